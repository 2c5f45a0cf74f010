"""The second launch: joins the parts of each query row by their log-sum-exp.

Where tiles are in stripes a unit has many parts, one of each CTA of its team, and two warpgroups
join 128 columns of one row (`_of_teams`). Otherwise it has few, and one warpgroup joins 128 columns
of some rows (`_of_shares`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from mlra_jax.kernels.absorbed_decode.mosaic_gpu import plan, schedule
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.plan import Shape
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.schedule import Bounds, at
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.walk import LOWEST

# Columns of a part that a thread joins, 16 bytes of it.
COLUMNS = 8
# Warpgroups that join a row together, and their warps.
JOINERS = 2
WARPS = JOINERS * plan.LANES // 32


def launch(shape: Shape) -> Callable:
    """Builds the launch.

    Returns:
      A function of the parts and their LSEs, as `walk.launch` returns them, and of the bounds. It
      returns `[B, L, T * H, C]`, C rounded up to whole lines, whose columns from C on mean nothing,
      and the LSEs of natural logarithm `[B, L, T * H]`.
    """
    if shape.config.stripes:
        return lambda parts, lses, *bounds: _of_teams(shape)(parts, lses)
    return _of_shares(shape)


class _Place(NamedTuple):
    """128 columns of a stream's query row."""

    batch_row: jax.Array
    unit: jax.Array
    stream: jax.Array
    row: jax.Array
    chunk: jax.Array


def _of_teams(shape: Shape):
    chunks = shape.lines
    lanes = plgpu.Layout.WG_STRIDED((plan.LANES,), 1)
    warps = range(WARPS)

    def body(part_ref, lses_ref, out_ref, lse_ref, sums, statistics, weighed):
        index = lax.axis_index("task")
        chunk, index = lax.rem(index, chunks), lax.div(index, chunks)
        row, index = lax.rem(index, shape.stream_rows), lax.div(index, shape.stream_rows)
        stream, unit = lax.rem(index, shape.streams), lax.div(index, shape.streams)
        if shape.config.overlap:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        parts = pl.ds(unit * shape.team, shape.team)
        weigh_parts(
            part_ref.at[stream, row, chunk, parts],
            lses_ref.at[stream, row, parts],
            sums,
            statistics,
        )
        plgpu.barrier_arrive(weighed)

        @pl.when(lax.axis_index("wg") == 0)
        def _join_warps():
            plgpu.barrier_wait(weighed)
            tops = [statistics[w] for w in warps]
            top = functools.reduce(jnp.maximum, tops)
            weights = [jnp.exp2(x - top) for x in tops]
            total = sum(statistics[WARPS + w] * weights[w] for w in warps)
            ats = [pl.ds(w * plan.LANES, plan.LANES) for w in warps]
            acc = sum(plgpu.load(sums.at[ats[w]], layout=lanes) * weights[w] for w in warps)
            place = _Place(jnp.int32(0), unit, stream, row, chunk)
            _store(shape, (out_ref, lse_ref), place, acc, top, total)

    return _kernel(
        shape,
        body,
        shape.units * shape.streams * shape.stream_rows * chunks,
        JOINERS,
        sums=plgpu.SMEM((WARPS * plan.LANES,), jnp.float32),
        statistics=plgpu.SMEM((2 * WARPS,), jnp.float32),
        weighed=plgpu.Barrier(num_arrivals=JOINERS),
    )


def _of_shares(shape: Shape):
    chunks, rows, at_once = shape.lines, shape.config.join_rows, shape.parts_at_once
    groups = plan.cdiv(shape.stream_rows, rows)

    def body(part_ref, lses_ref, lengths_ref, starts_ref, *refs):
        bounds = Bounds(lengths_ref, starts_ref, refs[0] if shape.problem.batch > 1 else None)
        index = lax.axis_index("task")
        chunk, index = lax.rem(index, chunks), lax.div(index, chunks)
        group, index = lax.rem(index, groups), lax.div(index, groups)
        stream, unit = lax.rem(index, shape.streams), lax.div(index, shape.streams)
        batch_row, unit_in_row = lax.div(unit, shape.units), lax.rem(unit, shape.units)
        first, count = schedule.parts_of(shape, bounds, batch_row, unit_in_row)
        own = [jnp.minimum(group * rows + r, shape.stream_rows - 1) for r in range(rows)]
        if shape.config.overlap:
            # What was read so far is older than the first launch; the parts are not.
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()

        lines = [(stream, row, chunk) for row in own]
        states = join_lines(part_ref, lses_ref, lines, first, count, at_once)
        for r, state in enumerate(states):
            place = _Place(batch_row, unit_in_row, stream, group * rows + r, chunk)
            pl.when(group * rows + r < shape.stream_rows)(
                functools.partial(_store, shape, refs[-2:], place, *state)
            )

    return _kernel(shape, body, shape.problem.batch * shape.units * shape.streams * groups * chunks)


