"""Values as people read them. Owns number and unit formats; knows nothing of where a value comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_HIDDEN_ITEMS = 12  # a list longer than this is shown by its first items and its length


def seconds(value: float | None) -> str:
    """`0.0312 s`, `41.7 s`, `3 min 12 s`."""
    if value is None or not math.isfinite(value):
        return "–"
    if value >= 180:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest:02d} s"
    return f"{value:.1f} s" if value >= 10 else f"{value:.3g} s"


def number(value: float | None) -> str:
    """Whole numbers grouped by thousands, others to four digits, tiny ones in powers of ten."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def value(thing: Any) -> str:
    """Anything JSON can hold, on one line."""
    if thing is None:
        return "–"
    if isinstance(thing, bool):
        return "yes" if thing else "no"
    if isinstance(thing, int | float):
        return number(thing)
    if isinstance(thing, str):
        return thing
    if isinstance(thing, Mapping):
        return ", ".join(f"{label(str(key))} {value(item)}" for key, item in thing.items()) or "none"
    if isinstance(thing, Sequence):
        shown = ", ".join(value(item) for item in thing[:_HIDDEN_ITEMS])
        return f"{shown}, … ({len(thing)} in all)" if len(thing) > _HIDDEN_ITEMS else shown or "none"
    return str(thing)


def label(key: str) -> str:
    """`max_abs_diff` as `max abs diff`."""
    return key.replace("_", " ").strip()


def flatten(thing: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows `(label, value)` of a nested mapping, in its own order; lists of mappings or lists are left out."""
    rows: list[tuple[str, str]] = []
    for key, item in thing.items():
        name = f"{prefix}{label(str(key))}"
        if isinstance(item, Mapping):
            rows += flatten(item, f"{name} · ")
        elif isinstance(item, list) and item and isinstance(item[0], Mapping | list):
            continue
        else:
            rows.append((name, value(item)))
    return rows
