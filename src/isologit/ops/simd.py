"""SIMD and threading primitives that Numba does not offer: the register-tile product, bit casts, atomics.

Each function here emits LLVM IR for the host's vector width. Nothing here knows what a model is.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def _host_vector_width() -> int:
    """float32 lanes of the widest vector register of this CPU."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


def _host_has_byte_products() -> bool:
    """Whether this CPU multiplies bytes four at a time, at its full vector width."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512vnni")) if VECTOR_WIDTH == 16 else bool(features.get("avxvnni"))


VECTOR_WIDTH = _host_vector_width()
HAS_BYTE_PRODUCTS = _host_has_byte_products()
PANEL_VECTORS = 2
_INTS = ir.VectorType(ir.IntType(32), VECTOR_WIDTH)
PANEL_WIDTH = PANEL_VECTORS * VECTOR_WIDTH  # output columns of one weight panel, and tokens of one KV block
# Tallest tile whose accumulators, two weight vectors and one broadcast fit the register file (16 or 32 registers).
TILE_ROWS = 12 if VECTOR_WIDTH == 16 else 6


def use_versioned_cache() -> None:
    """Keep compiled kernels in a folder named after the sources, so that an edited helper never meets a stale kernel.

    Numba invalidates its cache by the file of the outermost function only.
    """
    if os.environ.get("NUMBA_CACHE_DIR"):
        return
    digest = hashlib.sha256(numba.__version__.encode())
    package = Path(__file__).parent.parent
    for source in sorted([*package.glob("ops/*.py"), *package.glob("model/*.py")]):
        digest.update(source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    numba.config.CACHE_DIR = str(root / "isologit" / f"kernels-{digest.hexdigest()[:16]}")


use_versioned_cache()


def _data_pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _load_weights(builder: Any, pointer: Any, storage: str) -> Any:
    """One vector of weights widened exactly to float32; bytes as they are, four a lane."""
    wide = ir.VectorType(ir.FloatType(), VECTOR_WIDTH)
    if storage in ("float32", "bytes"):
        value = builder.load(builder.bitcast(pointer, (_INTS if storage == "bytes" else wide).as_pointer()))
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


def _constant(value: float) -> Any:
    return ir.Constant(ir.VectorType(ir.FloatType(), VECTOR_WIDTH), [value] * VECTOR_WIDTH)


def _dot_bytes(builder: Any, unsigned: Any, signed: Any, total: Any) -> Any:
    """`total` + the products of the four bytes of each lane, in int32 without rounding: AVX-512 VNNI's `vpdpbusd`."""
    if HAS_BYTE_PRODUCTS:
        signature = ir.FunctionType(_INTS, [_INTS] * 3)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * VECTOR_WIDTH}"
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), [total, unsigned, signed])
    for byte in range(4):
        up, down = (ir.Constant(_INTS, [shift] * VECTOR_WIDTH) for shift in (24 - 8 * byte, 24))
        a = builder.lshr(builder.shl(unsigned, up), down)
        b = builder.ashr(builder.shl(signed, up), down)
        total = builder.add(total, builder.mul(a, b))
    return total


def _spread(builder: Any, scalar: Any) -> Any:
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


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return _float_intrinsic(builder, "fma", a, b, c)


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for a cache line that will be read soon; any address is allowed."""
    i32, address = ir.IntType(32), ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [address, i32, i32, i32]), "llvm.prefetch.p0"
    )
    read, keep, data = (ir.Constant(i32, value) for value in (0, 2, 1))
    builder.call(function, [builder.bitcast(pointer, address), read, keep, data])


def _exp(builder: Any, x: Any) -> Any:
    """exp(x) within 2 ulp; the range reduction and polynomial of the Cephes library's `expf`."""
    bits = ir.VectorType(ir.IntType(32), VECTOR_WIDTH)
    x = _float_intrinsic(builder, "maxnum", _float_intrinsic(builder, "minnum", x, _constant(88.0)), _constant(-87.0))
    n = _float_intrinsic(builder, "floor", _fma(builder, x, _constant(1.44269504088896341), _constant(0.5)))
    r = _fma(builder, n, _constant(-0.693359375), x)
    r = _fma(builder, n, _constant(2.12194440e-4), r)
    p = _constant(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = _fma(builder, p, r, _constant(coefficient))
    y = _fma(builder, builder.fmul(p, r), r, builder.fadd(r, _constant(1.0)))
    biased = builder.add(builder.fptosi(n, bits), ir.Constant(bits, [127] * VECTOR_WIDTH))
    power = builder.bitcast(builder.shl(biased, ir.Constant(bits, [23] * VECTOR_WIDTH)), y.type)
    return builder.fmul(y, power)


def _swiglu(builder: Any, gate: Any, up: Any) -> Any:
    """gate / (1 + exp(-gate)) * up."""
    denominator = builder.fadd(_exp(builder, builder.fneg(gate)), _constant(1.0))
    return builder.fmul(builder.fdiv(gate, denominator), up)


_EXP_POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
)  # fmt: skip
_STORAGE_OF_DTYPE = {types.float32: "float32", types.int16: "float16", types.uint16: "bfloat16"}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bytes": 4}  # of a column at one place of the depth
CACHE_LINE = 64  # bytes
EPILOGUES = ("store", "add", "swiglu")


