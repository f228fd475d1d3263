"""Rooms import what docs/design.md's table allows, nothing else, and no module imports itself by a detour.

The table is the only list there is: a room that needs another one says so there, in the same commit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "isologit"
DESIGN = ROOT / "docs" / "design.md"
EVERYONES = "__version__"  # what any room may take from the package itself
LIBRARIES = {
    "tensors": {"torch", "transformers", "safetensors"},
    "HTTP": {"aiohttp", "fastapi", "httptools", "requests", "starlette", "uvicorn"},
}
"""What it means in imports when the table says that a room must not know something."""

Graph = dict[str, set[str]]


def rooms_table(text: str) -> tuple[Graph, Graph]:
    """Of docs/design.md: the rooms that each room may import, and the libraries that it must not."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    allowed = {room: set(re.findall(r"`(\w+)`", may)) for room, may, _ in rows}
    forbidden = {
        room: set().union(*(names for word, names in LIBRARIES.items() if re.search(rf"\b{word}\b", unknown)))
        for room, _, unknown in rows
    }
    return allowed, forbidden


def imported(code: str, module: str) -> Iterator[str]:
    """Full names of all that a module's code imports: anywhere in it, relative, or by `import_module("...")`."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str))


def room_of(name: str) -> str | None:
    """The room of a full name: `isologit.server.app.create_app` is in `server`; None for other packages."""
    parts = name.split(".")
    if parts[0] != "isologit" or parts[1:] in ([], [EVERYONES]):
        return None
    public = {"LLM": "llm", "GenerationRequest": "engine", "RequestOutput": "engine", "SamplingParams": "engine"}
    return public.get(parts[1], parts[1])


def wrong_arrows(code: str, module: str, allowed: Graph, forbidden: Graph) -> list[str]:
    """What a module imports and must not."""
    room = room_of(module)
    assert room is not None
    found = []
    for name in imported(code, module):
        other = room_of(name)
        if other not in (None, room) and other not in allowed.get(room, set()):
            found.append(f"{module} imports {name}, but `{room}` may not import `{other}`")
        if name.split(".")[0] in forbidden.get(room, set()):
            found.append(f"{module} imports {name}, which `{room}` must not know")
    return found


def modules() -> dict[str, str]:
    """Code of every module by its full name; `isologit/__init__.py` and `__main__.py` are no room and left out."""
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if path.parent != SOURCE or not path.stem.startswith("__")]
    return {
        "isologit." + ".".join(path.relative_to(SOURCE).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in paths
    }


ALLOWED, FORBIDDEN = rooms_table(DESIGN.read_text(encoding="utf-8"))
MODULES = modules()


def test_the_table_names_every_room_and_nothing_else() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms == set(ALLOWED)
    assert set().union(*ALLOWED.values()) <= rooms
    assert FORBIDDEN["server"] == LIBRARIES["tensors"]
    assert FORBIDDEN["engine"] == LIBRARIES["HTTP"]


def test_the_tables_arrows_point_one_way() -> None:
    """Every arrow of the chain that the design begins with is one of them."""
    order = list(TopologicalSorter(ALLOWED).static_order())  # raises CycleError
    chain = ["ops", "backends", "engine", "llm", "job", "cli"]
    assert sorted(chain, key=order.index) == chain
    assert all(lower in ALLOWED[upper] for lower, upper in pairwise(chain))
    with pytest.raises(CycleError):
        list(TopologicalSorter({**ALLOWED, "ops": {"cli"}}).static_order())


def test_no_room_imports_another_against_the_table() -> None:
    assert [wrong for name, code in MODULES.items() for wrong in wrong_arrows(code, name, ALLOWED, FORBIDDEN)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import isologit.server.app",
        "from isologit.server import app",
        "from isologit import server",
        "from isologit import LLM",
        "def late():\n    from isologit.server.app import create_app",
        "if TYPE_CHECKING:\n    from isologit.server.app import create_app",
        "from ..server import app",
        "from ..server.app import create_app",
        "import_module('isologit.server.app')",
        "importlib.import_module('isologit.server.app')",
        "import aiohttp",
        "from fastapi.responses import Response",
    ],
)
def test_a_wrong_arrow_is_seen(code: str) -> None:
    assert len(wrong_arrows(code, "isologit.engine.loop", ALLOWED, FORBIDDEN)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from isologit.engine.blocks import Blocks",
        "from . import blocks",
        "from .blocks import Blocks",
        "from isologit.backends.base import Backend",
        "from isologit import __version__",
        "import torch",
        "from isologitical import server",
    ],
)
def test_a_right_arrow_is_none(code: str) -> None:
    assert wrong_arrows(code, "isologit.engine.loop", ALLOWED, FORBIDDEN) == []


def import_graph(codes: dict[str, str]) -> Graph:
    """Which modules each module imports; a package stands for its `__init__`."""
    names = {module.removesuffix(".__init__"): module for module in codes}

    def target(name: str) -> str | None:
        while name:
            if name in names:
                return names[name]
            name = name.rpartition(".")[0]
        return None

    return {
        module: {found for name in imported(code, module) if (found := target(name)) not in (None, module)}  # type: ignore[misc]
        for module, code in codes.items()
    }


def test_no_module_imports_itself_by_a_detour() -> None:
    list(TopologicalSorter(import_graph(MODULES)).static_order())  # raises CycleError, which names the modules
    circle = {**MODULES, "isologit.errors": "def late():\n    import isologit.cli.app"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(import_graph(circle)).static_order())
