"""A layer from its attention's answer to what the next one asks its cache, on Hopper GPUs.

Five products lie there, of a few rows with weights that are read once: the output projection, the
MLP's two, what the next attention makes of its input, and its queries of their latent. As launches
of their own, each begins to read its weights when the one before has ended, and memory is idle
while devices wait for each other. Here one warpgroup of a CTA does nothing but copy the weights of
its share of them all into a ring, as far ahead as the ring goes, and two multiply. Features are the
rows of the products, so that a product is no wider than the batch.

Every product is cut into tiles of columns and into shares of what is contracted, one of each to a
CTA. Between two products a few warpgroups have a block of 64 features each: they add up what all
shares and devices have of it, do what the layer does there, and tell all CTAs. Where there is a
norm, the product is of what is not divided yet; who adds it up divides by then. Latents and rotary
keys of the new tokens go into the cache, queries to device memory; the last layer's launch ends
with its norm.

CTAs hear of each other's numbers as devices do in `exchange.mosaic_gpu`: a word of the board, an
array in device memory, is `EMPTY` until it is written, and who needs it reads until it is not. That
is one way to memory and one back, which take microseconds while weights are read; a counter would
be two more. Devices exchange parts twice, by the inboxes and the rules of that module.

What was heard must be `EMPTY` again before the next launch tells it:

- Parts that one warpgroup alone hears it empties at once.
- The MLP's input and the answer have been heard by all when the second exchange ends: who
  exchanges a block empties one of each then. All shares of a tile of the MLP's second product are
  heard by then, so all of `hidden` was told, so all parts of the widened MLP were, behind their
  CTAs' share of the input, of which each block was told behind all shares of a tile of the first
  product, and these behind their CTAs' share of the answer.
- The rest the next launch empties when it begins, each CTA with a fence before it tells its first
  part. `hidden` is the first of it that is told, and whoever tells it has heard of all those parts.

All CTAs wait for all, so that they must run at once: one on each multiprocessor.
"""

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mlra_jax.kernels import tiles
from mlra_jax.kernels.absorbed_decode.mosaic_gpu import Parts
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.join import join_lines, normalised
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.plan import LANES
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.schedule import Bounds, parts_of
from mlra_jax.kernels.after_attention.plan import CTAS, MULTIPLIERS, SLAB, STRIDE, Product, Shape
from mlra_jax.kernels.after_attention.telling import (
    empty,
    fence,
    hear,
    tell,
    tell_line,
    write_rows,
)
from mlra_jax.kernels.exchange.mosaic_gpu import INBOXES, far_from, own_number, require_at
from mlra_jax.kernels.rows import THREADS
from mlra_jax.kernels.tiles import COLUMN, ROW, TILE, tall, wide

_LINE = plgpu.Layout.WG_STRIDED((STRIDE,), vec_size=4)
_WAITING = 96
"""Registers of a thread for what it waits for at a time."""
_AT_ONCE = 33
"""Parts of a line that a warpgroup waits for at a time, at most."""
AHEAD = 3, 1, 1, 2, 2
"""Slabs of each product that a CTA waits for at a time. What CTAs tell each other would wait behind
more."""