LINES_PER_PASS = 4  # most lines that a pass of a tile product with a stream asks for
STREAM_CHUNK = 4096  # bytes


def make_tile_product(heights: tuple[int, ...], epilogue: str, *, panels: int = 1, stream: bool = False) -> Any:
    """Register-tile product `x[rows, K] @ w[K, PANEL_WIDTH]` with an epilogue, as a Numba intrinsic.

    Call: `tile(x, x_offset, x_step, w, w_offset, w_stride, K, fetch, pace, start, start_offset, start_stride, out,
    out_offset, out_stride, rows)`; arrays are flat, offsets and strides count elements; all are float32 but `w`, which
    is float32, float16 bits (int16) or bfloat16 bits (uint16), widened exactly. `rows` is one of `heights`, each of
    which has a loop of its own; for another number nothing is computed. `x` is transposed: row r's k-th value lies at
    `x_offset + k * x_step + r`, so that one pointer serves all rows of a tile. Weights from `fetch` elements behind
    the tile's own on are asked into the cache meanwhile, `pace` further each time: with a cache line of weights as many
    as the tile reads, with half a line half as many. Every output element is one chain of fused multiply-adds in
    ascending k that begins with its value in `start` (rows of PANEL_WIDTH * panels; one row of zeros with stride 0
    begins anew). However many rows there are, the chain is the same: that is why a row's result does not depend on
    what it is batched with.

    epilogue: "store" writes the sums to `out`, "add" adds them to it, "swiglu" takes the first half of a panel's
    columns as gate and the second as up and writes silu(gate) * up, VECTOR_WIDTH columns (Shazeer 2020).
    stream: two more arguments in front of `rows`, `chunks` and `rate`: other memory is asked into the cache meanwhile,
    chunk after chunk of STREAM_CHUNK bytes, whose addresses are in `chunks` (int64), `rate` / 256 of LINES_PER_PASS
    lines every second value of k. There must be an address more than the lines that are asked for fill.
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
                _data_pointer(context, builder, t, a)
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
    multiply_add = _dot_bytes if storage == "bytes" else _fma
    x_ptr, x_off, x_step, w_ptr, w_off, w_ld, depth, fetch, pace = operands
    x_base = builder.gep(x_ptr, [x_off])
    w_offsets, fetches = [w_off], [fetch]
    if panels > 1:
        given = [builder.load(builder.gep(w_off, [i64(i)])) for i in range(2 * panels)]
        w_offsets, fetches = given[::2], [builder.add(fetch, own) for own in given[1::2]]
    w_bases = [builder.gep(w_ptr, [offset]) for offset in w_offsets]
    asked_bases = [builder.gep(base, [distance]) for base, distance in zip(w_bases, fetches, strict=True)]

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
        w_now, (asked, *now_sums) = now[:panels], now[panels:]
        builder.cbranch(builder.icmp_signed("<", k, limit), body, done)
        builder.position_at_end(body)
        if step == unroll:
            for number in range(panels * lines_per_pass):
                which, place = divmod(number, lines_per_pass)
                _prefetch(builder, builder.gep(asked_bases[which], [builder.add(asked, times(pace, place))]))
            if stream:
                chunks, rate = stream
                first = times(k, LINES_PER_PASS // 2)
                _ask_stream(builder, chunks, rate, first, unroll // 2 * LINES_PER_PASS)
        current = list(now_sums)
        for u in range(step):
            weights = [
                _load_weights(builder, builder.gep(base, [builder.add(times(w_ld, u), i64(j * VECTOR_WIDTH))]), storage)
                for base in w_now
                for j in range(PANEL_VECTORS)
            ]
            for r in range(rows):
                scalar = _spread(builder, builder.load(builder.gep(x_now, [builder.add(times(x_step, u), i64(r))])))
                for j in range(vectors):
                    index = r * vectors + j
                    current[index] = multiply_add(builder, weights[j], scalar, current[index])
        following = [
            builder.add(k, i64(step)),
            builder.gep(x_now, [times(x_step, step)]),
            *[builder.gep(base, [times(w_ld, step)]) for base in w_now],
            builder.add(asked, times(pace, lines_per_pass)),
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


def _ask_stream(builder: Any, chunks: Any, rate: Any, first: Any, count: int) -> None:
    """Ask for the lines that are due at the places `first` to `first` + `count` - 1 of a stream."""
    i64, address = ir.IntType(64), ir.IntType(8).as_pointer()
    lines = STREAM_CHUNK // CACHE_LINE
    for place in range(count):
        line = builder.lshr(builder.mul(builder.add(first, i64(place)), rate), i64(8))
        chunk = builder.load(builder.gep(chunks, [builder.udiv(line, i64(lines))]))
        within = builder.mul(builder.urem(line, i64(lines)), i64(CACHE_LINE))
        _prefetch(builder, builder.inttoptr(builder.add(chunk, within), address))


@intrinsic
def bound_tile(
    typing_context, x, x_offset, x_step, w, w_offset, depth, fetch, pace, columns, column_offset, rows_to_take,
    factors, first_row, tops, tops_offset, rows,
):  # fmt: skip
    """Largest upper bound of a panel's logits for each row of a tile of bytes, into `tops` from `tops_offset` on.

    x: int32 of four int8 each, transposed as in `make_tile_product`; w: int32 of four uint8 each, a weight plus 128;
    depth: in fours. With t the product of x and w less `rows_to_take[row]` (int32), and s, e, n the panel's float32
    `columns` [3, PANEL_WIDTH], a column's bound is (t * s + factors[row, 0] * e + factors[row, 1] * n) *
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
            _data_pointer(context, builder, t, a)
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
                [ir.Constant(_INTS, [0] * VECTOR_WIDTH)] * (height * PANEL_VECTORS),
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
                taken = _spread(builder, builder.load(builder.gep(take, [row])))
                error, norm, scale = (
                    builder.load(builder.gep(factor, [builder.add(builder.mul(row, i64(3)), i64(i))])) for i in range(3)
                )
                bounds = []
                for j in range(PANEL_VECTORS):
                    s, e, n = parts[j::PANEL_VECTORS]
                    exact = builder.sitofp(builder.sub(sums[r * PANEL_VECTORS + j], taken), vector)
                    bound = _fma(builder, _spread(builder, error), e, builder.fmul(exact, s))
                    bounds.append(_fma(builder, _spread(builder, norm), n, bound))
                top = bounds[0]
                for other in bounds[1:]:
                    top = _larger(builder, top, other)
                top = _across_lanes(builder, top, lambda a, b: _larger(builder, a, b))
                target = builder.gep(tops_ptr, [builder.add(tops_off, i64(r))])
                builder.store(builder.fmul(top, scale), target)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger lanes of two vectors without NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


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
    left = _spread(builder, builder.trunc(builder.sub(length, k), i32))
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


