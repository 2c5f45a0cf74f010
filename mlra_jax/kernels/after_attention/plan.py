"""How a layer's launch shares its work and its memory."""

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
from jax import lax

SLAB = 64
"""Features at once: of what is contracted, and of what is exchanged."""
CTAS = 132
"""As many as an H100 or H200 has multiprocessors."""
RING_BYTES = 192 << 10
ROWS_BYTES = 32 << 10
"""Of shared memory for the batch's rows, beside the ring."""
MULTIPLIERS = 2
"""Warpgroups of a CTA that multiply."""
STRIDE = 512
"""Words that a warpgroup empties at a time."""


@dataclasses.dataclass(frozen=True)
class Product:
    """How the CTAs share a product of `contracted` by `columns` weights.

    Attributes:
      tile: columns of a CTA.
      depth: features that are contracted by what is copied at a time.
    """

    contracted: int
    columns: int
    tile: int
    depth: int = SLAB

    @property
    def tiles(self) -> int:
        return self.columns // self.tile

    @property
    def shares(self) -> int:
        return min(self.contracted // self.depth, CTAS // self.tiles)

    @property
    def blocks(self) -> int:
        """Of features, in a copy."""
        return self.depth // SLAB

    @property
    def most(self) -> int:
        """Blocks of features of a share."""
        return -(-(self.contracted // self.depth) // self.shares) * self.blocks

    def unit(self, cta):
        """(tile, share, its first block, how many copies) of a CTA, which may be none."""
        tile, share = lax.rem(cta, self.tiles), lax.div(cta, self.tiles)
        copies = self.contracted // self.depth
        bound = lambda share: lax.div(jnp.minimum(share, self.shares) * copies, self.shares)
        first = bound(share)
        return tile, share, first * self.blocks, bound(share + 1) - first


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes on one device: widths of the answer, of the stream, of the MLP, and of the next
    attention's entry, 0 if the launch has none; rows."""

    answer: int
    stream: int
    mlp: int
    entry: int
    rows: int

    @property
    def tile(self) -> int:
        return 256 if self.stream % 256 == 0 else 128

    @functools.cached_property
    def products(self) -> tuple[Product, ...]:
        sizes = (self.answer, self.stream), (self.stream, 2 * self.mlp), (self.mlp, self.stream)
        products = [Product(*size, self.tile) for size in sizes]
        return (*products, *[Product(self.stream, self.entry, SLAB, self.tile)] * bool(self.entry))

    @property
    def blocks(self) -> int:
        return self.stream // SLAB

    @property
    def slots(self) -> int:
        return RING_BYTES // (SLAB * self.tile * 2)

    @property
    def memory(self) -> int:
        """Bytes of shared memory for the rows."""
        blocks = max(MULTIPLIERS, *(product.most for product in self.products))
        return blocks * self.rows * SLAB * 2

    @functools.cached_property
    def board(self) -> dict[str, tuple[int, ...]]:
        """What CTAs tell each other, words by row of the batch. From `hidden` on the next launch
        empties it."""
        shares = [product.shares for product in self.products]
        return dict(
            parts_out=(shares[0], self.stream),
            parts_widened=(shares[1], 2 * self.mlp),
            parts_narrow=(shares[2], self.stream),
            entered_mlp=(self.stream,),
            squares_mlp=(self.blocks,),
            hidden=(self.mlp,),
            entered_next=(self.stream,),
            squares_next=(self.blocks,),
        )

    def places(self) -> dict[str, int]:
        """Where on the board each begins; `end` is where the last one ends."""
        ends = itertools.accumulate(
            (math.prod(s) * self.rows for s in self.board.values()), initial=0
        )
        return dict(zip((*self.board, "end"), ends, strict=True))

    @property
    def board_size(self) -> int:
        """Words, so many that each warpgroup with a part in the first product empties as many."""
        emptied = self.emptied * self.emptying
        # Squares are read as blocks, whose ends mean nothing.
        return self.places()["hidden"] + emptied + SLAB * self.rows

    @property
    def emptying(self) -> int:
        """Warpgroups that empty when a launch begins: those with a part in the first product."""
        return self.products[0].tiles * self.products[0].shares * MULTIPLIERS

    @property
    def emptied(self) -> int:
        """Words that each of them empties."""
        places = self.places()
        words = places["end"] - places["hidden"]
        return -(-words // (self.emptying * STRIDE)) * STRIDE
