"""The first launch: every CTA walks its tiles of the cache and writes parts of the results.

`launch` builds it. What the warpgroups of a CTA do depends on the mode and is listed in `_WAYS`,
one function to a role. They copy as well: who has read a tile asks for the next one in its place.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from mlra_jax.kernels import tiles
from mlra_jax.kernels.absorbed_decode.mosaic_gpu import plan, schedule
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.plan import Shape
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.schedule import (
    Bounds,
    Place,
    Share,
    Stripe,
    Visit,
    at,
)

# A finite stand-in for -inf as running maximum, so that no difference of infinities arises.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class _Cta:
    """What all warpgroups of a CTA share.

    Attributes:
      shape: the static sizes.
      factor: what scores are multiplied by, so that exp2 of them is the weight.
      q, q_rope, latents, k_rope: the arguments, in device memory; no q of values only.
      bounds: what each query sees.
      parts, lses: the results, in device memory.
      memory: shared memory and barriers by name, of `_memory` and the mode's own.
      index, wg: of the CTA in the grid, and of the warpgroup in the CTA.
      course, first: the CTA's tiles and its first visit; None until they are known.
    """

    shape: Shape
    factor: float
    q: Any
    q_rope: Any
    latents: Any
    k_rope: Any
    bounds: Bounds
    parts: Any
    lses: Any
    memory: types.SimpleNamespace
    index: jax.Array
    wg: jax.Array
    course: Any = None
    first: Any = None

    def query_stage(self, visit: Visit):
        """Which copy of the queries a visit uses."""
        return lax.rem(visit.number, self.shape.config.query_stages)

    def slot(self, stage):
        """Which slot of the stage the present warpgroup reads."""
        return stage * self.shape.slots + (self.wg if self.shape.slots > 1 else 0)

    def part(self, visit: Visit):
        return schedule.part(self.shape, self.index, visit.place)

    def copies(self, turn):
        """Whether the present warpgroup copies a turn's tile, or some of it."""
        if self.shape.slots > 1:
            return jnp.bool_(True)
        if self.shape.mode.takers > 1:
            return self.wg == lax.rem(jnp.int32(turn), jnp.int32(2))
        return self.is_last

    @property
    def is_last(self):
        return self.wg == self.shape.mode.warpgroups - 1

    def for_each_visit(self, visit: Callable[[Visit], None], drop: Callable[[Visit], None]) -> None:
        """Calls `visit` for all of the CTA's visits.

        `drop` is called before a visit if the CTA does not use the tile that it asked for unseen.
        """
        if self.shape.config.stripes:
            pl.when(self.first.turn > 0)(lambda: drop(self.first))
            visit(self.first)
            return

        def step(v: Visit) -> Visit:
            visit(v)
            return self.course.following(v)

        lax.while_loop(lambda v: v.tiles > 0, step, self.first)

    def position(self, visit: Visit, begin, i):
        """Where the visit's i-th tile lies in the cache, whose row begins to be read at `begin`."""
        stride = self.shape.team if self.shape.config.stripes else 1
        return begin + (visit.place.tile + i * stride) * self.shape.config.block


def launch(shape: Shape, scale: float) -> Callable:
    """Builds the launch.

    Returns:
      A function of queries (unless latents are values only) and rotary queries, with rows instead
      of queries and heads, of latents and rotary keys, each with its heads side by side, and of
      the bounds. It returns the parts, normalised, of shape [streams, rows, lines, parts, 128], and
      their base-2 LSEs [streams, 64, parts].
    """
    problem, config, mode = shape.problem, shape.config, shape.mode
    way = _WAYS[mode]

    def body(*refs, **scratch):
        *refs, parts, lses = refs
        q = None if problem.values_only else refs.pop(0)
        q_rope, latents, k_rope, lengths, starts, *table = refs
        memory = types.SimpleNamespace(**scratch)
        if mode is plan.COLUMNS:
            memory.q, memory.out = scratch["q"]
        index, wg = lax.axis_index("cta"), lax.axis_index("wg")
        if config.overlap:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        cta = _Cta(
            shape=shape,
            factor=scale * math.log2(math.e),
            q=q,
            q_rope=q_rope,
            latents=latents,
            k_rope=k_rope,
            bounds=Bounds(lengths, starts, table[0] if table else None),
            parts=parts,
            lses=lses,
            memory=memory,
            index=index,
            wg=wg,
        )
        if config.stripes:
            _guess(cta)
        course = (Stripe if config.stripes else Share.of)(shape, cta.bounds, index)
        cta = dataclasses.replace(cta, course=course, first=course.first())
        _begin(cta)
        for taken_by, role in way.roles:
            pl.when(taken_by(wg))(functools.partial(role, cta))

    out = shape.streams, shape.stream_rows, shape.lines, shape.parts, plan.LANES
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(out, shape.dtype),
            jax.ShapeDtypeStruct((shape.streams, plan.ROWS, shape.parts), jnp.float32),
        ),
        scratch_types=_memory(shape) | way.memory(shape),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=mode.warpgroups,
        thread_name="wg",
        kernel_name="absorbed_decode_split",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


