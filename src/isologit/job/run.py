"""The main job from prompts to report. Owns the order of the stages and what is inside the clock.

The clock: pre-process, inference, post-process. Loading, compiling and warm-up come before it, the baseline and the
certificate after it; all of them are timed and listed apart.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from isologit.common.progress import Observer, Silent
from isologit.errors import DatasetError, IsologitError
from isologit.fidelity import Reference
from isologit.fidelity.certifier import ScoringReference
from isologit.job.baseline import Baseline, BaselineSpeed, measure_baseline, time_engine
from isologit.job.engine import Engine, EngineFactory, load_engine, require_backend
from isologit.job.folder import CERTIFICATE, OUTPUTS, RESULT, STEPS, OutputFolder
from isologit.job.inference import infer
from isologit.job.journal import Journal
from isologit.job.machine import measure_limits
from isologit.job.memory_plan import MemoryPlan
from isologit.job.options import RunOptions
from isologit.job.outputs import output_lines, step_lines
from isologit.job.preprocess import Prepared, preprocess
from isologit.job.preview import plan_run
from isologit.job.profile import LAYER_PRODUCTS, profile
from isologit.job.proof import (
    add_contest_rows,
    fresh_capture_seed,
    hashes,
    load_reference,
    make_certificate,
    plan_capture,
    save_rows,
)
from isologit.job.result import Clock, Findings, RunResult, build_result, inference_seconds
from isologit.job.state import RunState, Segment, load_state
from isologit.job.threads import fastest_thread_count, torch_threads
from isologit.report import render_report


class RunInterrupted(IsologitError):
    """A run was stopped from outside. resumable: complete requests are kept in `folder`; else nothing is."""

    def __init__(self, folder: Path, done: int, total: int, *, resumable: bool) -> None:
        self.folder, self.resumable = folder, resumable
        if done:
            kept = f"{done} of {total} requests are complete and kept in {folder}"
        elif resumable:
            kept = f"what was complete before is kept in {folder}"
        else:
            kept = "no request was complete yet, so nothing is kept"
        super().__init__(f"interrupted; {kept}")


def run_job(
    options: RunOptions,
    *,
    observer: Observer | None = None,
    engine_factory: EngineFactory = load_engine,
) -> RunResult:
    """Do everything and write the output folder.

    Raises UserError before anything ran for what the user must change, RunInterrupted on KeyboardInterrupt. Whatever
    goes wrong, requests that are complete stay in the folder for `resume`; without any, nothing stays.
    """
    _require_files(options)
    require_backend(options.engine)
    folder = OutputFolder.claim(options.output_folder(), resume=options.resume)
    job = _Job(options, folder, observer or Silent(), engine_factory)
    try:
        return job.run()
    except KeyboardInterrupt:
        done = job.num_finished
        raise RunInterrupted(folder.path, done, job.num_requests, resumable=done > 0 or folder.resumed) from None
    finally:
        job.close()
        folder.release()


def _require_files(options: RunOptions) -> None:
    for file in (options.dataset, options.replay):
        if file is not None and not file.is_file():
            raise DatasetError(f"{file}: no such file; check the path")


class _Job:
    """The stages of one run, in order."""

    def __init__(
        self,
        options: RunOptions,
        folder: OutputFolder,
        observer: Observer,
        engine_factory: EngineFactory,
    ) -> None:
        self.options = options
        self.folder = folder
        self.observer = observer
        self.num_requests = 0
        self._engine_factory = engine_factory
        self._engine: Engine | None = None
        self._journal: Journal | None = None
        self._clock = Clock()

    @property
    def num_finished(self) -> int:
        """Requests that are complete and on disk."""
        return 0 if self._journal is None else len(self._journal.finished)

    def close(self) -> None:
        """Free the engine; partial files that hold nothing to resume from go away."""
        if self._engine is not None:
            self._engine.close()
        if self._journal is not None:
            self._journal.close()
        if not self.num_finished and not self.folder.resumed:
            self.folder.discard_partial()

    def run(self) -> RunResult:
        options, clock, observer = self.options, self._clock, self.observer
        observer.stage("planning memory")
        memory = plan_run(options)
        memory.require_fits()
        if memory.no_baseline is not None:
            observer.note(memory.no_baseline)
        engine = self._load()
        with self._timed("warm_up_s", "warming up"):
            engine.warm_up()

        observer.stage("reading prompts")
        began, start = datetime.now(UTC), time.perf_counter()
        prepared = preprocess(options, engine)
        segment = Segment(began.isoformat(timespec="seconds"), time.perf_counter() - start)
        found_hashes = hashes(engine, prepared)
        state = self._state(found_hashes)
        plan = plan_capture(prepared.max_tokens, options, state.capture_seed, engine.config.vocab_size)
        kept = add_contest_rows(plan, prepared) if options.save_logits == "contest" else plan

        self.num_requests = len(prepared.requests)
        journal = self._journal = Journal(self.folder.path, engine.config.vocab_size)
        state.close_segments(
            journal.steps, [(r.segment, r.metrics["finished_s"] or 0.0) for r in journal.finished.values()]
        )
        observer.stage("running")
        infer(prepared.with_capture(kept).requests, engine, journal, state, segment, self.folder, observer)
        engine_facts, chosen, phases = engine.describe(), engine.last_plan, engine.phase_seconds()

        start = time.perf_counter()
        self.folder.write_lines(OUTPUTS, output_lines(prepared, journal.finished, state.segments))
        clock.postprocess_s = time.perf_counter() - start
        rows = journal.captured()
        if options.save_logits != "none":
            self.folder.write_logits(lambda path: save_rows(path, rows, journal.finished, options))
        self.folder.write_lines(STEPS, step_lines(journal.steps, state.segments))

        with self._timed("baseline_s", "timing the baseline"):
            loaded, baseline, no_baseline = self._baseline(memory, prepared, journal, engine, state)
        with self._timed("certificate_s", "checking against the reference"):
            reference = loaded or load_reference(engine.checkpoint, memory.reference, engine_facts["device"])
            with torch_threads(_scoring_threads(reference, journal, engine.num_threads)):
                certificate = make_certificate(
                    prepared,
                    journal.finished,
                    rows,
                    plan,
                    engine.config.eos_token_ids,
                    reference,
                    observer,
                    options=options,
                    seed=state.capture_seed,
                    run_s=inference_seconds(state.segments),
                    found_hashes=found_hashes,
                )
        capture = {"seed": state.capture_seed, "rows_planned": sum(map(len, plan.values())), "rows_kept": len(rows)}
        found = Findings(
            options=options,
            prepared=prepared,
            finished=journal.finished,
            segments=state.segments,
            steps=journal.steps,
            clock=clock,
            hashes=found_hashes,
            capture=capture,
            engine_facts=engine_facts,
            plan=chosen,
            baseline=baseline,
            no_baseline=no_baseline,
            memory=memory,
            profile=self._profile(journal, engine, engine_facts, phases, len(state.segments) - 1),
        )
        result = build_result(found, certificate, engine, self.folder.path)
        self.folder.write_json(CERTIFICATE, {**certificate.to_dict(), "capture": capture})
        self.folder.write_json(RESULT, result.data)  # NOTE: last of the results; it is what makes a run finished
        render_report(self.folder.path)
        self.folder.discard_partial()
        return result

    def _load(self) -> Engine:
        with self._timed("load_s", "loading the model"):
            engine = self._engine = self._engine_factory(self.options.engine, self.observer.loading)
            engine.checkpoint.sha256()
        return engine

    def _state(self, found_hashes: dict[str, str]) -> RunState:
        identity = {**self.options.identity(), **{f"{name} hash": value for name, value in found_hashes.items()}}
        if not self.folder.resumed:
            return RunState(identity, fresh_capture_seed(self.options))
        state = load_state(self.folder.path)
        state.require_same(identity, self.folder.path)
        return state

    def _baseline(
        self, memory: MemoryPlan, prepared: Prepared, journal: Journal, engine: Engine, state: RunState
    ) -> tuple[Reference | None, Baseline | None, str | None]:
        """Time the baseline. Returns the whole reference, if it was loaded for it; the baseline; and why there is none.

        NOTE: the engine runs for the last time here. Its memory is free before transformers' model is loaded.
        """
        options = self.options
        tokens = {request_id: found.token_ids for request_id, found in journal.finished.items() if found.completed}
        completed = [request for request in prepared.requests if request.request_id in tokens]
        timed = None
        if memory.baseline_dtype is not None and completed:
            dtype: torch.dtype = getattr(torch, memory.baseline_dtype)
            speed = BaselineSpeed(engine.config, dtype, engine.num_threads)
            timed = time_engine(
                completed,
                tokens,
                engine,
                lambda request: speed.seconds(len(request.prompt_token_ids), len(tokens[request.request_id])),
                size=options.baseline_requests,
                seed=options.engine.seed,
                budget_s=options.baseline_seconds,
                main_inference_s=inference_seconds(state.segments),
            )
        device = engine.describe()["device"]
        engine.close()
        gc.collect()
        if timed is None:
            slow = memory.baseline_dtype is not None and bool(completed)
            why = f"no baseline was timed: one request alone would take longer than {options.baseline_seconds:g} s"
            return None, None, why if slow else memory.no_baseline
        model = Reference(engine.checkpoint, device=device, dtype=dtype)
        baseline = measure_baseline(
            timed,
            tokens,
            model,
            self.observer,
            dtype=str(memory.baseline_dtype),
            eos_token_ids=engine.config.eos_token_ids,
            most_threads=engine.num_threads,
            seed=options.engine.seed,
            budget_s=options.baseline_seconds,
        )
        if memory.reference == "whole" and dtype == torch.float32:
            return model, baseline, None
        del model
        gc.collect()  # NOTE: transformers' model is part of a cycle; the certificate is planned for without it
        return None, baseline, None

    def _profile(
        self, journal: Journal, engine: Engine, facts: Mapping[str, Any], phases: Mapping[str, float], segment: int
    ) -> dict[str, Any] | None:
        """Of the last segment; None when not asked for, when nothing was left to run in it, or when the backend
        does not book its products one by one.
        """
        steps = [step for step in journal.steps if step["segment"] == segment]
        if not self.options.profile or not steps or not phases.keys() >= set(LAYER_PRODUCTS):
            return None
        self.observer.stage("measuring the machine")
        with torch_threads(engine.num_threads):
            limits = measure_limits(facts["backend"])
        sizes = {name: facts[name] for name in ("weight_bytes", "step_bytes")}
        return profile(steps, phases, engine.config, limits, **sizes)

    @contextmanager
    def _timed(self, field: str, stage: str) -> Iterator[None]:
        self.observer.stage(stage)
        start = time.perf_counter()
        yield
        setattr(self._clock, field, time.perf_counter() - start)


def _scoring_threads(reference: ScoringReference, journal: Journal, most: int) -> int:
    """The number of threads that re-scoring is fastest with. A streamed reference reads while it computes: all."""
    answered = [found for found in journal.finished.values() if found.completed and found.token_ids]
    if not isinstance(reference, Reference) or not answered:
        return most
    found = min(answered, key=lambda found: len(found.prompt_token_ids) + len(found.token_ids))
    return fastest_thread_count(lambda: reference.score(found.prompt_token_ids, found.token_ids), most)
