"""Figures follow vLLM's definitions, from the scheduled time; what was not measured is None."""

from __future__ import annotations

import pytest
from tests.bench.records import load_run, record

from isologit.bench.metrics import counted_by, input_length, measure, output_lengths


class Words:
    def encode_without_bos(self, text: str) -> list[int]:
        return list(range(len(text.split())))


def test_definitions_by_hand() -> None:
    run = load_run([record("0"), record("1", token_times_s=[2.5, 2.5, 5.0], finished_s=5.5)])
    figures = measure(run, [3, 3], percentiles=[50, 99])
    assert figures["mean_ttft_ms"] == pytest.approx((1000 + 1500) / 2)
    assert figures["mean_ttft_ms_from_send"] == pytest.approx((500 + 1000) / 2)
    assert figures["mean_e2el_ms"] == pytest.approx((2000 + 4500) / 2)
    assert figures["mean_e2el_ms_from_send"] == pytest.approx((1500 + 4000) / 2)
    assert figures["mean_tpot_ms"] == pytest.approx(((2000 - 1000) / 2 + (4500 - 1500) / 2) / 2)
    assert figures["mean_itl_ms"] == pytest.approx((500 + 500 + 0 + 2500) / 4)
    assert figures["std_ttft_ms"] == pytest.approx(250)
    assert figures["p99_ttft_ms"] == pytest.approx(1495)
    assert figures["median_ttft_ms"] == figures["p50_ttft_ms"] == pytest.approx(1250)
    assert figures["duration"] == 5.5
    assert figures["request_throughput"] == pytest.approx(2 / 5.5)
    assert figures["output_throughput"] == pytest.approx(6 / 5.5)
    assert figures["total_token_throughput"] == pytest.approx((6 + 8) / 5.5)
    assert (figures["issued"], figures["completed"], figures["failed"]) == (2, 2, 0)


def test_waiting_on_this_side_counts_as_latency() -> None:
    """Inverse: counted from the send time, the wait is unseen."""
    run = load_run([record(sent_s=2.0)])
    figures = measure(run, [3])
    assert figures["mean_ttft_ms"] == pytest.approx(1000)
    assert figures["mean_ttft_ms_from_send"] == pytest.approx(0)


def test_tokens_are_counted_by_the_server_then_by_a_tokenizer_and_never_by_chunks() -> None:
    one = record(text="a b c d e f", token_times_s=[2.0, 3.0], reported_tokens=5)
    assert output_lengths([one], Words()) == [5]
    assert output_lengths([one], None) == [5]
    assert counted_by([one], "m") == "the server"
    unknown = record(reported_tokens=None, text="a b c d e f")
    assert output_lengths([unknown], Words()) == [6]
    assert counted_by([unknown], "m") == "the tokenizer of m"
    assert counted_by([one, unknown], "m") == "the server and the tokenizer of m"
    assert output_lengths([unknown], None) == [None]
    assert counted_by([unknown], None) is None
    assert counted_by([record(status="failed")], "m") is None
    figures = measure(load_run([unknown]), [None])
    assert figures["total_output_tokens"] is None
    assert figures["output_throughput"] is None
    assert figures["mean_tpot_ms"] is None
    assert figures["mean_itl_ms"] == pytest.approx(500)


def test_failed_requests_add_to_no_figure_but_their_count() -> None:
    lost = record("1", status="failed", text="half an ans", finished_s=1.6)
    run = load_run([record("0"), lost])
    figures = measure(run, output_lengths(run.records, Words()))
    alone = measure(load_run([record("0")]), [3])
    assert figures["failed"] == 1
    for key in ("completed", "total_output_tokens", "mean_ttft_ms", "mean_e2el_ms", "request_throughput"):
        assert figures[key] == alone[key]


def test_nothing_completed_is_none_and_not_zero() -> None:
    figures = measure(load_run([record(status="failed")]), [0])
    assert figures["mean_ttft_ms"] is None
    assert figures["p99_e2el_ms"] is None
    assert figures["completed"] == 0


def test_goodput_needs_every_limit_to_hold() -> None:
    run = load_run([record("0"), record("1", token_times_s=[2.9, 3.0])])
    assert measure(run, [3, 3], goodput={"ttft": 1000})["request_goodput"] == pytest.approx(1 / 3)
    assert measure(run, [3, 3], goodput={"e2el": 2000})["request_goodput"] == pytest.approx(2 / 3)
    assert measure(run, [3, 3], goodput={"ttft": 1000, "tpot": 499})["request_goodput"] == 0
    assert measure(run, [3, 3])["request_goodput"] is None
    assert measure(run, [3, None], goodput={"tpot": 1000})["request_goodput"] is None  # one is not known
    assert measure(run, [3, None], goodput={"ttft": 1000})["request_goodput"] == pytest.approx(1 / 3)
    assert measure(run, [3, 1], goodput={"tpot": 1000})["request_goodput"] == pytest.approx(2 / 3)


def test_prompt_tokens_are_the_servers_count_where_it_has_one() -> None:
    assert input_length(record()) == 4
    assert input_length(record(reported_prompt_tokens=9)) == 9
    assert measure(load_run([record(reported_prompt_tokens=9)]), [3])["total_input_tokens"] == 9


def test_an_answer_in_one_message_has_no_time_per_token() -> None:
    figures = measure(load_run([record(token_times_s=[3.0])]), [128])
    assert figures["mean_tpot_ms"] is None
    assert figures["total_output_tokens"] == 128


def test_only_the_metrics_and_percentiles_asked_for() -> None:
    figures = measure(load_run([record()]), [3], metrics=["ttft"], percentiles=[99.9])
    assert {key for key in figures if key.endswith("_ms")} == {
        "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99.9_ttft_ms",
    }  # fmt: skip


def test_most_at_once_counts_half_open_intervals() -> None:
    spans = [(0.0, 1.0), (1.0, 2.0), (1.5, 3.0)]
    records = [
        record(str(i), sent_s=start, finished_s=end, token_times_s=[end]) for i, (start, end) in enumerate(spans)
    ]
    assert measure(load_run(records), [1, 1, 1])["max_concurrent_requests"] == 2
