"""The register-tile products: a few rows by one panel of columns, as LLVM vector code for the host.

One emitter of loops serves products of float32 (weights of 32 or 16 bits), which end in an epilogue, and products of
bytes, which end in upper bounds. Nothing here knows what a model is.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from isologit.backends.cpu.simd import (
    BYTE_PRODUCTS,
    CACHE_LINE,
    INTS,
    PANEL_VECTORS,
    PANEL_WIDTH,
    TILE_ROWS,
    WORDS_OF_FOUR,
    across_lanes,
    constant,
    data_pointer,
    exp,
    fma,
    prefetch,
    spread,
)
from isologit.common.compiler import VECTOR_WIDTH

_STORAGE_OF_DTYPE = {types.float32: "float32", types.int16: "float16", types.uint16: "bfloat16"}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bytes": 4}  # of a column at one place of the depth
EPILOGUES = ("store", "add", "swiglu")

llvm.initialize_native_asmparser()

LINES_PER_PASS = 4  # most lines that a pass of a tile product with a stream prefetches
STREAM_CHUNK = 4096  # bytes


def _load_weights(builder: Any, pointer: Any, storage: str) -> Any:
    """One vector of weights widened exactly to float32; bytes as they are, four a lane."""
    wide = ir.VectorType(ir.FloatType(), VECTOR_WIDTH)
    if storage in ("float32", "bytes"):
        value = builder.load(builder.bitcast(pointer, (INTS if storage == "bytes" else wide).as_pointer()))
        value.align = 4
        return value
    if storage == "float16":
        narrow = ir.VectorType(ir.HalfType(), VECTOR_WIDTH)
        value = builder.load(builder.bitcast(pointer, narrow.as_pointer()))
        value.align = 2
        return builder.fpext(value, wide)
    bits16 = ir.VectorType(ir.IntType(16), VECTOR_WIDTH)
    bits32 = ir.VectorType(ir.IntType(32), VECTOR_WIDTH)
    value = builder.load(builder.bitcast(pointer, bits16.as_pointer()))
    value.align = 2
    shifted = builder.shl(builder.zext(value, bits32), ir.Constant(bits32, [16] * VECTOR_WIDTH))
    return builder.bitcast(shifted, wide)


def _dot_bytes(builder: Any, unsigned: Any, signed: Any, total: Any) -> Any:
    """`total` + the products of the four bytes of each lane, in int32 without rounding: VNNI's `vpdpbusd`."""
    if BYTE_PRODUCTS == "fours":
        signature = ir.FunctionType(INTS, [INTS] * 3)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * VECTOR_WIDTH}"
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [total, unsigned, signed])
    for byte in range(4):
        up, down = (ir.Constant(INTS, [shift] * VECTOR_WIDTH) for shift in (24 - 8 * byte, 24))
        a = builder.lshr(builder.shl(unsigned, up), down)
        b = builder.ashr(builder.shl(signed, up), down)
        total = builder.add(total, builder.mul(a, b))
    return total


def _dot_pairs(builder: Any, first: Any, second: Any, total: Any) -> Any:
    """`total` + the products of the two int16 of each lane, in int32 without rounding: `vpmaddwd`.

    NOTE: as one piece of assembly, because LLVM adds products to each other before it adds them to the total, and then
    has many more of them than registers.
    """
    product, any_register = {8: ("%ymm15", "x"), 16: ("%zmm31", "v")}[VECTOR_WIDTH]
    return builder.asm(
        ir.FunctionType(INTS, [INTS] * 3),
        f"vpmaddwd $2, $3, {product}\n\tvpaddd {product}, $0, $0",
        f"={any_register},0,{any_register},{any_register},~{{{product[1:]}}}",
        [total, first, second],
        side_effect=False,
    )


def _every_second_byte(builder: Any, fours: Any, first: int) -> Any:
    """The unsigned bytes `first` and `first` + 2 of each lane as a pair of int16."""
    if first == 0:
        return builder.and_(fours, ir.Constant(INTS, [0x00FF00FF] * VECTOR_WIDTH))
    halves = ir.VectorType(ir.IntType(16), 2 * VECTOR_WIDTH)
    moved = builder.lshr(builder.bitcast(fours, halves), ir.Constant(halves, [8] * 2 * VECTOR_WIDTH))
    return builder.bitcast(moved, INTS)


def _swiglu(builder: Any, gate: Any, up: Any) -> Any:
    """gate / (1 + exp(-gate)) * up."""
    denominator = builder.fadd(exp(builder, builder.fneg(gate)), constant(1.0))
    return builder.fmul(builder.fdiv(gate, denominator), up)


