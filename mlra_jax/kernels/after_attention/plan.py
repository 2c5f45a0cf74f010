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
ROWS_BYTES = 24 << 10
"""Of shared memory for the batch's rows, beside the ring and what warpgroups reduce through."""
MULTIPLIERS = 2
"""Warpgroups of a CTA that multiply."""
STRIDE = 512
"""Words that a warpgroup empties at a time."""
_WIDEST_LATENT = 128
"""One warpgroup takes a latent, one block after the other. With wider ones it was slower."""


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
    """Sizes on one device: widths of the answer, of the stream and of the MLP; rows; and of the
    next attention, 0 if the launch ends in front of it, widths of what it makes of its input
    (`entry`), of its query's latent, of a latent, of its rotary key, of a query beside that, and of
    all its queries. `in_parts` where the attention before leaves its answer in parts."""

    answer: int
    stream: int
    mlp: int
    rows: int
    entry: int = 0
    query: int = 0
    latent: int = 0
    rope: int = 0
    nope: int = 0
    asked: int = 0
    in_parts: bool = False

    @property
    def tile(self) -> int:
        return 256 if self.stream % 256 == 0 else 128

    @functools.cached_property
    def products(self) -> tuple[Product, ...]:
        sizes = (self.answer, self.stream), (self.stream, 2 * self.mlp), (self.mlp, self.stream)
        products = [Product(*size, self.tile) for size in sizes]
        if self.entry:
            products += [
                Product(self.stream, self.entry, SLAB, self.tile),
                Product(self.query, self.asked, self.tile),
            ]
        return tuple(products)

    @property
    def heads(self) -> int:
        """Of the next attention's queries."""
        return self.asked // (self.nope + self.rope)

    @property
    def latents(self) -> int:
        """In the entry."""
        return (self.entry - self.query - self.rope) // self.latent

    @property
    def enters(self) -> bool:
        """Whether a launch serves these widths of the next attention."""
        slabs = self.entry, self.query, self.latent, self.nope
        most = CTAS * MULTIPLIERS
        return (
            self.entry > 0
            and self.rope == SLAB
            and not any(width % SLAB for width in slabs)
            and self.latent <= _WIDEST_LATENT
            and (self.entry - self.query - self.rope) % self.latent == 0
            and self.asked % self.tile == 0
            and all(product.tiles <= CTAS for product in self.products)
            and max(self.entering, self.asked // SLAB) <= most
        )

    @property
    def entering(self) -> int:
        """Warpgroups that enter: one for each block of the query's latent, for each latent, and for
        the rotary key."""
        return self.query // SLAB + self.latents + 1

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
        names = "out", "widened", "narrow", "entered", "asked"
        parts = {
            f"parts_{name}": (product.shares, product.columns)
            for name, product in zip(names, self.products, strict=False)
        }
        board = parts | dict(
            entered_mlp=(self.stream,),
            squares_mlp=(self.blocks,),
            **(dict(answer=(self.answer,)) if self.in_parts else {}),
            hidden=(self.mlp,),
            entered_next=(self.stream,),
            squares_next=(self.blocks,),
        )
        if self.entry:
            board |= dict(entered_query=(self.query,), squares_query=(self.query // SLAB,))
        return board

    def places(self) -> dict[str, int]:
        """Where on the board each begins; `end` is where the last one ends."""
        ends = itertools.accumulate(
            (math.prod(s) * self.rows for s in self.board.values()), initial=0
        )
        return dict(zip((*self.board, "end"), ends, strict=True))

    @property
    def board_size(self) -> int:
        """Words, so many that each CTA with a part in the first product empties as many."""
        emptied = self.emptied * self.emptying
        # Squares are read as blocks, whose ends mean nothing.
        return self.places()["hidden"] + emptied + SLAB * self.rows

    @property
    def emptying(self) -> int:
        """CTAs that empty when a launch begins: those with a part in the first product."""
        return self.products[0].tiles * self.products[0].shares

    @property
    def emptied(self) -> int:
        """Words that each of them empties."""
        places = self.places()
        words = places["end"] - places["hidden"]
        return -(-words // (self.emptying * STRIDE)) * STRIDE