# --- Shared memory ---


def _queries(shape: Shape):
    width, rows = shape.problem.width, shape.query_rows(shape.streams)
    return tiles.swizzled(
        (shape.config.query_stages, width // shape.chunk, rows, shape.chunk), shape.dtype
    )


def _memory(shape: Shape) -> dict[str, Any]:
    """What every mode has: queries, the ring of tiles, their barriers, and row statistics."""
    problem, config = shape.problem, shape.config
    rope_rows = shape.query_rows(shape.rope_streams)
    copies, queries = shape.rope_streams, {}
    # COLUMNS has a third warpgroup, which is done with them before these two.
    readers = max(config.shared, 2)
    if not problem.values_only:
        copies += shape.streams * problem.width // shape.chunk
        queries = dict(q=_queries(shape))
    return queries | dict(
        q_rope=tiles.swizzled((config.query_stages, rope_rows, problem.rope), shape.dtype),
        latents=tiles.swizzled(
            (config.stages * shape.slots, config.block, shape.slot_width), shape.dtype
        ),
        k_rope=tiles.swizzled((config.stages, config.block, shape.rope_width), shape.dtype),
        q_full=plgpu.Barrier(num_arrivals=copies, num_barriers=config.query_stages),
        q_empty=plgpu.Barrier(num_arrivals=readers, num_barriers=config.query_stages),
    )


def _tile_barriers(shape: Shape) -> dict[str, Any]:
    stages, takers = shape.config.stages, shape.mode.takers
    return dict(
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        # Two warpgroups read every tile, unless they take turns.
        empty=plgpu.Barrier(num_arrivals=2 // takers, num_barriers=stages),
        statistics=plgpu.SMEM((4, plan.ROWS), jnp.float32),
    )


def _exchange_memory(shape: Shape) -> dict[str, Any]:
    """For two that join their states; each passes on sums, then results through the same space."""
    shapes = [
        tiles.swizzled((plan.ROWS, shape.piece), dtype) for dtype in (jnp.float32, shape.dtype)
    ]
    return _tile_barriers(shape) | dict(
        exchange_0=plgpu.RefUnion(*shapes),
        exchange_1=plgpu.RefUnion(*shapes),
        handed_over=plgpu.Barrier(num_arrivals=2),
        taken=plgpu.Barrier(num_arrivals=2),
    )


def _staging_memory(shape: Shape) -> dict[str, Any]:
    return _tile_barriers(shape) | dict(
        out=tiles.swizzled((2, plan.ROWS, shape.piece), shape.dtype)
    )


def _probability_memory(shape: Shape) -> dict[str, Any]:
    """For the hand-over of probabilities; the results pass through the space of the queries."""
    width, config = shape.problem.width, shape.config
    out = tiles.swizzled(
        (config.query_stages, width // shape.piece, plan.ROWS, shape.piece), shape.dtype
    )
    return _tile_barriers(shape) | dict(
        q=plgpu.RefUnion(_queries(shape), out),
        p=tiles.swizzled((plan.ROWS, config.block), shape.dtype),
        p_full=plgpu.Barrier(),
        p_empty=plgpu.Barrier(num_arrivals=2),
        inverse_full=plgpu.Barrier(),
        inverse_empty=plgpu.Barrier(num_arrivals=2),
    )


def _swapped_memory(shape: Shape) -> dict[str, Any]:
    """For each warpgroup; results pass through the space of the probabilities."""
    warpgroups, rows = shape.mode.warpgroups, shape.stream_rows
    return dict(
        p=tiles.swizzled((warpgroups, rows, shape.config.block), shape.dtype),
        reduction=plgpu.SMEM((warpgroups, tiles.REDUCTION), jnp.float32),
    )


def _slots_memory(shape: Shape) -> dict[str, Any]:
    """Latents have barriers of their own, so that a warpgroup begins and ends with its own."""
    shared, stages = shape.config.shared, shape.config.stages
    return _swapped_memory(shape) | dict(
        full=plgpu.Barrier(num_barriers=stages * shared),
        empty=plgpu.Barrier(num_barriers=stages * shared),
        rope_full=plgpu.Barrier(num_barriers=stages),
        rope_empty=plgpu.Barrier(num_arrivals=shared, num_barriers=stages),
    )


def _handing_over_memory(shape: Shape) -> dict[str, Any]:
    """For two that take turns, of which the second hands over its state."""
    return (
        _tile_barriers(shape)
        | _swapped_memory(shape)
        | dict(
            sums=plgpu.SMEM((shape.problem.width, shape.stream_rows), jnp.float32),
            handed_over=plgpu.Barrier(),
            taken=plgpu.Barrier(),
        )
    )


# --- Copies ---


def _guess(cta: _Cta) -> None:
    """Asks for the first tile of a stripe and the queries before the lengths are known.

    A row hardly ever begins late or ends this early.
    """
    place, block = schedule.stripe(cta.shape, cta.index), cta.shape.config.block
    last_tile = (cta.shape.problem.cache - 1) // block
    position = jnp.minimum(place.tile, last_tile) * block
    # The cache comes from farther away than the queries, so it is asked first.
    pl.when(cta.copies(0))(lambda: _load_tile(cta, place, position, 0))

    @pl.when(cta.is_last)
    def _load():
        _clear_padding(cta)
        _load_queries(cta, place, 0)


def _begin(cta: _Cta) -> None:
    """Asks for as many tiles and queries as there is room for, but those of `_guess`."""
    config, visit = cta.shape.config, cta.first

    def load(turn, _=None):
        pl.when(cta.copies(turn))(lambda: _load_turn(cta, cta.first, turn))

    if not config.stripes:
        load(jnp.int32(0))
        pl.when(cta.is_last)(lambda: _clear_padding(cta))
        for stage in range(config.query_stages):
            visit = cta.course.following(visit) if stage else visit
            there = cta.is_last & (visit.tiles > 0)
            pl.when(there)(functools.partial(_load_queries, cta, visit.place, stage))
    lax.fori_loop(1, config.stages, load, None)


def _give_back(cta: _Cta, visit: Visit, turn) -> None:
    """What a warpgroup does once it has read a turn's tile: copies the next one to its place."""
    stages = cta.shape.config.stages
    plgpu.barrier_arrive(cta.memory.empty.at[cta.slot(lax.rem(turn, stages))])
    # Where warpgroups take turns, the present one has just read its own.
    copies = cta.shape.mode.takers > 1 or cta.copies(turn)
    pl.when(copies)(lambda: _load_turn(cta, visit, turn + stages, reused=True))


def _give_back_queries(cta: _Cta, visit: Visit) -> None:
    stage, stages = cta.query_stage(visit), cta.shape.config.query_stages
    plgpu.barrier_arrive(cta.memory.q_empty.at[stage])
    if cta.shape.config.stripes:
        return

    @pl.when(cta.is_last)
    def _load():
        later = visit
        for _ in range(stages):
            later = cta.course.following(later)

        @pl.when(later.tiles > 0)
        def _():
            plgpu.barrier_wait(cta.memory.q_empty.at[stage])
            _load_queries(cta, later.place, stage)


def _load_turn(cta: _Cta, visit: Visit, turn, reused: bool = False) -> None:
    """Asks for a turn's tile, in the visit or later, if there is one."""
    found, place = cta.course.tile(visit, turn)

    @pl.when(found)
    def _load():
        config = cta.shape.config
        position = cta.bounds.begin(place.batch_row) + place.tile * config.block
        _load_tile(cta, place, position, lax.rem(turn, config.stages), reused)


def _load_tile(cta: _Cta, place: Place, position, stage, reused: bool = False) -> None:
    """Asks for what the present warpgroup copies of a tile, once all have read what it replaces."""
    memory, problem, slots = cta.memory, cta.shape.problem, cta.shape.slots
    positions, slot = at(position, cta.shape.config.block), cta.slot(stage)

    def copy(source, target, first_column, step, full):
        columns = at(first_column, target.shape[1], step)
        plgpu.copy_gmem_to_smem(source.at[place.batch_row, positions, columns], target, full)

    def copy_rope(full):
        first = place.latent * problem.rope if problem.rope_heads > 1 else 0
        copy(cta.k_rope, memory.k_rope.at[stage], first, problem.rope, full)

    if reused:
        plgpu.barrier_wait(memory.empty.at[slot])
    latent = place.latent + (cta.wg if slots > 1 else 0)
    full = memory.full.at[slot]
    copy(cta.latents, memory.latents.at[slot], latent * problem.width, problem.width, full)
    if slots == 1:
        copy_rope(full)
        return

    @pl.when(cta.is_last)
    def _copy_shared():
        if reused:
            plgpu.barrier_wait(memory.rope_empty.at[stage])
        copy_rope(memory.rope_full.at[stage])


def _clear_padding(cta: _Cta) -> None:
    """Makes the rows that a product has beyond the queries zero, of which `_softmax` makes zeros.

    No result depends on them. But multiplying what happens to lie there takes power, and a GPU that
    reads its memory as fast as it can has none to spare: it lowers its clock.
    """
    shape, memory = cta.shape, cta.memory
    if shape.config.swap or shape.stream_rows == plan.ROWS:
        return
    stages = range(shape.config.query_stages)
    refs = [(memory.q_rope.at[n], shape.rope_streams) for n in stages]
    if cta.q is not None:
        chunks = range(shape.problem.width // shape.chunk)
        refs += [(memory.q.at[n, chunk], shape.streams) for n in stages for chunk in chunks]
    for ref, streams in refs:
        last = pl.ds(shape.query_rows(streams) - plan.ROWS, plan.ROWS)
        ref.at[last][...] = _zeros(plan.ROWS, ref.shape[-1]).astype(shape.dtype)
    plgpu.commit_smem()


def _load_queries(cta: _Cta, place: Place, stage) -> None:
    shape, memory = cta.shape, cta.memory
    rows, chunk_width = shape.stream_rows, shape.chunk
    chunks = 0 if cta.q is None else shape.problem.width // chunk_width
    one_latent = shape.mode.row_tiles > 1
    full = memory.q_full.at[stage]
    for stream in range(shape.streams):
        first_row = place.row_block * shape.block_rows + (stream * plan.ROWS if one_latent else 0)
        source, target = at(first_row, rows, plan.ROWS), pl.ds(stream * rows, rows)
        latent = place.latent if one_latent else place.latent + stream
        for k in range(chunks):
            # In an order of its own, as all CTAs ask for the same at once.
            chunk = lax.rem(cta.index + k, chunks)
            columns = at(chunk * chunk_width, chunk_width, chunk_width)
            plgpu.copy_gmem_to_smem(
                cta.q.at[place.batch_row, latent, source, columns],
                memory.q.at[stage, chunk, target],
                full,
            )
        if stream < shape.rope_streams:
            group = lax.rem(latent, shape.problem.groups)
            plgpu.copy_gmem_to_smem(
                cta.q_rope.at[place.batch_row, group, source],
                memory.q_rope.at[stage, target],
                full,
            )


# --- What the warpgroups that multiply have in common ---


def _walk_tiles(cta: _Cta, visit: Visit, step: Callable, carry):
    """carry = step(stage, position, i, carry) for the visit's tiles that are the warpgroup's."""
    takers, stages = cta.shape.mode.takers, cta.shape.config.stages
    begin = cta.bounds.begin(visit.place.batch_row)
    others = lax.rem(cta.wg + lax.rem(visit.turn, 2), 2) if takers == 2 else jnp.int32(0)

    def body(k, carry):
        i = others + k * takers
        stage = lax.rem(visit.turn + i, stages)
        plgpu.barrier_wait(cta.memory.full.at[cta.slot(stage)])
        return step(stage, cta.position(visit, begin, i), visit.turn + i, carry)

    return lax.fori_loop(0, lax.div(visit.tiles - others + takers - 1, takers), body, carry)


def _drop(cta: _Cta, visit: Visit) -> None:
    """Uses up a tile that was loaded on a wrong guess."""
    memory = cta.memory

    def pass_over():
        plgpu.barrier_wait(memory.full.at[cta.slot(0)])
        if cta.shape.slots > 1:
            plgpu.barrier_wait(memory.rope_full.at[0])
            plgpu.barrier_arrive(memory.rope_empty.at[0])
        _give_back(cta, visit, jnp.int32(0))

    if cta.shape.mode.takers > 1:
        pl.when(cta.wg == 0)(pass_over)
    else:
        pass_over()


def _scores(cta: _Cta, query_stage, stream, stage):
    """Products of a stream's queries and keys, float32 [64, block]."""
    shape, memory = cta.shape, cta.memory
    rows, chunk_width, width = shape.stream_rows, shape.chunk, shape.problem.width
    chunks = 0 if cta.q is None else width // chunk_width
    rope = shape.problem.rope

    def products(acc_ref):
        own_rows = at(stream * rows, plan.ROWS)
        rope_rows = at(stream % shape.rope_streams * rows, plan.ROWS)
        first_column = 0 if shape.config.shared == 1 else stream * width
        for chunk in range(chunks):
            columns = at(first_column + chunk * chunk_width, chunk_width, chunk_width)
            keys = memory.latents.at[stage, :, columns].transpose((1, 0))
            plgpu.wgmma(acc_ref, memory.q.at[query_stage, chunk, own_rows], keys)
        columns = at(0 if shape.rope_width == rope else stream * rope, rope, rope)
        keys = memory.k_rope.at[stage, :, columns].transpose((1, 0))
        plgpu.wgmma(acc_ref, memory.q_rope.at[query_stage, rope_rows], keys)
        return acc_ref[...]

    return pl.run_scoped(products, plgpu.ACC((plan.ROWS, shape.config.block), jnp.float32))


def _sight(cta: _Cta, batch_row, first_query_row, rows_axis: int = 0):
    """A function that puts -inf where a query does not see, given where a tile begins."""
    problem, block = cta.shape.problem, cta.shape.config.block
    start = cta.bounds.starts[batch_row]
    ends = [cta.bounds.lengths[batch_row, t] for t in range(problem.queries)]
    first_end = functools.reduce(jnp.minimum, ends)

    def hide(s, position):
        def hidden(s):
            iota = functools.partial(
                plgpu.broadcasted_iota, jnp.int32, s.shape, layout=plgpu.Layout.WGMMA
            )
            column, limit = position + iota(1 - rows_axis), ends[0]
            row = first_query_row + iota(rows_axis)
            for t, end in enumerate(ends[1:], 1):
                limit = jnp.where(row >= t * problem.heads, end, limit)
            return jnp.where((column >= start) & (column < limit), s, -jnp.inf)

        # Only the tiles at the edges need it.
        in_full_view = (position >= start) & (position + block <= first_end)
        return lax.cond(in_full_view, lambda s: s, hidden, s)

    return hide


def _softmax(cta: _Cta, s, top, denominator):
    """One step of the running softmax: weights, what earlier sums fade by, top, denominator."""
    new_top = jnp.maximum(top, s.max(axis=1) * cta.factor)
    fade = jnp.exp2(top - new_top)
    p = jnp.exp2(s * cta.factor - tiles.wide(new_top, s))
    denominator = denominator * fade + p.sum(axis=1)
    if cta.shape.stream_rows < plan.ROWS:
        row = plgpu.broadcasted_iota(jnp.int32, p.shape, 0, layout=plgpu.Layout.WGMMA)
        p = jnp.where(row < cta.shape.stream_rows, p, 0.0)
    return p, fade, new_top, denominator


def _finish(top, denominator):
    """The base-2 LSE of each row, and what its sum is to be multiplied by."""
    saw_any = denominator > 0
    lse = jnp.where(saw_any, top + jnp.log2(denominator), -jnp.inf)
    return lse, 1.0 / jnp.where(saw_any, denominator, 1.0)


def _rows_of(value: float):
    return plgpu.layout_cast(jnp.full((plan.ROWS,), value, jnp.float32), tiles.ROW)


def _zeros(rows: int, columns: int):
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def _accumulate(accs, weights, values):
    """accs + weights values, for several blocks of columns."""

    def products(refs):
        for ref, value in zip(refs, values, strict=True):
            plgpu.wgmma(ref, weights, value)

    return pl.run_state(products)([plgpu.ACC.init(acc) for acc in accs])


def _store_lse(cta: _Cta, stream, part, lse) -> None:
    tiles.store(cta.lses.at[stream, :, part], lse)


def _send(cta: _Cta, staging, value, part, stream, column) -> None:
    """Writes 64 query rows of a part, from a column on, to device memory."""
    staging[...] = value.astype(cta.shape.dtype)
    plgpu.commit_smem()
    columns = at(column % plan.LANES, value.shape[1], value.shape[1])
    target = cta.parts.at[stream, :, column // plan.LANES, part, columns]
    plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, cta.shape.stream_rows)], target)


# --- Roles in the modes whose accumulator fits one warpgroup ---


def _attend(cta: _Cta, visit: Visit, stream, latent_in_tile):
    """A stream's sum over the visit's tiles, float32 [64, width], its top and denominator."""
    shape, width = cta.shape, cta.shape.problem.width
    query_stage = cta.query_stage(visit)
    first_row = visit.place.row_block * shape.mode.row_tiles
    if shape.mode.row_tiles > 1:
        first_row = first_row + cta.wg
    hide = _sight(cta, visit.place.batch_row, first_row * plan.ROWS)
    plgpu.barrier_wait(cta.memory.q_full.at[query_stage])

    def step(stage, position, turn, state):
        acc, top, denominator = state
        s = hide(_scores(cta, query_stage, stream, stage), position)
        p, fade, top, denominator = _softmax(cta, s, top, denominator)
        values = cta.memory.latents.at[stage, :, at(latent_in_tile * width, width, width)]
        faded = acc * tiles.wide(fade, acc)
        [acc] = _accumulate([faded], p.astype(shape.dtype), [values])
        _give_back(cta, visit, turn)
        return acc, top, denominator

    state = _zeros(plan.ROWS, width), _rows_of(LOWEST), _rows_of(0.0)
    state = _walk_tiles(cta, visit, step, state)
    _give_back_queries(cta, visit)
    return state


def _multiply(cta: _Cta) -> None:
    """Each of two warpgroups has a stream of its own."""
    piece, stream = cta.shape.piece, cta.wg

    def visit(v: Visit) -> None:
        latent_in_tile = 0 if cta.shape.config.shared == 1 else stream
        acc, top, denominator = _attend(cta, v, stream, latent_in_tile)
        part = cta.part(v)
        lse, inverse = _finish(top, denominator)
        _store_lse(cta, stream, part, lse)
        for column in range(0, cta.shape.problem.width, piece):
            value = acc[:, column : column + piece]
            staging = cta.memory.out.at[cta.wg]
            _send(cta, staging, value * tiles.wide(inverse, value), part, stream, column)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    cta.for_each_visit(visit, functools.partial(_drop, cta))


def _multiply_in_turns(cta: _Cta) -> None:
    """Two warpgroups take turns at the tiles of one stream."""

    def visit(v: Visit) -> None:
        state = _attend(cta, v, 0, 0)
        part = cta.part(v)
        for me in (0, 1):
            pl.when(cta.wg == me)(functools.partial(_unite, cta, me, part, v, *state))

    cta.for_each_visit(visit, functools.partial(_drop, cta))


def _unite(cta: _Cta, me: int, part, visit: Visit, acc, top, denominator) -> None:
    """Joins what the two warpgroups have; each writes one half of the columns."""
    memory, other = cta.memory, 1 - me
    half, piece = cta.shape.problem.width // 2, cta.shape.piece
    tops_smem, denominators_smem = (memory.statistics.at[pl.ds(k, 2)] for k in (0, 2))
    exchange = memory.exchange_0, memory.exchange_1
    mine_smem, _ = exchange[me]
    other_smem, out_smem = exchange[other]
    for offset in range(0, half, piece):
        if offset:
            plgpu.barrier_wait(memory.taken)
        else:
            pl.when(visit.number > 0)(lambda: plgpu.barrier_wait(memory.taken))
            tops_smem[me] = top
            denominators_smem[me] = denominator
        their_column, my_column = other * half + offset, me * half + offset
        mine_smem[...] = acc[:, their_column : their_column + piece]
        plgpu.barrier_arrive(memory.handed_over)
        plgpu.barrier_wait(memory.handed_over)
        if not offset:
            other_top = plgpu.load(tops_smem.at[other], layout=tiles.ROW)
            others = plgpu.load(denominators_smem.at[other], layout=tiles.ROW)
            joint = jnp.maximum(top, other_top)
            mine, theirs = jnp.exp2(top - joint), jnp.exp2(other_top - joint)
            lse, inverse = _finish(joint, denominator * mine + others * theirs)
            if me == 0:
                _store_lse(cta, 0, part, lse)
            mine, theirs = mine * inverse, theirs * inverse
        theirs_value = plgpu.load(other_smem, layout=plgpu.Layout.WGMMA)
        value = acc[:, my_column : my_column + piece]
        value = value * tiles.wide(mine, value) + theirs_value * tiles.wide(theirs, value)
        _send(cta, out_smem, value, part, 0, my_column)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(memory.taken)


# --- Roles in the mode whose accumulator takes two warpgroups ---


def _make_probabilities(cta: _Cta) -> None:
    """Turns tiles into probabilities, for the two that multiply by values."""
    memory = cta.memory
    fade_smem, inverse_smem = (memory.statistics.at[k] for k in (0, 1))

    def visit(v: Visit) -> None:
        query_stage = cta.query_stage(v)
        hide = _sight(cta, v.place.batch_row, v.place.row_block * plan.ROWS)
        plgpu.barrier_wait(memory.q_full.at[query_stage])

        def step(stage, position, turn, carry):
            top, denominator = carry
            s = _scores(cta, query_stage, 0, stage)
            p, fade, top, denominator = _softmax(cta, hide(s, position), top, denominator)
            p = p.astype(cta.shape.dtype)
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(memory.p_empty))
            memory.p[...] = p
            fade_smem[...] = fade
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.p_full)
            return top, denominator

        carry = _rows_of(LOWEST), _rows_of(0.0)
        top, denominator = _walk_tiles(cta, v, step, carry)
        lse, inverse = _finish(top, denominator)
        pl.when(v.number > 0)(lambda: plgpu.barrier_wait(memory.inverse_empty))
        inverse_smem[...] = inverse
        plgpu.barrier_arrive(memory.inverse_full)
        _store_lse(cta, 0, cta.part(v), lse)

    # The two that multiply give the tile back.
    cta.for_each_visit(visit, lambda _: plgpu.barrier_wait(memory.full.at[0]))


