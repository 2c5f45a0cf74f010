"""Numbers that CTAs and devices tell each other, in words that are `EMPTY` first.

Features by rows of the batch lie in registers as products have them (`TILE`), features first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from mlra_jax.kernels import words
from mlra_jax.kernels.after_attention.plan import SLAB
from mlra_jax.kernels.rows import THREADS
from mlra_jax.kernels.tiles import COLUMN, TILE

LINE = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
"""A number of each thread."""


def _pointers(ref, layout, shape):
    """To what a thread holds of an array that is whole in memory."""
    return words.pointers(ref, (_offset(indices, shape) for indices in layout.thread_idxs(shape)))


def _offset(indices, shape):
    index, offset = ir.IndexType.get(), indices[0]
    for size, i in zip(shape[1:], indices[1:], strict=True):
        offset = arith.addi(arith.muli(offset, arith.constant(index, size)), i)
    return offset


def tell(value, ref, far: tuple[jax.Array, jax.Array] | None = None) -> None:
    """Writes float32 where it is waited for, or on another device so `far` away, in bytes."""
    layout, number = TILE if value.ndim == 2 else COLUMN, plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()) + (number,) * len(far or ()))
    def write(ctx, value, ref, *far):
        pointers = _pointers(ref, value.layout, value.shape)
        for pointer, numbers in zip(pointers, value.registers.flat, strict=True):
            words.send(words.beyond(pointer, far) if far else pointer, numbers)

    write(value, ref, *(far or ()))


def tell_line(value, ref, row: jax.Array, rows: int) -> None:
    """Writes float32 of one row of the batch, one number of a thread, into features by rows."""

    @plgpu.inline_mgpu(
        arg_types=(LINE, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
    )
    def write(ctx, value, ref, row):
        index = ir.IndexType.get()
        row = arith.index_cast(index, row.registers.flat[0])
        spots = [
            arith.addi(arith.muli(feature, arith.constant(index, rows)), row)
            for (feature,) in value.layout.thread_idxs(value.shape)
        ]
        for pointer, number in zip(words.pointers(ref, spots), value.registers.flat, strict=True):
            words.send(pointer, number)

    write(value, ref, row)


def write_rows(value, ref, places, start: jax.Array, width: int) -> None:
    """Writes features by rows to where a row of so many numbers has its place, from `start` on.

    Args:
      ref: whole rows in device memory, of which `places` (int32) has the number for each row of the
        batch, or less than 0: that row is dropped.
    """

    @plgpu.inline_mgpu(
        arg_types=(TILE, plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
    )
    def write(ctx, value, ref, places, start):
        index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
        element = ir.MemRefType(ref.type).element_type
        base, of_places = mgpu.utils.memref_ptr(ref), mgpu.utils.memref_ptr(places)
        start = arith.index_cast(index, start.registers.flat[0])
        count = value.layout.vector_length
        spots = value.layout.thread_idxs(value.shape)
        for (feature, row), numbers in zip(spots, value.registers.flat, strict=True):
            for i in range(count):
                own = arith.addi(row, arith.constant(index, i))
                at = arith.index_cast(ir.IntegerType.get_signless(64), own)
                place = llvm.load(i32, mgpu.utils.getelementptr(of_places, [at], i32))
                kept = arith.cmpi(arith.CmpIPredicate.sge, place, arith.constant(i32, 0))
                with mgpu.when(kept):
                    line = arith.muli(arith.index_cast(index, place), arith.constant(index, width))
                    offset = arith.addi(line, arith.addi(start, feature))
                    offset = arith.index_cast(ir.IntegerType.get_signless(64), offset)
                    pointer = mgpu.utils.getelementptr(base, [offset], element)
                    llvm.store(vector.extract(numbers, [], [i]), pointer)

    write(value.astype(ref.dtype), ref, places, jnp.int32(start))


def empty(ref, layout, shape) -> None:
    """Makes memory of this device ready to be written again."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def write(ctx, ref):
        lying = layout.to_mgpu()
        length = getattr(lying, "vec_size", None) or lying.vector_length
        for pointer in _pointers(ref, lying, shape):
            words.write(pointer, words.filled(words.kind(length), words.EMPTY))

    write(ref)


def fence() -> None:
    """What was written before is there before what is written after it, for the whole device."""

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
    shape = SLAB, rows
    out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs), return_type=(out,) * len(refs))
    def read(ctx, *refs):
        lying, wanted = TILE.to_mgpu(), None
        if patiently:
            _wait_for_one(refs)
        pointers = [pointer for ref in refs for pointer in _pointers(ref, lying, shape)]
        if limit < SLAB:
            index, below = ir.IndexType.get(), arith.CmpIPredicate.ult
            wanted = [
                arith.cmpi(below, feature, arith.constant(index, limit))
                for _ in refs
                for feature, _ in lying.thread_idxs(shape)
            ]
        values = words.receive(pointers, lying.vector_length, wanted)
        # Threads end their loops apart; what comes next is often for a whole warp.
        mgpu.utils.warp_barrier()
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
        seen = vector.extract(words.read(pointer, 1), [], [0])
        scf.condition(arith.cmpi(arith.CmpIPredicate.eq, seen, words.word(words.EMPTY)), [])
    with ir.InsertionPoint(loop.after.blocks.append()):
        scf.yield_([])
    mgpu.warpgroup_barrier()
