"""Absorbed decode for Hopper GPUs: one pass over the latent cache at the speed of memory.

Two launches. The first walks the cache. Its work is a list of tiles (row of the batch, latent,
block of query rows, block of cache positions) that is cut into equal runs, one per CTA, so that
rows of unequal length cost what they read and no CTA waits for another. In a CTA one warpgroup only
issues TMA copies into a ring of shared-memory stages; the others multiply. A latent tile is loaded
once and serves as key and as value. The second launch joins the partial results of each query row
by their log-sum-exp.

How the multiplying warpgroups share the work depends on the problem:

  alternate  up to 64 query rows: two take turns at tiles and join their states at the end, so that
             the softmax of one runs while the other multiplies;
  together   more than 64 query rows: each of two has 64 of them, both use every tile;
  columns    latents of width 512, whose accumulator does not fit the registers of one warpgroup:
             the first turns tiles into probabilities, the second and third have one half of the
             value columns each.
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
_WIDTHS = (128, 256, 512)
# Columns that one warpgroup of the joining kernel has, one per thread.
_LANES = 128
# Parts that the joining kernel fetches in one copy.
_FETCH = 16
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
      min_tiles: least number of tiles worth a CTA of its own.
      query_stages: 2 loads the next row's queries while the present ones are in use.
      join_rows: query rows per CTA of the joining kernel.
      join_ways: warpgroups that share the parts of one query row in the joining kernel.
      join_parts: parts that one of them fetches at a time, a multiple of 16.
      overlap: let each launch begin while the one before it drains.
    """

    block: int = 64
    stages: int = 6
    ctas: int = 132
    min_tiles: int = 1
    query_stages: int = 1
    join_rows: int = 1
    join_ways: int = 4
    join_parts: int = 48
    overlap: bool = True


def _sm_count(device_kind: str) -> int:
    return {"H20": 78, "H800 PCIe": 114, "H100 PCIe": 114}.get(
        device_kind.removeprefix("NVIDIA "), 132
    )


def _mode(rows: int, width: int) -> str:
    if width == 512:
        return "columns"
    return "alternate" if rows <= _ROWS else "together"


def _piece(width: int) -> int:
    """Columns that a warpgroup passes through shared memory at a time when it has finished."""
    return 64 if width == 256 else 128


def _smem_bytes(config: Config, rows: int, width: int, rope: int) -> int:
    mode = _mode(rows, width)
    tiles = 2 if mode == "together" else 1
    both = width + rope
    query = config.query_stages * tiles * _ROWS * both * 2
    cache = config.stages * config.block * both * 2
    if mode == "columns":
        exchange = _ROWS * config.block * 2  # Results pass through the space of the queries.
    else:
        exchange = tiles * _ROWS * _piece(width) * (4 if mode == "alternate" else 2)
    # Two vectors of row statistics, each on a KiB of its own, and the barriers.
    return query + cache + exchange + 1024 + 4 * _ROWS + 768


def _with_most_stages(config: Config, rows: int, width: int, rope: int) -> Config | None:
    step = 2 if _mode(rows, width) == "alternate" else 1
    for stages in range(8, 0, -step):
        config = dataclasses.replace(config, stages=stages)
        if _smem_bytes(config, rows, width, rope) <= _SMEM_BYTES:
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
    config, rows = Config(), problem.queries * problem.heads
    if _with_most_stages(config, rows, problem.width, problem.rope) is None:
        return f"latents of {problem.width} + {problem.rope} do not fit shared memory"
    return None


def heuristic(problem: Any) -> Config:
    """The Config for a problem that nobody measured."""
    rows = problem.queries * problem.heads
    units = problem.batch * problem.latents
    config = Config(ctas=_sm_count(problem.device_kind))
    if units > 1 and problem.width == 128:
        config = dataclasses.replace(config, query_stages=2)
    if units > 2:
        # Many rows of few parts: several rows per CTA, one warpgroup for each.
        config = dataclasses.replace(config, join_rows=4, join_ways=1, join_parts=16)
    return _with_most_stages(config, rows, problem.width, problem.rope)


