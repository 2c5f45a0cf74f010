"""Absorbed decode on TPU: one pass over the cache at the speed of HBM (Pallas Mosaic TPU).

A program instance walks the visible tiles of one batch row after another. Copies from HBM run
`buffers - 1` tiles ahead of the arithmetic and do not stop at the end of a row, so rows of unequal
length cost what they read. A tile of latents is copied once and used as key and as value; the tile
of rotary keys beside it is copied once for all latents of the device.

The cache is read in the layout XLA gives it, so nothing is copied or padded in front of the kernel:
`[B, S, 1, C]` lies like `[B, S, C]`, and `[B, S, R]` with R < 128 lies like `[B, R, S]`, positions
along the lanes, without padding. `[B, S, L, C]` lies like `[B, L, S, C]` where L would be padded.
Rotary keys of whole lanes, which each latent may have for itself, lie like latents.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mlra_jax.kernels import target
from mlra_jax.kernels.absorbed_decode.problem import Problem
from mlra_jax.kernels.softmax import merge_partials

LANES = 128
SUBLANES = 8
ROW_BLOCK = 128  # query rows whose scores are alive at once
_MIB = 2**20
_MOST_QUERIES = 64  # of a row, each with an end of its own in the program
_HIDDEN = -1e30  # the score of what a query must not see: finite, so that no difference is a NaN


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """Settings of the kernel.

    Attributes:
      tile: cache positions copied and computed at a time, a multiple of 128.
      buffers: tiles in VMEM at once, at least 2; all but one are in flight.
      splits: parts each row is cut into, computed by different cores; 1 unless one JAX device is
        two cores (v4, v5p).
    """

    tile: int
    buffers: int
    splits: int

    def __post_init__(self):
        if self.tile < LANES or self.tile % LANES or self.buffers < 2 or self.splits < 1:
            raise ValueError(f"{self}: tile must be a multiple of 128, buffers >= 2, splits >= 1")


Config = TpuConfig


@dataclasses.dataclass(frozen=True)
class _Chip:
    cores: int  # that share the work of one JAX device
    vmem: int  # bytes per core, of which the kernel takes at most half
    tile: int  # bytes of a tile large enough to hide what a tile costs beside its copy
    flight: int  # bytes that must be on their way to keep HBM busy: about 2 us of bandwidth


_CHIPS = {
    "TPU v4": _Chip(cores=2, vmem=16 * _MIB, tile=1_000_000, flight=1 * _MIB),
    "TPU v5 lite": _Chip(cores=1, vmem=128 * _MIB, tile=1_200_000, flight=2 * _MIB),
    "TPU v5": _Chip(cores=2, vmem=64 * _MIB, tile=1_600_000, flight=3 * _MIB),
    "TPU v6 lite": _Chip(cores=1, vmem=128 * _MIB, tile=1_600_000, flight=4 * _MIB),
    "TPU7x": _Chip(cores=1, vmem=64 * _MIB, tile=1_600_000, flight=8 * _MIB),
}
_CHIPS |= {
    "TPU v5e": _CHIPS["TPU v5 lite"],
    "TPU v5p": _CHIPS["TPU v5"],
    "TPU v6e": _CHIPS["TPU v6 lite"],
}
_UNKNOWN_CHIP = _Chip(cores=1, vmem=16 * _MIB, tile=1_000_000, flight=2 * _MIB)
_WITHOUT_BFLOAT16 = ("TPU v2", "TPU v3")  # whose Mosaic multiplies float32 only


def supports(problem: Problem) -> str | None:
    """None, or in one phrase why the kernel cannot serve the problem."""
    if problem.device_kind in _WITHOUT_BFLOAT16:
        return f"it computes in bfloat16, which Mosaic does not on {problem.device_kind}"
    if problem.dtype != "bfloat16":
        return f"it computes in bfloat16, the call is {problem.dtype}"
    if problem.width % LANES:
        return f"latent width {problem.width} is no multiple of {LANES}"
    step = 16 if problem.rope < LANES and problem.rope_heads == 1 else LANES
    if problem.rope % step:
        heads = f" of {problem.rope_heads} heads" if problem.rope_heads > 1 else ""
        return f"rotary width {problem.rope}{heads} is no multiple of {step}"
    for heads, width in (
        (problem.latents, problem.width),
        (problem.rope_heads, problem.rope),
    ):
        if heads > 2 and not _heads_first(heads) and width != LANES:
            return f"{heads} latents of width {width} on one device"
    if problem.queries > _MOST_QUERIES:
        return f"{problem.queries} queries are more than {_MOST_QUERIES}"
    if problem.queries * problem.heads > 1024:
        return f"{problem.queries} queries x {problem.heads} heads are more than 1024 rows"
    if vmem_bytes(problem, TpuConfig(LANES, 2, 1)) > _chip(problem).vmem // 2:
        return "its buffers do not fit in VMEM"
    return None


def heuristic(problem: Problem) -> TpuConfig:
    """The configuration for the chip generation when nothing was measured."""
    chip = _chip(problem)
    # Two tiles of a full row at least: one arrives while the other is computed. More would not pay
    # for what every tile costs beside its copy, a few hundred cycles.
    room = max(problem.cache // 2, 2 * LANES)
    tile = min(chip.tile // _position_bytes(problem), room)
    tile = max(2 ** int(math.log2(tile)), LANES)
    in_flight = -(-chip.flight // (tile * _position_bytes(problem)))
    buffers = 1 + max(2, min(in_flight, problem.batch * -(-problem.cache // tile)))
    config = TpuConfig(tile, buffers, chip.cores)
    while vmem_bytes(problem, config) > chip.vmem // 2 and config.buffers > 2:
        config = dataclasses.replace(config, buffers=config.buffers - 1)
    while vmem_bytes(problem, config) > chip.vmem // 2 and config.tile > LANES:
        config = dataclasses.replace(config, tile=config.tile // 2 // LANES * LANES)
    return config


def candidates(problem: Problem) -> list[TpuConfig]:
    """What the autotuner measures; the heuristic's choice comes first."""
    first = heuristic(problem)
    configs = [first] + [
        TpuConfig(tile, buffers, first.splits)
        for tile in (256, 512, 1024, 2048, 4096)
        for buffers in (2, 4, 8)
    ]
    fits = [c for c in configs if vmem_bytes(problem, c) <= _chip(problem).vmem // 2]
    return list(dict.fromkeys(fits))


def vmem_bytes(problem: Problem, config: TpuConfig) -> int:
    """VMEM that the kernel asks for: tiles, queries, results, running sums and live scores."""
    L, C, R = problem.latents, problem.width, _round_up(problem.rope, LANES)
    M, M_block = _rows(problem.queries * problem.heads)
    tiles = config.buffers * config.tile * _position_bytes(problem)
    queries = 2 * 2 * M * ((0 if problem.values_only else L * C) + problem.groups * R)
    results = 2 * 4 * (L * M * C + SUBLANES * _round_up(M, LANES))
    sums = 4 * L * M * (C + 2 * LANES)
    # Scores, their rotary part per group, weights, and one latent's tile taken out of its packing.
    keys = 3 * 4 * R if problem.rope_heads > 1 else 0
    live = config.tile * (M_block * (4 + 4 + 2 + 4 * problem.groups) + 3 * 4 * C + keys)
    return tiles + queries + results + sums + live


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames=("scale", "config"))
@target.int32_indices
def absorbed_decode(
    q_BTLHC: jax.Array | None,
    q_rope_BTGHR: jax.Array,
    latents_BSLC: jax.Array,
    k_rope: jax.Array,
    lengths_BT: jax.Array,
    starts_B: jax.Array,
    *,
    scale: float,
    config: TpuConfig,
) -> tuple[jax.Array, jax.Array]:
    """The kernel behind `api.absorbed_decode`, with arguments as that function normalises them.

    Interpreted on CPU inside `pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(...))`.
    """
    B, T, _, H, R = q_rope_BTGHR.shape
    L, C = latents_BSLC.shape[2:]
    M, _ = _rows(T * H)
    problem = Problem.of(q_BTLHC, q_rope_BTGHR, latents_BSLC, k_rope)
    queries = [_queries_as_rows(q, M) for q in (q_BTLHC, q_rope_BTGHR) if q is not None]
    ends_B = lengths_BT.max(axis=1)
    # A row that sees nothing has no tiles at all.
    starts_B = jnp.minimum(starts_B, ends_B)

    latents = _as_it_lies(latents_BSLC)
    # Inside shard_map the results differ wherever an argument does.
    arguments = (*queries, latents, k_rope, lengths_BT, starts_B)
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arguments))
    call = _call(problem, config, scale, jax.sharding.ManualAxisType(varying=varying))
    out_KBLMC, lse_KBLM = call(
        starts_B,
        ends_B,
        lengths_BT,
        *queries,
        # Else XLA may first move a small cache into VMEM, all of it and by itself.
        pltpu.with_memory_space_constraint(latents, pltpu.HBM),
        pltpu.with_memory_space_constraint(
            _as_it_lies(k_rope) if R % LANES == 0 else jnp.swapaxes(k_rope, 1, 2), pltpu.HBM
        ),
    )

    if config.splits == 1:
        out_BLMC, lse_BLM = out_KBLMC[0], lse_KBLM[0]
    else:
        out_BLMC, lse_BLM = merge_partials(out_KBLMC, lse_KBLM)
    out_BLTHC = out_BLMC[:, :, : T * H].reshape(B, L, T, H, C).astype(latents.dtype)
    lse_BLTH = lse_BLM[:, :, : T * H].reshape(B, L, T, H)
    return jnp.swapaxes(out_BLTHC, 1, 2), jnp.swapaxes(lse_BLTH, 1, 2)


