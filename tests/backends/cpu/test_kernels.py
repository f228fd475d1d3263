"""What the CPU kernels promise beyond agreeing with their definitions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from numba import njit

from isologit.backends.cpu import arguments, heads, kernels, shortlist, simd, step, tiles
from isologit.backends.cpu.providers import linear_numba, packed_product, swiglu_numba
from isologit.backends.cpu.simd import PANEL_WIDTH, TILE_ROWS, row_max


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_product_rows_do_not_depend_on_the_batch(storage: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 130, generator=generator)
    weight = torch.randn(50, 130, generator=generator).to(getattr(torch, storage)).float()
    together = linear_numba(x, weight, storage)
    for rows in range(1, 40):  # every height of a tile, and every way of cutting rows into tiles
        first = 40 - rows if rows % 2 else 0
        assert torch.equal(linear_numba(x[first : first + rows], weight, storage), together[first : first + rows])


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_every_panel_is_computed_once(rows: int) -> None:
    """However many panels there are for the portions in which threads take them: adding twice would show."""
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(rows, 8, generator=generator), torch.randn(300 * PANEL_WIDTH, 8, generator=generator)
    for panels in (1, 3, 4, 5, 31, 32, 65, 97, 130, 263, 300):
        part = weight[: panels * PANEL_WIDTH]
        assert torch.allclose(packed_product(x, part, "float32", kernels.ADD), x @ part.T, atol=1e-4)


def test_gated_rows_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(5)
    x, gate, up = (torch.randn(n, 64, generator=generator) for n in (30, 150, 150))
    together = swiglu_numba(x, gate, up)
    for first, last in [(0, 1), (3, 5), (2, 5), (7, 11), (4, 9), (10, 17), (20, 28), (13, 30)]:
        assert torch.equal(swiglu_numba(x[first:last], gate, up), together[first:last])


def test_sixteen_bit_weights_are_widened_exactly() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 64, generator=generator)
    for storage in ("float16", "bfloat16"):
        weight = (torch.randn(32, 64, generator=generator) * 1e-3).to(getattr(torch, storage)).float()
        assert torch.equal(linear_numba(x, weight, storage), linear_numba(x, weight, "float32"))


def test_the_cache_of_compiled_kernels_depends_on_every_source_of_them() -> None:
    """Numba itself looks at the file of the outermost function only, and would run stale kernels."""
    modules = {arguments, heads, kernels, shortlist, simd, step, tiles}
    assert modules <= {sys.modules[f"isologit.backends.cpu.{path.stem}"] for path in simd.kernel_sources()}
    for name in ("work", "crew"):  # plain Python, which may change without a compilation
        assert name not in {path.stem for path in simd.kernel_sources()}


def test_argmax_reports_nan() -> None:
    row = np.array([1.0, np.nan, 2.0], np.float32)
    assert kernels.argmax_row(row, 0, 3) == -1
    assert kernels.argmax_row(row, 2, 1) == 0


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 70])
def test_a_row_of_any_length(length: int) -> None:
    """Neither the maximum nor the sum of exponentials reads or writes beyond the row."""
    row = np.full(length + 40, 100, np.float32)
    row[20 : 20 + length] = np.random.default_rng(length).normal(size=length)
    inside = row[20 : 20 + length].astype(np.float64)
    assert row_maximum(row, 20, length) == row[20 : 20 + length].max()
    weights = np.exp(2 * (inside - inside.max()))
    inverse = kernels.softmax_row(row, 20, length, length, np.float32(2))
    assert inverse == pytest.approx(1 / weights.sum(), rel=1e-5)
    np.testing.assert_allclose(row[20 : 20 + length], weights, atol=1e-6)
    assert (row[:20] == 100).all()
    assert (row[20 + length :] == 100).all()


@njit
def row_maximum(row: np.ndarray, offset: int, length: int) -> float:
    """The intrinsic, callable from Python."""
    return row_max(row, offset, length)


def test_nan_among_scores_is_not_lost() -> None:
    """The exponential clamps its argument, which alone would turn NaN into a large weight."""
    row = np.array([0.5, np.nan, 2.0, 1.0], np.float32)
    assert np.isnan(kernels.softmax_row(row, 0, 4, 4, np.float32(1)))
    assert not np.isnan(kernels.softmax_row(row, 2, 2, 2, np.float32(1)))


@pytest.mark.parametrize("rows", [1, 5, TILE_ROWS])
@pytest.mark.parametrize("size", [1, 16, 50, 64])
def test_a_tile_is_its_rows_side_by_side(rows: int, size: int) -> None:
    x = np.random.default_rng(0).normal(size=(TILE_ROWS, size + 3)).astype(np.float32)
    out = np.full(size * rows + 8, 7, np.float32)
    kernels.pack_tile(x.reshape(-1), 2, size + 3, rows, size, out, 4, rows)
    np.testing.assert_array_equal(out[4 : 4 + size * rows].reshape(size, rows), x[:rows, 2 : 2 + size].T)
    assert (np.delete(out, slice(4, 4 + size * rows)) == 7).all(), "a neighbouring tile was written"