def _across_lanes(builder: Any, value: Any, combine: Any) -> Any:
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
        pointer = builder.gep(_data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        lowest = _constant(float("-inf"))

        def larger(a: Any, b: Any) -> Any:
            return _float_intrinsic(builder, "maximum", a, b)

        def visit(place: Any, mask: Any, best: Any) -> Any:
            return larger(best, _masked_load(builder, place, mask, lowest))

        return _across_lanes(builder, _row_loop(builder, pointer, args[2], lowest, visit), larger)

    return types.float32(x, types.int64, types.int64), codegen


def _make_exp_sum(*, store: bool) -> Any:
    @intrinsic
    def exp_sum(typing_context, x, offset, length, top, scale):
        def codegen(context, builder, signature, args):
            pointer = builder.gep(_data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
            zero, top, scale = _constant(0.0), _spread(builder, args[3]), _spread(builder, args[4])

            def visit(place: Any, mask: Any, total: Any) -> Any:
                value = builder.fsub(_masked_load(builder, place, mask, zero), top)
                power = builder.select(mask, _exp(builder, builder.fmul(value, scale)), zero)
                if store:
                    _masked_store(builder, power, place, mask)
                return builder.fadd(total, power)

            return _across_lanes(builder, _row_loop(builder, pointer, args[2], zero, visit), builder.fadd)

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
        source = builder.gep(_data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        target = builder.gep(_data_pointer(context, builder, signature.args[4], args[4]), [args[5]])
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
        width = _spread(builder, builder.trunc(count, i32))
        mask = builder.icmp_signed("<", ir.Constant(width.type, list(lanes)), width)
        for column, value in enumerate(rows):
            _masked_store(builder, value, builder.gep(target, [builder.mul(args[6], i64(column))]), mask)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, types.int64, out, types.int64, types.int64), codegen


@intrinsic
def atomic_add(typing_context, array, index, value):
    """Add to `array[index]` (int64) as one indivisible operation; returns the value before."""

    def codegen(context, builder, signature, args):
        pointer = builder.gep(_data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context, array, index):
    """Read `array[index]` (int64) as other threads see it."""

    def codegen(context, builder, signature, args):
        pointer = builder.gep(_data_pointer(context, builder, signature.args[0], args[0]), [args[1]])
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
