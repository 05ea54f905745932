"""The inner block of the fused search: a product in registers that leaves one bit for each score.

A library's matrix product writes every score to memory, where another pass reads and compares it; with short vectors
that costs as much as the product. Here ROWS queries x COLUMNS gallery vectors are multiplied in registers and compared
there. The register-blocked product over packed panels is that of Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication" (ACM TOMS 34, 2008), without its loop over parts of the depth, as whole sums are compared.

It is written in LLVM's intermediate representation, which Numba compiles for the processor at hand: int8 through VNNI
(sums exact in int32, brought to cosines by the scales of both vectors), pairs of bf16 through AVX512-BF16 (products
exact in fp32, every sum rounded), fp32 through the fused multiply-adds of any other.
Importing this module loads Numba; import it where it is used.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

FEATURES = frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
LANES = 16 if "+avx512f" in FEATURES else 8
"""fp32 numbers in one of the kernel's vectors."""
ROWS = 12 if LANES == 16 else 6
"""Queries of a block: with two vectors of sums for each, the registers of a processor are just filled."""
COLUMNS = 2 * LANES
"""Gallery vectors of a block."""
DTYPES = tuple(
    name
    for name, usable in (
        ("int8", "+avx512vnni" in FEATURES if LANES == 16 else "+avxvnni" in FEATURES),
        ("bfloat16", "+avx512bf16" in FEATURES and LANES == 16),
        ("float32", "+fma" in FEATURES or "+neon" in FEATURES),
    )
    if usable
)
"""Number types that the kernel has instructions for here."""
ALIGNED = 64
"""Bytes at whose multiples the gallery's panels lie: an aligned vector is loaded in one step."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _vector(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


def _spread(builder: Any, one: Any) -> Any:
    """A vector whose lanes all are `one`."""
    none = ir.Constant(_vector(one.type), ir.Undefined)
    first = builder.insert_element(none, one, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, none, ir.Constant(_vector(_I32), [0] * LANES))


def _multiply_add(builder: Any, kind: str, sums: Any, left: Any, right: Any) -> Any:
    """`sums` plus the products of two vectors of 32-bit words: an fp32 number, a pair of bf16 or four int8 numbers.

    int8 words of the left are unsigned. Functions have the types that they had before LLVM 17, which later ones read.
    """
    name, operands = {
        "float32": (f"llvm.fma.v{LANES}f32", [left, right, sums]),
        "bfloat16": ("llvm.x86.avx512bf16.dpbf16ps.512", [sums, left, right]),
        "int8": (f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", [sums, left, right]),
    }[kind]
    signature = ir.FunctionType(sums.type, [one.type for one in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), operands)


def _at(builder: Any, data: Any, offset: Any) -> Any:
    return builder.gep(data, [offset])


def _loaded(builder: Any, data: Any, offset: Any, align: int) -> Any:
    """LANES numbers from `data` on."""
    kind = _vector(data.type.pointee).as_pointer()
    vector = builder.load(builder.bitcast(_at(builder, data, offset), kind))
    vector.align = align
    return vector


def _products(builder: Any, kind: str, panels: tuple[Any, Any], depth: Any, first: list[Any]) -> list[list[Any]]:
    """The sums of a block, ROWS times two vectors that begin as `first`, over `depth` steps through two panels."""
    before, (left, right) = builder.block, panels
    loop, after = builder.append_basic_block("depth"), builder.append_basic_block("multiplied")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    sums = [[builder.phi(one.type) for one in first] for _ in range(ROWS)]
    columns = builder.mul(step, _I64(COLUMNS))
    rights = [_loaded(builder, right, builder.add(columns, _I64(half * LANES)), 4 * LANES) for half in range(2)]
    rows = builder.mul(step, _I64(ROWS))
    for r, pair in enumerate(sums):
        spread = _spread(builder, builder.load(_at(builder, left, builder.add(rows, _I64(r)))))
        for half, phi in enumerate(pair):
            phi.add_incoming(first[half], before)
            phi.add_incoming(_multiply_add(builder, kind, phi, spread, rights[half]), loop)
    following = builder.add(step, _I64(1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, depth), loop, after)
    builder.position_at_end(after)
    return [[phi.incomings[1][0] for phi in pair] for pair in sums]


def _scored(builder: Any, sums: list[list[Any]], row_scales: Any, column_scales: Any, offsets: Any) -> list[list[Any]]:
    """Whole sums times the scales of their rows and columns, plus the offsets of the columns."""
    scales, added = (
        [_loaded(builder, data, _I64(half * LANES), 4) for half in range(2)] for data in (column_scales, offsets)
    )
    scores = []
    for r, pair in enumerate(sums):
        scale = _spread(builder, builder.load(_at(builder, row_scales, _I64(r))))
        scaled = [builder.fmul(builder.sitofp(one, scale.type), scales[half]) for half, one in enumerate(pair)]
        scores.append([_multiply_add(builder, "float32", added[half], one, scale) for half, one in enumerate(scaled)])
    return scores


def _compared(builder: Any, scores: list[list[Any]], row_bars: Any, column_bars: Any, masks: Any) -> Any:
    """Store for each row which columns reach the bar of the row or their own; whether any does."""
    bars = [_loaded(builder, column_bars, _I64(half * LANES), 4) for half in range(2)]
    every = _I32(0)
    for r, pair in enumerate(scores):
        row = _spread(builder, builder.load(_at(builder, row_bars, _I64(r))))
        mask = _I32(0)
        for half, score in enumerate(pair):
            lower = builder.select(builder.fcmp_ordered("<", bars[half], row), bars[half], row)
            reached = builder.bitcast(builder.fcmp_ordered(">=", score, lower), ir.IntType(LANES))
            mask = builder.or_(mask, builder.shl(builder.zext(reached, _I32), _I32(half * LANES)))
        builder.store(mask, _at(builder, masks, _I64(r)))
        every = builder.or_(every, mask)
    return builder.icmp_unsigned("!=", every, _I32(0))


@intrinsic
def reaching(
    context: Any,
    left_PKR: Any,
    i: Any,
    right_PKC: Any,
    j: Any,
    row_bars: Any,
    row_scales: Any,
    column_bars: Any,
    column_scales: Any,
    column_firsts: Any,
    column_offsets: Any,
    masks_R: Any,
) -> Any:
    """Multiply panel i of the queries with panel j of the gallery, compare, and fill `masks_R`; whether any bit is set.

    Panels, (P, K, ROWS) and (P, K, COLUMNS), are of words: uint32 (four int8 numbers), int32 (two bf16) or fp32. Bars,
    scales and offsets are fp32, for all places of all panels; masks are uint32, (ROWS,). All must be contiguous, and
    the gallery's panels begin at a multiple of ALIGNED bytes. int8 numbers of queries have 128 added; `column_firsts`,
    int32, are what sums begin with to make up for that. Only int8 has scales and offsets: score = sum x row's scale x
    column's scale + offset.

    Sums are in int32, or in fp32; then bf16 products and sums that are subnormal count as 0, which those of stored
    vectors, multiples of 2^-48, never are.
    """
    words = {types.uint32: "int8", types.int32: "bfloat16", types.float32: "float32"}

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = words[signature.args[0].dtype]
        left, right, bars, scales, *columns, masks = (
            context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 2, *range(4, 11))
        )
        depth = builder.extract_value(left.shape, 1)
        row, column = builder.mul(arguments[1], _I64(ROWS)), builder.mul(arguments[3], _I64(COLUMNS))
        panels = _at(builder, left.data, builder.mul(row, depth)), _at(builder, right.data, builder.mul(column, depth))
        row_bars, row_scales = (_at(builder, one.data, row) for one in (bars, scales))
        column_bars, column_scales, firsts, offsets = (_at(builder, one.data, column) for one in columns)
        if kind == "int8":
            first = [_loaded(builder, firsts, _I64(half * LANES), 4) for half in range(2)]
            sums = _products(builder, kind, panels, depth, first)
            scores = _scored(builder, sums, row_scales, column_scales, offsets)
        else:
            first = [ir.Constant(_vector(_F32), [0.0] * LANES)] * 2
            scores = _products(builder, kind, panels, depth, first)
        return _compared(builder, scores, row_bars, column_bars, masks.data)

    numbers = row_bars, row_scales, column_bars, column_scales, column_firsts, column_offsets
    return types.boolean(left_PKR, types.int64, right_PKC, types.int64, *numbers, masks_R), code


@intrinsic
def lowest(context: Any, mask: Any) -> Any:
    """Which is the lowest set bit of `mask`, which is not 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.cttz(arguments[0], ir.IntType(1)(1)), _I64)

    return types.int64(types.uint32), code


@intrinsic
def fetched(context: Any, right_GD: Any, g: Any, d: Any) -> Any:
    """Ask for the cache line of right_GD[g, d], without waiting for it."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        width = builder.extract_value(array.shape, 1)
        place = _at(builder, array.data, builder.add(builder.mul(arguments[1], width), arguments[2]))
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(right_GD, types.int64, types.int64), code
