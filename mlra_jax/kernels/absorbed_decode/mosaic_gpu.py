"""Absorbed decode for Hopper GPUs: one pass over the latent cache at the speed of memory.

Two launches. The first walks the cache. Its work is a list of tiles (row of the batch, latent, block
of query rows, block of cache positions) that is cut into equal runs, one per CTA, so that rows of
unequal length cost what they read and no CTA waits for another. In a CTA one warpgroup only issues
TMA copies into a ring of shared-memory stages; two others multiply. A latent tile is loaded once and
serves as key and as value. The second launch joins the partial results of each query row by their
log-sum-exp.

How the two multiplying warpgroups share the work depends on the problem:

  alternate  up to 64 query rows: they take turns at tiles and join their states at the end, so that
             the softmax of one runs while the other multiplies;
  together   more than 64 query rows: each has 64 of them, both use every tile;
  columns    latents of width 512: an accumulator would not fit the registers of one warpgroup, so
             the first computes the probabilities and the left half of the values, the second the
             right half.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Query rows of one wgmma; fewer are padded, which costs nothing while memory is the limit.
_ROWS = 64
# The smallest piece of a tiled shared-memory layout: starts and row counts are multiples of it.
_ALIGN = 8
_SMEM_BYTES = 227 * 1024
# Columns of the accumulator that pass through shared memory at a time.
_PIECE = 128
_WIDTHS = (128, 256, 512)
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
# A finite stand-in for -inf as running maximum, so that no difference of infinities arises.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be tuned; `heuristic` chooses it from the sizes.

    Attributes:
      block: cache positions per tile, a multiple of 16.
      stages: tiles in flight per CTA; an even number where warpgroups alternate.
      ctas: how many CTAs share the work, so at most how many parts a query row's result has.
      min_tiles: least number of tiles worth a CTA of its own.
      query_stages: 2 loads the next row's queries while the present ones are in use.
      merge: parts that the joining kernel holds in shared memory at a time, a multiple of 16.
      overlap: let the joining kernel start while the first drains (programmatic launch).
    """

    block: int = 64
    stages: int = 6
    ctas: int = 132
    min_tiles: int = 1
    query_stages: int = 1
    merge: int = 48
    overlap: bool = True


def _sm_count(device_kind: str) -> int:
    return {"H20": 78, "H800 PCIe": 114, "H100 PCIe": 114}.get(
        device_kind.removeprefix("NVIDIA "), 132
    )


def _mode(rows: int, width: int) -> str:
    if width == 512:
        return "columns"
    return "alternate" if rows <= _ROWS else "together"


def _smem_bytes(config: Config, rows: int, width: int, rope: int) -> int:
    mode = _mode(rows, width)
    tiles = 2 if mode == "together" else 1
    both = width + rope
    sizes = [
        config.query_stages * tiles * _ROWS * both * 2,
        config.stages * config.block * both * 2,
    ]
    if mode == "columns":
        sizes += [_ROWS * config.block * 2]
    else:
        sizes += [tiles * _ROWS * _PIECE * 4]
    # Two vectors of row statistics, 1 KiB apart, and then the barriers.
    return sum(sizes) + 1024 + 4 * _ROWS + 1024


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
    config = heuristic(problem)
    rows = problem.queries * problem.heads
    if _smem_bytes(config, rows, problem.width, problem.rope) > _SMEM_BYTES:
        return f"latents of {problem.width} + {problem.rope} do not fit shared memory"
    return None


def heuristic(problem: Any) -> Config:
    """The Config for a problem that nobody measured."""
    rows = problem.queries * problem.heads
    width, rope = problem.width, problem.rope
    mode = _mode(rows, width)
    query_stages = 2 if width == 128 and problem.batch * problem.latents > 1 else 1
    base = Config(
        block=64,
        ctas=_sm_count(problem.device_kind),
        query_stages=query_stages,
        merge=48 if problem.batch * problem.latents <= 2 else 16,
    )
    step = 2 if mode == "alternate" else 1
    stages = 8
    while stages > step and _smem_bytes(
        dataclasses.replace(base, stages=stages), rows, width, rope
    ) > (_SMEM_BYTES):
        stages -= step
    return dataclasses.replace(base, stages=stages)


