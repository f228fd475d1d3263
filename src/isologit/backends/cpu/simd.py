"""SIMD and threading primitives that Numba does not offer: vector arithmetic, rows of vectors, atomics, the clock.

What is emitted is LLVM IR for the host's vector width; `tiles.py` builds products of it. Nothing
here knows what a model is.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from isologit.common.cache_folder import cache_folder
from isologit.common.compiler import FEATURES, VECTOR_WIDTH


def has_byte_products(features: dict[str, bool], width: int, how: str) -> bool:
    """Whether a CPU with these features has instructions for products of bytes at this width, summed exactly in int32.

    "fours": of four with one instruction. "pairs": of two with two instructions, after they are widened to 16 bits.
    """
    needed = {"fours": {8: "avxvnni", 16: "avx512vnni"}, "pairs": {8: "avx2", 16: "avx512bw"}}
    return features.get(needed[how].get(width, ""), False)


def byte_products(features: dict[str, bool], width: int) -> str | None:
    """The fastest that a CPU with these features has: "fours", "pairs" or None."""
    return next((how for how in ("fours", "pairs") if has_byte_products(features, width, how)), None)


BYTE_PRODUCTS = byte_products(FEATURES, VECTOR_WIDTH)
# Words, int32 each, that hold what four bytes are multiplied with: four bytes, or two pairs of 16 bits.
WORDS_OF_FOUR = 2 if BYTE_PRODUCTS == "pairs" else 1
CACHE_LINE = 64  # bytes
PANEL_VECTORS = 2
INTS = ir.VectorType(ir.IntType(32), VECTOR_WIDTH)
PANEL_WIDTH = PANEL_VECTORS * VECTOR_WIDTH  # output columns of one weight panel, and tokens of one KV block
# Tallest tile whose accumulators, two weight vectors and one broadcast fit the register file (16 or 32 registers).
TILE_ROWS = 12 if VECTOR_WIDTH == 16 else 6


def kernel_sources() -> list[Path]:
    """The files whose code ends up in compiled kernels, or decides what those are given."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [
        file for file in files if any(word in file.read_text("utf-8") for word in ("njit", "llvmlite", "NamedTuple"))
    ]


def use_versioned_cache() -> None:
    """Keep compiled kernels in a folder named after the sources and the vector width.

    So neither an edited helper nor another width meets a stale kernel: Numba invalidates its cache by the file of the
    outermost function only. The folder is within `NUMBA_CACHE_DIR`, if that is set.
    """
    digest = hashlib.sha256(f"{numba.__version__} {VECTOR_WIDTH}".encode())
    for source in kernel_sources():
        digest.update(source.read_bytes())
    parent = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_folder())
    numba.config.CACHE_DIR = str(parent / f"kernels-{digest.hexdigest()[:16]}")


use_versioned_cache()


def data_pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Address of a Numba array's first element."""
    return context.make_array(array_type)(context, builder, array).data


def constant(value: float) -> Any:
    """A float32 vector with the value in every lane."""
    return ir.Constant(ir.VectorType(ir.FloatType(), VECTOR_WIDTH), [value] * VECTOR_WIDTH)


def spread(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, VECTOR_WIDTH), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), VECTOR_WIDTH), [0] * VECTOR_WIDTH)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, zeros)


def _float_intrinsic(builder: Any, name: str, *args: Any) -> Any:
    vector = ir.VectorType(ir.FloatType(), VECTOR_WIDTH)
    signature = ir.FunctionType(vector, [vector] * len(args))
    return builder.call(
        cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.v{VECTOR_WIDTH}f32"), args
    )


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return _float_intrinsic(builder, "fma", a, b, c)


def prefetch(builder: Any, pointer: Any) -> None:
    """Bring a cache line that will be read soon; any address is allowed."""
    i32, address = ir.IntType(32), ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [address, i32, i32, i32]), "llvm.prefetch.p0"
    )
    read, keep, data = (ir.Constant(i32, value) for value in (0, 2, 1))
    builder.call(function, [builder.bitcast(pointer, address), read, keep, data])


