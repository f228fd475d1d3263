"""A verdict and its reasons agree."""

from __future__ import annotations

import pytest

from isologit.common.verdict import Reason, Verdict

REASON = Reason("failed_requests", "1 of 2 requests failed")


def test_one_reason_makes_it_invalid() -> None:
    assert Verdict.of([]).valid
    found = Verdict.of([REASON])
    assert not found.valid
    assert found.to_dict() == {
        "verdict": "INVALID",
        "reasons": [{"code": "failed_requests", "message": "1 of 2 requests failed"}],
    }
    assert str(REASON) == "failed_requests: 1 of 2 requests failed"


def test_what_is_not_certified_is_not_valid() -> None:
    assert not Verdict("NOT CERTIFIED", (REASON,)).valid


def test_a_verdict_cannot_contradict_its_reasons() -> None:
    with pytest.raises(AssertionError):
        Verdict("VALID", (REASON,))
    with pytest.raises(AssertionError):
        Verdict("INVALID")
