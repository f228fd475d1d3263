"""Whether this interpreter has what `device.sh` needs, before a GPU's minutes are spent; if not, how to get it.

    python benchmarks/device_needs.py

It reads the requirements from pyproject.toml and uses nothing but Python's own library. A package that is listed but
that no stage imports is named and does not stop the script.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What the stages import, the rest following from it.
MODULES = (
    "isologit.cli",
    "isologit.fidelity.outside",
    "isologit.backends.torch.backend",
    "isologit.backends.cuda.model",
    "pytest",
)
_TEST_TOOLS = ("pytest", "pytest-timeout")


def requirements(pyproject: Path) -> list[str]:
    """Of the project, its CUDA backend and its tests, as "name>=version"."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    tools = [line for line in extras["dev"] if re.split("[>=]", line)[0] in _TEST_TOOLS]
    return [line.split(";")[0] for line in [*project["dependencies"], *extras["cuda"], *tools]]


def lacking(wanted: list[str]) -> list[str]:
    """Those that are not installed, or too old."""
    found = []
    for requirement in wanted:
        name, least = requirement.split(">=")
        try:
            if _numbers(version(name)) >= _numbers(least):
                continue
        except PackageNotFoundError:
            pass
        found.append(requirement)
    return found


def _numbers(text: str) -> list[int]:
    """The numbers that a version begins with."""
    return [int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", text).group())]  # type: ignore[union-attr]


def main() -> int:
    """0 when all stages can start."""
    missing = lacking(requirements(Path(__file__).parents[1] / "pyproject.toml"))
    broken = []
    for module in MODULES:
        try:
            import_module(module)
        except ImportError as error:
            broken.append(f"{module}: {error}")
    if missing:
        print(f"not installed, or too old, for {sys.executable}: {' '.join(missing)}")
    if not broken:
        return 0
    print("cannot be imported: " + "; ".join(broken))
    names = " ".join(f"'{requirement}'" for requirement in missing)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(
        f"with a network:  {sys.executable} -m pip install {names}\n"
        f"without one, elsewhere:  pip download --only-binary=:all: --python-version {python} -d wheels {names}\n"
        f"and here:  {sys.executable} -m pip install --no-index --find-links wheels {names}\n"
        "another interpreter that has them:  PYTHON=/path/to/python benchmarks/device.sh FOLDER"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
