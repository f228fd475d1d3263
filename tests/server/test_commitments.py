"""`serve --commit` in all three dialects: commitments travel with the tokens, rows are shown, and a judge agrees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tests.server.conftest import Running, running

from isologit.errors import RequestError
from isologit.judge.audits import AUDITS, Case
from isologit.judge.client import ClientPlan, apply_load
from isologit.judge.entry import EntrySpec
from isologit.judge.evidence import ProcessFacts, RunEvidence
from isologit.judge.profile import Profile
from isologit.judge.reference import JudgeReference
from isologit.server.commitments import Commitments
from isologit.server.options import ServerOptions
from isologit.workload import builtin_requests, demo_model_path

NONCE = bytes(range(32))
CHECKS = ("conservation", "stream", "endings", "ids_text", "rescoring", "fingerprint", "commitment")


@pytest.fixture(scope="module")
def reference() -> JudgeReference:
    return JudgeReference(demo_model_path())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(commit=True)) as started:
        yield started


def judged(url: str, dialect: str, reference: JudgeReference, *, probe: bool = False) -> Case:
    requests = [(s.id, s.prompt, min(24, s.max_new_tokens)) for s in builtin_requests(24, 5) if s.prompt]
    plan = ClientPlan(
        url=url,
        dialect=dialect,
        model="llama2" if dialect == "llm-serving" else "tgi",
        commit=True,
        probe=probe,
        nonce=NONCE.hex(),
        requests=requests,
        arrival_s=[0.0] * len(requests),
        warm_up=[("w", requests[0][1], 4)],
        max_concurrency=None,
        prepare_s=60,
        request_s=60,
        run_s=60,
        silence_s=60,
        reveal_rows=40,
        reveal_seed=bytes(32).hex(),
    )
    found = apply_load(plan)
    run = RunEvidence("r", "1", "timed", "e", "0" * 64, 1, NONCE.hex(), True, dialect, ProcessFacts(started=True))
    run.records, run.revealed, run.positions = found.records, found.revealed, found.positions
    run.client_problem, run.reveal_problem = found.problem, found.reveal_problem
    assert found.problem is None
    spec = EntrySpec(name="isologit", command=("x",), commit=True)
    return Case(Profile(name="p", title="t"), spec, [run], reference)


@pytest.mark.parametrize("dialect", ["openai", "llm-serving", "tgi"])
def test_a_judge_finds_every_token_right(server: Running, dialect: str, reference: JudgeReference) -> None:
    case = judged(server.url, dialect, reference)
    assert sum(len(record.commitments) for record in case.runs[0].records) > 200
    assert len(case.runs[0].revealed) == 40
    for name in CHECKS:
        assert AUDITS[name].verify(case) == [], name


def test_rows_of_another_round_are_not_revealed() -> None:
    kept = Commitments(4)
    assert kept.commit("a", 0, np.ones((1, 4), np.float32)) is None, "nothing is committed to outside of a round"
    kept.begin(NONCE)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert len(kept.commit("a", 3, rows) or ()) == 2
    assert kept.reveal([("a", 4)]) != kept.reveal([("a", 3)])
    kept.begin(bytes(32))
    with pytest.raises(RequestError, match="not committed"):
        kept.reveal([("a", 3)])
    with pytest.raises(RequestError, match="32 bytes"):
        kept.begin(b"short")


def test_without_the_option_there_is_no_such_path(reference: JudgeReference) -> None:
    """The inverse: a server that does not commit is found by the missing path, not by silence."""
    with running() as started, pytest.raises(AssertionError):
        judged(started.url, "openai", reference)
