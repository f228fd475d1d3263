"""The page of load results is made from files alone, ours or vLLM's, and greys what does not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.report.run_folder import write_folder
from tests.report.test_report import HOSTILE, _Tags

from isologit.errors import OutputFolderError
from isologit.report import load_figures, render_report


def _result(rate: float | str, n: int = 40, **more: Any) -> dict[str, Any]:
    """A detailed result as vLLM writes it."""
    rng = np.random.default_rng(0)
    start = np.cumsum(rng.exponential(0.1, n))
    ttft, gaps = rng.exponential(0.05, n), rng.exponential(0.01, (n, 8))
    found = {
        "date": "20260105-093000",
        "backend": "openai",
        "model_id": "demo",
        "num_prompts": n,
        "request_rate": rate,
        "duration": float(start[-1] + 1),
        "completed": n,
        "request_throughput": 9.5,
        "output_throughput": 81.0,
        "start_times": (1000 + start).tolist(),
        "ttfts": ttft.tolist(),
        "itls": gaps.tolist(),
        "output_lens": [9] * n,
        "errors": [""] * n,
    }
    for metric in ("ttft", "tpot", "e2el"):
        found |= {f"{statistic}_{metric}_ms": 10.0 for statistic in ("mean", "median", "p99")}
    return {**found, **more}


def _write(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, result in enumerate(results):
        (folder / f"load{number}.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def _page(folder: Path) -> str:
    return render_report(folder).read_text(encoding="utf-8")


def _figures(page: str) -> set[str]:
    return {value.removeprefix("figure-") for name, value in _Tags(page).attributes if name == "aria-labelledby"}


def test_one_run_has_its_requests_and_a_sweep_its_rates_as_well(tmp_path: Path) -> None:
    per_run = {"timeline-0", "concurrency-0", "gaps-0"}
    assert _figures(_page(_write(tmp_path / "one", _result(10.0)))) == {"cdf", *per_run}
    page = _page(_write(tmp_path / "many", _result("inf"), _result(10.0), _result(5.0)))
    per_run |= {name.replace("0", digit) for name in per_run for digit in "12"}
    assert _figures(page) == {"cdf", "throughput", "latency", "knee", *per_run}
    assert page.index("5/s") < page.index("10/s") < page.index("all at once")


def test_vllms_own_file_is_drawn_without_a_verdict(tmp_path: Path) -> None:
    page = _page(_write(tmp_path, _result(10.0)))
    assert "NOT CHECKED" in page


def test_a_file_without_lists_still_has_its_row(tmp_path: Path) -> None:
    result = {key: value for key, value in _result(10.0).items() if not isinstance(value, list)}
    page = _page(_write(tmp_path, result, {**result, "request_rate": 20.0}))
    assert _figures(page) == {"throughput", "latency", "knee"}


def test_what_does_not_count_is_grey_with_its_reason(tmp_path: Path) -> None:
    reason = {"code": "failed_requests", "message": "3 of 40 requests failed"}
    page = _page(_write(tmp_path, _result(5.0, verdict="VALID"), _result(9.0, verdict="INVALID", reasons=[reason])))
    assert '<header class="band invalid">' in page
    assert page.count('<tr class="dull"><td>') == 1
    assert "3 of 40 requests failed" in page
    valid = _page(_write(tmp_path, _result(5.0, verdict="VALID"), _result(9.0, verdict="VALID")))
    assert '<header class="band valid">' in valid
    assert '<tr class="dull">' not in valid


def test_nothing_answered_still_gives_a_page(tmp_path: Path) -> None:
    empty = _result(5.0, completed=0, ttfts=[None] * 40, errors=["no"] * 40, verdict="INVALID", request_throughput=0.0)
    empty |= {key: None for key in empty if key.endswith("_ms") or key == "output_throughput"}
    assert "INVALID" in _page(_write(tmp_path, empty))
    assert "INVALID" in _page(_write(tmp_path, empty, {**empty, "request_rate": 9.0}))


def test_texts_of_files_cannot_become_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    hostile = _result(
        5.0,
        verdict="INVALID",
        reasons=[{"code": HOSTILE, "message": HOSTILE}],
        backend=HOSTILE,
        options={HOSTILE: HOSTILE},
        request_ids=[f"{i}{HOSTILE}" for i in range(20)],
        **{key: value[:20] for key, value in _result(5.0).items() if isinstance(value, list)},
    )
    page = _page(_write(tmp_path, hostile))
    tags = _Tags(page)
    assert not {"script", "img", "link", "iframe"} & set(tags.names)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    links = [value for name, value in tags.attributes if name in {"src", "href", "xlink:href"}]
    assert all(link.startswith("#") for link in links)
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_folder_decides_which_report_is_made(tmp_path: Path) -> None:
    run = write_folder(tmp_path / "run", n=3, num_steps=4)
    assert "isologit run" in _page(_write(run, _result(5.0)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.json").write_text('{"a": 1}')
    with pytest.raises(OutputFolderError, match=r"holds no result\.json"):
        render_report(tmp_path / "other")


def test_requests_at_once_are_counted_from_sending_to_the_end() -> None:
    moments, count = load_figures.requests_at_once(np.array([0.0, 1.0, 1.5]), np.array([1.0, 2.0, 3.0]))
    assert moments.tolist() == [0.0, 1.0, 1.0, 1.5, 2.0, 3.0]
    assert count.tolist() == [1, 0, 1, 2, 1, 0]
