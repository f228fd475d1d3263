"""Progress on standard error: how far loading is, and no silence in any stage."""

from __future__ import annotations

import time

import pytest

from isologit.cli import display
from isologit.cli.display import Lines, LoadPace
from isologit.common.load_progress import LoadProgress


def test_loading_tells_gib_rate_and_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace, gib = LoadPace(), 1 << 30
    assert pace.detail(LoadProgress("packing weights", 0, 12 * gib)) == "packing weights 0.0/12.0 GiB"
    now = 102.0
    assert pace.detail(LoadProgress("packing weights", 3 * gib, 12 * gib)) == (
        "packing weights 3.0/12.0 GiB · 1.50 GiB/s · ETA 0:00:06"
    )
    now = 108.0
    assert pace.detail(LoadProgress("packing weights", 12 * gib, 12 * gib)).endswith("12.0/12.0 GiB · 1.50 GiB/s")
    assert pace.detail(LoadProgress("keeping packed weights", 0, gib)) == "keeping packed weights 0.0/1.0 GiB"


def test_a_stage_that_tells_nothing_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "_LINE_EVERY_S", 0.05)
    monkeypatch.setattr(display, "_LOOK_EVERY_S", 0.01)
    with Lines().running() as lines:
        lines.stage("warming up")
        time.sleep(0.5)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warming up ..."
    assert said[1].startswith("warming up: 0:00:0")
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_lines_are_some_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines().running() as lines:
        lines.stage("loading the model")
        for done in range(1000):
            lines.loading(LoadProgress("packing weights", done, 1000))
    assert capsys.readouterr().err == "loading the model ...\n"
    assert display._LINE_EVERY_S + display._LOOK_EVERY_S < 5