def _heads_first(heads: int) -> bool:
    """Whether XLA lays heads out before positions, as tiles of 2, 4 or 8 heads would be padded."""
    return heads not in (1, 2, 4) and heads % SUBLANES != 0


def _as_it_lies(cache: jax.Array) -> jax.Array:
    """`[B, S, C]`, `[B, S, N, C]` or `[B, N, S, C]`: renames dimensions, moves nothing."""
    if cache.ndim == 4 and cache.shape[2] == 1:
        return cache[:, :, 0]
    if cache.ndim == 4 and _heads_first(cache.shape[2]):
        return jnp.swapaxes(cache, 1, 2)
    return cache


def _call(problem: Problem, config: TpuConfig, scale: float, manual_axis_type):
    """The Pallas call: of bounds, queries as rows and cache to partial results of each split."""
    B, L, G, S = problem.batch, problem.latents, problem.groups, problem.cache
    C, R, N, K = problem.width, problem.rope, problem.rope_heads, config.splits
    M, _ = _rows(problem.queries * problem.heads)
    dtype = jnp.dtype(problem.dtype)

    def tile_of(n, width):
        if n == 1:
            return config.tile, width
        return (n, config.tile, width) if _heads_first(n) else (config.tile, n, width)

    rope_tile = tile_of(N, R) if R % LANES == 0 else (R, config.tile)
    per_row = lambda k, b, *_: (b, 0, 0, 0)
    per_part = lambda k, b, *_: (k, b, 0, 0, 0)
    result = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=manual_axis_type)
    vmem = vmem_bytes(problem, config)
    asked = 0 if problem.values_only else L * C
    read = 2 * (B * S * (L * C + N * R) + B * M * (asked + G * R))
    return pl.pallas_call(
        functools.partial(
            _kernel,
            heads=problem.heads,
            queries=problem.queries,
            values_only=problem.values_only,
            scale=scale,
            config=config,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(K, B),
            in_specs=[
                *([] if problem.values_only else [pl.BlockSpec((None, L, M, C), per_row)]),
                pl.BlockSpec((None, G, M, R), per_row),
                pl.BlockSpec(memory_space=pltpu.HBM),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[
                pl.BlockSpec((None, None, L, M, C), per_part),
                pl.BlockSpec((None, None, L, M), lambda k, b, *_: (k, b, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((config.buffers, *tile_of(L, C)), dtype),
                pltpu.VMEM((config.buffers, *rope_tile), dtype),
                pltpu.SemaphoreType.DMA((2, config.buffers)),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.VMEM((L, M, C), jnp.float32),
                pltpu.VMEM((2, L, M, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            result((K, B, L, M, C), dtype if K == 1 else jnp.float32),
            result((K, B, L, M), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(16 * _MIB, vmem + vmem // 4),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * S * M * (asked + L * C + max(G, N) * R),
            transcendentals=B * S * L * M,
            bytes_accessed=read + B * L * M * (C * 2 + 4),
        ),
        name="absorbed_decode",
    )


@dataclasses.dataclass(frozen=True)
class _Refs:
    """What a program instance works on.

    Attributes:
      starts, ends, lengths: in SMEM, int32 [B], [B] and [B, T]; `ends` is a row's farthest.
      q_LMC, q_rope_GMR: the queries of the instance's batch row; no q_LMC of values only.
      latents, k_rope: the cache, in HBM.
      out_LMC, lse_LM: the results of the batch row.
      tiles, rope_tiles, arrived: the buffers, and semaphores of the copies into them.
      cursor: int32 [4] in SMEM, how far the copies and the arithmetic are; see below.
      sum_LMC, top_LM, total_LM: the running softmax: weighted sum, maximum and denominator; the
        last two repeated along lanes.
    """

    starts: Any
    ends: Any
    lengths: Any
    q_LMC: Any
    q_rope_GMR: Any
    latents: Any
    k_rope: Any
    out_LMC: Any
    lse_LM: Any
    tiles: Any
    rope_tiles: Any
    arrived: Any
    cursor: Any
    sum_LMC: Any
    top_LM: Any
    total_LM: Any


# What the cursor holds: row and tile of the next copy, tiles asked for, tiles used.
_ROW, _TILE, _ASKED, _USED = range(4)


class _Row(NamedTuple):
    """Bounds of the instance's batch row: its first position, farthest end, end of each query."""

    start: jax.Array
    end: jax.Array
    query_ends: list[jax.Array]


def _kernel(*refs, heads: int, queries: int, values_only: bool, scale: float, config: TpuConfig):
    split, b = pl.program_id(0), pl.program_id(1)
    B = pl.num_programs(1)
    if values_only:
        refs = *refs[:3], None, *refs[3:]
    refs = _Refs(*refs[:-1], top_LM=refs[-1].at[0], total_LM=refs[-1].at[1])
    copies = _Copies(refs, config, split, B)

    @pl.when(b == 0)
    def _():
        copies.begin()

    refs.sum_LMC[...] = jnp.zeros_like(refs.sum_LMC)
    refs.top_LM[...] = jnp.full_like(refs.top_LM, _HIDDEN)
    refs.total_LM[...] = jnp.zeros_like(refs.total_LM)
    # Rows are query-major: all heads of query 0, then all of query 1.
    row = _Row(refs.starts[b], refs.ends[b], [refs.lengths[b, t] for t in range(queries)])
    origin, count = copies.share(b)
    attend = functools.partial(_attend, refs, row, heads=heads, scale=scale, tile_size=config.tile)

    @pl.loop(0, count)
    def _(tile):
        buffer = lax.rem(refs.cursor[_USED], config.buffers)
        for copy in copies.of(b, tile, buffer):
            copy.wait()
        copies.ask_for_next()
        position = origin + tile * config.tile
        whole = (position >= row.start) & (
            position + config.tile <= functools.reduce(jnp.minimum, row.query_ends)
        )
        pl.when(whole)(lambda: attend(position, buffer, masked=False))
        pl.when(~whole)(lambda: attend(position, buffer, masked=True))
        refs.cursor[_USED] += 1

    _write_results(refs)


class _Copies(NamedTuple):
    """Copies from HBM, `buffers - 1` tiles ahead of the arithmetic, through all batch rows."""

    refs: _Refs
    config: TpuConfig
    split: jax.Array
    batch: jax.Array

    def share(self, row):
        """First position and number of tiles of `row` that are this split's."""
        refs, config = self.refs, self.config
        # Lanes hold positions of rotary keys, so a copy can only begin at a multiple of 128.
        origin = refs.starts[row] & -LANES
        visible = refs.ends[row] > refs.starts[row]
        count = lax.div(refs.ends[row] - origin + config.tile - 1, config.tile)
        count = jnp.where(visible, count, 0)
        if config.splits == 1:
            return origin, count
        # Rows of few tiles give the odd one to different splits in turn.
        turn = lax.rem(self.split + row, config.splits)
        first = lax.div(count * turn, config.splits)
        last = lax.div(count * (turn + 1), config.splits)
        return origin + first * config.tile, last - first

    def of(self, row, tile, buffer):
        """The copies of a tile's latents and of its rotary keys, as far as they are visible."""
        refs, config = self.refs, self.config
        position = pl.multiple_of(self.share(row)[0] + tile * config.tile, LANES)
        needed = jnp.minimum(refs.ends[row] - position, config.tile)

        def by_rows(cache, tiles, arrived):
            heads = (slice(None),) if _heads_first(tiles.shape[1]) else ()
            rows = needed
            if len(cache.shape) == 3 or heads:  # Else positions are outside of the tiling.
                rows = pl.multiple_of((needed + SUBLANES - 1) & -SUBLANES, SUBLANES)
            source = cache.at[(row, *heads, pl.ds(position, rows))]
            target = tiles.at[(buffer, *heads, pl.ds(0, rows))]
            return pltpu.make_async_copy(source, target, arrived)

        def by_lanes(cache, tiles, arrived):
            lanes = pl.ds(0, pl.multiple_of((needed + LANES - 1) & -LANES, LANES))
            source = cache.at[row, :, pl.ds(position, lanes.size)]
            return pltpu.make_async_copy(source, tiles.at[buffer, :, lanes], arrived)

        copy_rope = by_rows if refs.q_rope_GMR.shape[-1] % LANES == 0 else by_lanes
        return (
            by_rows(refs.latents, refs.tiles, refs.arrived.at[0, buffer]),
            copy_rope(refs.k_rope, refs.rope_tiles, refs.arrived.at[1, buffer]),
        )

    def skip_finished_rows(self, row, tile):
        last = self.batch - 1
        exhausted = lambda at: (
            (at[0] < self.batch) & (at[1] >= self.share(jnp.minimum(at[0], last))[1])
        )
        return lax.while_loop(exhausted, lambda at: (at[0] + 1, jnp.int32(0)), (row, tile))

    def ask_for_next(self):
        cursor = self.refs.cursor
        row, tile = cursor[_ROW], cursor[_TILE]

        @pl.when(row < self.batch)
        def _():
            for copy in self.of(row, tile, lax.rem(cursor[_ASKED], self.config.buffers)):
                copy.start()
            cursor[_ASKED] += 1
            cursor[_ROW], cursor[_TILE] = self.skip_finished_rows(row, tile + 1)

    def begin(self):
        cursor = self.refs.cursor
        cursor[_ASKED] = 0
        cursor[_USED] = 0
        cursor[_ROW], cursor[_TILE] = self.skip_finished_rows(jnp.int32(0), jnp.int32(0))
        pl.loop(0, self.config.buffers - 1)(lambda _: self.ask_for_next())


def _attend(
    refs: _Refs, row: _Row, position, buffer, *, heads: int, scale: float, tile_size: int, masked
) -> None:
    """Adds a tile to the running softmax of all query rows."""
    L, M, _ = refs.sum_LMC.shape
    G, _, R = refs.q_rope_GMR.shape
    own_keys, width_axis = len(refs.rope_tiles.shape) == 4, 0 if R % LANES else 1
    M_block = min(M, ROW_BLOCK)
    if masked:
        along = position + lax.broadcasted_iota(jnp.int32, (1, tile_size), 1)
        down = position + lax.broadcasted_iota(jnp.int32, (tile_size, 1), 0)
        written = (down >= row.start) & (down < row.end)
    rope_tiles = [take_latent(refs.rope_tiles, buffer, n) for n in range(L if own_keys else 1)]

    def attend_rows(i):
        rows = pl.ds(i * M_block, M_block)
        if masked:
            row_end = jnp.full((M_block, 1), row.query_ends[0])
            row_id = i * M_block + lax.broadcasted_iota(jnp.int32, (M_block, 1), 0)
            for t in range(1, len(row.query_ends)):
                row_end = jnp.where(row_id >= t * heads, row.query_ends[t], row_end)
            visible = (along >= row.start) & (along < row_end)
        rope_scores = [
            _dot(refs.q_rope_GMR[n % G, rows], rope_tiles[n if own_keys else 0], 1, width_axis)
            for n in range(L if own_keys else G)
        ]
        # One stage after the other for all latents: the compiler's scheduler keeps to this
        # order, and a latent by itself leaves the units idle while each waits for the last.
        tiles, scores = [], []
        for latent in range(L):
            tile = take_latent(refs.tiles, buffer, latent)
            if masked:
                # What was never written may be anything, and 0 * NaN is NaN.
                tile = jnp.where(written, tile.astype(jnp.float32), 0).astype(tile.dtype)
            score = rope_scores[latent if own_keys else latent % G]
            if refs.q_LMC is not None:
                score += _dot(refs.q_LMC[latent, rows], tile, 1, 1)
            score *= scale * math.log2(math.e)
            tiles.append(tile)
            scores.append(jnp.where(visible, score, _HIDDEN) if masked else score)
        old_tops = [refs.top_LM[latent, rows, :1] for latent in range(L)]
        tops = [
            jnp.maximum(old, score.max(axis=1, keepdims=True))
            for old, score in zip(old_tops, scores, strict=True)
        ]
        weights = [jnp.exp2(score - top) for score, top in zip(scores, tops, strict=True)]
        products = [
            _dot(weight.astype(tile.dtype), tile, 1, 0)
            for weight, tile in zip(weights, tiles, strict=True)
        ]
        for latent in range(L):
            fade = jnp.exp2(old_tops[latent] - tops[latent])
            total = fade * refs.total_LM[latent, rows, :1]
            total += weights[latent].sum(axis=1, keepdims=True)
            refs.sum_LMC[latent, rows] = fade * refs.sum_LMC[latent, rows] + products[latent]
            refs.top_LM[latent, rows] = jnp.broadcast_to(tops[latent], (M_block, LANES))
            refs.total_LM[latent, rows] = jnp.broadcast_to(total, (M_block, LANES))

    if M_block == M:
        attend_rows(0)
    else:
        pl.loop(0, M // M_block)(attend_rows)


def _write_results(refs: _Refs) -> None:
    for latent in range(refs.sum_LMC.shape[0]):
        top, total = refs.top_LM[latent], refs.total_LM[latent]
        # A query that saw nothing has only hidden scores, which all look alike to the softmax.
        saw_any = top > _HIDDEN / 2
        weight = jnp.where(saw_any, 1 / jnp.where(saw_any, total, 1), 0)
        log = jnp.log2(jnp.where(saw_any, total, 1))
        lse = jnp.where(saw_any, (top + log) * math.log(2), -jnp.inf)
        refs.out_LMC[latent] = (refs.sum_LMC[latent] * weight[:, :1]).astype(refs.out_LMC.dtype)
        refs.lse_LM[pl.ds(latent, 1)] = lse.T[:1]


def take_latent(tiles_ref, buffer, latent: int) -> jax.Array:
    """Latent `latent` of a tile as `[tile, C]`.

    A tile `[L, tile, C]` has it as it is. In one of `[tile, L, C]`, positions outside, each 32-bit
    word of VMEM holds two neighbouring latents. Words of every (L/2)-th row are loaded with a
    stride and their half taken, so that nothing has to be transposed.
    """
    if len(tiles_ref.shape) == 3:
        return tiles_ref[buffer]
    if _heads_first(tiles_ref.shape[1]):
        return tiles_ref[buffer, latent]
    _, tile, L, C = tiles_ref.shape
    across = C // LANES
    stride = L // 2 * across
    words_ref = tiles_ref.at[buffer].bitcast(jnp.uint32).reshape(tile * stride, LANES)
    first = latent // 2 * across
    columns = [
        words_ref[pl.ds(first + i, tile, stride=stride)] if stride > 1 else words_ref[...]
        for i in range(across)
    ]
    words = columns[0] if across == 1 else jnp.concatenate(columns, axis=1)
    # A bfloat16 is the upper half of the float32 of the same value.
    words = words << 16 if latent % 2 == 0 else words & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(words, jnp.float32).astype(tiles_ref.dtype)


def _dot(a, b, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _queries_as_rows(q_BTLHC: jax.Array, M: int) -> jax.Array:
    B, T, L, H, C = q_BTLHC.shape
    q_BLMC = jnp.swapaxes(q_BTLHC, 1, 2).reshape(B, L, T * H, C)
    return jnp.pad(q_BLMC, ((0, 0), (0, 0), (0, M - T * H), (0, 0)))


def _rows(count: int) -> tuple[int, int]:
    """Query rows with padding, and how many of them are computed at once."""
    if count > ROW_BLOCK:
        return _round_up(count, ROW_BLOCK), ROW_BLOCK
    padded = _round_up(count, SUBLANES)
    return padded, padded


def _round_up(x: int, multiple: int) -> int:
    return (x + multiple - 1) // multiple * multiple


def _position_bytes(problem: Problem) -> int:
    return 2 * (problem.latents * problem.width + problem.rope_heads * problem.rope)


def _chip(problem: Problem) -> _Chip:
    return _CHIPS.get(problem.device_kind, _UNKNOWN_CHIP)
