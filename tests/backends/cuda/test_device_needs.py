"""What the prepared script says before it spends a GPU's minutes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.device_needs import lacking, requirements


def test_what_is_missing_or_too_old_is_named() -> None:
    wanted = ["numpy>=1.20", "numpy>=999", "no-such-package>=1"]
    assert lacking(wanted) == ["numpy>=999", "no-such-package>=1"]


def test_requirements_are_the_projects() -> None:
    found = requirements(Path(__file__).parents[3] / "pyproject.toml")
    names = {requirement.split(">=")[0] for requirement in found}
    assert {"torch", "pydantic", "triton", "pytest"} <= names
    assert all(";" not in requirement and requirement.count(">=") == 1 for requirement in found)