def after_attention(
    answer: jax.Array | Parts,
    x_DR: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    weights: Sequence[jax.Array],
    inbox: jax.Array,
    far: jax.Array,
    board: jax.Array,
    turn: jax.Array,
    entering: Sequence[jax.Array] = (),
    cache: Sequence[jax.Array] = (),
    *,
    factors: Sequence[float],
    eps: Sequence[float],
    shape: Shape,
) -> tuple[jax.Array, ...]:
    """(the stream, what follows, the inboxes, the board) of one device.

    What follows is the stream's norm, `[R, D]`; or of the next attention its queries but for their
    rotary parts `[R, H * K]`, these `[R, H * R]`, and the cache with its latents and rotary keys.

    Args:
      answer: bfloat16 `[R, K]`, what the output projection reads on this device, or its parts.
      x_DR: bfloat16, the stream.
      scales: of the MLP's norm and of the next one, which multiply by them and by `factors`.
      weights: bfloat16, `[K, D]`, `[D, 2 F]`, `[F, D]`, and where an attention follows what it
        makes of its input, `[D, E]`, and its queries of their latent, `[Q, A]`.
      inbox, far: int32 as of `exchange`.
      board: int32 `[Shape.board_size]`, from the launch before, or `EMPTY`; changed in place.
      turn: int32 `[1]`, the number of the first exchange in its step modulo `INBOXES`.
      entering: where an attention follows: scales of the norms of the query's latent and of all
        latents; cosines and sines of the rows' positions, float32 `[2, rope, R]`, for a vector and
        for it with its halves exchanged; int32 `[R]`, the number of each row's slot in the cache,
        less than 0 where nothing is kept; int32 `[1]`, the cache's first latent among all.
      cache: likewise, its latents `[B, S, L, C]` and rotary keys `[B, S, rope]`, changed in place.
      factors, eps: of the norms, in the order of their scales.
    """
    D, R = x_DR.shape
    widths = [shape.heads * n for n in (shape.nope, shape.rope)] if entering else [D]
    following = [jax.ShapeDtypeStruct((R, n), x_DR.dtype) for n in widths]
    answers, names = (answer,), ["answer"]
    if shape.in_parts:
        answers = answer.parts, answer.lses, *answer.bounds
        names = ["parts", "lses", "lengths", "starts", "table"][: len(answers)]
    names += ["x", "scale_mlp", "scale_next", "turn", "far", "inbox", "board"]
    if entering:
        names += ["scale_query", "scale_latents", "turns", "places", "first", "latents", "k_rope"]
    num_in = len(names) + len(weights)

    def body(*refs, **memory):
        before, (stream, *after) = refs[:num_in], refs[num_in:]
        arrays = types.SimpleNamespace(
            **dict(zip(names, before, strict=False)),
            weights=before[len(names) :],
            stream=stream,
            following=after,
        )
        cta = _Cta(
            shape=shape,
            factors=factors,
            eps=eps,
            devices=len(far) - 1,
            index=lax.axis_index("cta"),
            wg=lax.axis_index("wg"),
            a=arrays,
            parts=answer.shape if shape.in_parts else None,
            memory=types.SimpleNamespace(**memory),
        )
        pl.when(cta.wg == MULTIPLIERS)(functools.partial(_copy, cta))
        pl.when(cta.wg < MULTIPLIERS)(functools.partial(_multiply, cta))

    swizzled = functools.partial(tiles.swizzled, dtype=jnp.bfloat16)
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((D, R), x_DR.dtype), *following),
        scratch_types=dict(
            ring=plgpu.RefUnion(
                swizzled((shape.slots, SLAB, shape.tile)),
                swizzled((shape.slots, shape.tile, SLAB)),
            ),
            rows=swizzled((shape.memory // (R * SLAB * 2), R, SLAB)),
            scratch=plgpu.SMEM((MULTIPLIERS, tiles.REDUCTION), jnp.float32),
            inverse=plgpu.SMEM((R,), jnp.float32),
            twice=plgpu.SMEM((MULTIPLIERS, 2 * SLAB, R), jnp.float32),
            full=plgpu.Barrier(num_barriers=shape.slots),
            empty=plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=shape.slots),
            answer=plgpu.Barrier(num_arrivals=shape.products[0].most),
            emptied=plgpu.Barrier(),
            ready=plgpu.Barrier(num_arrivals=MULTIPLIERS),
            found=plgpu.Barrier(),
        ),
        grid=(CTAS,),
        grid_names=("cta",),
        num_threads=MULTIPLIERS + 1,
        thread_name="wg",
        kernel_name="after_attention",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            skip_device_barrier=True,
            reduction_scratch_bytes=0,
            approx_math=True,
        ),
    )
    inbox_ref, board_ref = jax.new_ref(inbox), jax.new_ref(board)
    cache_refs = [jax.new_ref(x) for x in cache]
    ours = turn, far, inbox_ref, board_ref
    arrays = *answers, x_DR, *scales, *ours, *entering, *cache_refs, *weights
    stream, *following = kernel(*arrays)
    following = (*following, *map(jax.freeze, cache_refs))
    return stream, following, jax.freeze(inbox_ref), jax.freeze(board_ref)


@dataclasses.dataclass(frozen=True)
class _Cta:
    """What the warpgroups of a CTA share.

    Attributes:
      a: the arrays in device memory.
      parts: the sizes of the attention, if it left its answer in parts.
      far, me: how far it is to all devices' inboxes, of which one is this device's.
    """

    shape: Shape
    factors: Sequence[float]
    eps: Sequence[float]
    devices: int
    index: jax.Array
    wg: jax.Array
    a: Any
    parts: Any
    memory: Any
    far: Sequence = ()
    me: Any = None

    @property
    def block(self):
        """The block of features that the warpgroup exchanges, if there is one."""
        return self.wg * CTAS + self.index

    @property
    def gated(self):
        """The block of the MLP's features that the warpgroup gates, if there is one, and what of
        the next attention it enters; those that had no part in the product before come first."""
        return (CTAS - 1 - self.index) * MULTIPLIERS + self.wg

    def slab(self, slot, product: Product):
        """Memory of the ring for what is copied at a time."""
        return self.memory.ring[product.depth > SLAB].at[slot]

    def hear(self, refs, **how):
        return hear(refs, self.shape.rows, **how)

    def inbox(self, turn, sender, block):
        turn = lax.rem(self.a.turn[0] + turn, INBOXES)
        start = (turn * self.devices + sender) * self.shape.stream + block * SLAB
        return self.a.inbox.at[pl.ds(start * self.shape.rows, SLAB * self.shape.rows)]

    def told(self, name: str, *place, count: int = SLAB):
        """A place on the board, of `count` numbers of each row."""
        at = 0
        for size, i in zip(self.shape.board[name], place, strict=True):
            at = at * size + i
        start = self.shape.places()[name] + at * self.shape.rows
        return self.a.board.at[pl.ds(start, count * self.shape.rows)]


def _slab(i, count: int = SLAB):
    return pl.ds(pl.multiple_of(i * SLAB, SLAB), count)


# --- Copies ---