def exp(builder: Any, x: Any) -> Any:
    """exp(x) within 2 ulp; the range reduction and polynomial of the Cephes library's `expf`."""
    bits = ir.VectorType(ir.IntType(32), VECTOR_WIDTH)
    x = _float_intrinsic(builder, "maxnum", _float_intrinsic(builder, "minnum", x, constant(88.0)), constant(-87.0))
    n = _float_intrinsic(builder, "floor", fma(builder, x, constant(1.44269504088896341), constant(0.5)))
    r = fma(builder, n, constant(-0.693359375), x)
    r = fma(builder, n, constant(2.12194440e-4), r)
    p = constant(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = fma(builder, p, r, constant(coefficient))
    y = fma(builder, builder.fmul(p, r), r, builder.fadd(r, constant(1.0)))
    biased = builder.add(builder.fptosi(n, bits), ir.Constant(bits, [127] * VECTOR_WIDTH))
    power = builder.bitcast(builder.shl(biased, ir.Constant(bits, [23] * VECTOR_WIDTH)), y.type)
    return builder.fmul(y, power)


_EXP_POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
)  # fmt: skip


def _row_loop(builder: Any, pointer: Any, length: Any, initial: Any, visit: Any) -> Any:
    """Emit a loop over the `length` float32 at `pointer`, a vector at a time; returns what `visit` made of `initial`.

    `visit(place, mask, value)` is given the address of a vector, which of its lanes are within the length, and the
    value so far.
    """
    i32, i64 = ir.IntType(32), ir.IntType(64)
    before = builder.basic_block
    head, body, done = (builder.append_basic_block(f"row.{part}") for part in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    k, value = builder.phi(i64), builder.phi(initial.type)
    k.add_incoming(i64(0), before)
    value.add_incoming(initial, before)
    builder.cbranch(builder.icmp_signed("<", k, length), body, done)
    builder.position_at_end(body)
    left = spread(builder, builder.trunc(builder.sub(length, k), i32))
    lanes = ir.Constant(left.type, list(range(VECTOR_WIDTH)))
    following = visit(builder.gep(pointer, [k]), builder.icmp_signed("<", lanes, left), value)
    k.add_incoming(builder.add(k, i64(VECTOR_WIDTH)), builder.basic_block)
    value.add_incoming(following, builder.basic_block)
    builder.branch(head)
    builder.position_at_end(done)
    return value


def _masked_load(builder: Any, place: Any, mask: Any, otherwise: Any) -> Any:
    i32 = ir.IntType(32)
    signature = ir.FunctionType(otherwise.type, [place.type, i32, mask.type, otherwise.type])
    name = f"llvm.masked.load.v{VECTOR_WIDTH}f32.p0"
    return builder.call(
        cgutils.get_or_insert_function(builder.module, signature, name), [place, i32(4), mask, otherwise]
    )


def _masked_store(builder: Any, value: Any, place: Any, mask: Any) -> None:
    i32 = ir.IntType(32)
    signature = ir.FunctionType(ir.VoidType(), [value.type, place.type, i32, mask.type])
    name = f"llvm.masked.store.v{VECTOR_WIDTH}f32.p0"
    builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [value, place, i32(4), mask])


def across_lanes(builder: Any, value: Any, combine: Any) -> Any:
    """All lanes combined in pairs, then pairs of pairs and so on, as a scalar."""
    undefined = ir.Constant(value.type, ir.Undefined)
    distance = VECTOR_WIDTH // 2
    while distance:
        order = [(lane + distance) % VECTOR_WIDTH for lane in range(VECTOR_WIDTH)]
        others = builder.shuffle_vector(
            value, undefined, ir.Constant(ir.VectorType(ir.IntType(32), VECTOR_WIDTH), order)
        )
        value = combine(value, others)
        distance //= 2
    return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


