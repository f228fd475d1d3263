"""What HTTP adds: medians against the offline run's, and other output tokens are seen."""

from __future__ import annotations

from benchmarks.serving_overhead import WHOLE, summarise

from isologit.bench.dialects import DIALECTS

OFFLINE = [{"seconds": seconds, "cpu_s": 20.0, "output_tokens": 100} for seconds in (10.0, 9.0, 30.0)]


def served(seconds: float, tokens: int = 100) -> dict[str, float]:
    return {"seconds": seconds, "server_cpu_s": 20.0, "client_cpu_s": 1.0, "output_tokens": tokens}


def test_medians_are_compared() -> None:
    found = summarise(("tgi", "stream"), [served(10.4), served(99.0), served(10.1)], OFFLINE)
    assert (found["backend"], found["way"]) == ("tgi", "stream")
    assert (found["seconds"], found["ratio"], found["cpu_ratio"]) == (10.4, 1.04, 1.05)
    assert found["within_bar"]
    assert found["equal_output_tokens"]


def test_a_slow_server_or_other_tokens_are_said() -> None:
    assert not summarise(("tgi", "stream"), [served(10.6)], OFFLINE)["within_bar"]
    assert not summarise(("tgi", "stream"), [served(10.0), served(10.0, tokens=99)], OFFLINE)["equal_output_tokens"]


def test_every_protocol_that_is_not_a_chat_is_measured() -> None:
    assert set(WHOLE) == set(DIALECTS) - {"openai-chat"}
