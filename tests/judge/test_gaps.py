"""The audit of held-back streams: what it accuses, and what a busy machine looks like."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from isologit.judge.audits import AUDITS, Case
from isologit.judge.entry import EntrySpec
from isologit.judge.evidence import ProcessFacts, RequestEvidence, RunEvidence
from isologit.judge.profile import Profile

SPEC = EntrySpec(name="E", command=("x",))


def run(arrivals: Callable[[int], list[float]], *, tokens: int = 16, lag_s: float = 0.0, n: int = 8) -> Case:
    """n answers, sent at 0; arrivals: seconds of each token of answer i."""
    records = []
    for i in range(n):
        seconds = arrivals(i)
        records.append(
            RequestEvidence(
                f"r{i}", "", tokens, "", 0.0, sent_s=0.0, finished_s=seconds[-1], token_ids=[5] * tokens,
                arrivals=[(second, 1) for second in seconds], status="completed",
            )
        )  # fmt: skip
    evidence = RunEvidence("r", "r", "timed", "E", "", 1, "", False, "openai", ProcessFacts(), client_lag_s=lag_s)
    evidence.records = records
    return Case(Profile(name="t", title="t"), SPEC, [evidence], None)  # type: ignore[arg-type]


def accused(case: Case) -> bool:
    return bool(AUDITS["gaps"].verify(case))


def test_answers_in_one_piece_are_accused() -> None:
    assert accused(run(lambda i: [0.5 + i / 10] * 16))
    assert accused(run(lambda i: [0.5 + i / 10 + 1e-4 * k for k in range(16)]))


@pytest.mark.parametrize(
    "seconds",
    [
        lambda i: [0.03 * k + 0.03 for k in range(16)],  # token by token
        lambda i: [0.03 * (k // 4 * 4 + 4) for k in range(16)],  # four at a time, as drafts are verified
        lambda i: [10.0 * i + 0.03 * k for k in range(1, 17)],  # each waits long for its turn
        lambda i: [3.0 + 0.03 * k for k in range(16)],  # a long prompt first
        lambda i: [0.004] * 16,  # made faster than anybody reads
    ],
)
def test_streams_are_not(seconds: Callable[[int], list[float]]) -> None:
    assert not accused(run(seconds))


def test_a_judge_that_was_late_itself_accuses_nobody() -> None:
    seconds = lambda i: [0.5] * 16  # noqa: E731
    assert not accused(run(seconds, lag_s=0.4))
    assert accused(run(seconds, lag_s=0.1))


def test_few_or_short_answers_say_nothing() -> None:
    assert not accused(run(lambda i: [0.5] * 16, n=3))
    assert not accused(run(lambda i: [0.5] * 7, tokens=7))