@intrinsic
def row_max(typing_context, x, offset, length):
    """Largest of the `length` float32 from `x[offset]` on; NaN if there is one among them."""

    def codegen(context, builder, signature, args):
        pointer = builder.gep(data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        lowest = constant(float("-inf"))

        def larger(a: Any, b: Any) -> Any:
            return _float_intrinsic(builder, "maximum", a, b)

        def visit(place: Any, mask: Any, best: Any) -> Any:
            return larger(best, _masked_load(builder, place, mask, lowest))

        return across_lanes(builder, _row_loop(builder, pointer, args[2], lowest, visit), larger)

    return types.float32(x, types.int64, types.int64), codegen


def _make_exp_sum(*, store: bool) -> Any:
    @intrinsic
    def exp_sum(typing_context, x, offset, length, top, scale):
        def codegen(context, builder, signature, args):
            pointer = builder.gep(data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
            zero, top, scale = constant(0.0), spread(builder, args[3]), spread(builder, args[4])

            def visit(place: Any, mask: Any, total: Any) -> Any:
                value = builder.fsub(_masked_load(builder, place, mask, zero), top)
                power = builder.select(mask, exp(builder, builder.fmul(value, scale)), zero)
                if store:
                    _masked_store(builder, power, place, mask)
                return builder.fadd(total, power)

            return across_lanes(builder, _row_loop(builder, pointer, args[2], zero, visit), builder.fadd)

        return types.float32(x, types.int64, types.int64, types.float32, types.float32), codegen

    return exp_sum


# `f(x, offset, length, top, scale)`: sum of exp((value - top) * scale) over the `length` float32 from `x[offset]` on,
# in an order that depends on the length alone; the second also replaces the values by what it sums.
exp_sum = _make_exp_sum(store=False)
exp_in_place = _make_exp_sum(store=True)


@intrinsic
def transpose_block(typing_context, x, offset, stride, rows, out, out_offset, out_stride):
    """`rows` rows of VECTOR_WIDTH float32 in `x`, `stride` apart, to VECTOR_WIDTH rows of `rows` in `out`.

    For 1 to TILE_ROWS rows, on machines where TILE_ROWS is at most VECTOR_WIDTH. Rows are exchanged in pairs at
    distances 1, 2, 4 and so on: at each, the elements on the wrong side of a pair's diagonal change places.
    """

    def codegen(context, builder, signature, args):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(ir.FloatType(), VECTOR_WIDTH)
        count = args[3]
        source = builder.gep(data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        target = builder.gep(data_pointer(context, builder, signature.args[4], args[4]), [args[5]])
        rows = [ir.Constant(vector, ir.Undefined)] * VECTOR_WIDTH
        last = builder.sub(count, i64(1))
        for r in range(TILE_ROWS):
            # What is past the last row is not stored; the last row is read in its place.
            row = builder.select(builder.icmp_signed("<", i64(r), count), i64(r), last)
            rows[r] = builder.load(
                builder.bitcast(builder.gep(source, [builder.mul(args[2], row)]), vector.as_pointer())
            )
            rows[r].align = 4
        lanes = range(VECTOR_WIDTH)

        def chosen(a: Any, b: Any, order: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(i32, len(order)), order))

        distance = 1
        while distance < VECTOR_WIDTH:
            for first in (row for row in lanes if not row & distance):
                a, b = rows[first], rows[first + distance]
                rows[first] = chosen(a, b, [lane + (VECTOR_WIDTH - distance) * bool(lane & distance) for lane in lanes])
                rows[first + distance] = chosen(
                    a, b, [lane + (VECTOR_WIDTH if lane & distance else distance) for lane in lanes]
                )
            distance *= 2
        width = spread(builder, builder.trunc(count, i32))
        mask = builder.icmp_signed("<", ir.Constant(width.type, list(lanes)), width)
        for column, value in enumerate(rows):
            _masked_store(builder, value, builder.gep(target, [builder.mul(args[6], i64(column))]), mask)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, types.int64, out, types.int64, types.int64), codegen


@intrinsic
def atomic_add(typing_context, array, index, value):
    """Add to `array[index]` (int64) as one indivisible operation; returns the value before."""

    def codegen(context, builder, signature, args):
        pointer = builder.gep(data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context, array, index):
    """Read `array[index]` (int64) as other threads see it."""

    def codegen(context, builder, signature, args):
        pointer = builder.gep(data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def monotonic_ns(typing_context):
    """Nanoseconds of the system's monotonic clock (POSIX `clock_gettime`)."""

    def codegen(context, builder, signature, args):
        i64, i32 = ir.IntType(64), ir.IntType(32)
        moment = cgutils.alloca_once(builder, ir.ArrayType(i64, 2))
        pointer = builder.bitcast(moment, i64.as_pointer())
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(i32, [i32, i64.as_pointer()]), "clock_gettime"
        )
        builder.call(function, [i32(time.CLOCK_MONOTONIC), pointer])
        seconds, nanoseconds = (builder.load(builder.gep(pointer, [i64(i)])) for i in range(2))
        return builder.add(builder.mul(seconds, i64(1_000_000_000)), nanoseconds)

    return types.int64(), codegen


@intrinsic
def yield_processor(typing_context):
    """Offer this core to another runnable thread (POSIX `sched_yield`)."""

    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen
