"""One run: one life of an entry under load, in its sandbox, as evidence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from isologit.judge.client import ClientPlan
from isologit.judge.entry import Entry
from isologit.judge.evidence import RequestEvidence, RevealedRow, RunEvidence, RunKind
from isologit.judge.process import EntryProcess, Running
from isologit.judge.profile import Profile
from isologit.judge.prompts import RoundPrompts
from isologit.judge.seeds import RoundSeed

_CLIENT_GRACE_S = 60.0


@dataclass(frozen=True)
class RunSpec:
    """Which run of a round this is; everything drawn for it follows from its `label` and the round's seed."""

    round_id: str
    run_id: str
    kind: RunKind
    repeat: int
    attempt: int
    entry_sha256: str

    @property
    def label(self) -> str:
        """Names the run in draws: the same run of another attempt draws anew."""
        return f"{self.kind}/{self.repeat}/{self.attempt}/{self.entry_sha256}"


def perform_run(
    spec: RunSpec,
    entry: Entry,
    profile: Profile,
    prompts: RoundPrompts,
    model: Path,
    seed: RoundSeed,
    folder: Path,
    *,
    practice: bool,
    build: Path | None = None,
) -> tuple[RunEvidence, bytes]:
    """Evidence, and the end of what the entry wrote. folder: for the load's own files, which are gone afterwards.
    build: what the entry built.

    Whatever the entry does, this ends within the profile's limits and raises nothing. Raises SandboxError when the
    judge's own sandbox fails.
    """
    nonce = seed.derive("nonce", spec.label).hex()
    process = EntryProcess(entry, model, profile.limits, folder, practice=practice, build=build)
    evidence = RunEvidence(
        round_id=spec.round_id,
        run_id=spec.run_id,
        kind=spec.kind,
        entry=entry.name,
        entry_sha256=spec.entry_sha256,
        attempt=spec.attempt,
        nonce=nonce,
        commit=entry.spec.commit,
        dialect=entry.spec.dialect,
        process=process.facts,
    )
    with process.running() as running:
        if running is None:
            evidence.client_problem = f"the entry did not start: {process.facts.problem}"
        else:
            plan = _client_plan(entry, spec, profile, prompts, running, nonce, seed)
            _load(plan, running, folder, profile, evidence)
            if evidence.client_problem is None and not process.alive():
                process.facts.died = True
    if process.facts.problem is not None and evidence.client_problem is None:
        evidence.client_problem = process.facts.problem
    return evidence, process.log


def _client_plan(
    entry: Entry,
    spec: RunSpec,
    profile: Profile,
    prompts: RoundPrompts,
    running: Running,
    nonce: str,
    seed: RoundSeed,
) -> ClientPlan:
    load, requests = profile.load, prompts.of(spec.kind, seed, spec.label)
    gaps = [0.0] * len(requests)
    if load.rate is not None:
        gaps = seed.generator("arrivals", spec.label).exponential(1 / load.rate, len(requests)).cumsum().tolist()
        gaps = [second - gaps[0] for second in gaps]
    return ClientPlan(
        url=running.url,
        dialect=entry.spec.dialect,
        model=entry.spec.served_model,
        commit=entry.spec.commit,
        probe=spec.kind == "probed",
        nonce=nonce,
        requests=requests,
        arrival_s=gaps,
        warm_up=prompts.of_warm_up(seed, spec.label),
        max_concurrency=load.max_concurrency,
        prepare_s=profile.limits.start_s,
        request_s=profile.limits.request_s,
        run_s=profile.limits.run_s,
        silence_s=profile.limits.silence_s,
        reveal_rows=profile.reveal_rows,
        reveal_seed=seed.derive("positions", spec.label).hex(),
        supervisor_pid=running.supervisor_pid,
    )


def _load(plan: ClientPlan, running: Running, folder: Path, profile: Profile, evidence: RunEvidence) -> None:
    """Apply the load in a process of its own, in the entry's network; its result becomes evidence."""
    plan_file, result_file = folder / "plan.json", folder / "client.json"
    plan_file.write_text(json.dumps(asdict(plan)), encoding="utf-8")
    command = running.beside([sys.executable, "-m", "isologit.judge.client", plan_file, result_file, str(os.getpid())])
    limits = profile.limits
    limit_s = limits.start_s + limits.run_s + limits.request_s + _CLIENT_GRACE_S
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
        said = " ".join(done.stderr.split())[-300:]
    except subprocess.TimeoutExpired:
        said = f"the load did not end within {limit_s:g} s"
    if not result_file.is_file():
        evidence.client_problem = f"the judge's load failed: {said}"
        return
    found = json.loads(result_file.read_text(encoding="utf-8"))
    plan_file.unlink()
    result_file.unlink()
    evidence.records = [RequestEvidence.from_dict(record) for record in found["records"]]
    evidence.revealed = [RevealedRow(**row) for row in found["revealed"]]
    evidence.positions = [(name, index) for name, index in found["positions"]]
    evidence.duration_s = found["duration_s"]
    if found["start_cpu_s"] is not None:
        evidence.process.start_cpu_s = found["start_cpu_s"]
    evidence.client_lag_s = found["lag_s"]
    evidence.client_problem, evidence.client_problem_code = found["problem"], found["problem_code"]
    evidence.reveal_problem = found["reveal_problem"]
