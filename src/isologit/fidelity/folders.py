"""Two sets of saved logits against each other: the contest's check, made whole.

Pairs rows, then looks at the set of keys, shape, dtype, finite values and tolerance, in that order. A difference is a
verdict; only what cannot be read or paired is an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isologit.common.verdict import Reason, Verdict
from isologit.fidelity.capture_file import CAPTURES, read_captures
from isologit.fidelity.compare import ATOL, Comparison, ComparisonAccumulator
from isologit.fidelity.contest import LogitsName, read_contest_row, read_sidecar
from isologit.fidelity.files import LogitsFileError

_LISTED = 10  # names in a summary


@dataclass(frozen=True)
class _Saved:
    """One saved row: its name for people, what it can be paired by, and how to load it."""

    label: str
    position: int
    key: str | None  # the contest's sentence key
    prompt_sha256: str | None
    context_sha256: str | None
    load: Callable[[], np.ndarray]

    @property
    def name_key(self) -> Hashable:
        return self.key, self.position

    @property
    def prompt_key(self) -> Hashable:
        return self.prompt_sha256, self.position


@dataclass(frozen=True)
class FolderComparison:
    """What comparing two folders found.

    pairing: "prompt" (hash and position) or "name" (the contest's key and position). only_in_a, only_in_b: rows without
    a partner. failed: rows that do not pass, in order. contexts_differ: pairs whose preceding tokens differ, so that
    their rows answer different questions. Pairs are named as in a; `comparison.worst.key` too.
    """

    a: str
    b: str
    pairing: str
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    failed: tuple[str, ...]
    contexts_differ: tuple[str, ...]
    comparison: Comparison

    @property
    def verdict(self) -> Verdict:
        """VALID: both hold the same keys, and every row passes."""
        reasons = [
            Reason(code, f"{len(names)} rows are only in {where}: {_listing(names)}")
            for code, names, where in (("only_in_a", self.only_in_a, self.a), ("only_in_b", self.only_in_b, self.b))
            if names
        ]
        reasons += self.comparison.reasons()
        if not self.comparison.ok and not reasons:
            reasons.append(Reason("no_rows", "nothing was checked: no row could be compared"))
        return Verdict.of(reasons)

    def summary_lines(self) -> list[str]:
        """The result for people, worst first."""
        found = self.comparison
        lines = [
            f"{'PASS' if self.verdict.valid else 'FAIL'}: {found.rows} rows compared, paired by {self.pairing}; "
            f"|a - b| <= {found.atol:g} + {found.rtol:g} * |b|"
        ]
        for names, where in ((self.only_in_a, self.a), (self.only_in_b, self.b)):
            if names:
                lines.append(f"only in {where}: {_listing(names)}")
        if found.first_problem:
            lines.append(f"first problem: {found.first_problem}")
        counts = (found.shape_mismatches, found.dtype_mismatches, found.nonfinite, found.over_tolerance)
        lines.append("shape {}, dtype {}, not finite {}, over tolerance {}".format(*counts))
        if self.failed:
            lines.append(f"rows that fail: {_listing(self.failed)}")
        if self.contexts_differ:
            lines.append(f"tokens before the row differ: {_listing(self.contexts_differ)}")
        if found.worst is not None:
            worst = found.worst
            lines.append(
                f"largest difference {worst.abs_diff:.3g}: {worst.key} token {worst.token}, "
                f"{worst.ours:.6g} against {worst.theirs:.6g}"
            )
        lines.append(
            f"differences: mean {found.mean_abs:.3g}, median {found.median_abs:.3g}, p99 {found.p99_abs:.3g}; "
            f"relative max {found.max_rel:.3g}, mean {found.mean_rel:.3g}; up to {found.max_fp16_ulp} float16 steps"
        )
        lines.append(f"same top token {found.top1_agreement:.2%}; KL mean {found.kl_mean:.3g}, max {found.kl_max:.3g}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON."""
        return {
            **self.verdict.to_dict(),
            "a": self.a,
            "b": self.b,
            "tolerance": {"atol": self.comparison.atol, "rtol": self.comparison.rtol},
            "pairing": self.pairing,
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "failed": list(self.failed),
            "contexts_differ": list(self.contexts_differ),
            "comparison": self.comparison.to_dict(),
        }


def compare_folders(a: Path, b: Path, *, atol: float = ATOL, rtol: float = 0.0) -> FolderComparison:
    """Compare the logits saved in two places: contest folders, run folders with `captures.safetensors`, or such files.

    The order of arguments is that of `numpy.allclose(a, b)`: relative tolerance and KL are taken with respect to b.
    With a = baseline, b = new and rtol=1e-5 the tolerance is that of the contest's script. Rows are paired by prompt
    hash and position when both sides know them, else by (key, position); rows that share a key are paired in the order
    of their times. Raises LogitsFileError when one side cannot be read, is empty, or the two cannot be paired.
    """
    side_a, side_b = _load(a), _load(b)
    if all(row.prompt_sha256 for row in (*side_a, *side_b)):
        pairing = "prompt"
    elif all(row.key for row in (*side_a, *side_b)):
        pairing = "name"
    else:
        raise LogitsFileError(f"{a} and {b} cannot be paired: a contest folder needs its index.jsonl for that")
    pairs, only_in_a, only_in_b = _pair(side_a, side_b, pairing)
    found = ComparisonAccumulator(atol=atol, rtol=rtol)
    failed = [mine.label for mine, other in pairs if not found.add(mine.label, mine.load(), other.load())]
    contexts = [mine.label for mine, other in pairs if _context_differs(mine, other)]
    return FolderComparison(
        a=str(a),
        b=str(b),
        pairing=pairing,
        only_in_a=tuple(only_in_a),
        only_in_b=tuple(only_in_b),
        failed=tuple(failed),
        contexts_differ=tuple(contexts),
        comparison=found.result(),
    )


def _context_differs(mine: _Saved, other: _Saved) -> bool:
    return None not in (mine.context_sha256, other.context_sha256) and mine.context_sha256 != other.context_sha256


def _pair(
    side_a: Sequence[_Saved], side_b: Sequence[_Saved], pairing: str
) -> tuple[list[tuple[_Saved, _Saved]], list[str], list[str]]:
    """Pairs in the order of a, and the names of rows without a partner on either side."""
    waiting: dict[Hashable, list[_Saved]] = defaultdict(list)
    for row in side_b:
        waiting[row.prompt_key if pairing == "prompt" else row.name_key].append(row)
    pairs: list[tuple[_Saved, _Saved]] = []
    only_in_a: list[str] = []
    for row in side_a:
        partners = waiting[row.prompt_key if pairing == "prompt" else row.name_key]
        if partners:
            pairs.append((row, partners.pop(0)))
        else:
            only_in_a.append(row.label)
    return pairs, only_in_a, [row.label for rows in waiting.values() for row in rows]


def _load(path: Path) -> list[_Saved]:
    """The rows saved in a place, in the order of their times."""
    if path.is_file():
        return _from_captures(path)
    if not path.is_dir():
        raise LogitsFileError(f"{path}: no such file or folder; name a folder of .npy files or a run folder")
    if (path / CAPTURES).exists():
        return _from_captures(path / CAPTURES)
    sidecar = read_sidecar(path)
    named = sorted((LogitsName.parse(file.name).time, file) for file in path.glob("*.npy"))
    if not named:
        raise LogitsFileError(f"{path}: holds neither .npy files nor {CAPTURES}; nothing can be compared")
    if any(file.name not in sidecar for _, file in named):
        sidecar = {}
    return [_from_contest(file, sidecar.get(file.name, {})) for _, file in named]


def _from_contest(file: Path, entry: dict[str, Any]) -> _Saved:
    name = LogitsName.parse(file.name)
    hashes = entry.get("prompt_sha256"), entry.get("context_sha256")
    return _Saved(file.name, name.position, name.key, *hashes, partial(read_contest_row, file))


def _from_captures(path: Path) -> list[_Saved]:
    found = read_captures(path)
    if not len(found.rows):
        raise LogitsFileError(f"{path}: holds no rows; nothing can be compared")
    labels = [
        f"request {request_id} output token {index}"
        for request_id, index in zip(found.request_ids, found.output_indices.tolist(), strict=True)
    ]
    hashes = zip(found.prompt_sha256, found.context_sha256, strict=True)
    return [
        _Saved(label, position, None, prompt, context, partial(np.asarray, row))
        for label, position, (prompt, context), row in zip(
            labels, found.positions.tolist(), hashes, found.rows, strict=True
        )
    ]


def _listing(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", … {more} more" if more > 0 else "")
