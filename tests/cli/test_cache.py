"""`isologit cache` lists what is kept and removes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from isologit.checkpoints import weight_cache
from isologit.checkpoints.weight_cache import WeightCache
from isologit.cli.app import app


def cache(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["cache", *arguments])
    return done.exit_code, done.output


def test_list_and_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOLOGIT_CACHE", str(tmp_path))
    monkeypatch.setattr(weight_cache, "_FREE_BYTES", 0)
    monkeypatch.setattr(weight_cache, "_FREE_SHARE", 0.0)
    assert cache() == (0, f"nothing is kept in {tmp_path / 'weights'}\n")
    assert cache("clear") == (0, "nothing was kept\n")
    for sha256, title in (("a" * 64, "models/one"), ("b" * 64, "models/two")):
        WeightCache().keep(
            np.zeros(3 << 20, np.uint8),
            title=title,
            fingerprint=sha256,
            sha256=sha256,
            layout="wide",
            facts={},
            num_threads=1,
        )
    code, text = cache()
    assert code == 0
    assert "models/one" in text
    assert "aaaaaaaaaaaaaaaa-" in text
    assert cache("clear", "three")[0] == 2
    code, text = cache("clear", "models/two")
    assert (code, text.startswith("removed bbbbbbbbbbbbbbbb-")) == (0, True)
    assert "models/two" not in cache()[1]
    assert cache("clear")[0] == 0
    assert not list((tmp_path / "weights").glob("*.weights"))
