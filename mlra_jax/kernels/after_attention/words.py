"""Numbers that CTAs and devices hear from each other: words of device memory, first `EMPTY`.

Features by rows of the batch lie in registers as products have them (`TILE`), features first.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from mlra_jax.kernels.after_attention.plan import SLAB, STRIDE
from mlra_jax.kernels.exchange.mosaic_gpu import EMPTY, read_words, write_words

TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
LINE = plgpu.Layout.WG_STRIDED((STRIDE,), vec_size=4)


def _pointers(ref, layout, shape):
    """(pointer, first index) of what a thread holds of an array that is whole in memory."""
    base = mgpu.utils.memref_ptr(ref)
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    index = ir.IndexType.get()
    for indices in layout.thread_idxs(shape):
        offset = indices[0]
        for size, i in zip(shape[1:], indices[1:], strict=True):
            offset = arith.addi(arith.muli(offset, arith.constant(index, size)), i)
        offset = arith.index_cast(i64, offset)
        yield mgpu.utils.getelementptr(base, [offset], i32), indices[0]


def tell(value, ref) -> None:
    """Writes float32 where it is waited for, perhaps on another device."""
    layout = TILE if value.ndim == 2 else COLUMN

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def write(ctx, value, ref):
        pointers = _pointers(ref, value.layout, value.shape)
        for (pointer, _), numbers in zip(pointers, value.registers.flat, strict=True):
            words = mgpu.utils.bitcast(numbers, _words(value.layout.vector_length))
            empty = arith.cmpi(arith.CmpIPredicate.eq, words, _all(words.type, EMPTY))
            write_words(pointer, arith.select(empty, _all(words.type, 0), words))

    write(value, ref)


def put(value, ref, column, columns: int) -> None:
    """Writes features by rows where rows of so many columns are, from a column on."""

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def write(ctx, value, ref, column):
        i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
        index, base = ir.IndexType.get(), mgpu.utils.memref_ptr(ref)
        column = arith.index_cast(index, column.registers.flat[0])
        places = value.layout.thread_idxs(value.shape)
        for (feature, row), numbers in zip(places, value.registers.flat, strict=True):
            words = mgpu.utils.bitcast(numbers, _words(value.layout.vector_length))
            for i in range(value.layout.vector_length):
                at = arith.addi(row, arith.constant(index, i))
                at = arith.addi(arith.muli(at, arith.constant(index, columns)), feature)
                at = arith.index_cast(i64, arith.addi(at, column))
                word = vector.broadcast(_words(1), vector.extract(words, [], [i]))
                write_words(mgpu.utils.getelementptr(base, [at], i32), word)

    write(value, ref, jnp.int32(column))


def empty(ref, layout, shape) -> None:
    """Makes memory of this device ready to be written again."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def write(ctx, ref):
        lying = layout.to_mgpu()
        length = getattr(lying, "vec_size", None) or lying.vector_length
        for pointer, _ in _pointers(ref, lying, shape):
            write_words(pointer, _all(_words(length), EMPTY))

    write(ref)


def fence() -> None:
    @plgpu.inline_mgpu(arg_types=())
    def order(ctx):
        void = ir.Type.parse("!llvm.void")
        text = "fence.acq_rel.gpu;"
        llvm.inline_asm(void, [], text, "~{memory}", has_side_effects=True)

    order()


def hear(refs, rows: int, limit: int = SLAB, patiently: bool = False) -> list[jax.Array]:
    """Blocks of float32 when all of them have been told.

    Features from `limit` on are 0, and not waited for. Where all CTAs wait, which would keep memory
    busy, they do it `patiently`: by looking at one word of each block until it is there.
    """
    shape, layout = (SLAB, rows), TILE
    out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=(out,) * len(refs))
    def read(ctx, *refs):
        lying, i32 = layout.to_mgpu(), ir.IntegerType.get_signless(32)
        kind = _words(lying.vector_length)
        if patiently:
            _wait_for_one(refs)
        places = [place for ref in refs for place in _pointers(ref, lying, shape)]
        loop = scf.WhileOp([kind] * len(places), [_all(kind, EMPTY)] * len(places))
        with ir.InsertionPoint(loop.before.blocks.append(*[kind] * len(places))):
            found, missing = [], []
            for pointer, index in places:
                words = read_words(pointer, lying.vector_length)
                if limit < SLAB:
                    index = arith.index_cast(i32, index)
                    wanted = arith.cmpi(arith.CmpIPredicate.ult, index, arith.constant(i32, limit))
                    words = arith.select(wanted, words, _all(kind, 0))
                found.append(words)
                missing.append(arith.cmpi(arith.CmpIPredicate.eq, words, _all(kind, EMPTY)))
            any_missing = functools.reduce(arith.ori, missing)
            bits = [vector.extract(any_missing, [], [i]) for i in range(lying.vector_length)]
            scf.condition(functools.reduce(arith.ori, bits), found)
        block = loop.after.blocks.append(*[kind] * len(places))
        with ir.InsertionPoint(block):
            scf.yield_(list(block.arguments))
        # Threads end their loops apart; what comes next is often for a whole warp.
        mgpu.utils.warp_barrier()
        real = ir.VectorType.get((lying.vector_length,), ir.F32Type.get())
        values = [mgpu.utils.bitcast(words, real) for words in loop.results]
        arrays, count = [], len(values) // len(refs)
        for n in range(len(refs)):
            registers = np.empty(lying.registers_shape(shape), dtype=object)
            registers.flat = values[n * count : (n + 1) * count]
            arrays.append(
                mgpu.FragmentedArray(_registers=registers, _layout=lying, _is_signed=None)
            )
        return tuple(arrays)

    found = read(*refs)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _wait_for_one(refs) -> None:
    """Until the first word of each array is there, each thread watching one."""
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(mgpu.utils.thread_idx(), arith.constant(i32, len(refs)))
    pointer = mgpu.utils.memref_ptr(refs[0])
    for n, ref in enumerate(refs[1:], 1):
        mine = arith.cmpi(arith.CmpIPredicate.eq, thread, arith.constant(i32, n))
        pointer = arith.select(mine, mgpu.utils.memref_ptr(ref), pointer)
    loop = scf.WhileOp([], [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        word = vector.extract(read_words(pointer, 1), [], [0])
        scf.condition(arith.cmpi(arith.CmpIPredicate.eq, word, arith.constant(i32, EMPTY)), [])
    with ir.InsertionPoint(loop.after.blocks.append()):
        scf.yield_([])
    mgpu.warpgroup_barrier()


def _words(count: int) -> ir.Type:
    return ir.VectorType.get((count,), ir.IntegerType.get_signless(32))


def _all(kind: ir.Type, value: int):
    return vector.broadcast(kind, arith.constant(ir.IntegerType.get_signless(32), value))