def candidates(problem: Any) -> list[Config]:
    """The settings worth measuring for a problem."""
    first = heuristic(problem)
    rows = problem.queries * problem.heads
    step = 2 if _mode(rows, problem.width) == "alternate" else 1
    found = [first]
    for block in (32, 64, 128):
        for min_tiles in (1, 2):
            for query_stages in (1, 2):
                config = dataclasses.replace(
                    first, block=block, min_tiles=min_tiles, query_stages=query_stages, stages=8
                )
                while config.stages > step and (
                    _smem_bytes(config, rows, problem.width, problem.rope) > _SMEM_BYTES
                ):
                    config = dataclasses.replace(config, stages=config.stages - step)
                fits = _smem_bytes(config, rows, problem.width, problem.rope) <= _SMEM_BYTES
                if fits and config not in found:
                    found.append(config)
    return found


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
    rows: int  # Query rows of one latent, T * H rounded up to the alignment.
    scale: float
    dtype: Any

    @property
    def mode(self) -> str:
        return _mode(self.rows, self.width)

    @property
    def tiles(self) -> int:  # Row tiles that a CTA has at once.
        return 2 if self.mode == "together" else 1

    @property
    def blocks(self) -> int:  # Blocks of query rows per latent.
        return -(-self.rows // (_ROWS * self.tiles))

    @property
    def units(self) -> int:  # (latent, block of rows) pairs per batch row.
        return self.latents * self.blocks

    @property
    def part_rows(self) -> int:
        return _ROWS if self.mode == "columns" else min(self.rows, _ROWS)

    def slots(self, config: Config) -> int:
        """Every CTA and every unit begins at most one new partial result."""
        return config.ctas + self.batch * self.units


def _schedule(shape: _Shape, config: Config, lengths_ref, starts_ref, table_ref):
    """Reads how the tiles are numbered: (total, tiles per CTA, first tile and tile count of a row)."""
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

    share = jnp.maximum(_cdiv(total, config.ctas), config.min_tiles)
    return total, share, span


def _table(shape: _Shape, config: Config, lengths_BT, starts_B):
    """For batches: before which tile each row begins, then the row that each CTA begins with."""
    count_B = _tile_count(starts_B, lengths_BT.max(axis=1), config.block)
    row = jnp.arange(shape.batch + 1)
    begin = jnp.where(row[:-1] < row[:, None], count_B, 0).sum(axis=1)
    share = jnp.maximum(_cdiv(begin[-1] * shape.units, config.ctas), config.min_tiles)
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


def _split_kernel(shape: _Shape, config: Config):
    """Builds the launch that walks the cache: partial outputs (normalised) and base-2 LSEs."""
    block, stages, width = config.block, config.stages, shape.width
    mode, tiles = shape.mode, shape.tiles
    turns = 2 if mode == "alternate" else 1
    factor = shape.scale * math.log2(math.e)
    half = width // 2

    def body(*refs, **scratch):
        q_ref, q_rope_ref, latents_ref, k_rope_ref, lengths_ref, starts_ref = refs[:6]
        table_ref = refs[6] if shape.batch > 1 else None
        part_ref, part_lse_ref = refs[-2:]
        q_smem, q_rope_smem = scratch["q"], scratch["q_rope"]
        c_smem, r_smem = scratch["latents"], scratch["k_rope"]
        q_full, q_empty = scratch["q_full"], scratch["q_empty"]
        full, empty = scratch["full"], scratch["empty"]
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        if config.overlap:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        total, share, span = _schedule(shape, config, lengths_ref, starts_ref, table_ref)
        first = cta * share
        last = jnp.minimum(first + share, total)

        def for_each_unit(visit):
            """Calls visit(row, latent, block of rows, first tile, tiles, ring position, count)."""

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
                latent, rows_block = lax.div(unit, shape.blocks), lax.rem(unit, shape.blocks)
                visit(row, latent, rows_block, tile_in_unit, now, ring, seen)
                return tile + now, row, ring + now, seen + 1

            row = jnp.int32(0)
            if table_ref is not None:
                row = table_ref[shape.batch + 1 + cta]
            lax.while_loop(lambda c: c[0] < last, step, (first, row, jnp.int32(0), jnp.int32(0)))

        def begin_of(row):
            start = starts_ref[row]
            return start - lax.rem(start, jnp.int32(_ALIGN))

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                pl.when(seen >= config.query_stages)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
                at = pl.ds(pl.multiple_of(rows_block * (_ROWS * tiles), _ROWS), q_smem.shape[1])
                group = lax.rem(latent, shape.groups)
                plgpu.copy_gmem_to_smem(q_ref.at[row, latent, at], q_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(
                    q_rope_ref.at[row, group, at], q_rope_smem.at[slot], q_full.at[slot]
                )
                begin = begin_of(row)

                def load(i, _):
                    stage = lax.rem(ring + i, stages)
                    pl.when(ring + i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                    at = pl.ds(pl.multiple_of(begin + (tile + i) * block, _ALIGN), block)
                    plgpu.copy_gmem_to_smem(
                        latents_ref.at[row, at, latent], c_smem.at[stage], full.at[stage]
                    )
                    plgpu.copy_gmem_to_smem(
                        k_rope_ref.at[row, at], r_smem.at[stage], full.at[stage]
                    )

                lax.fori_loop(0, now, load, None)

            for_each_unit(visit)

        def scores(slot, row_tile, stage):
            def product(acc_ref):
                at = pl.ds(row_tile * _ROWS, _ROWS)
                plgpu.wgmma(acc_ref, q_smem.at[slot, at], c_smem.at[stage].transpose((1, 0)))
                plgpu.wgmma(acc_ref, q_rope_smem.at[slot, at], r_smem.at[stage].transpose((1, 0)))
                return acc_ref[...]

            return pl.run_scoped(product, plgpu.ACC((_ROWS, block), jnp.float32))

        def hide(s, row, row_in_latent, position):
            """Puts -inf where a query does not see; only the tiles at the edges need it."""
            start, ends = starts_ref[row], [lengths_ref[row, t] for t in range(shape.queries)]
            full_view = (position >= start) & (
                position + block <= functools.reduce(jnp.minimum, ends)
            )

            def hidden(s):
                iota = functools.partial(
                    plgpu.broadcasted_iota, jnp.int32, s.shape, layout=plgpu.Layout.WGMMA
                )
                column, limit = position + iota(1), ends[0]
                for t, end in enumerate(ends[1:], 1):
                    limit = jnp.where(row_in_latent + iota(0) >= t * shape.heads, end, limit)
                return jnp.where((column >= start) & (column < limit), s, -jnp.inf)

            return lax.cond(full_view, lambda s: s, hidden, s)

        def wide(x, like):
            return lax.broadcast_in_dim(x, like.shape, [0])

        def softmax(s, m, l):
            new_m = jnp.maximum(m, s.max(axis=1) * factor)
            alpha = jnp.exp2(m - new_m)
            p = jnp.exp2(s * factor - wide(new_m, s))
            return p, alpha, new_m, l * alpha + p.sum(axis=1)

        def rows_of(value):
            return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), _ROW_LAYOUT)

        def zeros(columns):
            return plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)

        def accumulate(acc, p, values):
            return pl.run_state(lambda ref: plgpu.wgmma(ref, p, values))(plgpu.ACC.init(acc))

        def slot_of_part(row, latent, rows_block):
            return cta + (row * shape.latents + latent) * shape.blocks + rows_block

        def finish(m, l):
            lse = jnp.where(l > 0, m + jnp.log2(l), -jnp.inf)
            return lse, 1.0 / jnp.where(l > 0, l, 1.0)

        def multiply():
            out_smem, m_smem, l_smem = scratch["out"], scratch["m"], scratch["l"]
            merge_full, merge_empty = scratch["merge_full"], scratch["merge_empty"]
            row_tile = wg if mode == "together" else 0

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                begin = begin_of(row)
                row_in_latent = (rows_block * tiles + row_tile) * _ROWS
                plgpu.barrier_wait(q_full.at[slot])
                if turns == 2:
                    mine = lax.rem(wg + lax.rem(ring, 2), 2)
                    steps = lax.div(now - mine + 1, 2)
                else:
                    mine, steps = 0, now

                def step(k, carry):
                    acc, m, l = carry
                    i = mine + k * turns
                    stage = lax.rem(ring + i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    s = scores(slot, row_tile, stage)
                    s = hide(s, row, row_in_latent, begin + (tile + i) * block)
                    p, alpha, m, l = softmax(s, m, l)
                    acc = acc * wide(alpha, acc)
                    acc = accumulate(acc, p.astype(shape.dtype), c_smem.at[stage])
                    plgpu.barrier_arrive(empty.at[stage])
                    return acc, m, l

                carry = (zeros(width), rows_of(_LOWEST), rows_of(0.0))
                acc, m, l = lax.fori_loop(0, steps, step, carry)
                plgpu.barrier_arrive(q_empty.at[slot])
                part = slot_of_part(row, latent, rows_block)

                def write(columns, value):
                    out = out_smem.at[row_tile]
                    out[...] = value
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        out.at[pl.ds(0, shape.part_rows)], part_ref.at[part, row_tile, :, columns]
                    )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def column_pieces():
                    for at in range(0, width, _PIECE):
                        yield at == 0, pl.ds(at, _PIECE), acc[:, at : at + _PIECE]

                if turns == 1:
                    lse, inverse = finish(m, l)
                    part_lse_ref[part, row_tile] = lse
                    for _, columns, value in column_pieces():
                        write(columns, value * wide(inverse, value))
                    return

                @pl.when(wg == 1)
                def _hand_over():
                    for is_first, _, value in column_pieces():
                        if is_first:
                            pl.when(seen > 0)(lambda: plgpu.barrier_wait(merge_empty))
                            m_smem[...] = m
                            l_smem[...] = l
                        else:
                            plgpu.barrier_wait(merge_empty)
                        out_smem[0] = value
                        plgpu.barrier_arrive(merge_full)

                @pl.when(wg == 0)
                def _join():
                    for is_first, columns, value in column_pieces():
                        plgpu.barrier_wait(merge_full)
                        if is_first:
                            other_m = plgpu.load(m_smem, layout=_ROW_LAYOUT)
                            other_l = plgpu.load(l_smem, layout=_ROW_LAYOUT)
                            top = jnp.maximum(m, other_m)
                            mine, theirs = jnp.exp2(m - top), jnp.exp2(other_m - top)
                            lse, inverse = finish(top, l * mine + other_l * theirs)
                            part_lse_ref[part, 0] = lse
                            mine, theirs = mine * inverse, theirs * inverse
                        other = plgpu.load(out_smem.at[0], layout=plgpu.Layout.WGMMA)
                        write(columns, value * wide(mine, value) + other * wide(theirs, other))
                        plgpu.barrier_arrive(merge_empty)

            for_each_unit(visit)

        def multiply_left():
            p_smem, alpha_smem, l_smem = scratch["p"], scratch["alpha"], scratch["l"]
            p_full, p_empty = scratch["p_full"], scratch["p_empty"]
            l_full, l_empty = scratch["l_full"], scratch["l_empty"]

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                begin = begin_of(row)
                plgpu.barrier_wait(q_full.at[slot])

                def step(i, carry):
                    acc, m, l = carry
                    stage = lax.rem(ring + i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    s = scores(slot, 0, stage)
                    s = hide(s, row, rows_block * _ROWS, begin + (tile + i) * block)
                    p, alpha, m, l = softmax(s, m, l)
                    p = p.astype(shape.dtype)
                    pl.when(ring + i > 0)(lambda: plgpu.barrier_wait(p_empty))
                    p_smem[...] = p
                    alpha_smem[...] = alpha
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_full)
                    acc = acc * wide(alpha, acc)
                    acc = accumulate(acc, p, c_smem.at[stage, :, pl.ds(0, half)])
                    plgpu.barrier_arrive(empty.at[stage])
                    return acc, m, l

                carry = (zeros(half), rows_of(_LOWEST), rows_of(0.0))
                acc, m, l = lax.fori_loop(0, now, step, carry)
                plgpu.barrier_arrive(q_empty.at[slot])
                lse, inverse = finish(m, l)
                pl.when(seen > 0)(lambda: plgpu.barrier_wait(l_empty))
                l_smem[...] = inverse
                plgpu.barrier_arrive(l_full)
                part = slot_of_part(row, latent, rows_block)
                part_lse_ref[part, 0] = lse
                part_ref[part, 0, :, pl.ds(0, half)] = acc * wide(inverse, acc)

            for_each_unit(visit)

        def multiply_right():
            p_smem, alpha_smem, l_smem = scratch["p"], scratch["alpha"], scratch["l"]
            p_full, p_empty = scratch["p_full"], scratch["p_empty"]
            l_full, l_empty = scratch["l_full"], scratch["l_empty"]

            def visit(row, latent, rows_block, tile, now, ring, seen):
                def step(i, acc):
                    stage = lax.rem(ring + i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    plgpu.barrier_wait(p_full)
                    alpha = plgpu.load(alpha_smem, layout=_ROW_LAYOUT)
                    acc = acc * wide(alpha, acc)
                    acc = accumulate(acc, p_smem, c_smem.at[stage, :, pl.ds(half, half)])
                    plgpu.barrier_arrive(p_empty)
                    plgpu.barrier_arrive(empty.at[stage])
                    return acc

                acc = lax.fori_loop(0, now, step, zeros(half))
                plgpu.barrier_wait(l_full)
                inverse = plgpu.load(l_smem, layout=_ROW_LAYOUT)
                plgpu.barrier_arrive(l_empty)
                part = slot_of_part(row, latent, rows_block)
                part_ref[part, 0, :, pl.ds(half, half)] = acc * wide(inverse, acc)

            for_each_unit(visit)

        if mode == "columns":

            @pl.when(wg == 0)
            def _left():
                plgpu.set_max_registers(232, action="increase")
                multiply_left()

            @pl.when(wg == 1)
            def _right():
                plgpu.set_max_registers(232, action="increase")
                multiply_right()
        else:

            @pl.when(wg < 2)
            def _both():
                plgpu.set_max_registers(232, action="increase")
                multiply()

    row_vector = plgpu.SMEM((_ROWS,), jnp.float32)
    scratch = dict(
        q=_swizzled((config.query_stages, tiles * _ROWS, width), shape.dtype),
        q_rope=_swizzled((config.query_stages, tiles * _ROWS, shape.rope), shape.dtype),
        latents=_swizzled((stages, block, width), shape.dtype),
        k_rope=_swizzled((stages, block, shape.rope), shape.dtype),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=config.query_stages),
        q_empty=plgpu.Barrier(
            num_arrivals=1 if mode == "columns" else 2, num_barriers=config.query_stages
        ),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=1 if mode == "alternate" else 2, num_barriers=stages),
    )
    if mode == "columns":
        scratch |= dict(
            p=_swizzled((_ROWS, block), shape.dtype),
            alpha=row_vector,
            l=row_vector,
            p_full=plgpu.Barrier(),
            p_empty=plgpu.Barrier(),
            l_full=plgpu.Barrier(),
            l_empty=plgpu.Barrier(),
        )
    else:
        scratch |= dict(
            out=_swizzled((tiles, _ROWS, _PIECE), jnp.float32),
            m=row_vector,
            l=row_vector,
            merge_full=plgpu.Barrier(),
            merge_empty=plgpu.Barrier(),
        )
    slots = shape.slots(config)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((slots, tiles, shape.part_rows, width), jnp.float32),
            jax.ShapeDtypeStruct((slots, tiles, _ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        kernel_name="absorbed_decode_split",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


def _join_kernel(shape: _Shape, config: Config):
    """Builds the launch that joins the parts of every query row; a CTA has 128 columns of one."""
    lanes, piece = 128, 16
    pieces = config.merge // piece

    def body(*refs, o_smem, lse_smem, ready):
        part_ref, part_lse_ref, lengths_ref, starts_ref = refs[:4]
        table_ref = refs[4] if shape.batch > 1 else None
        out_ref, lse_ref = refs[-2:]
        if config.overlap:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        unit_tile, row, columns = (lax.axis_index(n) for n in ("unit", "row", "columns"))
        unit, tile = lax.div(unit_tile, shape.tiles), lax.rem(unit_tile, shape.tiles)
        batch_row, unit_in_row = lax.div(unit, shape.units), lax.rem(unit, shape.units)
        latent, rows_block = lax.div(unit_in_row, shape.blocks), lax.rem(unit_in_row, shape.blocks)
        _, share, span = _schedule(shape, config, lengths_ref, starts_ref, table_ref)
        begin, count = span(batch_row)
        begin = begin + unit_in_row * count
        cta = lax.div(begin, share)
        parts = jnp.where(count > 0, lax.div(begin + count - 1, share) - cta + 1, 0)
        slot = cta + unit
        row_in_latent = (rows_block * shape.tiles + tile) * _ROWS + row
        column = pl.ds(columns * lanes, lanes)

        def flat(value):
            return plgpu.layout_cast(
                jnp.full((lanes,), value, jnp.float32), plgpu.Layout.WG_STRIDED((lanes,), 1)
            )

        def batch_of_parts(turn, carry):
            base = turn * config.merge
            for i in range(pieces):

                @pl.when(base + i * piece < parts)
                def _fetch(i=i):
                    at, here = pl.ds(slot + base + i * piece, piece), pl.ds(i * piece, piece)
                    plgpu.copy_gmem_to_smem(
                        part_lse_ref.at[at, tile], lse_smem.at[here], ready.at[i]
                    )
                    plgpu.copy_gmem_to_smem(
                        part_ref.at[at, tile, row, column], o_smem.at[here], ready.at[i]
                    )

            def join(i, carry):
                acc, top, total = carry
                plgpu.barrier_wait(ready.at[i])
                at = [i * piece + k for k in range(piece)]
                there = [base + a < parts for a in at]
                lse = [jnp.where(t, lse_smem[a, row], -jnp.inf) for a, t in zip(at, there)]
                new_top = functools.reduce(jnp.maximum, lse, top)
                fade = jnp.exp2(top - new_top)
                acc, total = acc * fade, total * fade
                for k in range(piece):
                    weight = jnp.exp2(lse[k] - new_top)
                    value = plgpu.load(
                        o_smem.at[at[k]], layout=plgpu.Layout.WG_STRIDED((lanes,), 1)
                    )
                    total = total + weight
                    acc = acc + jnp.where(there[k], value, flat(0.0)) * weight
                return acc, new_top, total

            ready_pieces = jnp.minimum(_cdiv(parts - base, piece), pieces)
            return lax.fori_loop(0, ready_pieces, join, carry)

        carry = (flat(0.0), jnp.float32(_LOWEST), jnp.float32(0))
        turns = _cdiv(parts, config.merge)
        acc, top, total = lax.fori_loop(0, turns, batch_of_parts, carry)
        seen = total > 0
        acc = acc * (1.0 / jnp.where(seen, total, 1.0))

        @pl.when(row_in_latent < shape.rows)
        def _store():
            out_ref[batch_row, latent, row_in_latent, column] = acc.astype(shape.dtype)
            lse = (top + jnp.log2(total)) * math.log(2)

            @pl.when(columns == 0)
            def _store_lse():
                lse_ref[batch_row, latent, row_in_latent] = jnp.where(seen, lse, -jnp.inf)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (shape.batch, shape.latents, shape.rows, shape.width), shape.dtype
            ),
            jax.ShapeDtypeStruct((shape.batch, shape.latents, shape.rows), jnp.float32),
        ),
        scratch_types=dict(
            o_smem=plgpu.SMEM((config.merge, lanes), jnp.float32),
            lse_smem=plgpu.SMEM((config.merge, _ROWS), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=pieces),
        ),
        grid=(
            shape.batch * shape.units * shape.tiles,
            min(shape.rows, _ROWS),
            shape.width // lanes,
        ),
        grid_names=("unit", "row", "columns"),
        num_threads=1,
        thread_name="wg",
        kernel_name="absorbed_decode_join",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
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
    rows = -(-T * H // _ALIGN) * _ALIGN
    shape = _Shape(
        B, T, L, H, G, C, R, latents_BSLC.shape[1], rows, float(scale), jnp.dtype(q_BTLHC.dtype)
    )

    def as_rows(x_BTNHX):
        # For one query or one latent this only renames dimensions.
        N, X = x_BTNHX.shape[2], x_BTNHX.shape[4]
        x_BNRX = jnp.swapaxes(x_BTNHX, 1, 2).reshape(B, N, T * H, X)
        return jnp.pad(x_BNRX, ((0, 0), (0, 0), (0, rows - T * H), (0, 0)))

    bounds = (lengths_BT, starts_B)
    if B > 1:
        bounds += (_table(shape, config, lengths_BT, starts_B),)
    parts = _split_kernel(shape, config)(
        as_rows(q_BTLHC), as_rows(q_rope_BTGHR), latents_BSLC, k_rope_BSR, *bounds
    )
    out_BLRC, lse_BLR = _join_kernel(shape, config)(*parts, *bounds)
    out_BTLHC = jnp.swapaxes(out_BLRC[:, :, : T * H].reshape(B, L, T, H, C), 1, 2)
    lse_BTLH = jnp.swapaxes(lse_BLR[:, :, : T * H].reshape(B, L, T, H), 1, 2)
    return out_BTLHC, lse_BTLH
