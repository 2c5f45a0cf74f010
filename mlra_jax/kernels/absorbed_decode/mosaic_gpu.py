"""Absorbed decode for Hopper GPUs: one pass over the latent cache at the speed of memory.

Two launches. The first walks the cache. Its work is a list of tiles (row of the batch, latents,
block of query rows, block of cache positions) that is divided equally among the CTAs, so that rows
of unequal length cost what they read and no CTA waits for another. In a CTA one warpgroup only
issues TMA copies into a ring of shared-memory stages; the others multiply. A latent tile is loaded
once and serves as key and as value. The second launch joins the partial results of each query row
by their log-sum-exp.

How the multiplying warpgroups share the work depends on the problem:

  alternate  one latent, up to 64 query rows: two take turns at tiles and join their states at the
             end, so that the softmax of one runs while the other multiplies;
  latents    tiles of two latents, which share a rotary key: each of two has one of them;
  together   more than 64 query rows: each of two has 64 of them, both use every tile;
  columns    latents of width 512, whose accumulator does not fit the registers of one warpgroup:
             the first turns tiles into probabilities, the second and third have one half of the
             value columns each.

A stream is up to 64 query rows of one latent, with a softmax of their own. A unit is what walks the
cache as one: the one or two streams of a CTA.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

# Query rows of one wgmma; fewer are padded, which costs nothing while memory is the limit.
_ROWS = 64
# The smallest piece of a tiled shared-memory layout: starts and row counts are multiples of it.
_ALIGN = 8
_SMEM_BYTES = 227 * 1024
_WIDTHS = (128, 256, 512)
# Threads of a warpgroup.
_LANES = 128
# Columns of a partial result that a thread joins, 16 bytes of it.
_COLUMNS = 8
# Warpgroups that join a row together, and their warps.
_JOINERS = 2
_WARPS = _JOINERS * _LANES // 32
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
# A finite stand-in for -inf as running maximum, so that no difference of infinities arises.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be tuned; `heuristic` chooses it from the sizes.

    Attributes:
      block: cache positions per tile, a multiple of 64.
      stages: tiles in flight per CTA; an even number where two warpgroups take turns.
      ctas: how many CTAs share the work, so at most how many parts a query row's result has.
      shared: latents that a tile holds, 1 or 2.
      query_stages: 2 loads the next row's queries while the present ones are in use.
      stripes: give CTAs every n-th tile instead of a run of neighbours; for a batch of one row,
        whose units then divide the CTAs among themselves.
      join_rows: query rows that a CTA of the second launch joins, where tiles are not in stripes.
      overlap: let each launch begin while the one before it drains.
    """

    block: int = 64
    stages: int = 4
    ctas: int = 132
    shared: int = 1
    query_stages: int = 1
    stripes: bool = False
    join_rows: int = 4
    overlap: bool = True


def _multiprocessors(device_kind: str) -> int:
    return {"H20": 78, "H800 PCIe": 114, "H100 PCIe": 114}.get(
        device_kind.removeprefix("NVIDIA "), 132
    )


def _mode(rows: int, width: int, shared: int) -> str:
    if width == 512:
        return "columns"
    if shared > 1:
        return "latents"
    return "alternate" if rows <= _ROWS else "together"


def _piece(width: int) -> int:
    """Columns that a warpgroup passes through shared memory at a time when it has finished."""
    return {128: 64, 256: 32, 512: 128}[width]


def _chunk(width: int) -> int:
    """Columns that one copy of queries brings."""
    return 64 if width == 512 else 128


def _query_rows(rows: int, streams: int) -> int:
    """Rows of the queries in shared memory: a product of 64 rows may begin at any stream's."""
    own = min(rows, _ROWS)
    return streams * own + _ROWS - own


def _smem_bytes(config: Config, problem: Any) -> int:
    shape, rope = _shape(problem, config), problem.rope
    width, mode = shape.width, shape.mode
    query = _query_rows(shape.rows, shape.streams) * width
    query += _query_rows(shape.rows, shape.rope_streams) * rope
    cache = config.stages * config.block * (shape.shared * width + rope)
    if mode == "columns":
        exchange = 2 * _ROWS * config.block  # Results pass through the space of the queries.
    else:
        exchange = 2 * _ROWS * _piece(width) * (4 if mode == "alternate" else 2)
    # Row statistics and barriers come last, each on a KiB of its own.
    return (config.query_stages * query + cache) * 2 + exchange + 3 * 1024


def _with_most_stages(config: Config, problem: Any) -> Config | None:
    # More in flight gains nothing, but memory then serves some CTAs long before others.
    for stages in range(4, 0, -_shape(problem, config).turns):
        config = dataclasses.replace(config, stages=stages)
        if _smem_bytes(config, problem) <= _SMEM_BYTES:
            return config
    return None


def supports(problem: Any) -> str | None:
    """None if the kernel can serve the problem, otherwise why not, in one phrase."""
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype {problem.dtype} is neither bfloat16 nor float16"
    if problem.width not in _WIDTHS:
        return f"latent width {problem.width} is none of {_WIDTHS}"
    if problem.rope not in (16, 32, 64, 128):
        return f"rotary width {problem.rope} is none of 16, 32, 64, 128"
    if problem.cache % _ALIGN:
        return f"the cache has {problem.cache} positions, which is no multiple of {_ALIGN}"
    if _with_most_stages(Config(), problem) is None:
        return f"latents of {problem.width} + {problem.rope} do not fit shared memory"
    return None


