"""A run counts only when every request was answered once and the generator kept its own schedule."""

from __future__ import annotations

import dataclasses

import pytest
from tests.bench.records import load_run, record

from isologit.bench.records import LoadRun
from isologit.bench.verdict import judge, measure_lag


def _codes(run: LoadRun) -> list[str]:
    return [reason.code for reason in judge(run).reasons]


def test_all_answered_on_time_is_valid() -> None:
    verdict = judge(load_run([record("0"), record("1")]))
    assert verdict.to_dict()["verdict"] == "VALID"
    assert verdict.reasons == ()


@pytest.mark.parametrize(
    ("status", "code"), [("failed", "failed_requests"), ("unsent", "unsent_requests"), ("pending", "lost_requests")]
)
def test_one_request_without_an_answer_is_invalid(status: str, code: str) -> None:
    run = load_run([record("0"), record("lost", status=status, error="because")])
    assert judge(run).status == "INVALID"
    assert _codes(run) == [code]
    assert "1 of 2 requests" in judge(run).reasons[0].message
    assert "lost: because" in judge(run).reasons[0].message


def test_ids_are_conserved() -> None:
    one, two = record("0"), record("1")
    assert _codes(load_run([one], requests=[one.request, two.request])) == ["ids_differ"]
    assert _codes(load_run([one, two], requests=[one.request])) == ["ids_differ"]
    assert _codes(load_run([one, one])) == ["duplicate_ids"]
    assert _codes(load_run([])) == ["no_requests"]


def test_a_server_that_went_away_is_named() -> None:
    run = dataclasses.replace(load_run([record("0", status="failed")]), server_gone=True)
    assert _codes(run) == ["server_gone", "failed_requests"]


@pytest.mark.parametrize(("lag_s", "word"), [(0.015, "VALID"), (0.025, "NOT CERTIFIED")])
def test_a_generator_late_by_more_than_one_percent_of_the_latency_does_not_certify(lag_s: float, word: str) -> None:
    late = [record(str(i), dispatched_s=1.0 + lag_s) for i in range(4)]  # latency is 2 s
    assert judge(load_run(late)).status == word


@pytest.mark.parametrize(("lag_s", "word"), [(0.02, "VALID"), (0.04, "NOT CERTIFIED")])
def test_a_few_late_requests_count_against_the_duration(lag_s: float, word: str) -> None:
    late = [record(f"late{i}", dispatched_s=1.0 + lag_s) for i in range(2)]  # duration is 3 s
    records = [record(str(i)) for i in range(48)] + late
    verdict = judge(load_run(records))
    assert verdict.status == word
    lag = measure_lag(load_run(records))
    assert lag is not None
    assert lag.max_ms == pytest.approx(1000 * lag_s)


def test_waiting_for_a_slot_is_not_lag() -> None:
    assert judge(load_run([record(sent_s=1.9)])).status == "VALID"