def _copy(cta: _Cta) -> None:
    """Asks for the answer and for the weights, slab by slab; empties the board meanwhile."""
    shape, memory = cta.shape, cta.memory
    _empty_board(cta)
    out = shape.products[0]
    _, _, first, _ = out.unit(cta.index)
    for i in range(0 if shape.in_parts else out.most):
        block = _slab(jnp.minimum(first + i, out.contracted // SLAB - 1))
        plgpu.copy_gmem_to_smem(cta.a.answer.at[:, block], memory.rows.at[i], memory.answer)

    def arrive(step, _):
        plgpu.barrier_wait(memory.full.at[lax.rem(step, shape.slots)])

    step = arrived = jnp.int32(0)
    for product, ref, ahead in zip(shape.products, cta.a.weights, AHEAD, strict=False):
        tile, _, first, count = product.unit(cta.index)
        columns = pl.ds(pl.multiple_of(tile * product.tile, product.tile), product.tile)

        def copy(i, steps, product=product, ref=ref, columns=columns, first=first, ahead=ahead):
            step, arrived = steps
            slot, due = lax.rem(step, shape.slots), step - min(ahead, shape.slots) + 1
            lax.fori_loop(arrived, due, arrive, None)
            pl.when(step >= shape.slots)(lambda: plgpu.barrier_wait(memory.empty.at[slot]))
            source = ref.at[_slab(first + i * product.blocks, product.depth), columns]
            plgpu.copy_gmem_to_smem(source, cta.slab(slot, product), memory.full.at[slot])

            # What the CTA tells from now on is there after that.
            @pl.when(step == 0)
            def _emptied():
                fence()
                plgpu.barrier_arrive(memory.emptied)

            return step + 1, jnp.maximum(arrived, due)

        step, arrived = lax.fori_loop(0, count, copy, (step, arrived))


# --- Products ---


def _multiply(cta: _Cta) -> None:
    out, widen, narrow, *attention = cta.shape.products[: len(cta.a.weights)]
    # Read now, while nothing waits for them.
    far, here = far_from(cta.a.far, cta.devices)
    require_at(cta.a.inbox, here)
    cta = dataclasses.replace(cta, far=far, me=own_number(far))
    if cta.shape.in_parts:
        _join(cta)
        _take(cta, out, "answer")
    else:
        plgpu.barrier_wait(cta.memory.answer)
    pl.when(cta.index < cta.shape.emptying)(lambda: plgpu.barrier_wait(cta.memory.emptied))
    step = _product(cta, out, jnp.int32(0), "parts_out")
    exchanges, last = cta.block < cta.shape.blocks, not attention
    pl.when(exchanges)(lambda: _enter_mlp(cta))
    _take(cta, widen, "entered_mlp")
    step = _product(cta, widen, step, "parts_widened")
    pl.when(cta.gated < cta.shape.mlp // SLAB)(lambda: _gate(cta))
    _take(cta, narrow, "hidden")
    step = _product(cta, narrow, step, "parts_narrow")
    pl.when(exchanges)(lambda: _leave(cta) if last else _enter_next(cta))
    if attention:
        entry, asked = attention
        _take(cta, entry, "entered_next")
        step = _product_of_entry(cta, entry, step)
        pl.when(cta.gated < cta.shape.entering)(lambda: _enter_attention(cta))
        _take(cta, asked, "entered_query")
        _product(cta, asked, step, "parts_asked")
        pl.when(cta.block < cta.shape.asked // SLAB)(lambda: _ask(cta))


def _product(cta: _Cta, product: Product, step, name: str):
    """Tells the CTA's share of a product, each warpgroup half of the tile's columns."""
    half = product.tile // MULTIPLIERS
    tile, share, _, count = product.unit(cta.index)
    mine = pl.ds(pl.multiple_of(cta.wg * half, half), half)
    acc, step = _multiplied(cta, product, step, mine)
    column = tile * product.tile + cta.wg * half
    pl.when(count > 0)(lambda: tell(acc, cta.told(name, share, column, count=half)))
    _meet(cta)
    return step


def _multiplied(cta: _Cta, product: Product, step, columns):
    """(what the CTA's slabs add up to in some columns of its tile, the step after them)."""
    memory, slots = cta.memory, cta.shape.slots
    *_, count = product.unit(cta.index)

    def products(acc):
        def multiply(i, step):
            slot = lax.rem(step, slots)
            plgpu.barrier_wait(memory.full.at[slot])
            for k in range(product.blocks):
                weights = cta.slab(slot, product).at[pl.ds(k * SLAB, SLAB), columns]
                rows = memory.rows.at[i * product.blocks + k]
                plgpu.wgmma(acc, weights.transpose((1, 0)), rows.transpose((1, 0)))
            # What was read before this one is free.
            plgpu.wgmma_wait(product.blocks)
            before = lax.rem(step + slots - 1, slots)
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(memory.empty.at[before]))
            return step + 1

        end = lax.fori_loop(0, count, multiply, step)
        plgpu.wgmma_wait(0)
        last = lax.rem(end + slots - 1, slots)
        pl.when(count > 0)(lambda: plgpu.barrier_arrive(memory.empty.at[last]))
        return acc[...], end

    return pl.run_scoped(products, plgpu.ACC((columns.size, cta.shape.rows), jnp.float32))


def _product_of_entry(cta: _Cta, product: Product, step):
    """As `_product`, by one warpgroup; the other one finds what it is to be multiplied by."""
    memory, (tile, share, _, count) = cta.memory, product.unit(cta.index)

    @pl.when((cta.wg > 0) & (count > 0))
    def _inverse():
        memory.inverse[...] = _inverse_of(cta, "squares_next", cta.eps[1])
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.found)

        def leave(i, _):
            slot = lax.rem(step + i, cta.shape.slots)
            plgpu.barrier_wait(memory.full.at[slot])
            plgpu.barrier_arrive(memory.empty.at[slot])

        lax.fori_loop(0, count, leave, None)

    @pl.when((cta.wg == 0) & (count > 0))
    def _multiply():
        acc, _ = _multiplied(cta, product, step, pl.ds(0, SLAB))
        plgpu.barrier_wait(memory.found)
        inverse = plgpu.load(memory.inverse, layout=COLUMN)
        tell(acc * tall(inverse, acc), cta.told("parts_entered", share, tile * SLAB))

    _meet(cta)
    return step + count


# --- What lies between them ---


def _empty_board(cta: _Cta) -> None:
    """Empties the CTA's piece of what the launch before has left."""
    shape = cta.shape

    @pl.when(cta.index < shape.emptying)
    def _():
        start = shape.places()["hidden"] + cta.index * shape.emptied
        for offset in range(0, shape.emptied, STRIDE):
            empty(cta.a.board.at[pl.ds(start + offset, STRIDE)], _LINE, (STRIDE,))


def _join(cta: _Cta) -> None:
    """Tells the answer, a warpgroup a head's line of a row at a time, and 0 in rows without any."""
    of, rows, a = cta.parts, cta.shape.rows, cta.a
    bounds = Bounds(a.lengths, a.starts, getattr(a, "table", None))
    lines = cta.shape.answer // LANES * rows
    at_once = min(of.team if of.config.stripes else 2 * of.parts_at_once, _AT_ONCE)

    def some(i, _):
        number = cta.block + i * (CTAS * MULTIPLIERS)
        line, row = lax.div(number, rows), lax.rem(number, rows)
        latent, head = lax.div(line, of.problem.heads), lax.rem(line, of.problem.heads)
        unit, stream = lax.div(latent, of.config.shared), lax.rem(latent, of.config.shared)

        @pl.when(number < lines)
        def _():
            there = row < of.problem.batch
            first, count = parts_of(of, bounds, jnp.where(there, row, 0), unit)
            parts = first, jnp.where(there, count, 0), at_once
            [(acc, _, total)] = join_lines(a.parts, a.lses, [(stream, head, 0)], *parts)
            y = normalised(acc, total).astype(jnp.bfloat16).astype(jnp.float32)
            tell_line(y, cta.told("answer", line * LANES, count=LANES), row, rows)

    lax.fori_loop(0, -(-lines // (CTAS * MULTIPLIERS)), some, None)


def _parts(cta: _Cta, name: str, block):
    shares = cta.shape.board[name][0]
    return [cta.told(name, share, block * SLAB) for share in range(shares)]


def _empty_blocks(cta: _Cta, refs) -> None:
    for ref in refs:
        empty(ref, TILE, (SLAB, cta.shape.rows))


def _exchanged(cta: _Cta, name: str, turn: int):
    """What a block of all devices' parts adds up to; empties the inbox of the exchange before."""
    devices = range(cta.devices)
    refs = _parts(cta, name, cta.block)
    part = _sum(cta.hear(refs))
    for device in devices:
        tell(part, cta.inbox(turn, cta.me, cta.block), cta.far[device])
    _empty_blocks(cta, refs)
    _empty_blocks(cta, [cta.inbox(turn + INBOXES - 1, n, cta.block) for n in devices])
    return _sum(cta.hear([cta.inbox(turn, n, cta.block) for n in devices]))


def _enter_mlp(cta: _Cta) -> None:
    """Tells a block of the MLP's input. It is not yet divided by the root of the mean square, which
    takes all blocks to know."""
    a, at = cta.a, _slab(cta.block)
    x = (tiles.load(a.x.at[at], TILE) + _exchanged(cta, "parts_out", 0)).astype(a.x.dtype)
    # Half a layer on, in the place of what it was: no other warpgroup reads it.
    tiles.store(a.stream.at[at], x)
    _tell_scaled(cta, x, a.scale_mlp, cta.factors[0], "mlp", cta.block)


def _enter_next(cta: _Cta) -> None:
    """Tells a block of what the next attention enters, likewise."""
    _tell_scaled(cta, _after(cta), cta.a.scale_next, cta.factors[1], "next", cta.block)


def _after(cta: _Cta):
    """A block of the stream after the layer; empties what was told of it half a layer before."""
    stream = cta.a.stream.at[_slab(cta.block)]
    added = _exchanged(cta, "parts_narrow", 1)
    _empty_blocks(cta, [cta.told("entered_mlp", cta.block * SLAB)])
    for i in range(0, cta.shape.answer // SLAB if cta.shape.in_parts else 0, cta.shape.blocks):

        @pl.when(i + cta.block < cta.shape.answer // SLAB)
        def _empty_answer(block=i + cta.block):
            _empty_blocks(cta, [cta.told("answer", block * SLAB)])

    empty(cta.told("squares_mlp", cta.block, count=1), COLUMN, (cta.shape.rows,))
    x = (tiles.load(stream, TILE) + added).astype(cta.a.stream.dtype)
    tiles.store(stream, x)
    return x


def _tell_scaled(cta: _Cta, x, scale_ref, factor: float, name: str, block) -> None:
    scale = tiles.load(scale_ref.at[_slab(block)], ROW) * factor
    x = x.astype(jnp.float32)
    scaled = (x * wide(scale, x)).astype(jnp.bfloat16).astype(jnp.float32)
    tell(scaled, cta.told(f"entered_{name}", block * SLAB))
    _tell_squares(cta, x, f"squares_{name}", block)


def _tell_squares(cta: _Cta, x, name: str, block) -> None:
    tell(_squares(cta, x), cta.told(name, block, count=1))


def _squares(cta: _Cta, x):
    return tiles.over_rows("add", x * x, cta.memory.scratch.at[cta.wg])


def _inverse_of(cta: _Cta, name: str, eps: float):
    """What each row is to be multiplied by, from its sums of squares."""
    (blocks,) = cta.shape.board[name]
    squares = [
        cta.hear([cta.told(name, begin)], limit=blocks - begin)[0]
        for begin in range(0, blocks, SLAB)
    ]
    total = tiles.over_rows("add", _sum(squares), cta.memory.scratch.at[cta.wg])
    return lax.rsqrt(total / (blocks * SLAB) + eps)


def _gate(cta: _Cta) -> None:
    """Tells a block of the input of the MLP's second product."""
    shape, block = cta.shape, cta.gated
    shares = shape.products[1].shares
    gate, up = (_parts(cta, "parts_widened", block + k * (shape.mlp // SLAB)) for k in (0, 1))
    inverse = _inverse_of(cta, "squares_mlp", cta.eps[0])
    parts = cta.hear(gate + up)
    both = (_sum(parts[:shares]), _sum(parts[shares:]))
    x, y = ((z * tall(inverse, z)).astype(jnp.bfloat16).astype(jnp.float32) for z in both)
    y = x / (1.0 + jnp.exp(-x)) * y
    tell(y.astype(jnp.bfloat16).astype(jnp.float32), cta.told("hidden", block * SLAB))
    _empty_blocks(cta, gate + up)


def _leave(cta: _Cta) -> None:
    """Writes a block of the last layer's stream and of its norm."""
    a, at = cta.a, _slab(cta.block)
    x = _after(cta).astype(jnp.float32)
    _tell_squares(cta, x, "squares_next", cta.block)
    x = x * tall(_inverse_of(cta, "squares_next", cta.eps[1]), x)
    x = x * wide(tiles.load(a.scale_next.at[at], ROW) * cta.factors[1], x)
    _write(cta, x, a.following[0].at[:, at])


def _write(cta: _Cta, x, ref) -> None:
    """Writes a block of features to `[R, 64]`."""
    # Both warpgroups are done with these rows.
    staging = cta.memory.rows.at[cta.wg]
    staging.transpose((1, 0))[...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, ref)
    plgpu.wait_smem_to_gmem(0)


def _enter_attention(cta: _Cta) -> None:
    """Tells a block of the query's latent, or puts a latent or the rotary key into the cache."""
    shape, a, number = cta.shape, cta.a, cta.gated
    of_query = shape.query // SLAB
    latent = number - of_query

    @pl.when(number < of_query)
    def _query():
        x = _heard(cta, "parts_entered", number)
        _tell_scaled(cta, x, a.scale_query, cta.factors[2], "query", number)

    @pl.when((latent >= 0) & (latent < shape.latents))
    def _latent():
        C, held = shape.latent, a.latents.shape[2]
        xs = [
            _heard(cta, "parts_entered", (shape.query + latent * C) // SLAB + i)
            for i in range(C // SLAB)
        ]
        inverse = lax.rsqrt(_sum([_squares(cta, x) for x in xs]) / C + cta.eps[3])
        # The entry has either the cache's latents or all.
        own = shape.latents == held
        among_all, kept = (latent + a.first[0], latent) if own else (latent, latent - a.first[0])

        @pl.when((kept >= 0) & (kept < held))
        def _keep():
            for i, x in enumerate(xs):
                scale_ref = a.scale_latents.at[_slab(among_all * (C // SLAB) + i)]
                scale = tiles.load(scale_ref, ROW) * cta.factors[3]
                x = x * tall(inverse, x) * wide(scale, x)
                write_rows(x, a.latents, a.places, kept * C + i * SLAB, held * C)

    @pl.when(latent == shape.latents)
    def _rotary():
        x = _heard(cta, "parts_entered", (shape.entry - shape.rope) // SLAB)
        write_rows(_turned(cta, x), a.k_rope, a.places, 0, shape.rope)


def _ask(cta: _Cta) -> None:
    """Writes a block of the next attention's queries."""
    shape, (nope, rope) = cta.shape, cta.a.following
    each = (shape.nope + shape.rope) // SLAB
    head, piece = lax.div(cta.block, each), lax.rem(cta.block, each)
    inverse = _inverse_of(cta, "squares_query", cta.eps[2])
    x = _heard(cta, "parts_asked", cta.block)
    x = x * tall(inverse, x)
    turns = piece == each - 1
    pl.when(turns)(lambda: _write(cta, _turned(cta, x), rope.at[:, _slab(head)]))
    fixed = _slab(head * (each - 1) + piece)
    pl.when(jnp.logical_not(turns))(lambda: _write(cta, x, nope.at[:, fixed]))


def _heard(cta: _Cta, name: str, block):
    """What a block's parts add up to, which no other warpgroup hears."""
    refs = _parts(cta, name, block)
    x = _sum(cta.hear(refs))
    _empty_blocks(cta, refs)
    return x


def _turned(cta: _Cta, x):
    """A rotary vector at each row's position."""
    cos, sin = (tiles.load(cta.a.turns.at[k], TILE) for k in (0, 1))
    twice = cta.memory.twice.at[cta.wg]
    # Beside itself, each half has the other one behind it.
    for start in (0, SLAB):
        tiles.store(twice.at[pl.ds(start, SLAB)], x)
    plgpu.commit_smem()
    return x * cos + tiles.load(twice.at[pl.ds(SLAB // 2, SLAB)], TILE) * sin


def _take(cta: _Cta, product: Product, name: str) -> None:
    """The CTA's share of a product's input, from the board into shared memory."""
    shape, memory, wg = cta.shape, cta.memory, cta.wg
    _, _, first, count = product.unit(cta.index)
    count = count * product.blocks
    most = -(-product.most // MULTIPLIERS)
    at_once = max(1, min(most, _WAITING // (SLAB * shape.rows // THREADS)))

    def enter(i, y):
        memory.rows.at[i].transpose((1, 0))[...] = y.astype(jnp.bfloat16)

    def some(n, _):
        places = [wg + MULTIPLIERS * (n * at_once + k) for k in range(at_once)]
        blocks = [first + jnp.minimum(i, count - 1) for i in places]
        refs = [cta.told(name, block * SLAB) for block in blocks]
        for i, y in zip(places, cta.hear(refs, patiently=True), strict=True):
            pl.when(i < count)(functools.partial(enter, i, y))

    turns = lax.div(count - wg + MULTIPLIERS * at_once - 1, MULTIPLIERS * at_once)
    lax.fori_loop(0, turns, some, None)
    _meet(cta)


def _sum(parts):
    return functools.reduce(jnp.add, parts)


def _meet(cta: _Cta) -> None:
    """Both multiplying warpgroups are here and see what both have written to shared memory."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(cta.memory.ready)
    plgpu.barrier_wait(cta.memory.ready)