def make_tile_product(heights: tuple[int, ...], epilogue: str, *, panels: int = 1, stream: bool = False) -> Any:
    """Register-tile product `x[rows, K] @ w[K, PANEL_WIDTH]` with an epilogue, as a Numba intrinsic.

    Call: `tile(x, x_offset, x_step, w, w_offset, w_stride, K, fetch, pace, start, start_offset, start_stride, out,
    out_offset, out_stride, rows)`; arrays are flat, offsets and strides count elements; all are float32 but `w`, which
    is float32, float16 bits (int16) or bfloat16 bits (uint16), widened exactly. `rows` is one of `heights`, each of
    which has a loop of its own; for another number nothing is computed. `x` is transposed: row r's k-th value lies at
    `x_offset + k * x_step + r`, so that one pointer serves all rows of a tile. Weights from `fetch` elements behind
    the tile's own on are prefetched meanwhile, `pace` further each time: with a cache line of weights as many
    as the tile reads, with half a line half as many. Every output element is one chain of fused multiply-adds in
    ascending k that begins with its value in `start` (rows of PANEL_WIDTH * panels; one row of zeros with stride 0
    begins anew). However many rows there are, the chain is the same: that is why a row's result does not depend on
    what it is batched with.

    epilogue: "store" writes the sums to `out`, "add" adds them to it, "swiglu" takes the first half of a panel's
    columns as gate and the second as up and writes silu(gate) * up, VECTOR_WIDTH columns (Shazeer 2020).
    stream: two more arguments in front of `rows`, `chunks` and `rate`: other memory is prefetched meanwhile,
    chunk after chunk of STREAM_CHUNK bytes, whose addresses are in `chunks` (int64), `rate` / 256 of LINES_PER_PASS
    lines every second value of k. There must be an address more than the prefetched lines fill.
    panels: with more than one, `w_offset` is an int64 array of two values a panel, its offset and what it adds to
    `fetch`, and the results stand side by side in `out`: short tiles need several chains in flight to hide the latency
    of the multiply-add.
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"unknown epilogue {epilogue!r}; there are {', '.join(EPILOGUES)}")

    def emit(arguments: tuple[Any, ...]) -> Any:
        storage = _STORAGE_OF_DTYPE[arguments[3].dtype]

        def codegen(context, builder, signature, args):
            *values, rows = [
                data_pointer(context, builder, t, a)
                if isinstance(t, types.Array)
                else context.cast(builder, a, t, types.int64)
                for t, a in zip(signature.args, args, strict=True)
            ]
            end = builder.append_basic_block("tile.end")
            switch = builder.switch(rows, end)
            for height in heights:
                block = builder.append_basic_block(f"tile.{height}")
                switch.add_case(ir.IntType(64)(height), block)
                builder.position_at_end(block)
                _emit_tile(builder, values, height, panels, storage, epilogue)
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*arguments), codegen

    @intrinsic
    def tile(
        typing_context, x, x_offset, x_step, w, w_offset, w_stride, depth, fetch, pace, start, start_offset,
        start_stride, out, out_offset, out_stride, rows,
    ):  # fmt: skip
        return emit(
            (
                x, x_offset, x_step, w, w_offset, w_stride, depth, fetch, pace, start, start_offset, start_stride,
                out, out_offset, out_stride, rows,
            )
        )  # fmt: skip

    @intrinsic
    def streaming_tile(
        typing_context, x, x_offset, x_step, w, w_offset, w_stride, depth, fetch, pace, start, start_offset,
        start_stride, out, out_offset, out_stride, chunks, rate, rows,
    ):  # fmt: skip
        return emit(
            (
                x, x_offset, x_step, w, w_offset, w_stride, depth, fetch, pace, start, start_offset, start_stride,
                out, out_offset, out_stride, chunks, rate, rows,
            )
        )  # fmt: skip

    return streaming_tile if stream else tile


def _emit_tile(builder: Any, values: list[Any], rows: int, panels: int, storage: str, epilogue: str) -> None:
    """The product of a tile of so many rows; `values` are the arguments of the call but `rows`."""
    i64 = ir.IntType(64)
    vector = ir.VectorType(ir.FloatType(), VECTOR_WIDTH)
    vectors = PANEL_VECTORS * panels
    operands, (start_ptr, start_off, start_ld, out_ptr, out_off, out_ld), stream = values[:9], values[9:15], values[15:]

    def place(pointer: Any, offset: Any, stride: Any, row: int, j: int) -> Any:
        index = builder.add(offset, builder.add(builder.mul(stride, i64(row)), i64(j * VECTOR_WIDTH)))
        return builder.bitcast(builder.gep(pointer, [index]), vector.as_pointer())

    sums = []
    for r in range(rows):
        for j in range(vectors):
            sums.append(builder.load(place(start_ptr, start_off, start_ld, r, j)))
            sums[-1].align = 4
    sums = _emit_sums(builder, operands, sums, rows, panels, storage, stream)
    for r in range(rows):
        results = sums[r * vectors : (r + 1) * vectors]
        if epilogue == "swiglu":
            results = [_swiglu(builder, *results[j : j + 2]) for j in range(0, vectors, PANEL_VECTORS)]
        for j, value in enumerate(results):
            pointer = place(out_ptr, out_off, out_ld, r, j)
            if epilogue == "add":
                previous = builder.load(pointer)
                previous.align = 4
                value = builder.fadd(previous, value)
            builder.store(value, pointer).align = 4


def _emit_sums(
    builder: Any, operands: list[Any], sums: list[Any], rows: int, panels: int, storage: str, stream: Any = ()
) -> list[Any]:
    """The loops over the depth of a tile; returns `sums`, PANEL_VECTORS * panels vectors a row, with the products."""
    i64 = ir.IntType(64)
    unroll = 4 if rows <= 2 else 2
    vectors = PANEL_VECTORS * panels
    lines_per_pass = unroll * PANEL_WIDTH * _BYTES[storage] // CACHE_LINE
    words = WORDS_OF_FOUR if storage == "bytes" else 1
    multiply_add = fma if storage != "bytes" else _dot_bytes if words == 1 else _dot_pairs
    x_ptr, x_off, x_step, w_ptr, w_off, w_ld, depth, fetch, pace = operands
    x_base = builder.gep(x_ptr, [x_off])
    w_offsets, fetches = [w_off], [fetch]
    if panels > 1:
        given = [builder.load(builder.gep(w_off, [i64(i)])) for i in range(2 * panels)]
        w_offsets, fetches = given[::2], [builder.add(fetch, own) for own in given[1::2]]
    w_bases = [builder.gep(w_ptr, [offset]) for offset in w_offsets]
    prefetch_bases = [builder.gep(base, [distance]) for base, distance in zip(w_bases, fetches, strict=True)]

    def times(value: Any, count: int) -> Any:
        return builder.mul(value, i64(count))

    def loop(start: Any, step: int, limit: Any, pointers: list[Any], sums: list[Any]) -> Any:
        """Emit `for k in range(start, limit, step)`; returns k, pointers and sums as they are after it."""
        before = builder.basic_block
        head = builder.append_basic_block("tile.head")
        body = builder.append_basic_block("tile.body")
        done = builder.append_basic_block("tile.done")
        builder.branch(head)
        builder.position_at_end(head)
        initial = [start, *pointers, *sums]
        phis = [builder.phi(value.type) for value in initial]
        for phi, value in zip(phis, initial, strict=True):
            phi.add_incoming(value, before)
        k, x_now, *now = phis
        w_now, (ahead, *now_sums) = now[:panels], now[panels:]
        builder.cbranch(builder.icmp_signed("<", k, limit), body, done)
        builder.position_at_end(body)
        if step == unroll:
            for number in range(panels * lines_per_pass):
                which, place = divmod(number, lines_per_pass)
                prefetch(builder, builder.gep(prefetch_bases[which], [builder.add(ahead, times(pace, place))]))
            if stream:
                chunks, rate = stream
                first = times(k, LINES_PER_PASS // 2)
                _prefetch_stream(builder, chunks, rate, first, unroll // 2 * LINES_PER_PASS)
        current = list(now_sums)
        for u in range(step):
            weights = [
                _load_weights(builder, builder.gep(base, [builder.add(times(w_ld, u), i64(j * VECTOR_WIDTH))]), storage)
                for base in w_now
                for j in range(PANEL_VECTORS)
            ]
            for word in range(words):
                factors = weights if words == 1 else [_every_second_byte(builder, value, word) for value in weights]
                for r in range(rows):
                    place = builder.add(times(x_step, u), i64(words * r + word))
                    scalar = spread(builder, builder.load(builder.gep(x_now, [place])))
                    for j in range(vectors):
                        index = r * vectors + j
                        current[index] = multiply_add(builder, factors[j], scalar, current[index])
        following = [
            builder.add(k, i64(step)),
            builder.gep(x_now, [times(x_step, step)]),
            *[builder.gep(base, [times(w_ld, step)]) for base in w_now],
            builder.add(ahead, times(pace, lines_per_pass)),
            *current,
        ]
        for phi, value in zip(phis, following, strict=True):
            phi.add_incoming(value, builder.basic_block)
        builder.branch(head)
        builder.position_at_end(done)
        return k, phis[1 : 3 + panels], now_sums

    whole = builder.and_(depth, i64(-unroll))
    k, pointers, sums = loop(i64(0), unroll, whole, [x_base, *w_bases, i64(0)], sums)
    result: list[Any] = loop(k, 1, depth, pointers, sums)[2]
    return result


def _prefetch_stream(builder: Any, chunks: Any, rate: Any, first: Any, count: int) -> None:
    """Prefetch the lines that are due at the places `first` to `first` + `count` - 1 of a stream."""
    i64, address = ir.IntType(64), ir.IntType(8).as_pointer()
    lines = STREAM_CHUNK // CACHE_LINE
    for place in range(count):
        line = builder.lshr(builder.mul(builder.add(first, i64(place)), rate), i64(8))
        chunk = builder.load(builder.gep(chunks, [builder.udiv(line, i64(lines))]))
        within = builder.mul(builder.urem(line, i64(lines)), i64(CACHE_LINE))
        prefetch(builder, builder.inttoptr(builder.add(chunk, within), address))


@intrinsic
def bound_tile(
    typing_context, x, x_offset, x_step, w, w_offset, depth, fetch, pace, columns, column_offset, rows_to_take,
    factors, first_row, tops, tops_offset, rows,
):  # fmt: skip
    """Largest upper bound of a panel's logits for each row of a tile of bytes, into `tops` from `tops_offset` on.

    x: int32, for each place of the depth WORDS_OF_FOUR of each row, side by side: four int8, or with products in pairs
    two int16 of the first and the third, and two of the second and the fourth. w: int32 of four uint8 each, a weight
    plus 128; depth: in fours. With t the product of x and w less `rows_to_take[row]` (int32), and s, e, n the panel's
    float32 `columns` [3, PANEL_WIDTH], a column's bound is (t * s + factors[row, 0] * e + factors[row, 1] * n) *
    factors[row, 2]. Rows of the tile are numbered from `first_row` on; 1 to TILE_ROWS of them.
    """
    signature = types.void(
        x, x_offset, x_step, w, w_offset, depth, fetch, pace, columns, column_offset, rows_to_take, factors, first_row,
        tops, tops_offset, rows,
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        vector = ir.VectorType(ir.FloatType(), VECTOR_WIDTH)
        values = [
            data_pointer(context, builder, t, a)
            if isinstance(t, types.Array)
            else context.cast(builder, a, t, types.int64)
            for t, a in zip(signature.args, args, strict=True)
        ]
        x_ptr, x_off, x_st, w_ptr, w_off, deep, ahead, pace_, columns_ptr, column, take, factor, first, *out = values
        tops_ptr, tops_off, count = out
        operands = [x_ptr, x_off, x_st, w_ptr, w_off, i64(PANEL_WIDTH), deep, ahead, pace_]
        end = builder.append_basic_block("bound.end")
        switch = builder.switch(count, end)
        for height in range(1, TILE_ROWS + 1):
            block = builder.append_basic_block(f"bound.{height}")
            switch.add_case(i64(height), block)
            builder.position_at_end(block)
            sums = _emit_sums(
                builder,
                operands,
                [ir.Constant(INTS, [0] * VECTOR_WIDTH)] * (height * PANEL_VECTORS),
                height,
                1,
                "bytes",
            )
            parts = []
            for i in range(3 * PANEL_VECTORS):
                place = builder.gep(columns_ptr, [builder.add(column, i64(i * VECTOR_WIDTH))])
                parts.append(builder.load(builder.bitcast(place, vector.as_pointer())))
                parts[-1].align = 4
            for r in range(height):
                row = builder.add(first, i64(r))
                taken = spread(builder, builder.load(builder.gep(take, [row])))
                error, norm, scale = (
                    builder.load(builder.gep(factor, [builder.add(builder.mul(row, i64(3)), i64(i))])) for i in range(3)
                )
                bounds = []
                for j in range(PANEL_VECTORS):
                    s, e, n = parts[j::PANEL_VECTORS]
                    exact = builder.sitofp(builder.sub(sums[r * PANEL_VECTORS + j], taken), vector)
                    bound = fma(builder, spread(builder, error), e, builder.fmul(exact, s))
                    bounds.append(fma(builder, spread(builder, norm), n, bound))
                top = bounds[0]
                for other in bounds[1:]:
                    top = _larger(builder, top, other)
                top = across_lanes(builder, top, lambda a, b: _larger(builder, a, b))
                target = builder.gep(tops_ptr, [builder.add(tops_off, i64(r))])
                builder.store(builder.fmul(top, scale), target)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger lanes of two vectors without NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)