def candidates(problem: Any) -> list[Config]:
    """The settings worth measuring for a problem."""
    first = heuristic(problem)
    found = [first]
    for block in (64, 128):
        for query_stages in (1, 2):
            for changes in (
                {},
                dict(min_tiles=2),
                dict(join_rows=1, join_ways=4, join_parts=48),
                dict(join_rows=4, join_ways=1, join_parts=16),
            ):
                config = dataclasses.replace(
                    first, block=block, query_stages=query_stages, **changes
                )
                rows = problem.queries * problem.heads
                config = _with_most_stages(config, rows, problem.width, problem.rope)
                if config is not None and config not in found:
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
        return min(self.rows, _ROWS)

    def slots(self, config: Config) -> int:
        """Every CTA and every unit begins at most one new partial result."""
        return config.ctas + self.batch * self.units


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
    loader = 3 if mode == "columns" else 2
    factor = shape.scale * math.log2(math.e)
    half, piece = width // 2, _piece(width)

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

        def load():
            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                pl.when(seen >= config.query_stages)(lambda: plgpu.barrier_wait(q_empty.at[slot]))
                at = pl.ds(pl.multiple_of(rows_block * (_ROWS * tiles), _ROWS), tiles * _ROWS)
                group = lax.rem(latent, shape.groups)
                plgpu.copy_gmem_to_smem(q_ref.at[row, latent, at], q_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(
                    q_rope_ref.at[row, group, at], q_rope_smem.at[slot], q_full.at[slot]
                )
                begin = begin_of(row)

                def load_tile(i, _):
                    stage = lax.rem(ring + i, stages)
                    pl.when(ring + i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                    at = pl.ds(pl.multiple_of(begin + (tile + i) * block, _ALIGN), block)
                    plgpu.copy_gmem_to_smem(
                        latents_ref.at[row, at, latent], c_smem.at[stage], full.at[stage]
                    )
                    plgpu.copy_gmem_to_smem(
                        k_rope_ref.at[row, at], r_smem.at[stage], full.at[stage]
                    )

                lax.fori_loop(0, now, load_tile, None)

            for_each_unit(visit)

        def scores(slot, row_tile, stage):
            def product(acc_ref):
                at = pl.ds(row_tile * _ROWS, _ROWS)
                plgpu.wgmma(acc_ref, q_smem.at[slot, at], c_smem.at[stage].transpose((1, 0)))
                plgpu.wgmma(acc_ref, q_rope_smem.at[slot, at], r_smem.at[stage].transpose((1, 0)))
                return acc_ref[...]

            return pl.run_scoped(product, plgpu.ACC((_ROWS, block), jnp.float32))

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

        def accumulate(acc, p, values):
            return pl.run_state(lambda ref: plgpu.wgmma(ref, p, values))(plgpu.ACC.init(acc))

        def accumulate_all(accs, p, values):
            def products(refs):
                for ref, value in zip(refs, values, strict=True):
                    plgpu.wgmma(ref, p, value)

            return pl.run_state(products)([plgpu.ACC.init(acc) for acc in accs])

        def part_of(row, latent, rows_block):
            return cta + (row * shape.latents + latent) * shape.blocks + rows_block

        def finish(top, denominator):
            seen = denominator > 0
            lse = jnp.where(seen, top + jnp.log2(denominator), -jnp.inf)
            return lse, 1.0 / jnp.where(seen, denominator, 1.0)

        def send(staging, value, target):
            """Writes 64 query rows of a partial result to device memory."""
            staging[...] = value.astype(shape.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, shape.part_rows)], target)

        def multiply():
            if turns == 2:
                other_smem, out_smem = scratch["out"]
                top_smem, denominator_smem = scratch["statistics"]
                handed_over, taken = scratch["handed_over"], scratch["taken"]
            else:
                out_smem = scratch["out"]
            row_tile = wg if mode == "together" else 0

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                begin = begin_of(row)
                hide = sight(row, (rows_block * tiles + row_tile) * _ROWS)
                plgpu.barrier_wait(q_full.at[slot])
                if turns == 2:
                    mine = lax.rem(wg + lax.rem(ring, 2), 2)
                    steps = lax.div(now - mine + 1, 2)
                else:
                    mine, steps = 0, now

                def step(k, carry):
                    acc, top, denominator = carry
                    i = mine + k * turns
                    stage = lax.rem(ring + i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    s = hide(scores(slot, row_tile, stage), begin + (tile + i) * block)
                    p, fade, top, denominator = softmax(s, top, denominator)
                    acc = acc * wide(fade, acc)
                    acc = accumulate(acc, p.astype(shape.dtype), c_smem.at[stage])
                    plgpu.barrier_arrive(empty.at[stage])
                    return acc, top, denominator

                carry = (zeros(width), rows_of(_LOWEST), rows_of(0.0))
                acc, top, denominator = lax.fori_loop(0, steps, step, carry)
                plgpu.barrier_arrive(q_empty.at[slot])
                part = part_of(row, latent, rows_block)

                def column_pieces():
                    for at in range(0, width, piece):
                        target = part_ref.at[part, row_tile, :, pl.ds(at, piece)]
                        yield at == 0, acc[:, at : at + piece], target

                if turns == 1:
                    lse, inverse = finish(top, denominator)
                    part_lse_ref[part, row_tile] = lse
                    for _, value, target in column_pieces():
                        send(out_smem.at[row_tile], value * wide(inverse, value), target)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    return

                @pl.when(wg == 1)
                def _hand_over():
                    for is_first, value, _ in column_pieces():
                        if is_first:
                            pl.when(seen > 0)(lambda: plgpu.barrier_wait(taken))
                            top_smem[...] = top
                            denominator_smem[...] = denominator
                        else:
                            plgpu.barrier_wait(taken)
                        other_smem[...] = value
                        plgpu.barrier_arrive(handed_over)

                @pl.when(wg == 0)
                def _take():
                    for is_first, value, target in column_pieces():
                        plgpu.barrier_wait(handed_over)
                        if is_first:
                            other_top = plgpu.load(top_smem, layout=_ROW_LAYOUT)
                            others = plgpu.load(denominator_smem, layout=_ROW_LAYOUT)
                            joint = jnp.maximum(top, other_top)
                            mine, theirs = jnp.exp2(top - joint), jnp.exp2(other_top - joint)
                            lse, inverse = finish(joint, denominator * mine + others * theirs)
                            part_lse_ref[part, 0] = lse
                            mine, theirs = mine * inverse, theirs * inverse
                        other = plgpu.load(other_smem, layout=plgpu.Layout.WGMMA)
                        value = value * wide(mine, value) + other * wide(theirs, other)
                        send(out_smem, value, target)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(taken)

            for_each_unit(visit)

        def make_probabilities():
            p_smem, (fade_smem, inverse_smem) = scratch["p"], scratch["statistics"]
            p_full, p_empty = scratch["p_full"], scratch["p_empty"]
            inverse_full, inverse_empty = scratch["inverse_full"], scratch["inverse_empty"]

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                begin = begin_of(row)
                hide = sight(row, rows_block * _ROWS)
                plgpu.barrier_wait(q_full.at[slot])

                def step(i, carry):
                    top, denominator = carry
                    stage = lax.rem(ring + i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    s = hide(scores(slot, 0, stage), begin + (tile + i) * block)
                    p, fade, top, denominator = softmax(s, top, denominator)
                    p = p.astype(shape.dtype)
                    pl.when(ring + i > 0)(lambda: plgpu.barrier_wait(p_empty))
                    p_smem[...] = p
                    fade_smem[...] = fade
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_full)
                    return top, denominator

                carry = rows_of(_LOWEST), rows_of(0.0)
                top, denominator = lax.fori_loop(0, now, step, carry)
                lse, inverse = finish(top, denominator)
                pl.when(seen > 0)(lambda: plgpu.barrier_wait(inverse_empty))
                inverse_smem[...] = inverse
                plgpu.barrier_arrive(inverse_full)
                part_lse_ref[part_of(row, latent, rows_block), 0] = lse

            for_each_unit(visit)

        def multiply_half():
            p_smem, (fade_smem, inverse_smem) = scratch["p"], scratch["statistics"]
            p_full, p_empty = scratch["p_full"], scratch["p_empty"]
            inverse_full, inverse_empty = scratch["inverse_full"], scratch["inverse_empty"]
            which = wg - 1

            def visit(row, latent, rows_block, tile, now, ring, seen):
                slot = lax.rem(seen, config.query_stages)
                first_column = pl.multiple_of(which * half, half)
                # Two narrow products, as a kernel of 512 threads may not name the registers of a
                # wide one.
                ats = [first_column + at for at in range(0, half, piece)]

                def step(i, accs):
                    stage = lax.rem(ring + i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    plgpu.barrier_wait(p_full)
                    fade = plgpu.load(fade_smem, layout=_ROW_LAYOUT)
                    accs = [acc * wide(fade, acc) for acc in accs]
                    accs = accumulate_all(
                        accs, p_smem, [c_smem.at[stage, :, pl.ds(at, piece)] for at in ats]
                    )
                    plgpu.barrier_arrive(p_empty)
                    plgpu.barrier_arrive(empty.at[stage])
                    return accs

                accs = lax.fori_loop(0, now, step, [zeros(piece) for _ in ats])
                plgpu.barrier_wait(inverse_full)  # Also says that the queries were read.
                inverse = plgpu.load(inverse_smem, layout=_ROW_LAYOUT)
                plgpu.barrier_arrive(inverse_empty)
                part = part_of(row, latent, rows_block)
                for k, (at, acc) in enumerate(zip(ats, accs, strict=True)):
                    staging = wide_out_smem[0].at[slot, which * len(ats) + k]
                    target = part_ref.at[part, 0, :, pl.ds(at, piece)]
                    send(staging, acc * wide(inverse, acc), target)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_empty.at[slot])

            for_each_unit(visit)

        # The register file is divided anew: little for copies, much for accumulators.
        @pl.when(wg == loader)
        def _load():
            plgpu.set_max_registers(40, action="decrease")
            load()

        if mode == "columns":

            @pl.when(wg == 0)
            def _make_probabilities():
                plgpu.set_max_registers(112, action="decrease")
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

    slots = shape.slots(config)
    queries = _swizzled((config.query_stages, tiles * _ROWS, width), shape.dtype)
    statistics = [plgpu.SMEM((_ROWS,), jnp.float32)] * 2
    scratch = dict(
        q_rope=_swizzled((config.query_stages, tiles * _ROWS, shape.rope), shape.dtype),
        latents=_swizzled((stages, block, width), shape.dtype),
        k_rope=_swizzled((stages, block, shape.rope), shape.dtype),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=config.query_stages),
        q_empty=plgpu.Barrier(num_arrivals=2, num_barriers=config.query_stages),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=1 if mode == "alternate" else 2, num_barriers=stages),
    )
    if mode == "columns":
        out = _swizzled((config.query_stages, width // piece, _ROWS, piece), shape.dtype)
        scratch |= dict(
            q=plgpu.RefUnion(queries, out),
            p=_swizzled((_ROWS, block), shape.dtype),
            statistics=statistics,
            p_full=plgpu.Barrier(),
            p_empty=plgpu.Barrier(num_arrivals=2),
            inverse_full=plgpu.Barrier(),
            inverse_empty=plgpu.Barrier(num_arrivals=2),
        )
    elif mode == "alternate":
        other, out = _swizzled((_ROWS, piece), jnp.float32), _swizzled((_ROWS, piece), shape.dtype)
        scratch |= dict(
            q=queries,
            out=plgpu.RefUnion(other, out),
            statistics=statistics,
            handed_over=plgpu.Barrier(),
            taken=plgpu.Barrier(),
        )
    else:
        scratch |= dict(q=queries, out=_swizzled((tiles, _ROWS, piece), shape.dtype))
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((slots, tiles, shape.part_rows, width), shape.dtype),
            jax.ShapeDtypeStruct((slots, tiles, _ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=loader + 1,
        thread_name="wg",
        kernel_name="absorbed_decode_split",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


def _join_kernel(shape: _Shape, config: Config):
    """Builds the launch that joins the parts of every query row.

    A CTA has `join_rows` rows and 128 columns; `join_ways` warpgroups share the parts of a row.
    """
    lanes, piece = _LANES, _FETCH
    ways, rows = config.join_ways, config.join_rows
    pieces = config.join_parts // piece
    vector = plgpu.Layout.WG_STRIDED((lanes,), 1)

    def body(*refs, o_smem, lse_smem, ready, sums, tops, totals, done):
        part_ref, part_lse_ref, lengths_ref, starts_ref = refs[:4]
        table_ref = refs[4] if shape.batch > 1 else None
        out_ref, lse_ref = refs[-2:]
        unit_tile, row, columns, wg = (lax.axis_index(n) for n in ("unit", "row", "columns", "wg"))
        way, row = lax.div(wg, rows), row * rows + lax.rem(wg, rows)
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
        few_rows = pl.ds(lax.div(row, 4) * 4, 4)
        row_of_few = lax.rem(row, 4)
        if config.overlap:
            # What was read so far is older than the first launch; the parts are not.
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()

        def flat(value):
            return plgpu.layout_cast(jnp.full((lanes,), value, jnp.float32), vector)

        def batch_of_parts(turn, carry):
            base = (turn * ways + way) * config.join_parts
            for i in range(pieces):

                @pl.when(base + i * piece < parts)
                def _fetch(i=i):
                    at, here = pl.ds(slot + base + i * piece, piece), pl.ds(i * piece, piece)
                    plgpu.copy_gmem_to_smem(
                        part_lse_ref.at[at, tile, few_rows], lse_smem.at[wg, here], ready.at[wg, i]
                    )
                    plgpu.copy_gmem_to_smem(
                        part_ref.at[at, tile, row, column], o_smem.at[wg, here], ready.at[wg, i]
                    )

            def join(i, carry):
                acc, top, total = carry
                plgpu.barrier_wait(ready.at[wg, i])
                at = [i * piece + k for k in range(piece)]
                there = [base + a < parts for a in at]
                lse = [
                    jnp.where(there[k], lse_smem[wg, at[k], row_of_few], -jnp.inf)
                    for k in range(piece)
                ]
                new_top = functools.reduce(jnp.maximum, lse, top)
                fade = jnp.exp2(top - new_top)
                acc, total = acc * fade, total * fade
                for k in range(piece):
                    weight = jnp.exp2(lse[k] - new_top)
                    value = plgpu.load(o_smem.at[wg, at[k]], layout=vector)
                    value = value.astype(jnp.float32)
                    total = total + weight
                    acc = acc + jnp.where(there[k], value, flat(0.0)) * weight
                return acc, new_top, total

            ready_pieces = jnp.clip(_cdiv(parts - base, piece), 0, pieces)
            return lax.fori_loop(0, ready_pieces, join, carry)

        carry = (flat(0.0), jnp.float32(_LOWEST), jnp.float32(0))
        turns = _cdiv(parts, config.join_parts * ways)
        acc, top, total = lax.fori_loop(0, turns, batch_of_parts, carry)

        def store(acc, top, total):
            seen = total > 0
            acc = acc * (1.0 / jnp.where(seen, total, 1.0))

            @pl.when(row_in_latent < shape.rows)
            def _store():
                out_ref[batch_row, latent, row_in_latent, column] = acc.astype(shape.dtype)
                lse = (top + jnp.log2(total)) * math.log(2)

                @pl.when(columns == 0)
                def _store_lse():
                    lse_ref[batch_row, latent, row_in_latent] = jnp.where(seen, lse, -jnp.inf)

        if ways == 1:
            store(acc, top, total)
            return

        @pl.when(way > 0)
        def _hand_over():
            sums[wg] = acc
            tops[wg] = flat(0.0) + top
            totals[wg] = flat(0.0) + total
            plgpu.barrier_arrive(done.at[lax.rem(wg, rows)])

        @pl.when(way == 0)
        def _join_ways():
            plgpu.barrier_wait(done.at[wg])
            others = [wg + k * rows for k in range(1, ways)]
            other_tops = [tops[o, 0] for o in others]
            best = functools.reduce(jnp.maximum, other_tops, top)
            fade = jnp.exp2(top - best)
            joined, joined_total = acc * fade, total * fade
            for o, other_top in zip(others, other_tops, strict=True):
                fade = jnp.exp2(other_top - best)
                joined = joined + plgpu.load(sums.at[o], layout=vector) * fade
                joined_total = joined_total + totals[o, 0] * fade
            store(joined, best, joined_total)

    threads = ways * rows
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (shape.batch, shape.latents, shape.rows, shape.width), shape.dtype
            ),
            jax.ShapeDtypeStruct((shape.batch, shape.latents, shape.rows), jnp.float32),
        ),
        scratch_types=dict(
            o_smem=plgpu.SMEM((threads, config.join_parts, lanes), shape.dtype),
            lse_smem=plgpu.SMEM((threads, config.join_parts, 4), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=(threads, pieces)),
            sums=plgpu.SMEM((threads, lanes), jnp.float32),
            tops=plgpu.SMEM((threads, lanes), jnp.float32),
            totals=plgpu.SMEM((threads, lanes), jnp.float32),
            done=plgpu.Barrier(num_arrivals=max(ways - 1, 1), num_barriers=rows),
        ),
        grid=(
            shape.batch * shape.units * shape.tiles,
            -(-min(shape.rows, _ROWS) // rows),
            shape.width // lanes,
        ),
        grid_names=("unit", "row", "columns"),
        num_threads=threads,
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
