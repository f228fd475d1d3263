"""A server without commitments is judged by its log-probabilities, and what that leaves open is said."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.judge.small_round import practice

from isologit.judge.audits import AUDITS, Case
from isologit.judge.entry import Entry
from isologit.judge.profile import Limits, Load, Profile
from isologit.judge.prompts import RoundPrompts
from isologit.judge.reference import JudgeReference
from isologit.judge.run import RunSpec, perform_run
from isologit.judge.seeds import RoundSeed
from isologit.judge.verdict import EntryVerdict, judge_case
from isologit.workload import builtin_requests, demo_model_path

SEED = RoundSeed(bytes(range(1, 33)))
PROFILE = Profile(
    name="foreign",
    title="Foreign",
    load=Load(warm_up=1),
    limits=Limits(start_s=120, request_s=120, run_s=240, stop_s=5),
    audits=tuple(name for name, audit in AUDITS.items() if not audit.runs and name != "canary"),
)


def judged(folder: Path, arithmetic: str) -> EntryVerdict:
    target = folder / "entry"
    shutil.copytree(Path(__file__).parent / "foreign", target)
    file = target / "entry.yaml"
    file.write_text(file.read_text().replace("ARITHMETIC", arithmetic))
    entry = Entry(target)
    requests = [(spec.id, spec.prompt, 12) for spec in builtin_requests(4, 3) if spec.prompt is not None]
    prompts = RoundPrompts(requests, [], [("w", "Hello", 4)])
    spec = RunSpec("r", "r-timed", "timed", 0, 1, entry.sha256())
    run, log = perform_run(spec, entry, PROFILE, prompts, demo_model_path(), SEED, folder, practice=practice())
    assert run.client_problem is None, (run.client_problem, log)
    return judge_case(Case(PROFILE, entry.spec, [run], JudgeReference(demo_model_path())))


def test_a_foreign_server_is_valid_and_its_limits_are_said(tmp_path: Path) -> None:
    verdict = judged(tmp_path, "exact")
    assert verdict.status == "VALID", verdict.findings
    assert verdict.audits["logprobs"] == "passed"
    assert verdict.audits["fingerprint"].startswith("not applicable")
    assert "of each row only the most likely tokens were compared" in verdict.figures["open"][0]


def test_eight_bits_show_in_the_log_probabilities(tmp_path: Path) -> None:
    verdict = judged(tmp_path, "int8")
    assert verdict.status == "INVALID"
    assert {"logprobs.differ"} <= {finding.code for finding in verdict.findings}
