"""The page is made from files alone, shows what they say, and needs nothing beside itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tests.report.run_folder import outputs, write_folder, write_json, write_lines

from isologit.errors import OutputFolderError
from isologit.report import figures, render_report, text

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)> & $\\frac{1}$ "\' \u202e'


class _Tags(HTMLParser):
    """Element names and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def _page(folder: Path) -> str:
    return render_report(folder).read_text(encoding="utf-8")


def test_shows_verdict_speed_and_figures(tmp_path: Path) -> None:
    page = _page(write_folder(tmp_path))
    assert '<header class="band valid">' in page
    assert "28.2×" in page
    assert "20.0 s → 0.71 s on the same 24 requests" in page
    for name in ("timeline", "batch", "histogram", "scatter"):
        assert f'aria-labelledby="figure-{name}"' in page
    assert "Failed requests" in page
    assert "line 7: the prompt is longer" in page
    assert "a" * 64 in page


def test_invalid_shows_its_reasons(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    found = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    reasons = [{"code": "shape", "message": "row 3 <is> wrong"}, "of an older file"]
    write_json(folder / "certificate.json", {**found, "verdict": "INVALID", "reasons": reasons})
    page = _page(folder)
    assert '<header class="band invalid">' in page
    assert "<li>shape: row 3 &lt;is&gt; wrong</li>" in page
    assert "<li>of an older file</li>" in page


def test_prompts_and_texts_cannot_become_markup(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, prompt=HOSTILE, text=HOSTILE)
    lines = outputs(12, np.random.default_rng(0), prompt=HOSTILE, text=HOSTILE)
    write_lines(folder / "outputs.jsonl", [{**line, "id": f"{i}{HOSTILE}"} for i, line in enumerate(lines)])
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    write_json(folder / "result.json", {**result, HOSTILE: {HOSTILE: HOSTILE}})
    tags = _Tags(_page(folder))
    assert "script" not in tags.names
    assert "img" not in tags.names
    assert not [name for name, _ in tags.attributes if name.startswith("on")]


def test_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = _page(write_folder(tmp_path))
    assert "://" not in page
    assert "@import" not in page
    tags = _Tags(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags.names)
    links = [value for name, value in tags.attributes if name in {"src", "href", "xlink:href"}]
    assert links
    assert all(link.startswith("#") for link in links)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_ids_of_figures_are_unique_and_resolve(tmp_path: Path) -> None:
    attributes = _Tags(_page(write_folder(tmp_path))).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value[1:] for name, value in attributes if name == "xlink:href"]
    used += [value[5:-1] for name, value in attributes if name == "clip-path"]
    assert used
    assert set(used) <= set(ids)


@pytest.mark.parametrize("missing", ["certificate.json", "outputs.jsonl", "steps.jsonl"])
def test_a_missing_file_leaves_its_part_out(tmp_path: Path, missing: str) -> None:
    folder = write_folder(tmp_path)
    (folder / missing).unlink()
    part = {"certificate.json": "histogram", "outputs.jsonl": "timeline", "steps.jsonl": "batch"}[missing]
    page = _page(folder)
    assert f'aria-labelledby="figure-{part}"' not in page
    assert ("NOT CHECKED" in page) == (missing == "certificate.json")


def test_an_almost_empty_result_still_gives_a_page(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"format_version": 1})
    write_json(tmp_path / "certificate.json", {"verdict": "INVALID", "reasons": []})
    (tmp_path / "outputs.jsonl").write_text('{"id": "0", "error": "empty"}\n{"id": "1", "te', encoding="utf-8")
    page = _page(tmp_path)
    assert "INVALID" in page
    assert "<svg" not in page


def test_no_result_or_a_damaged_one_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputFolderError, match=r"holds no result\.json"):
        render_report(tmp_path)
    (tmp_path / "result.json").write_text('{"a": ', encoding="utf-8")
    with pytest.raises(OutputFolderError, match="not readable JSON"):
        render_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_1500_requests_stay_under_3_megabytes_and_leave_no_other_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, n=1500, num_steps=5000, prompt="word " * 400, text="word " * 2000)
    before = {path.name for path in folder.iterdir()}
    assert render_report(folder).stat().st_size < 3_000_000
    assert {path.name for path in folder.iterdir()} - before == {"report.html"}


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    assert _page(write_folder(tmp_path / "a")) == _page(write_folder(tmp_path / "b"))


def test_text_of_a_figure_is_not_rewritten() -> None:
    one = np.array([0.0, 0.0]), np.array([1.0, 1.0]), np.array([2.0, 2.0]), np.array([3.0, 3.0])
    svg = figures.request_timeline(["1.23456 $x$", 'a id="b'], *one)
    assert ">1.23456 $x$<" in svg
    assert '>a id="b<' in svg


@pytest.mark.parametrize("pairs", [np.zeros((0, 2)), np.zeros((3, 2)), np.ones((1, 2))])
def test_scatter_copes_with_exact_equality(pairs: np.ndarray) -> None:
    assert "<svg" in figures.delta_against_logit(*pairs.T, tolerance=5e-3)


@pytest.mark.parametrize("counts", [[0, 0], [7, 0], [0, 7]])
def test_histogram_copes_with_empty_bins(counts: list[int]) -> None:
    edges = np.array([0.0, 5e-3, 1.0])
    assert "<svg" in figures.delta_histogram(edges, np.array(counts, float), tolerance=5e-3, noise_floor=None)


@pytest.mark.parametrize(
    ("thing", "shown"),
    [
        (None, "–"),
        (True, "yes"),
        (98086, "98,086"),
        (2.4e-5, "2.40e-05"),
        (0.005, "0.005"),
        ([1, 2], "1, 2"),
        ([], "none"),
        (list(range(99)), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … (99 in all)"),
        ({"max_seqs": 4}, "max seqs 4"),
    ],
)
def test_values_as_people_read_them(thing: object, shown: str) -> None:
    assert text.value(thing) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.712, "0.712 s"), (41.68, "41.7 s"), (192.4, "3 min 12 s"), (None, "–")]
)
def test_seconds_as_people_read_them(value: float | None, shown: str) -> None:
    assert text.seconds(value) == shown