def _multiply_half(cta: _Cta) -> None:
    """Multiplies probabilities by one half of the values' columns."""
    shape, memory = cta.shape, cta.memory
    half, piece = shape.problem.width // 2, shape.piece
    fade_smem, inverse_smem = (memory.statistics.at[k] for k in (0, 1))
    which = cta.wg - 1

    def visit(v: Visit) -> None:
        query_stage = cta.query_stage(v)
        first_column = pl.multiple_of(which * half, half)
        # Two narrow products, as a kernel of 512 threads may not name the registers of a wide one.
        columns = [first_column + offset for offset in range(0, half, piece)]

        def step(stage, position, turn, accs):
            plgpu.barrier_wait(memory.p_full)
            fade = plgpu.load(fade_smem, layout=tiles.ROW)
            accs = [acc * tiles.wide(fade, acc) for acc in accs]
            values = [memory.latents.at[stage, :, pl.ds(column, piece)] for column in columns]
            accs = _accumulate(accs, memory.p, values)
            plgpu.barrier_arrive(memory.p_empty)
            _give_back(cta, v, turn)
            return accs

        accs = _walk_tiles(cta, v, step, [_zeros(plan.ROWS, piece) for _ in columns])
        plgpu.barrier_wait(memory.inverse_full)  # Also says that the queries were read.
        inverse = plgpu.load(inverse_smem, layout=tiles.ROW)
        plgpu.barrier_arrive(memory.inverse_empty)
        part = cta.part(v)
        for k, (column, acc) in enumerate(zip(columns, accs, strict=True)):
            staging = memory.out.at[query_stage, which * len(columns) + k]
            _send(cta, staging, acc * tiles.wide(inverse, acc), part, 0, column)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _give_back_queries(cta, v)

    def drop(v: Visit) -> None:
        _drop(cta, v)
        plgpu.barrier_arrive(memory.p_empty)

    cta.for_each_visit(visit, drop)


