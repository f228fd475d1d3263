"""The audits that compare times: canned evidence of entries whose time is what their tokens cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from isologit.judge.audits import AUDITS, Case
from isologit.judge.entry import EntrySpec
from isologit.judge.evidence import ProcessFacts, RequestEvidence, RunEvidence, RunKind
from isologit.judge.profile import Profile
from isologit.judge.reference import ScoringModel

_PROMPT_TOKENS = 40
_MODEL = cast(ScoringModel, SimpleNamespace(vocab_size=10, prompt_ids=lambda prompt: [1] * _PROMPT_TOKENS))


def run(kind: RunKind, place: int, output_tokens: int, seconds: float) -> RunEvidence:
    process = ProcessFacts(started=True, run_cpu_s=seconds)
    made = RunEvidence("r", f"{kind}-{place}", kind, "e", "0" * 64, 1, "00" * 32, True, "openai", process)
    made.duration_s = seconds
    made.records = [
        RequestEvidence("a", "p", output_tokens, "x", 0.0, token_ids=[5] * output_tokens, status="completed")
    ]
    return made


def accusations(audit: str, kind: RunKind, output_tokens: int, seconds: float) -> int:
    """Timed runs of 60 output tokens in a second each, and one run of this kind."""
    runs = [run("timed", place, 60, 1.0) for place in range(3)] + [run(kind, 0, output_tokens, seconds)]
    case = Case(Profile(name="p", title="t"), EntrySpec(name="e", command=("x",)), runs, _MODEL)
    return len(AUDITS[audit].verify(case))


@pytest.mark.parametrize("audit_and_kind", [("held_out", "held-out"), ("perturbed_weights", "perturbed")])
def test_shorter_answers_to_other_prompts_accuse_nobody(
    audit_and_kind: tuple[str, RunKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.7 of all tokens in 0.7 of the time; by the answers alone a token took 1.4 times as long."""
    monkeypatch.setattr("isologit.judge.audits.perturbed_weights.not_greedy", lambda case, run: None)
    assert not accusations(*audit_and_kind, output_tokens=30, seconds=0.7)


@pytest.mark.parametrize(("seconds", "accused"), [(1.09, 0), (1.11, 1)])
def test_secret_prompts_may_take_a_tenth_more(seconds: float, accused: int) -> None:
    assert accusations("held_out", "held-out", 60, seconds) == accused


@pytest.mark.parametrize(("seconds", "accused"), [(0.61, 0), (0.3, 1)])
def test_copies_may_save_their_prompts_and_no_more(seconds: float, accused: int) -> None:
    assert accusations("twins", "twins", 60, seconds) == accused
