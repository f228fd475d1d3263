"""Which step is to be committed next, and the one behind it that the device may compute meanwhile.

Owns the order of `schedule` and `execute`. It decides nothing about requests and reads no results; the contract is in
docs/design.md, "Two steps at once".
"""

from __future__ import annotations

import time
from typing import NamedTuple

from isologit.engine.runner import Runner, StepResult
from isologit.engine.scheduler import Scheduler, StepPlan


class StartedStep(NamedTuple):
    """A step that the device has been given; reading its result waits for it. at: when, on `time.perf_counter`."""

    plan: StepPlan
    result: StepResult
    at: float


class Pipeline:
    """Starts steps, one ahead of the one to be committed where the backend overlaps them and the scheduler foresees it.

    schedule_s: what the last `next` spent in the scheduler, in seconds.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.schedule_s = 0.0
        self._scheduler = scheduler
        self._runner = runner
        self._overlaps = runner.backend.overlaps_steps
        self._ahead: StartedStep | None = None

    def __bool__(self) -> bool:
        """Whether a step runs ahead."""
        return self._ahead is not None

    def next(self) -> StartedStep | None:
        """The step to commit before this is called again; None if nothing is left to compute."""
        self.schedule_s = 0.0
        step, self._ahead = self._ahead or self._start(), None
        if self._overlaps and step is not None and self._scheduler.foresees(step.plan):
            with self._scheduler.as_if_committed(step.plan, step.result.first_rows):
                self._ahead = self._start()
        return step

    def drop(self) -> None:
        """Forget the step that runs ahead: its sequences are given up."""
        self._ahead = None

    def _start(self) -> StartedStep | None:
        start = time.perf_counter()
        plan = self._scheduler.schedule()
        scheduled = time.perf_counter()
        self.schedule_s += scheduled - start
        return None if plan is None else StartedStep(plan, self._runner.execute(plan), scheduled)
