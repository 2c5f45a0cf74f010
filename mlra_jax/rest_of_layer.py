"""What a decoding step does of a layer behind its attention, by the launches that serve."""

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention import sharded
from mlra_jax.attention.base import Asked, Entries
from mlra_jax.kernels import after_attention, between_products, exchange
from mlra_jax.layers import RMSNorm, SummedProjection, angles


class Additions:
    """`add(x, y, norm)` of one decoding step: `x + y` and its norm, both `[B, T, D]`.

    `x` is the stream, at first None, and `y` a result of `summed`, an embedding or projections. On
    one device, and where `kernels.exchange` serves, these results stay in parts from now on
    (`apart`), and one kernel does all at once.

    Attributes:
      exchange: of the step, or None.
    """

    def __init__(
        self,
        mesh: Mesh,
        stream: jax.ShapeDtypeStruct,
        summed: Iterable[nnx.Module],
        vocabulary: int,
    ):
        self.mesh, self.stream, self.exchange = mesh, stream, None
        B, T, D = stream.shape
        if mesh.size == 1:
            for module in summed:
                module.apart = isinstance(module, SummedProjection)
        elif exchange.supports(mesh, sharding.MODEL, B * T, D) is None:
            for module in summed:
                module.apart = True
            self.exchange = exchange.Exchange(mesh, sharding.MODEL, B * T, D, vocabulary)

    def __call__(self, x_BTD, y, norm: RMSNorm) -> tuple[jax.Array, jax.Array]:
        if self.exchange is not None:
            return self._exchanged(x_BTD, y, norm)
        if self.mesh.size == 1 and x_BTD is not None:
            if len(y) > 1:
                return norm.of_sum(x_BTD, y)
            [y] = y
        x_BTD = y if x_BTD is None else x_BTD + y
        x_BTD = sharding.constrain(x_BTD, self.mesh, "batch", "length", None)
        return x_BTD, norm(x_BTD)

    def whole(self, logits_BTV: jax.Array) -> jax.Array:
        """The step's logits on every device, where a kernel brings them there."""
        if self.exchange is None:
            return logits_BTV
        rows_RV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
        return self.exchange.gather(rows_RV).reshape(logits_BTV.shape)

    def _exchanged(self, x_BTD, y_NBTD, norm):
        B, T, D = self.stream.shape
        x_BTD = jnp.zeros((B, T, D), self.stream.dtype) if x_BTD is None else x_BTD
        summands_NRD, x_RD = y_NBTD.reshape(-1, B * T, D), x_BTD.reshape(B * T, D)
        how = dict(factor=norm.factor, eps=norm.eps, dtype=norm.dtype)
        both = self.exchange(summands_NRD, x_RD, norm.scale[...], **how)
        return tuple(x.reshape(B, T, D) for x in both)


def rest_of_layers(
    add: Additions,
    blocks: Sequence[nnx.Module],
    caches: Sequence[Entries],
    lengths_B: jax.Array,
    positions_BT: jax.Array,
) -> "Apart | AtOnce":
    """How the step of `add` does it for these blocks, which all have the sizes of the first, and
    their caches, whose rows fill so many slots.

    Called with a block's number, the stream, what its attention's `decode` returns, and the norm
    that follows, it returns the stream behind the block and what the next attention's `decode`
    takes, in the end the norm. The stream is as `stream` makes it of `[B, T, D]`.
    """
    if add.exchange is None:
        return Apart(add, blocks)
    shape = _shape(add, blocks[0], caches[0])
    weights = [blocks[0].attention.out, blocks[0].mlp.gate_up, blocks[0].mlp.down]
    dtypes = [add.stream.dtype, *(module.kernel[...].dtype for module in weights)]
    if after_attention.supports(add.mesh.devices.flat[0], shape, dtypes) is not None:
        return Apart(add, blocks)
    return AtOnce(add, blocks, caches, lengths_B, positions_BT, shape)