def heuristic(problem: Any) -> Config:
    """The Config for a problem that nobody measured."""
    pairs = (
        problem.width == 128
        and problem.latents % 2 == 0
        and problem.queries * problem.heads <= _ROWS
    )
    config = Config(ctas=_multiprocessors(problem.device_kind), shared=2 if pairs else 1)
    units = _shape(problem, config).units
    if problem.batch == 1 and units <= 4 and config.ctas % units == 0:
        # As many CTAs as have equally much to do when the cache is full.
        tiles = pl.cdiv(problem.cache, config.block)
        team = pl.cdiv(tiles, pl.cdiv(tiles, config.ctas // units))
        config = dataclasses.replace(config, stripes=True, ctas=team * units)
    elif problem.width == 128 and config.shared == 1:
        config = dataclasses.replace(config, query_stages=2)
    return _with_most_stages(config, problem)


def candidates(problem: Any) -> list[Config]:
    """The settings worth measuring for a problem."""
    first = heuristic(problem)
    found = [first]
    # Tiles in stripes are joined by whole teams.
    join_rows = [first.join_rows] if first.stripes else [2, 4, 8]
    for block, shared, query_stages, rows in itertools.product(
        (64, 128), sorted({1, first.shared}), (1, 2), join_rows
    ):
        stripes = first.stripes and shared == first.shared
        config = dataclasses.replace(
            first,
            block=block,
            ctas=first.ctas if stripes else _multiprocessors(problem.device_kind),
            shared=shared,
            query_stages=query_stages,
            join_rows=rows,
            stripes=stripes,
        )
        config = _with_most_stages(config, problem)
        if config is None:
            continue
        # Fewer tiles in flight wait less in memory's queues.
        turns = _shape(problem, config).turns
        for stages in (config.stages, max(config.stages - turns, turns)):
            config = dataclasses.replace(config, stages=stages)
            if config not in found:
                found.append(config)
    return found


def _at(start, size: int, multiple: int = _ALIGN):
    """The slice [start, start + size), start being a multiple of `multiple`."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, multiple), size)


def _cdiv(a, b):
    return lax.div(a + b - 1, jnp.int32(b) if isinstance(b, int) else b)


def _tile_count(start, end, block: int):
    """Tiles that cover [start, end); the first begins at `start` rounded down to the alignment."""
    begin = start - lax.rem(start, jnp.full_like(start, _ALIGN))
    return jnp.where(end > start, lax.div(end - begin + block - 1, jnp.full_like(end, block)), 0)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The static sizes both kernels are built from."""

    batch: int
    queries: int
    latents: int
    heads: int
    groups: int
    width: int
    rope: int
    cache: int
    shared: int
    scale: float
    dtype: Any

    @property
    def rows(self) -> int:
        """Query rows of one latent, T * H rounded up to the alignment."""
        return -(-self.queries * self.heads // _ALIGN) * _ALIGN

    @property
    def mode(self) -> str:
        return _mode(self.rows, self.width, self.shared)

    @property
    def row_tiles(self) -> int:
        """Blocks of 64 query rows that a CTA has at once."""
        return 2 if self.mode == "together" else 1

    @property
    def streams(self) -> int:
        return self.row_tiles * self.shared

    @property
    def rope_streams(self) -> int:
        """Streams with rotary queries of their own."""
        return self.row_tiles * min(self.groups, self.shared)

    @property
    def blocks(self) -> int:
        """Blocks of query rows per latent, each walking the cache."""
        return -(-self.rows // (_ROWS * self.row_tiles))

    @property
    def units(self) -> int:
        """Units per batch row: (latents of a tile, block of rows) pairs."""
        return self.latents // self.shared * self.blocks

    @property
    def stream_rows(self) -> int:
        return min(self.rows, _ROWS)

    @property
    def multipliers(self) -> int:
        """Warpgroups of a CTA that multiply."""
        return 3 if self.mode == "columns" else 2

    @property
    def turns(self) -> int:
        """Warpgroups that take turns at tiles; the number of stages is a multiple of it."""
        return 2 if self.mode == "alternate" else 1

    def of_unit(self, unit):
        """The first latent of a unit and its block of query rows."""
        return lax.div(unit, self.blocks) * self.shared, lax.rem(unit, self.blocks)

    def slots(self, config: Config) -> int:
        """Partial results at most; every CTA and every unit begins at most one new."""
        return config.ctas if config.stripes else config.ctas + self.batch * self.units


def _shape(problem: Any, config: Config) -> _Shape:
    """What follows from the sizes; it has no scale yet."""
    sizes = {f.name: getattr(problem, f.name, None) for f in dataclasses.fields(_Shape)}
    return _Shape(**sizes | dict(shared=config.shared))


def _schedule(shape: _Shape, config: Config, lengths_ref, starts_ref, table_ref):
    """How tiles are numbered: their total, the share of a CTA, and a row's first tile and count."""
    if table_ref is None:
        start, end = starts_ref[0], lengths_ref[0, 0]
        for t in range(1, shape.queries):
            end = jnp.maximum(end, lengths_ref[0, t])
        count = _tile_count(start, end, config.block)
        total = count * shape.units
        span = lambda row: (jnp.int32(0), count)
    else:
        total = table_ref[shape.batch] * shape.units

        def span(row):
            first = table_ref[row]
            return first * shape.units, table_ref[row + 1] - first

    return total, jnp.maximum(_cdiv(total, config.ctas), 1), span


def _table(shape: _Shape, config: Config, lengths_BT, starts_B):
    """For batches: before which tile each row begins, then the row that each CTA begins with."""
    count_B = _tile_count(starts_B, lengths_BT.max(axis=1), config.block)
    row = jnp.arange(shape.batch + 1)
    begin = jnp.where(row[:-1] < row[:, None], count_B, 0).sum(axis=1)
    share = jnp.maximum(_cdiv(begin[-1] * shape.units, config.ctas), 1)
    first = jnp.arange(config.ctas, dtype=jnp.int32) * share
    row_of_cta = (begin[1:] * shape.units <= first[:, None]).sum(axis=1)
    return jnp.concatenate([begin, row_of_cta]).astype(jnp.int32)


def _swizzled(shape, dtype):
    """Shared memory as wgmma and TMA want it; the last dimension decides the swizzle."""
    size = jnp.dtype(dtype).itemsize
    swizzle = next(s for s in (128, 64, 32) if shape[-1] * size % s == 0)
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)),
    )


def _weigh(parts_ref, lses_ref, sums_ref, statistics_ref) -> None:
    """Joins partial results of one row as far as a warp can alone.

    What was read is dropped from L2: otherwise it would be written to device memory while the next
    launch reads its cache.

    Args:
      parts_ref: normalised partial results [n, 128] of two bytes an element, in device memory.
      lses_ref: float32 [n], their base-2 LSEs.
      sums_ref: float32 [_WARPS * 128] in shared memory, for each warp's sum of weighted parts.
      statistics_ref: float32 [2 * _WARPS] in shared memory, for the LSE whose weight is 1 in each
        warp, then for each warp's sum of weights.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)
    def weigh(ctx, parts, lses, sums, statistics):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        memory = ir.MemRefType(parts.type)
        count, element = memory.shape[0], memory.element_type
        narrow, wide = (ir.VectorType.get((_COLUMNS,), t) for t in (element, f32))
        number, real = (functools.partial(arith.constant, t) for t in (i32, f32))
        spread = functools.partial(vector.broadcast, wide)
        below = functools.partial(arith.cmpi, arith.CmpIPredicate.ult)
        exp2 = lambda x: llvm.inline_asm(f32, [x], "ex2.approx.ftz.f32 $0, $1;", "=f,f")

        def at(ref, index, kind):
            return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], kind)

        thread = mgpu.thread_idx()
        lane, warp = arith.remui(thread, number(32)), arith.divui(thread, number(32))
        half_warp, column = arith.divui(thread, number(16)), arith.remui(thread, number(16))
        column = arith.muli(column, number(_COLUMNS))
        # Each half of a warp reads every n-th part.
        indices = [arith.addi(half_warp, number(k)) for k in range(0, count, 2 * _WARPS)]
        there, last = below(indices[-1], number(count)), indices[-1]
        indices[-1] = arith.minui(last, number(count - 1))
        places = [arith.addi(arith.muli(i, number(_LANES)), column) for i in indices]
        lse = [llvm.load(f32, at(lses, i, f32)) for i in indices]
        values = [llvm.load(narrow, at(parts, place, element)) for place in places]
        lse[-1] = arith.select(there, lse[-1], real(-math.inf))
        top = functools.reduce(arith.maximumf, lse, real(_LOWEST))
        total, acc = real(0.0), spread(real(0.0))
        for x, value in zip(lse, values, strict=True):
            weight = exp2(arith.subf(x, top))
            total = arith.addf(total, weight)
            acc = mlir_math.fma(arith.extf(wide, value), spread(weight), acc)
        # The two halves become one.
        swap = lambda x: mgpu.utils.shfl_bfly(x, 16)
        joint = arith.maximumf(top, swap(top))
        fade = exp2(arith.subf(top, joint))
        total, acc = arith.mulf(total, fade), arith.mulf(acc, spread(fade))
        total = arith.addf(total, swap(total))
        for k in range(_COLUMNS):
            one = vector.extract(acc, [], [k])
            acc = vector.insert(arith.addf(one, swap(one)), acc, [], [k])
        with mgpu.when(below(lane, number(16))):
            place = arith.addi(arith.muli(warp, number(_LANES)), column)
            llvm.store(acc, at(sums, place, f32))
            llvm.store(joint, at(statistics, warp, f32))
            llvm.store(total, at(statistics, arith.addi(warp, number(_WARPS)), f32))
        # One thread for each line of 128 bytes, of which no other warp has read.
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, number(8)), number(0))):
            for k, place in enumerate(places):
                with mgpu.when(there) if k + 1 == len(places) else contextlib.nullcontext():
                    pointer, void = at(parts, place, element), ir.Type.parse("!llvm.void")
                    text = "discard.global.L2 [$0], 128;"
                    llvm.inline_asm(void, [pointer], text, "l,~{memory}", has_side_effects=True)

    weigh(parts_ref, lses_ref, sums_ref, statistics_ref)


def _join_teams(shape: _Shape, config: Config):
    """The second launch where tiles are in stripes: each CTA has a part of every row of its unit.

    A CTA joins 128 columns of one row.
    """
    chunks, team = shape.width // _LANES, config.ctas // shape.units
    lanes = plgpu.Layout.WG_STRIDED((_LANES,), 1)
    warps = range(_WARPS)

    def body(part_ref, part_lse_ref, out_ref, lse_ref, sums, statistics, weighed):
        index = lax.axis_index("task")
        chunk, index = lax.rem(index, chunks), lax.div(index, chunks)
        stream_row, index = lax.rem(index, shape.stream_rows), lax.div(index, shape.stream_rows)
        stream, unit = lax.rem(index, shape.streams), lax.div(index, shape.streams)
        if config.overlap:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        parts = pl.ds(unit * team, team)
        _weigh(
            part_ref.at[stream, stream_row, chunk, parts],
            part_lse_ref.at[stream, stream_row, parts],
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
            total = sum(statistics[_WARPS + w] * weights[w] for w in warps)
            ats = [pl.ds(w * _LANES, _LANES) for w in warps]
            acc = sum(plgpu.load(sums.at[ats[w]], layout=lanes) * weights[w] for w in warps)
            place = jnp.int32(0), unit, stream, stream_row, chunk
            _store_joined(shape, (out_ref, lse_ref), place, acc, top, total)

    return _join_kernel(
        shape,
        body,
        shape.units * shape.streams * shape.stream_rows * chunks,
        _JOINERS,
        sums=plgpu.SMEM((_WARPS * _LANES,), jnp.float32),
        statistics=plgpu.SMEM((2 * _WARPS,), jnp.float32),
        weighed=plgpu.Barrier(num_arrivals=_JOINERS),
    )


def _store_joined(shape: _Shape, refs, place, acc, top, total):
    """Writes 128 columns of one query row, and once its LSE; place is from batch row to chunk."""
    out_ref, lse_ref = refs
    batch_row, unit, stream, row, chunk = place
    latent, rows_block = shape.of_unit(unit)
    row = row + rows_block * (_ROWS * shape.row_tiles)
    if shape.shared > 1:
        latent = latent + stream
    else:
        row = row + stream * _ROWS

    @pl.when(row < shape.rows)
    def _store():
        seen = total > 0
        scaled = acc * (1.0 / jnp.where(seen, total, 1.0))
        at = _at(chunk * _LANES, _LANES, _LANES)
        out_ref[batch_row, latent, row, at] = scaled.astype(shape.dtype)

        @pl.when(chunk == 0)
        def _store_lse():
            lse = (top + jnp.log2(total)) * math.log(2)
            lse_ref[batch_row, latent, row] = jnp.where(seen, lse, -jnp.inf)


def _join_shares(shape: _Shape, config: Config):
    """The second launch for units of few parts each; a CTA joins 128 columns of some rows."""
    chunks = shape.width // _LANES
    rows, at_a_time = config.join_rows, 3
    groups = -(-shape.stream_rows // rows)
    lanes = plgpu.Layout.WG_STRIDED((_LANES,), 1)

    def body(part_ref, part_lse_ref, lengths_ref, starts_ref, *refs):
        table_ref = refs[0] if shape.batch > 1 else None
        out_ref, lse_ref = refs[-2:]
        index = lax.axis_index("task")
        chunk, index = lax.rem(index, chunks), lax.div(index, chunks)
        group, index = lax.rem(index, groups), lax.div(index, groups)
        stream, unit = lax.rem(index, shape.streams), lax.div(index, shape.streams)
        batch_row, unit_in_row = lax.div(unit, shape.units), lax.rem(unit, shape.units)
        _, share, span = _schedule(shape, config, lengths_ref, starts_ref, table_ref)
        begin, count = span(batch_row)
        begin = begin + unit_in_row * count
        cta = lax.div(begin, share)
        parts = jnp.where(count > 0, lax.div(begin + count - 1, share) - cta + 1, 0)
        slot = cta + unit
        stream_row = [jnp.minimum(group * rows + r, shape.stream_rows - 1) for r in range(rows)]
        if config.overlap:
            # What was read so far is older than the first launch; the parts are not.
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()

        def some_parts(turn, carry):
            base = turn * at_a_time
            slots = [slot + jnp.minimum(base + k, parts - 1) for k in range(at_a_time)]
            lses = [[part_lse_ref[stream, row, at] for at in slots] for row in stream_row]
            values = [
                [plgpu.load(part_ref.at[stream, row, chunk, at], layout=lanes) for at in slots]
                for row in stream_row
            ]
            after = []
            for (acc, top, total), lse, value in zip(carry, lses, values, strict=True):
                lse = [jnp.where(base + k < parts, x, -jnp.inf) for k, x in enumerate(lse)]
                new_top = functools.reduce(jnp.maximum, lse, top)
                fade = jnp.exp2(top - new_top)
                acc, total = acc * fade, total * fade
                for k in range(at_a_time):
                    weight = jnp.exp2(lse[k] - new_top)
                    acc = acc + value[k].astype(jnp.float32) * weight
                    total = total + weight
                after.append((acc, new_top, total))
            return after

        nothing = plgpu.layout_cast(jnp.zeros((_LANES,), jnp.float32), lanes)
        carry = [(nothing, jnp.float32(_LOWEST), jnp.float32(0)) for _ in range(rows)]
        carry = lax.fori_loop(0, _cdiv(parts, at_a_time), some_parts, carry)
        for r, state in enumerate(carry):
            place = batch_row, unit_in_row, stream, group * rows + r, chunk
            pl.when(group * rows + r < shape.stream_rows)(
                functools.partial(_store_joined, shape, (out_ref, lse_ref), place, *state)
            )

    tasks = shape.batch * shape.units * shape.streams * groups * chunks
    return _join_kernel(shape, body, tasks)


def _join_kernel(shape: _Shape, body, tasks: int, warpgroups: int = 1, **scratch):
    # A named single warpgroup would cost a barrier.
    threads = dict(num_threads=warpgroups, thread_name="wg") if warpgroups > 1 else {}
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (shape.batch, shape.latents, shape.rows, shape.width), shape.dtype
            ),
            jax.ShapeDtypeStruct((shape.batch, shape.latents, shape.rows), jnp.float32),
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


def _split_kernel(shape: _Shape, config: Config):
    """Builds the launch that walks the cache: partial outputs (normalised) and base-2 LSEs."""
    block, stages, width = config.block, config.stages, shape.width
    mode, streams, multipliers = shape.mode, shape.streams, shape.multipliers
    turns = shape.turns
    rows, rope_streams = shape.stream_rows, shape.rope_streams
    factor = shape.scale * math.log2(math.e)
    team = config.ctas // shape.units  # CTAs of a unit, where tiles are in stripes.
    stride = team if config.stripes else 1
    half, piece, chunk_width = width // 2, _piece(width), _chunk(width)

    def body(*refs, **scratch):
        q_ref, q_rope_ref, latents_ref, k_rope_ref, lengths_ref, starts_ref = refs[:6]
        table_ref = refs[6] if shape.batch > 1 else None
        part_ref, part_lse_ref = refs[-2:]
        q_smem, *wide_out_smem = scratch["q"] if mode == "columns" else (scratch["q"],)
        q_rope_smem, c_smem, r_smem = scratch["q_rope"], scratch["latents"], scratch["k_rope"]
        q_full, q_empty = scratch["q_full"], scratch["q_empty"]
        full, empty = scratch["full"], scratch["empty"]
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        if config.overlap:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        schedule = functools.partial(_schedule, shape, config, lengths_ref, starts_ref, table_ref)

        if config.stripes:
            # All that is known before the lengths arrive: row, latent, block of rows, first tile.
            unit, first_tile = lax.rem(cta, shape.units), lax.div(cta, shape.units)
            stripe = jnp.int32(0), *shape.of_unit(unit), first_tile

        def for_each_unit(visit, drop):
            """Calls visit(row, latent, block of rows, first tile, tiles, ring position, count)."""
            if config.stripes:
                _, _, span = schedule()
                row, latent, rows_block, tile = stripe
                now = lax.div(jnp.maximum(span(row)[1] - tile + team - 1, 0), team)
                # The tile that was guessed has place 0 of the ring, whether it is used or not.
                ring = jnp.where((now > 0) & (begin_of(row) == 0), 0, 1)
                pl.when(ring > 0)(drop)
                visit(row, latent, rows_block, tile, now, ring, jnp.int32(0))
                return

            total, share, span = schedule()
            first = cta * share
            last = jnp.minimum(first + share, total)

            def step(carry):
                tile, row, ring, seen = carry
                if table_ref is not None:  # Rows without tiles are passed over.
                    row = lax.while_loop(
                        lambda r: table_ref[r + 1] * shape.units <= tile, lambda r: r + 1, row
                    )
                begin, count = span(row)
                unit = lax.div(tile - begin, count)
                tile_in_unit = lax.rem(tile - begin, count)
                now = jnp.minimum(count - tile_in_unit, last - tile)
                visit(row, *shape.of_unit(unit), tile_in_unit, now, ring, seen)
                return tile + now, row, ring + now, seen + 1

            row = jnp.int32(0)
            if table_ref is not None:
                row = table_ref[shape.batch + 1 + cta]
            lax.while_loop(lambda c: c[0] < last, step, (first, row, jnp.int32(0), jnp.int32(0)))

        def begin_of(row):
            start = starts_ref[row]
            return start - lax.rem(start, jnp.int32(_ALIGN))

        def for_each_tile(row, tile, now, ring, step, carry):
            """carry = step(stage, position, ring position, carry) for the warpgroup's tiles."""
            begin = begin_of(row)
            skipped = lax.rem(wg + lax.rem(ring, 2), 2) if turns == 2 else jnp.int32(0)

            def body(k, carry):
                i = skipped + k * turns
                stage = lax.rem(ring + i, stages)
                plgpu.barrier_wait(full.at[stage])
                return step(stage, begin + (tile + i * stride) * block, ring + i, carry)

            return lax.fori_loop(0, lax.div(now - skipped + turns - 1, turns), body, carry)

        def load_tile(row, latent, position, stage):
            at = _at(position, block)
            columns = _at(latent * width, shape.shared * width, width)
            plgpu.copy_gmem_to_smem(
                latents_ref.at[row, at, columns], c_smem.at[stage], full.at[stage]
            )
            plgpu.copy_gmem_to_smem(k_rope_ref.at[row, at], r_smem.at[stage], full.at[stage])

        def load_queries(row, latent, rows_block, slot):
            for stream in range(streams):
                tile_of_rows = stream if shape.row_tiles > 1 else 0
                at = rows_block * (_ROWS * shape.row_tiles) + tile_of_rows * _ROWS
                source, target = _at(at, rows, _ROWS), pl.ds(stream * rows, rows)
                which = latent if shape.row_tiles > 1 else latent + stream
                for k in range(width // chunk_width):
                    # In an order of its own, as all CTAs ask for the same at once.
                    chunk = lax.rem(cta + k, width // chunk_width)
                    columns = _at(chunk * chunk_width, chunk_width, chunk_width)
                    plgpu.copy_gmem_to_smem(
                        q_ref.at[row, which, source, columns],
                        q_smem.at[slot, chunk, target],
                        q_full.at[slot],
                    )
                if stream < rope_streams:
                    plgpu.copy_gmem_to_smem(
                        q_rope_ref.at[row, lax.rem(which, shape.groups), source],
                        q_rope_smem.at[slot, target],
                        q_full.at[slot],
                    )

        def load():
            # The cache comes from farther away than the queries, so it is asked first.
            if config.stripes:
                # Without waiting for the lengths: a row hardly ever begins late or ends this early.
                row, latent, rows_block, tile = stripe
                last_tile = (shape.cache - 1) // block
                load_tile(row, latent, jnp.minimum(tile, last_tile) * block, 0)
                load_queries(row, latent, rows_block, 0)

            def visit(row, latent, rows_block, tile, now, ring, seen):
                begin = begin_of(row)

                def load_next(i, _=None):
                    stage = lax.rem(ring + i, stages)
                    pl.when(ring + i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                    load_tile(row, latent, begin + (tile + i * stride) * block, stage)

                if config.stripes:
                    lax.fori_loop(1 - ring, now, load_next, None)
                    return
                load_next(jnp.int32(0))
                slot = lax.rem(seen, config.query_stages)
                before = seen >= config.query_stages
                pl.when(before)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
                load_queries(row, latent, rows_block, slot)
                lax.fori_loop(1, now, load_next, None)

            for_each_unit(visit, drop=lambda: None)

        def drop():
            """Uses up a tile that was loaded on a wrong guess."""

            def pass_over():
                plgpu.barrier_wait(full.at[0])
                plgpu.barrier_arrive(empty.at[0])

            if mode == "alternate":
                pl.when(wg == 0)(pass_over)
            else:
                pass_over()

        def scores(slot, stream, stage):
            """Products of a stream's queries and keys, float32 [64, block]."""

            def products(acc_ref):
                at = _at(stream * rows, _ROWS)
                rope_at = _at(stream % rope_streams * rows, _ROWS)
                first_column = 0 if shape.shared == 1 else stream * width
                for chunk in range(width // chunk_width):
                    columns = _at(first_column + chunk * chunk_width, chunk_width, chunk_width)
                    keys = c_smem.at[stage, :, columns].transpose((1, 0))
                    plgpu.wgmma(acc_ref, q_smem.at[slot, chunk, at], keys)
                keys = r_smem.at[stage].transpose((1, 0))
                plgpu.wgmma(acc_ref, q_rope_smem.at[slot, rope_at], keys)
                return acc_ref[...]

            return pl.run_scoped(products, plgpu.ACC((_ROWS, block), jnp.float32))

        def sight(row, first_query_row):
            """A function that puts -inf where a query does not see, given where a tile begins."""
            start, ends = starts_ref[row], [lengths_ref[row, t] for t in range(shape.queries)]
            seen_by_all = functools.reduce(jnp.minimum, ends)

            def hide(s, position):
                def hidden(s):
                    iota = functools.partial(
                        plgpu.broadcasted_iota, jnp.int32, s.shape, layout=plgpu.Layout.WGMMA
                    )
                    column, limit = position + iota(1), ends[0]
                    for t, end in enumerate(ends[1:], 1):
                        limit = jnp.where(first_query_row + iota(0) >= t * shape.heads, end, limit)
                    return jnp.where((column >= start) & (column < limit), s, -jnp.inf)

                # Only the tiles at the edges need it.
                in_full_view = (position >= start) & (position + block <= seen_by_all)
                return lax.cond(in_full_view, lambda s: s, hidden, s)

            return hide

        def wide(x, like):
            return lax.broadcast_in_dim(x, like.shape, [0])

        def softmax(s, top, denominator):
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            fade = jnp.exp2(top - new_top)
            p = jnp.exp2(s * factor - wide(new_top, s))
            return p, fade, new_top, denominator * fade + p.sum(axis=1)

        def rows_of(value):
            return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), _ROW_LAYOUT)

        def zeros(columns):
            return plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)

        def accumulate(accs, weights, values):
            def products(refs):
                for ref, value in zip(refs, values, strict=True):
                    plgpu.wgmma(ref, weights, value)

            return pl.run_state(products)([plgpu.ACC.init(acc) for acc in accs])

        def part_of(row, latent, rows_block):
            if config.stripes:
                return lax.rem(cta, shape.units) * team + lax.div(cta, shape.units)
            unit = row * shape.units + lax.div(latent, shape.shared) * shape.blocks + rows_block
            return cta + unit

        def finish(top, denominator):
            seen = denominator > 0
            lse = jnp.where(seen, top + jnp.log2(denominator), -jnp.inf)
            return lse, 1.0 / jnp.where(seen, denominator, 1.0)

        def store_lse(stream, part, lse):
            # One number to each of 64 places, which JAX from 0.12 on wants to be told.
            target = part_lse_ref.at[stream, :, part]
            if hasattr(plgpu, "store"):
                plgpu.store(target, lse, optimized=False)
            else:
                target[...] = lse

        def send(staging, value, part, stream, column):
            """Writes 64 query rows of a partial result, from a column on, to device memory."""
            staging[...] = value.astype(shape.dtype)
            plgpu.commit_smem()
            columns = _at(column % _LANES, value.shape[1], value.shape[1])
            target = part_ref.at[stream, :, column // _LANES, part, columns]
            plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, rows)], target)

        def multiply():
            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                stream = 0 if mode == "alternate" else wg
                first_row = rows_block * shape.row_tiles
                if shape.row_tiles > 1:
                    first_row = first_row + wg
                hide = sight(row, first_row * _ROWS)
                plgpu.barrier_wait(q_full.at[slot])
                latent_in_tile = 0 if shape.shared == 1 else stream

                def step(stage, here, i, state):
                    acc, top, denominator = state
                    s = hide(scores(slot, stream, stage), here)
                    p, fade, top, denominator = softmax(s, top, denominator)
                    values = c_smem.at[stage, :, _at(latent_in_tile * width, width, width)]
                    faded = acc * wide(fade, acc)
                    [acc] = accumulate([faded], p.astype(shape.dtype), [values])
                    plgpu.barrier_arrive(empty.at[stage])
                    return acc, top, denominator

                state = zeros(width), rows_of(_LOWEST), rows_of(0.0)
                acc, top, denominator = for_each_tile(row, tile, now, ring, step, state)
                plgpu.barrier_arrive(q_empty.at[slot])
                part = part_of(row, latent, rows_block)
                if mode == "alternate":
                    for me in (0, 1):
                        state = acc, top, denominator
                        pl.when(wg == me)(functools.partial(unite, me, part, seen, *state))
                    return
                lse, inverse = finish(top, denominator)
                store_lse(stream, part, lse)
                for at in range(0, width, piece):
                    value = acc[:, at : at + piece]
                    staging = scratch["out"].at[wg]
                    send(staging, value * wide(inverse, value), part, stream, at)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            for_each_unit(visit, drop)

        def unite(me, part, seen, acc, top, denominator):
            """Joins what the two warpgroups have; each writes one half of the columns."""
            other = 1 - me
            tops_smem, denominators_smem = (scratch["statistics"].at[pl.ds(k, 2)] for k in (0, 2))
            taken, handed_over = scratch["taken"], scratch["handed_over"]
            mine_smem, _ = scratch[f"exchange_{me}"]
            other_smem, out_smem = scratch[f"exchange_{other}"]
            for at in range(0, half, piece):
                if at:
                    plgpu.barrier_wait(taken)
                else:
                    pl.when(seen > 0)(lambda: plgpu.barrier_wait(taken))
                    tops_smem[me] = top
                    denominators_smem[me] = denominator
                theirs_at = other * half + at
                mine_smem[...] = acc[:, theirs_at : theirs_at + piece]
                plgpu.barrier_arrive(handed_over)
                plgpu.barrier_wait(handed_over)
                if not at:
                    other_top = plgpu.load(tops_smem.at[other], layout=_ROW_LAYOUT)
                    others = plgpu.load(denominators_smem.at[other], layout=_ROW_LAYOUT)
                    joint = jnp.maximum(top, other_top)
                    mine, theirs = jnp.exp2(top - joint), jnp.exp2(other_top - joint)
                    lse, inverse = finish(joint, denominator * mine + others * theirs)
                    if me == 0:
                        store_lse(0, part, lse)
                    mine, theirs = mine * inverse, theirs * inverse
                theirs_value = plgpu.load(other_smem, layout=plgpu.Layout.WGMMA)
                value = acc[:, me * half + at : me * half + at + piece]
                value = value * wide(mine, value) + theirs_value * wide(theirs, value)
                send(out_smem, value, part, 0, me * half + at)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(taken)

        def make_probabilities():
            p_smem = scratch["p"]
            fade_smem, inverse_smem = (scratch["statistics"].at[k] for k in (0, 1))
            p_full, p_empty = scratch["p_full"], scratch["p_empty"]
            inverse_full, inverse_empty = scratch["inverse_full"], scratch["inverse_empty"]

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                hide = sight(row, rows_block * _ROWS)
                plgpu.barrier_wait(q_full.at[slot])

                def step(stage, here, i, carry):
                    top, denominator = carry
                    s = scores(slot, 0, stage)
                    p, fade, top, denominator = softmax(hide(s, here), top, denominator)
                    p = p.astype(shape.dtype)
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(p_empty))
                    p_smem[...] = p
                    fade_smem[...] = fade
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_full)
                    return top, denominator

                carry = rows_of(_LOWEST), rows_of(0.0)
                top, denominator = for_each_tile(row, tile, now, ring, step, carry)
                lse, inverse = finish(top, denominator)
                pl.when(seen > 0)(lambda: plgpu.barrier_wait(inverse_empty))
                inverse_smem[...] = inverse
                plgpu.barrier_arrive(inverse_full)
                store_lse(0, part_of(row, latent, rows_block), lse)

            for_each_unit(visit, drop=lambda: plgpu.barrier_wait(full.at[0]))

        def multiply_half():
            p_smem = scratch["p"]
            fade_smem, inverse_smem = (scratch["statistics"].at[k] for k in (0, 1))
            p_full, p_empty = scratch["p_full"], scratch["p_empty"]
            inverse_full, inverse_empty = scratch["inverse_full"], scratch["inverse_empty"]
            which = wg - 1

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                first_column = pl.multiple_of(which * half, half)
                # Two narrow products, as a kernel of 512 threads may not name the registers of a
                # wide one.
                ats = [first_column + at for at in range(0, half, piece)]

                def step(stage, here, i, accs):
                    plgpu.barrier_wait(p_full)
                    fade = plgpu.load(fade_smem, layout=_ROW_LAYOUT)
                    accs = [acc * wide(fade, acc) for acc in accs]
                    values = [c_smem.at[stage, :, pl.ds(at, piece)] for at in ats]
                    accs = accumulate(accs, p_smem, values)
                    plgpu.barrier_arrive(p_empty)
                    plgpu.barrier_arrive(empty.at[stage])
                    return accs

                accs = [zeros(piece) for _ in ats]
                accs = for_each_tile(row, tile, now, ring, step, accs)
                plgpu.barrier_wait(inverse_full)  # Also says that the queries were read.
                inverse = plgpu.load(inverse_smem, layout=_ROW_LAYOUT)
                plgpu.barrier_arrive(inverse_empty)
                part = part_of(row, latent, rows_block)
                for k, (at, acc) in enumerate(zip(ats, accs, strict=True)):
                    staging = wide_out_smem[0].at[slot, which * len(ats) + k]
                    send(staging, acc * wide(inverse, acc), part, 0, at)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_empty.at[slot])

            def drop_half():
                drop()
                plgpu.barrier_arrive(p_empty)

            for_each_unit(visit, drop_half)

        # The register file is divided anew: little for copies, much for accumulators.
        @pl.when(wg == multipliers)
        def _load():
            plgpu.set_max_registers(40, action="decrease")
            load()

        if mode == "columns":

            @pl.when(wg == 0)
            def _make_probabilities():
                plgpu.set_max_registers(120, action="decrease")
                make_probabilities()

            @pl.when((wg == 1) | (wg == 2))
            def _multiply_half():
                plgpu.set_max_registers(176, action="increase")
                multiply_half()

        else:

            @pl.when(wg < 2)
            def _multiply():
                plgpu.set_max_registers(232, action="increase")
                multiply()

    q_rows, rope_rows = _query_rows(shape.rows, streams), _query_rows(shape.rows, rope_streams)
    queries = _swizzled(
        (config.query_stages, width // chunk_width, q_rows, chunk_width), shape.dtype
    )
    copies = streams * width // chunk_width + rope_streams
    scratch = dict(
        q_rope=_swizzled((config.query_stages, rope_rows, shape.rope), shape.dtype),
        latents=_swizzled((stages, block, shape.shared * width), shape.dtype),
        k_rope=_swizzled((stages, block, shape.rope), shape.dtype),
        q_full=plgpu.Barrier(num_arrivals=copies, num_barriers=config.query_stages),
        q_empty=plgpu.Barrier(num_arrivals=2, num_barriers=config.query_stages),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=1 if mode == "alternate" else 2, num_barriers=stages),
        statistics=plgpu.SMEM((4, _ROWS), jnp.float32),
    )
    if mode == "columns":
        out = _swizzled((config.query_stages, width // piece, _ROWS, piece), shape.dtype)
        scratch |= dict(
            q=plgpu.RefUnion(queries, out),
            p=_swizzled((_ROWS, block), shape.dtype),
            p_full=plgpu.Barrier(),
            p_empty=plgpu.Barrier(num_arrivals=2),
            inverse_full=plgpu.Barrier(),
            inverse_empty=plgpu.Barrier(num_arrivals=2),
        )
    elif mode == "alternate":
        shapes = [_swizzled((_ROWS, piece), dtype) for dtype in (jnp.float32, shape.dtype)]
        scratch |= dict(
            q=queries,
            exchange_0=plgpu.RefUnion(*shapes),
            exchange_1=plgpu.RefUnion(*shapes),
            handed_over=plgpu.Barrier(num_arrivals=2),
            taken=plgpu.Barrier(num_arrivals=2),
        )
    else:
        scratch |= dict(q=queries, out=_swizzled((2, _ROWS, piece), shape.dtype))
    slots = shape.slots(config)
    parts = (
        jax.ShapeDtypeStruct((streams, rows, width // _LANES, slots, _LANES), shape.dtype),
        jax.ShapeDtypeStruct((streams, _ROWS, slots), jnp.float32),
    )
    return plgpu.kernel(
        body,
        out_type=parts,
        scratch_types=scratch,
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=multipliers + 1,
        thread_name="wg",
        kernel_name="absorbed_decode_split",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


def absorbed_decode(
    q_BTLHC: jax.Array,
    q_rope_BTGHR: jax.Array,
    latents_BSLC: jax.Array,
    k_rope_BSR: jax.Array,
    lengths_BT: jax.Array,
    starts_B: jax.Array,
    *,
    scale: float,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the latents; arguments as `api.absorbed_decode` normalises them.

    The cache must be finite wherever a tile may reach (up to `Config.block` positions beyond the
    length): hidden scores are replaced, but hidden values are multiplied by a weight of zero.

    Returns:
      out_BTLHC in the dtype of `q_BTLHC`, and lse_BTLH in float32 (natural logarithm).
    """
    B, T, L, H, C = q_BTLHC.shape
    G, R = q_rope_BTGHR.shape[2], q_rope_BTGHR.shape[4]
    S = latents_BSLC.shape[1]
    dtype = jnp.dtype(q_BTLHC.dtype)
    shape = _Shape(B, T, L, H, G, C, R, S, config.shared, float(scale), dtype)

    def as_rows(x_BTNHX):
        # For one query or one latent this only renames dimensions.
        N, X = x_BTNHX.shape[2], x_BTNHX.shape[4]
        x_BNRX = jnp.swapaxes(x_BTNHX, 1, 2).reshape(B, N, T * H, X)
        return jnp.pad(x_BNRX, ((0, 0), (0, 0), (0, shape.rows - T * H), (0, 0)))

    bounds = (lengths_BT, starts_B)
    if B > 1:
        bounds += (_table(shape, config, lengths_BT, starts_B),)
    parts = _split_kernel(shape, config)(
        as_rows(q_BTLHC),
        as_rows(q_rope_BTGHR),
        latents_BSLC.reshape(B, S, L * C),
        k_rope_BSR,
        *bounds,
    )
    if config.stripes:
        out_BLRC, lse_BLR = _join_teams(shape, config)(*parts)
    else:
        out_BLRC, lse_BLR = _join_shares(shape, config)(*parts, *bounds)
    out_BTLHC = jnp.swapaxes(out_BLRC[:, :, : T * H].reshape(B, L, T, H, C), 1, 2)
    lse_BTLH = jnp.swapaxes(lse_BLR[:, :, : T * H].reshape(B, L, T, H), 1, 2)
    return out_BTLHC, lse_BTLH
