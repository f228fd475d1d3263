"""The table of claims: figures from result files, and a verdict that can say no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.claims import claims


def result(ours_s: float, peer_s: float, *, tokens: int = 1000, verdict: str = "VALID") -> dict[str, Any]:
    return {
        "workload": {"prompt_tokens": 0, "output_tokens": tokens},
        "systems": {"other": {"label": "Other"}, "slow": {"label": "Slow"}},
        "summary": {
            "isologit": {"median_s": ours_s, "limit_over_time": 0.8, "tile_limit_over_time": 0.6},
            "other": {"median_s": peer_s},
            "slow": {"median_s": 9 * peer_s},
        },
        "runs": [{"certificate": {"verdict": verdict, "max_abs": 1e-5}}, {"certificate": None}],
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
    write("speculation", {"cases": cases})
    #                   300: ratio, limit; 1500: ratio, limit; tiny, alone, long, flat, slots 8, 1, 128, certificates
    assert verdicts(tmp_path) == [True, True, False, True, True, False, True, True, True, False, None, False]
    assert next(claims(tmp_path)).measured == "6.90 s against 10.00 s of Other: 0.69"