class Apart:
    """Product by product."""

    def __init__(self, add: Additions, blocks: Sequence[nnx.Module]):
        self.add, self.blocks = add, blocks

    def stream(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD

    def __call__(self, i: int, x_BTD, y, next_norm: RMSNorm):
        block = self.blocks[i]
        x_BTD, normed_BTD = self.add(x_BTD, y, block.mlp_norm)
        return self.add(x_BTD, block.mlp(normed_BTD), next_norm)


class AtOnce:
    """In one launch; attentions leave their output projection to it (`SummedProjection.later`)."""

    def __init__(
        self,
        add: Additions,
        blocks: Sequence[nnx.Module],
        caches: Sequence[Entries],
        lengths_B: jax.Array,
        positions_BT: jax.Array,
        shape: after_attention.Shape,
    ):
        self.add, self.blocks, self.caches = add, blocks, caches
        self.launch = after_attention.AfterAttention(add.exchange, shape)
        for block in blocks:
            block.attention.out.later = True
            block.attention.in_parts = shape.in_parts
        self.common = None
        if shape.entry:
            first = blocks[0].attention
            turned = angles(positions_BT, shape.rope, first.rope_base)
            turns = between_products.turning(turned).swapaxes(1, 2)
            places, first_latent = sharded.places(
                lengths_B, *positions_BT.shape, first.kv_norm.blocks, caches[0], **first.of_cache
            )
            self.common = dict(turns=turns, places=places, first=first_latent)

    def stream(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD.reshape(-1, x_BTD.shape[-1]).T

    def __call__(self, i: int, x_DR, answer, next_norm: RMSNorm):
        block, (B, T, D) = self.blocks[i], self.add.stream.shape
        out, widen, narrow = block.attention.out, block.mlp.gate_up, block.mlp.down
        norms = block.mlp_norm, next_norm
        layer = after_attention.Layer(
            *(module.kernel[...] for module in (out, widen, narrow)),
            **_of_norms(norms),
            of_answer=sharding.spec("batch", "length", *out.axes),
            of_weights=(
                sharding.spec(*out.axes),
                sharding.spec(None, None, "mlp"),
                sharding.spec("mlp"),
            ),
        )
        if self.common is None or i + 1 == len(self.blocks):
            x_DR, normed_RD = self.launch(answer, x_DR, layer, None)
            return x_DR, normed_RD.reshape(B, T, D)
        x_DR, following = self.launch(answer, x_DR, layer, self._attention(i + 1))
        *queries, latents, k_rope = following
        # So shaped, XLA finds that they are taken apart again.
        q_BTHX = jnp.concatenate([x.reshape(B, T, *x.shape[1:]) for x in queries], axis=-1)
        return x_DR, Asked(q_BTHX, dict(latents=latents, k_rope=k_rope))

    def _attention(self, i: int) -> after_attention.Attention:
        attention, cache = self.blocks[i].attention, self.caches[i]
        query, axes = attention.q_up.kernel, attention.cache_axes
        return after_attention.Attention(
            entry=attention.joined.kernel[...],
            query=query[...],
            **_of_norms((attention.q_norm, attention.kv_norm)),
            **self.common,
            **cache,
            of_query=sharding.spec(*query.get_metadata()["out_sharding"]),
            of_latents=sharding.spec(*axes["latents"]),
            of_k_rope=sharding.spec(*axes["k_rope"]),
        )


def _of_norms(norms: tuple[RMSNorm, RMSNorm]) -> dict:
    return dict(
        scales=tuple(norm.scale[...] for norm in norms),
        factors=tuple(norm.factor for norm in norms),
        eps=tuple(norm.eps for norm in norms),
    )


def _shape(add: Additions, block: nnx.Module, cache: Entries) -> after_attention.Shape:
    """Of the launch, with the next attention where it serves that."""
    (B, T, D), mesh = add.stream.shape, add.mesh
    ways = sharding.size(mesh, sharding.MODEL)
    out, down = block.attention.out, block.mlp.down
    *answer, _ = sharding.named(mesh, *out.axes).shard_shape(out.kernel[...].shape)
    sizes = math.prod(answer), D, down.kernel[...].shape[0] // ways, B * T
    in_parts = T == 1 and block.attention.leaves_parts(cache)
    if (widths := block.attention.entry_widths()) is not None:
        shape = after_attention.Shape(*sizes, **widths, in_parts=in_parts)
        if shape.enters:
            return shape
    return after_attention.Shape(*sizes, in_parts=in_parts)
