"""Who takes which tiles: how they are numbered, and the visits that each CTA makes."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.kernels.absorbed_decode.mosaic_gpu import plan
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.plan import Shape


class Place(NamedTuple):
    """A tile of a unit: its batch row, first latent, block of query rows, and number."""

    batch_row: jax.Array
    latent: jax.Array
    row_block: jax.Array
    tile: jax.Array


class Visit(NamedTuple):
    """A CTA's run of tiles of one unit, of which each stream makes one part.

    Attributes:
      place: the first of its tiles.
      tiles: how many there are; 0 where a CTA's stripe has none.
      turn: how many tiles the CTA took before, used or not.
      number: how many visits it made before.
    """

    place: Place
    tiles: jax.Array
    turn: jax.Array
    number: jax.Array


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What of the cache each query sees, as references within a kernel.

    Attributes:
      lengths: int32 [B, T], the end of what each query sees.
      starts: int32 [B], the first position.
      table: of `table`, for more than one batch row, else None.
    """

    lengths: Any
    starts: Any
    table: Any

    def begin(self, batch_row):
        """Where the first tile of a batch row begins."""
        if self.table is not None:
            # Beside what has been read of it: the starts are far away, in device memory.
            return self.table[self.lengths.shape[0] + 1 + batch_row]
        return _aligned(self.starts[batch_row])


def _aligned(start):
    return start - lax.rem(start, jnp.full_like(start, plan.ALIGN))


def at(start, size: int, multiple: int = plan.ALIGN):
    """The slice [start, start + size), start being a multiple of `multiple`."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, multiple), size)


def cdiv(a, b):
    return lax.div(a + b - 1, jnp.int32(b) if isinstance(b, int) else b)


def tile_count(start, end, block: int):
    """Tiles that cover [start, end); the first begins at `start` rounded down to the alignment."""
    begin = _aligned(start)
    return jnp.where(end > start, lax.div(end - begin + block - 1, jnp.full_like(end, block)), 0)


def table(shape: Shape, lengths_BT: jax.Array, starts_B: jax.Array) -> jax.Array:
    """For batches: before which tile each row begins, where in the cache each row's first tile
    does, then the row that each CTA begins with."""
    batch, ctas = shape.problem.batch, shape.config.ctas
    lengths_BT, starts_B = lengths_BT.astype(jnp.int32), starts_B.astype(jnp.int32)
    count_B = tile_count(starts_B, lengths_BT.max(axis=1), shape.config.block)
    row = jnp.arange(batch + 1, dtype=jnp.int32)
    begin = jnp.where(row[:-1] < row[:, None], count_B, 0).sum(axis=1, dtype=jnp.int32)
    share = jnp.maximum(cdiv(begin[-1] * shape.units, ctas), 1)
    first = jnp.arange(ctas, dtype=jnp.int32) * share
    row_of_cta = (begin[1:] * shape.units <= first[:, None]).sum(axis=1)
    return jnp.concatenate([begin, _aligned(starts_B), row_of_cta]).astype(jnp.int32)


def numbering(shape: Shape, bounds: Bounds):
    """How tiles are numbered: their total, the share of a CTA, and a row's first tile and count."""
    if bounds.table is None:
        start, end = bounds.starts[0], bounds.lengths[0, 0]
        for t in range(1, shape.problem.queries):
            end = jnp.maximum(end, bounds.lengths[0, t])
        count = tile_count(start, end, shape.config.block)
        total = count * shape.units
        span = lambda row: (jnp.int32(0), count)
    else:
        total = bounds.table[shape.problem.batch] * shape.units

        def span(row):
            first = bounds.table[row]
            return first * shape.units, bounds.table[row + 1] - first

    return total, jnp.maximum(cdiv(total, shape.config.ctas), 1), span


def of_unit(shape: Shape, unit):
    """The first latent of a unit and its block of query rows."""
    return (
        lax.div(unit, shape.row_blocks) * shape.config.shared,
        lax.rem(unit, shape.row_blocks),
    )


def stripe(shape: Shape, cta) -> Place:
    """The first tile of a CTA's stripe: all that is known before the lengths arrive."""
    unit, first_tile = lax.rem(cta, shape.units), lax.div(cta, shape.units)
    return Place(jnp.int32(0), *of_unit(shape, unit), first_tile)


