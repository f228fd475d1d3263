"""What the definitions of operations do not cover: FP8 terms of keys and values, large rows, tiles and buckets."""

from __future__ import annotations

import math
import os

import pytest
import torch

from isologit.backends.cuda.backend import CUDABackend
from isologit.backends.cuda.tiles import BUCKETS, NARROW_ROWS, bucket_of, tile_for
from isologit.ops.definitions import OPS

needs_kernels = pytest.mark.skipif(CUDABackend.why_not("auto") is not None, reason="no GPU, and no interpreter")


@needs_kernels
def test_fp8_terms_of_keys_and_values_keep_fifteen_bits() -> None:
    """One term of float16 alone would be ten times further off: the inverse."""
    from isologit.backends.cuda.providers import attention_with, paged_attention

    inputs = OPS["paged_attention"].make_inputs(torch.Generator().manual_seed(1))
    inputs["v"] *= 8
    exact = OPS["paged_attention"].definition(**{name: x.double() for name, x in inputs.items()})
    alone = {**inputs, "v": inputs["v"].half().float()}
    one_term = (paged_attention(**alone).double() - exact).abs().max()
    assert one_term > 1e-3
    if os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter rounds to FP8 wrongly where a mantissa carries
        assert (attention_with(torch.float8_e4m3fn, **inputs).double() - exact).abs().max() < one_term / 5
    assert (paged_attention(**inputs).double() - exact).abs().max() < one_term / 100


@needs_kernels
def test_a_row_past_the_range_of_float16_is_scaled_into_it() -> None:
    """Gate and up of 3000 give 9e6, which float16 does not hold."""
    from isologit.backends.cuda.providers import swiglu

    x = torch.tensor([[3000.0], [0.5]])
    got = swiglu(x, torch.ones(1, 1), torch.ones(1, 1))
    want = OPS["swiglu"].definition(x.double(), torch.ones(1, 1).double(), torch.ones(1, 1).double())
    assert ((got - want).abs() / want.abs()).max() < 1e-5


@needs_kernels
def test_argmax_of_not_a_number_is_minus_one() -> None:
    from isologit.backends.cuda.providers import argmax

    logits = torch.randn(3, 400)
    logits[1, 350] = math.nan
    assert argmax(logits).tolist() == [int(logits[0].argmax()), -1, int(logits[2].argmax())]


@needs_kernels
def test_tokens_that_the_last_step_chose_take_the_place_of_their_rows() -> None:
    from isologit.backends.cuda import kernels
    from isologit.backends.cuda.providers import _DEVICE

    tokens = torch.tensor([5, -1, -3, 0, -2, 7, 9], dtype=torch.int32, device=_DEVICE)
    chosen = torch.tensor([40, -1, 60], dtype=torch.int32, device=_DEVICE)  # the second row was NaN
    kernels.take_chosen[(2,)](tokens, chosen, 6, BLOCK=4)
    assert tokens.tolist() == [5, 40, 60, 0, 0, 7, 9]


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 300, 2048, 2049])
def test_every_step_has_a_bucket_and_every_product_a_tile(rows: int) -> None:
    bucket = bucket_of(rows)
    assert bucket >= rows
    assert bucket in BUCKETS or bucket % BUCKETS[-1] == 0
    for out_features in (128, 4096, 22016):
        tile = tile_for(bucket, out_features, 1, 132)
        assert bucket % tile.block_m == 0
        assert out_features % tile.block_n == 0
        assert (tile.block_m <= 64) if bucket <= NARROW_ROWS else (tile.block_m >= 64)
