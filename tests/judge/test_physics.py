"""The floor of processor time: canned evidence, since a floor that a real proxy falls under needs a large model."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isologit.judge.audits import AUDITS, Case
from isologit.judge.canary import peak_flop_per_s
from isologit.judge.entry import EntrySpec
from isologit.judge.evidence import ProcessFacts, RequestEvidence, RunEvidence
from isologit.judge.profile import Profile
from isologit.judge.reference import ScoringModel


def case(run_cpu_s: float, **facts: Any) -> Case:
    process = ProcessFacts(started=True, run_cpu_s=run_cpu_s, **facts)
    run = RunEvidence("r", "1", "timed", "e", "0" * 64, 1, "00" * 32, True, "openai", process)
    run.records = [RequestEvidence("a", "p", 100, "x", 0.0, token_ids=[5] * 100, status="completed")]
    run.peak_flop_per_s = 1e9
    model = cast(ScoringModel, SimpleNamespace(num_parameters=10_000_000, vocab_size=10))
    return Case(Profile(name="p", title="t"), EntrySpec(name="e", command=("x",)), [run], model)


@pytest.mark.parametrize(("used_s", "accused"), [(0.49, True), (0.51, False)])
def test_the_floor_is_two_operations_a_parameter_at_four_times_the_peak(used_s: float, accused: bool) -> None:
    assert bool(AUDITS["processor_time"].verify(case(used_s))) is accused


def test_a_busy_machine_does_not_lower_the_peak() -> None:
    """Three busy processes on each core; over a longer time, the rate would be a quarter."""
    quiet = max(peak_flop_per_s() for _ in range(3))
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * len(os.sched_getaffinity(0)))
    ]
    try:
        assert max(peak_flop_per_s() for _ in range(3)) > 0.5 * quiet
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_connections_are_named() -> None:
    assert not AUDITS["network"].verify(case(1.0))
    assert "192.0.2.7:80" in AUDITS["network"].verify(case(1.0, peers=["192.0.2.7:80"]))[0].message