def part(shape: Shape, cta, place: Place):
    """Which part of the results a CTA's visit makes."""
    if shape.config.stripes:
        return lax.rem(cta, shape.units) * shape.team + lax.div(cta, shape.units)
    return cta + (
        place.batch_row * shape.units
        + lax.div(place.latent, shape.config.shared) * shape.row_blocks
        + place.row_block
    )


class Stripe(NamedTuple):
    """The tiles of a CTA where they are in a stripe: one visit."""

    shape: Shape
    bounds: Bounds
    cta: jax.Array

    def first(self) -> Visit:
        place = stripe(self.shape, self.cta)
        _, _, span = numbering(self.shape, self.bounds)
        team = self.shape.team
        tiles = span(place.batch_row)[1]
        tiles = lax.div(jnp.maximum(tiles - place.tile + team - 1, 0), team)
        # The tile that was asked for unseen has the first turn, whether it is used or not.
        turn = jnp.where((tiles > 0) & (self.bounds.begin(place.batch_row) == 0), 0, 1)
        return Visit(place, tiles, turn, jnp.int32(0))

    def tile(self, visit: Visit, turn):
        """Whether there is a tile of a turn, in the visit or later, and its place."""
        i = turn - visit.turn
        return i < visit.tiles, visit.place._replace(tile=visit.place.tile + i * self.shape.team)


class Share(NamedTuple):
    """The tiles of a CTA where they are neighbours, an equal share of them all.

    Attributes:
      span: of `numbering`.
      begin, end: the CTA's tiles by their numbers.
    """

    shape: Shape
    bounds: Bounds
    cta: jax.Array
    span: Callable
    begin: jax.Array
    end: jax.Array

    @classmethod
    def of(cls, shape: Shape, bounds: Bounds, cta) -> "Share":
        total, share, span = numbering(shape, bounds)
        end = jnp.minimum(cta * share + share, total)
        return cls(shape, bounds, cta, span, cta * share, end)

    def first(self) -> Visit:
        table = self.bounds.table
        row = jnp.int32(0) if table is None else table[2 * self.shape.problem.batch + 1 + self.cta]
        return self._from(row, jnp.int32(0), jnp.int32(0))

    def following(self, visit: Visit) -> Visit:
        """The visit after one; it has no tiles if that was the last."""
        row = visit.place.batch_row
        return self._from(row, visit.turn + visit.tiles, visit.number + 1)

    def tile(self, visit: Visit, turn):
        """Whether there is a tile of a turn, in the visit or later, and its place."""
        i = turn - visit.turn

        def here():
            return jnp.bool_(True), visit.place._replace(tile=visit.place.tile + i)

        def later():
            found = self._from(visit.place.batch_row, turn, visit.number)
            return found.tiles > 0, found.place

        return lax.cond(i < visit.tiles, here, later)

    def _from(self, row, turn, number) -> Visit:
        """The visit from a turn on, in a batch row or a later one."""
        shape, table, tile = self.shape, self.bounds.table, self.begin + turn
        if table is not None:  # Rows without tiles are passed over.
            before = lambda r: (tile < self.end) & (table[r + 1] * shape.units <= tile)
            row = lax.while_loop(before, lambda r: r + 1, row)
        begin, count = self.span(row)
        count = jnp.maximum(count, 1)
        unit, tile_in_unit = lax.div(tile - begin, count), lax.rem(tile - begin, count)
        tiles = jnp.maximum(jnp.minimum(count - tile_in_unit, self.end - tile), 0)
        return Visit(Place(row, *of_unit(shape, unit), tile_in_unit), tiles, turn, number)


def parts_of(shape: Shape, bounds: Bounds, batch_row, unit_in_row):
    """(first, count) of a unit's parts."""
    if shape.config.stripes:
        return unit_in_row * shape.team, jnp.int32(shape.team)
    _, share, span = numbering(shape, bounds)
    begin, count = span(batch_row)
    begin = begin + unit_in_row * count
    cta = lax.div(begin, share)
    parts = jnp.where(count > 0, lax.div(begin + count - 1, share) - cta + 1, 0)
    return cta + batch_row * shape.units + unit_in_row, parts