def join_lines(part_ref, lses_ref, lines: Sequence, first, count, at_once: int) -> list:
    """Joins parts of lines by one warpgroup, so many of each at once.

    Args:
      part_ref, lses_ref: what `walk.launch` returns.
      lines: (stream, row, line of the row) of each.
      first, count: which of the parts, of all lines.

    Returns:
      for each line (the weighted sum, float32 [128], of a thread one number; the base-2 LSE whose
      weight is 1 in it; the sum of weights).
    """
    lanes = plgpu.Layout.WG_STRIDED((plan.LANES,), 1)

    def some_parts(i, carry):
        base = i * at_once
        parts = [first + jnp.minimum(base + k, count - 1) for k in range(at_once)]
        lses = [[lses_ref[stream, row, part] for part in parts] for stream, row, _ in lines]
        values = [
            [plgpu.load(part_ref.at[stream, row, chunk, part], layout=lanes) for part in parts]
            for stream, row, chunk in lines
        ]
        after = []
        for (acc, top, total), lse, value in zip(carry, lses, values, strict=True):
            lse = [jnp.where(base + k < count, x, -jnp.inf) for k, x in enumerate(lse)]
            new_top = functools.reduce(jnp.maximum, lse, top)
            fade = jnp.exp2(top - new_top)
            acc, total = acc * fade, total * fade
            for k in range(at_once):
                weight = jnp.exp2(lse[k] - new_top)
                acc = acc + value[k].astype(jnp.float32) * weight
                total = total + weight
            after.append((acc, new_top, total))
        return after

    nothing = plgpu.layout_cast(jnp.zeros((plan.LANES,), jnp.float32), lanes)
    carry = [(nothing, jnp.float32(LOWEST), jnp.float32(0)) for _ in lines]
    return lax.fori_loop(0, schedule.cdiv(count, at_once), some_parts, carry)


def normalised(acc, total):
    """A line of results; 0 where a row sees nothing."""
    return acc * (1.0 / jnp.where(total > 0, total, 1.0))


def _store(shape: Shape, refs, place: _Place, acc, top, total) -> None:
    """Writes what was joined: 128 columns of one query row, and once its LSE."""
    out_ref, lse_ref = refs
    batch_row, unit, stream, row, chunk = place
    latent, row_block = schedule.of_unit(shape, unit)
    row = row + row_block * shape.block_rows
    if shape.config.shared > 1:
        latent = latent + stream
    else:
        row = row + stream * plan.ROWS

    @pl.when(row < shape.problem.queries * shape.problem.heads)
    def _store_row():
        columns = at(chunk * plan.LANES, plan.LANES, plan.LANES)
        out_ref[batch_row, latent, row, columns] = normalised(acc, total).astype(shape.dtype)

        @pl.when(chunk == 0)
        def _store_lse():
            lse = (top + jnp.log2(total)) * math.log(2)
            lse_ref[batch_row, latent, row] = jnp.where(total > 0, lse, -jnp.inf)


def _kernel(shape: Shape, body: Callable, tasks: int, warpgroups: int = 1, **scratch):
    problem = shape.problem
    # A named single warpgroup would cost a barrier.
    threads = dict(num_threads=warpgroups, thread_name="wg") if warpgroups > 1 else {}
    rows = problem.queries * problem.heads
    out = problem.batch, problem.latents, rows, shape.lines * plan.LANES
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(out, shape.dtype),
            jax.ShapeDtypeStruct(out[:3], jnp.float32),
        ),
        scratch_types=scratch,
        grid=(tasks,),
        grid_names=("task",),
        **threads,
        kernel_name="absorbed_decode_join",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