# --- The role in the modes where cache positions are the rows of the products ---


def _multiply_swapped(cta: _Cta) -> None:
    """Each warpgroup has a latent of the tile, or every second tile where there is one latent.

    Scores are [block, rows], sums [width, rows]. The weights are exp2 of scores less a reference,
    which follows the maximum only when that is more than `_HEADROOM` above it: then no reduction
    over positions is needed for most tiles. The denominators are sums of each thread until the
    visit ends.
    """
    shape, memory = cta.shape, cta.memory
    stream = cta.wg if shape.slots > 1 else 0
    rows, block, width = shape.stream_rows, shape.config.block, shape.problem.width
    p_smem, scratch = memory.p.at[cta.wg], memory.reduction.at[cta.wg]

    def visit(v: Visit) -> None:
        query_stage = cta.query_stage(v)
        hide = _sight(cta, v.place.batch_row, 0, rows_axis=1)
        plgpu.barrier_wait(memory.q_full.at[query_stage])

        def step(stage, position, turn, state):
            if shape.slots > 1:
                plgpu.barrier_wait(memory.rope_full.at[stage])
            s = _swapped_scores(cta, query_stage, stream, stage)
            if shape.slots > 1:
                plgpu.barrier_arrive(memory.rope_empty.at[stage])
            s = hide(s, position) * cta.factor

            def raise_reference(acc, reference, sums):
                raised = jnp.maximum(reference, tiles.over_rows("max", s, scratch))
                fade = jnp.exp2(reference - raised)
                return acc * tiles.tall(fade, acc), raised, sums * tiles.tall(fade, sums)

            _, reference, _ = state
            above = _any_above(s - tiles.tall(reference + _HEADROOM, s))
            state = lax.cond(above, raise_reference, lambda *state: state, *state)
            acc, reference, sums = state
            p = jnp.exp2(s - tiles.tall(reference, s))
            p_smem.transpose((1, 0))[...] = p.astype(shape.dtype)
            plgpu.commit_smem()
            values = memory.latents.at[cta.slot(stage)]
            acc = _add_product(acc, values.transpose((1, 0)), p_smem.transpose((1, 0)))
            _give_back(cta, v, turn)
            return acc, reference, sums + p

        state = _zeros(width, rows), _columns_of(LOWEST, rows), _zeros(block, rows)
        acc, reference, sums = _walk_tiles(cta, v, step, state)
        _give_back_queries(cta, v)
        state = acc, reference, tiles.over_rows("add", sums, scratch)
        if shape.mode.takers == 1:
            send(v, *state)
        else:
            pl.when(cta.wg == 0)(lambda: send(v, *_joined_with_handed_over(cta, *state)))
            pl.when(cta.wg == 1)(lambda: _hand_over(cta, v, *state))

    def send(v: Visit, acc, reference, denominator) -> None:
        part = cta.part(v)
        lse, inverse = _finish(reference, denominator)
        scratch.at[pl.ds(0, rows)][...] = lse
        plgpu.commit_smem()
        lse = plgpu.load(scratch.at[pl.ds(0, plan.ROWS)], layout=tiles.ROW)
        _store_lse(cta, stream, part, lse)
        acc = acc * tiles.tall(inverse, acc)
        for column in range(0, width, block):
            value = acc[column : column + block].astype(shape.dtype)
            p_smem.transpose((1, 0))[...] = value
            plgpu.commit_smem()
            columns = at(column % plan.LANES, block, block)
            target = cta.parts.at[stream, :, column // plan.LANES, part, columns]
            plgpu.copy_smem_to_gmem(p_smem, target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    cta.for_each_visit(visit, functools.partial(_drop, cta))


# Binary places by which a score may exceed the reference; float16 ends at 2**16.
_HEADROOM = 8.0


def _swapped_scores(cta: _Cta, query_stage, stream, stage):
    """Products of keys and a stream's queries, float32 [block, rows]."""
    shape, memory = cta.shape, cta.memory
    rows, rope = shape.stream_rows, shape.problem.rope

    def products(acc_ref):
        for chunk in range(0 if cta.q is None else shape.problem.width // shape.chunk):
            keys = memory.latents.at[cta.slot(stage), :, pl.ds(chunk * shape.chunk, shape.chunk)]
            queries = memory.q.at[query_stage, chunk, at(stream * rows, rows)]
            plgpu.wgmma(acc_ref, keys, queries.transpose((1, 0)))
        column = 0 if shape.rope_width == rope else stream * rope
        keys = memory.k_rope.at[stage, :, at(column, rope, rope)]
        queries = memory.q_rope.at[query_stage, at(stream % shape.rope_streams * rows, rows)]
        plgpu.wgmma(acc_ref, keys, queries.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(products, plgpu.ACC((shape.config.block, rows), jnp.float32))


def _hand_over(cta: _Cta, visit: Visit, acc, reference, denominator) -> None:
    memory, own = cta.memory, pl.ds(0, cta.shape.stream_rows)
    pl.when(visit.number > 0)(lambda: plgpu.barrier_wait(memory.taken))
    tiles.store(memory.sums, acc)
    tiles.store(memory.statistics.at[0, own], reference)
    tiles.store(memory.statistics.at[1, own], denominator)
    plgpu.barrier_arrive(memory.handed_over)


def _joined_with_handed_over(cta: _Cta, acc, reference, denominator):
    """The sums, reference and denominator of both warpgroups' tiles."""
    memory, own = cta.memory, pl.ds(0, cta.shape.stream_rows)
    plgpu.barrier_wait(memory.handed_over)
    other_acc = tiles.load(memory.sums, tiles.TILE)
    other_reference, other_denominator = (
        tiles.load(memory.statistics.at[k, own], tiles.COLUMN) for k in (0, 1)
    )
    plgpu.barrier_arrive(memory.taken)
    joint = jnp.maximum(reference, other_reference)
    mine, theirs = jnp.exp2(reference - joint), jnp.exp2(other_reference - joint)
    acc = acc * tiles.tall(mine, acc) + other_acc * tiles.tall(theirs, acc)
    return acc, joint, denominator * mine + other_denominator * theirs


def _add_product(acc, left, right):
    return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(acc))


def _columns_of(value: float, columns: int):
    return plgpu.layout_cast(jnp.full((columns,), value, jnp.float32), tiles.COLUMN)


def _any_above(x):
    """Whether an element of an accumulator is above zero, for all threads of the warpgroup."""
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def vote(_, x):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        values = [
            vector.extract(register, [], [k])
            for register in x.registers.flat
            for k in range(ir.VectorType(register.type).shape[0])
        ]
        top = functools.reduce(arith.maximumf, values)
        zero = arith.constant(f32, 0.0)
        mine = arith.extui(i32, arith.cmpf(arith.CmpFPredicate.OGT, top, zero))
        barrier = mgpu.utils.warpgroup_barrier_idx(sync=False)
        text = (
            "{ .reg .pred mine, any; setp.ne.b32 mine, $1, 0; "
            f"barrier.red.or.pred any, $2, {plan.LANES}, mine; selp.b32 $0, 1, 0, any; }}"
        )
        found = llvm.inline_asm(
            i32, [mine, barrier], text, "=r,r,r,~{memory}", has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return vote(x) > 0


# --- Who does what ---


class _Way(NamedTuple):
    """The roles of warpgroups, each behind who takes it, and the shared memory that they add."""

    roles: tuple[tuple[Callable[[jax.Array], Any], Callable[[_Cta], None]], ...]
    memory: Callable[[Shape], dict[str, Any]]


_all = lambda wg: True
_WAYS = {
    plan.ALTERNATE: _Way(((_all, _multiply_in_turns),), _exchange_memory),
    plan.LATENTS: _Way(((_all, _multiply),), _staging_memory),
    plan.TOGETHER: _Way(((_all, _multiply),), _staging_memory),
    plan.COLUMNS: _Way(
        ((lambda wg: wg == 0, _make_probabilities), (lambda wg: wg > 0, _multiply_half)),
        _probability_memory,
    ),
    plan.SWAPPED[1]: _Way(((_all, _multiply_swapped),), _handing_over_memory),
    plan.SWAPPED[2]: _Way(((_all, _multiply_swapped),), _slots_memory),
    plan.SWAPPED[4]: _Way(((_all, _multiply_swapped),), _slots_memory),
}
