"""The largest logit found through bytes is the largest of all, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from isologit.backends.cpu import kernels, shortlist, simd, tiles
from isologit.backends.cpu.providers import linear_numba
from isologit.backends.cpu.shortlist import (
    NOT_PICKED,
    ROW_DTYPE,
    ByteHead,
    bound_panels,
    pack_byte_head,
    pick_row,
    quantise_row,
)
from isologit.backends.cpu.simd import PANEL_WIDTH
from isologit.common.compiler import FEATURES, VECTOR_WIDTH


def byte_head(weight: torch.Tensor) -> ByteHead:
    head = pack_byte_head(weight)
    assert head is not None
    return head


def bounds(x: np.ndarray, head: ByteHead) -> np.ndarray:
    """[R, panels] upper bounds of each row; NaN for rows that have none."""
    rows, depth = x.shape
    tiles = kernels.tile_count(rows)
    row_integers = np.zeros(rows * depth, ROW_DTYPE)
    take, factors = np.zeros(rows, np.int32), np.zeros((rows, 3), np.float32)
    bounded = np.zeros(rows, bool)
    flat = x.reshape(-1)
    for tile in range(tiles):
        top, end = kernels.even_share(tile, tiles, rows)
        for row in range(top, end):
            place = top * depth + (row - top) * 4
            bounded[row] = quantise_row(flat, row * depth, depth, row_integers, place, end - top, take, factors, row)
    tops = np.zeros(len(head.weights) * rows, np.float32)
    bound_panels(
        row_integers.view(np.int32), rows, head.weights, head.columns, take, factors, tops,
        np.zeros(1, np.int64), 0,
    )  # fmt: skip
    found = tops.reshape(-1, rows).T.copy()
    found[~bounded] = np.nan
    return found


def pick(x: np.ndarray, weight: torch.Tensor, head: ByteHead | None = None) -> list[tuple[int, int]]:
    """(index of the largest logit, panels computed) of each row of x that has bounds."""
    tops = bounds(x, head or byte_head(weight))
    panels = kernels.pack_weight(weight, "float32")
    scratch, offsets = np.zeros(kernels.SCRATCH_SIZE, np.float32), np.zeros(8, np.int64)
    row_tops = np.zeros(len(panels), np.float32)
    rows = [row for row in range(len(x)) if not np.isnan(tops[row]).any()]
    return [
        pick_row(
            x.reshape(-1), row * x.shape[1], row, len(x), panels, len(weight),
            np.ascontiguousarray(tops.T).reshape(-1), row_tops, scratch, kernels.ZEROS, offsets,
        )
        for row in rows
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(1, 3 * PANEL_WIDTH + 5),
    fours=st.integers(1, 40),
    rows=st.integers(1, 30),
    outliers=st.booleans(),
    tied=st.booleans(),
)
def test_no_logit_exceeds_its_bound_and_the_largest_is_picked(
    seed: int, vocab: int, fours: int, rows: int, outliers: bool, tied: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 4 * fours)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 4))
    w = rng.standard_normal((vocab, 4 * fours)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 4))
    if outliers:  # one huge feature takes the precision from all others, in rows and in columns
        x[:, rng.integers(4 * fours)] *= 1000
        w[rng.integers(vocab)] *= 100
    if tied:
        w[:] = w[rng.integers(0, vocab, vocab)]
        w[rng.integers(vocab)] = 0
    weight = torch.from_numpy(w)
    logits = linear_numba(torch.from_numpy(x), weight).numpy()
    padded = np.full((rows, -(-vocab // PANEL_WIDTH) * PANEL_WIDTH), -np.inf, np.float32)
    padded[:, :vocab] = logits
    assert (padded.reshape(rows, -1, PANEL_WIDTH).max(2) <= bounds(x, byte_head(weight))).all()
    assert [index for index, _ in pick(x, weight)] == logits.argmax(1).tolist()


def test_few_panels_are_computed() -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((8000, 512)).astype(np.float32))
    x = rng.standard_normal((50, 512)).astype(np.float32)
    assert np.mean([panels for _, panels in pick(x, weight)]) < 0.1 * 8000 / PANEL_WIDTH


def test_without_the_error_in_the_bounds_a_wrong_token_is_picked() -> None:
    """The inverse: approximate logits alone choose wrong ones among near ties."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal(256)
    columns = base + 1e-3 * rng.standard_normal((4000, 256))
    columns[np.arange(4000) % PANEL_WIDTH > 0] /= 2  # one near tie a panel, whose bound no neighbour lifts
    weight = torch.from_numpy(columns.astype(np.float32))
    x = (base + 0.1 * rng.standard_normal((20, 256))).astype(np.float32)
    best = linear_numba(torch.from_numpy(x), weight).numpy().argmax(1).tolist()
    honest = byte_head(weight)
    assert all(found in (index, NOT_PICKED) for (found, _), index in zip(pick(x, weight), best, strict=True))
    no_errors = honest.columns.copy()
    no_errors[:, 1:] = 0
    careless = pick(x, weight, ByteHead(honest.weights, no_errors))
    assert [index for index, _ in careless] != best