def weigh_parts(parts_ref, lses_ref, sums_ref, statistics_ref) -> None:
    """Joins partial results of one row as far as a warp can alone.

    What was read is dropped from L2: otherwise it would be written to device memory while the next
    launch reads its cache.

    Args:
      parts_ref: normalised partial results [n, 128] of two bytes an element, in device memory.
      lses_ref: float32 [n], their base-2 LSEs.
      sums_ref: float32 [WARPS * 128] in shared memory, for each warp's sum of weighted parts.
      statistics_ref: float32 [2 * WARPS] in shared memory, for the LSE whose weight is 1 in each
        warp, then for each warp's sum of weights.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
    def weigh(ctx, parts, lses, sums, statistics):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        memory = ir.MemRefType(parts.type)
        count, element = memory.shape[0], memory.element_type
        narrow, wide = (ir.VectorType.get((COLUMNS,), t) for t in (element, f32))
        number, real = (functools.partial(arith.constant, t) for t in (i32, f32))
        spread = functools.partial(vector.broadcast, wide)
        below = functools.partial(arith.cmpi, arith.CmpIPredicate.ult)
        exp2 = lambda x: llvm.inline_asm(f32, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")

        def at(ref, index, kind):
            return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], kind)

        thread = mgpu.thread_idx()
        lane, warp = arith.remui(thread, number(32)), arith.divui(thread, number(32))
        half_warp, column = arith.divui(thread, number(16)), arith.remui(thread, number(16))
        column = arith.muli(column, number(COLUMNS))
        # Each half of a warp reads every n-th part.
        indices = [arith.addi(half_warp, number(k)) for k in range(0, count, 2 * WARPS)]
        there, last = below(indices[-1], number(count)), indices[-1]
        indices[-1] = arith.minui(last, number(count - 1))
        places = [arith.addi(arith.muli(i, number(plan.LANES)), column) for i in indices]
        lse = [llvm.load(f32, at(lses, i, f32)) for i in indices]
        values = [llvm.load(narrow, at(parts, place, element)) for place in places]
        lse[-1] = arith.select(there, lse[-1], real(-math.inf))
        top = functools.reduce(arith.maximumf, lse, real(LOWEST))
        total, acc = real(0.0), spread(real(0.0))
        for k, (x, value) in enumerate(zip(lse, values, strict=True)):
            weight = exp2(arith.subf(x, top))
            total = arith.addf(total, weight)
            value = arith.extf(wide, value)
            if k + 1 == len(values):
                # Who has no last part has read another's, which may be dropped by now: anything.
                value = arith.select(there, value, spread(real(0.0)))
            acc = mlir_math.fma(value, spread(weight), acc)
        # The two halves become one.
        swap = lambda x: mgpu.utils.shfl_bfly(x, 16)
        joint = arith.maximumf(top, swap(top))
        fade = exp2(arith.subf(top, joint))
        total, acc = arith.mulf(total, fade), arith.mulf(acc, spread(fade))
        total = arith.addf(total, swap(total))
        for k in range(COLUMNS):
            one = vector.extract(acc, [], [k])
            acc = vector.insert(arith.addf(one, swap(one)), acc, [], [k])
        with mgpu.when(below(lane, number(16))):
            place = arith.addi(arith.muli(warp, number(plan.LANES)), column)
            llvm.store(acc, at(sums, place, f32))
            llvm.store(joint, at(statistics, warp, f32))
            llvm.store(total, at(statistics, arith.addi(warp, number(WARPS)), f32))
        # One thread for each line of 128 bytes, of which no other warp has read.
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, number(8)), number(0))):
            for k, place in enumerate(places):
                with mgpu.when(there) if k + 1 == len(places) else contextlib.nullcontext():
                    pointer, void = at(parts, place, element), ir.Type.parse("!llvm.void")
                    text = "discard.global.L2 [$0], 128;"
                    llvm.inline_asm(void, [pointer], text, "l,~{memory}", has_side_effects=True)

    weigh(parts_ref, lses_ref, sums_ref, statistics_ref)
