"""The table of claims: figures from result files, and a verdict that can say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.claims import claims


def result(
    ours_s: float,
    peer_s: float,
    *,
    tokens: int = 1000,
    verdict: str = "VALID",
    vector: str = "AVX-512 VNNI",
    predicted: float = 1.0,
    waiting: float = 0.0,
) -> dict[str, Any]:
    return {
        "environment": {"cpu": "A CPU", "cores": 2, "vector": vector},
        "workload": {"prompt_tokens": 0, "output_tokens": tokens},
        "systems": {"other": {"label": "Other"}, "slow": {"label": "Slow"}},
        "summary": {
            "isologit": {"median_s": ours_s, "limit_over_time": 0.8, "tile_limit_over_time": 0.6},
            "other": {"median_s": peer_s},
            "slow": {"median_s": 9 * peer_s},
        },
        "runs": [
            {
                "certificate": {"verdict": verdict, "max_abs": 1e-5},
                "engine": {"predicted_s": predicted * ours_s, "waiting_s": waiting * ours_s},
                "total_s": ours_s,
            },
            {"certificate": None, "engine": None, "total_s": peer_s},
        ],
    }


def verdicts(folder: Path) -> list[bool | None]:
    return [claim.met for claim in claims(folder)]


def test_nothing_is_claimed_without_a_result(tmp_path: Path) -> None:
    assert set(verdicts(tmp_path)) == {None}


def test_claims_hold_or_do_not(tmp_path: Path) -> None:
    def write(name: str, content: dict[str, Any]) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    write("peers-trace300", result(6.9, 10.0))
    write("peers-trace1500", result(35.0, 40.0, tokens=5000))
    write("peers-tiny64", result(9.9, 10.0))
    write("peers-latency", result(10.1, 10.0))
    write("peers-long", result(10.9, 10.0, verdict="INVALID"))
    cases = [{"slots": slots, "times_faster": 1.3, "off_s": 1.3, "on_s": 1.0} for slots in (1, 8)]
    write("speculation", {"cases": cases, "environment": {"cpu": "A CPU", "cores": 2}})
    # 300: ratio, limit, planner; 1500: the same; tiny, alone, long; AVX2 of both; flat, slots 8, 1, 128, certificates
    trace, of_avx2, rest = [True, True, True, False, True, True], [None] * 8, [True, True, False, None, False]
    assert verdicts(tmp_path) == [*trace, True, False, True, *of_avx2, *rest]
    first = next(claims(tmp_path))
    assert first.measured == "6.90 s against 10.00 s of Other: 0.69"
    assert first.machine == "A CPU, 2 cores, AVX-512 VNNI"
    kept = {**result(7.9, 10.0), "isa": "avx2"}
    write("peers-trace300-avx2", kept)
    assert verdicts(tmp_path)[9:17] == [False, True, True, True, None, None, None, None]
    assert list(claims(tmp_path))[9].machine == "A CPU, 2 cores, AVX-512 VNNI, kept to AVX2"


def test_a_cpu_without_avx512_has_bars_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "peers-trace300.json").write_text(json.dumps(result(7.7, 10.0, vector="AVX2")))
    found = [claim for claim in claims(tmp_path) if claim.what.startswith("trace300")]
    assert [(claim.what[:14], claim.met) for claim in found] == [("trace300, AVX2", True)] * 4


def test_a_prediction_or_a_wait_can_be_too_far_off(tmp_path: Path) -> None:
    def about(what: str, **figures: float) -> list[tuple[bool | None, str]]:
        (tmp_path / "peers-trace300.json").write_text(json.dumps(result(10.0, 20.0, vector="AVX2", **figures)))
        return [(c.met, c.measured) for c in claims(tmp_path) if c.what.startswith("trace300") and what in c.what]

    assert about("predicts", predicted=1.09) == [(True, "1.09 of it; run by run 1.09")]
    assert about("predicts", predicted=0.89) == [(False, "0.89 of it; run by run 0.89")]
    assert about("waits", waiting=0.019) == [(True, "1.90% at most")]
    assert about("waits", waiting=0.021) == [(False, "2.10% at most")]