def test_rows_without_bounds_and_rows_with_too_many_candidates_are_left_to_the_whole_product() -> None:
    weight = torch.ones(300 * PANEL_WIDTH, 8)  # all logits are equal, so every panel must be computed
    x = np.ones((1, 8), np.float32)
    assert pick(x, weight)[0][0] == NOT_PICKED
    strange = np.ones((4, 8), np.float32)
    strange[0, 3], strange[1, 2], strange[2] = np.nan, np.inf, 0
    assert np.isnan(bounds(strange, byte_head(weight))).any(1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
def test_weights_that_bounds_cannot_hold_are_refused(value: float) -> None:
    weight = torch.ones(3, 8)
    weight[1, 2] = value
    assert pack_byte_head(weight) is None
    assert pack_byte_head(torch.ones(3, 6)) is None
    assert pack_byte_head(torch.ones(3, 8)) is not None


@pytest.mark.parametrize("how", ["fours", "pairs", None])
def test_integer_products_are_exact_by_every_instruction(how: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the ends of their ranges too, and with instructions that this width would not choose."""
    if how is not None and not simd.has_byte_products(FEATURES, VECTOR_WIDTH, how):
        pytest.skip("this CPU has no such instruction")
    words = 2 if how == "pairs" else 1
    monkeypatch.setattr(tiles, "BYTE_PRODUCTS", how)
    monkeypatch.setattr(tiles, "WORDS_OF_FOUR", words)
    rng = np.random.default_rng(2)
    depth, rows = 33, 5
    most = 127 if words == 1 else 32767
    x = rng.integers(-most, most + 1, (depth, rows, 4))
    w = rng.integers(1, 256, (depth, PANEL_WIDTH, 4)).astype(np.uint8)
    x[:, 0], w[:, 0] = most, 255
    stored = np.ascontiguousarray(x if words == 1 else x[..., [0, 2, 1, 3]], np.int8 if words == 1 else np.int16)
    columns = np.zeros(3 * PANEL_WIDTH, np.float32)
    columns[:PANEL_WIDTH] = 1  # the scales; no errors
    take, factors, tops = np.zeros(rows, np.int32), np.ones((rows, 3), np.float32), np.zeros(rows, np.float32)

    @njit
    def call(x, w, columns, take, factors, tops):  # type: ignore[no-untyped-def]
        tiles.bound_tile(x, 0, rows * words, w, 0, depth, 0, 0, columns, 0, take, factors, 0, tops, 0, rows)

    call(stored.view(np.int32).reshape(-1), w.view(np.int32).reshape(-1), columns, take, factors, tops)
    sums = np.einsum("krb,kcb->rc", x.astype(np.int64), w.astype(np.int64))
    assert np.array_equal(tops, sums.max(1).astype(np.float32))


@pytest.mark.parametrize("depth", [4, 768, 4096, shortlist.LARGEST_DEPTH // 4 * 4])
def test_no_sum_of_products_overflows(depth: int) -> None:
    assert shortlist.has_byte_bounds(depth)
    assert not shortlist.has_byte_bounds(shortlist.LARGEST_DEPTH // 4 * 4 + 4)
    most = shortlist.largest_integer(depth)
    assert 127 <= most <= np.iinfo(ROW_DTYPE).max
    assert depth * 255 * most < 2**31
