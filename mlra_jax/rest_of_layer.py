"""What a decoding step does of a layer behind its attention, by the launches that serve."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from mlra_jax import sharding
from mlra_jax.kernels import after_attention
from mlra_jax.layers import Additions, Entered, RMSNorm


def rest_of_layers(
    add: Additions, blocks: Sequence[nnx.Module], caches: Sequence[dict[str, jax.Array]]
) -> "Apart | AtOnce":
    """How the step of `add` does it for these blocks, of which all have the same sizes.

    Called with a block's number, the stream, what its attention's `decode` returns, and the norm
    that follows, it returns the stream behind the block and what the next attention's `decode`
    takes, in the end the norm. The stream is as `stream` makes it of `[B, T, D]`.
    """
    if add.exchange is None:
        return Apart(add, blocks)
    shape, reads = _shape(add, blocks[0], caches[0])
    weights = [blocks[0].attention.out, blocks[0].mlp.gate_up, blocks[0].mlp.down]
    dtypes = [add.stream.dtype, *(module.kernel[...].dtype for module in weights)]
    if after_attention.supports(add.mesh.devices.flat[0], shape, dtypes) is not None:
        return Apart(add, blocks)
    return AtOnce(add, blocks, shape, reads)


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
        shape: after_attention.Shape,
        reads: bool,
    ):
        self.add, self.blocks, self.reads = add, blocks, reads
        self.launch = after_attention.AfterAttention(add.exchange, shape)
        for block in blocks:
            block.attention.out.later = True

    def stream(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD.reshape(-1, x_BTD.shape[-1]).T

    def __call__(self, i: int, x_DR, answer, next_norm: RMSNorm):
        block, (B, T, D) = self.blocks[i], self.add.stream.shape
        entry = None
        if self.reads and i + 1 < len(self.blocks):
            entry = self.blocks[i + 1].attention.joined.kernel
        out, widen, narrow = block.attention.out, block.mlp.gate_up, block.mlp.down
        norms = block.mlp_norm, next_norm
        layer = after_attention.Layer(
            *(module.kernel[...] for module in (out, widen, narrow)),
            entry=None if entry is None else entry[...],
            scales=tuple(norm.scale[...] for norm in norms),
            factors=tuple(norm.factor for norm in norms),
            eps=tuple(norm.eps for norm in norms),
            of_answer=sharding.spec("batch", "length", *out.axes),
            of_weights=(
                sharding.spec(*out.axes),
                sharding.spec(None, None, "mlp"),
                sharding.spec("mlp"),
                sharding.spec(None, "latent"),
            ),
        )
        x_DR, following = self.launch(answer, x_DR, layer)
        if entry is None:
            return x_DR, following.reshape(B, T, D)
        return x_DR, Entered(following.reshape(-1, B, T, following.shape[-1]))


def _shape(add: Additions, block: nnx.Module, cache):
    """(the sizes of the launch, whether it makes the products that the next attention reads)."""
    (B, T, D), mesh = add.stream.shape, add.mesh
    ways = sharding.size(mesh, sharding.MODEL)
    out, down = block.attention.out, block.mlp.down
    where = jax.NamedSharding(mesh, sharding.spec(*out.axes))
    *answer, _ = where.shard_shape(out.kernel[...].shape)
    sizes = math.prod(answer), D, down.kernel[...].shape[0] // ways
    joined = getattr(block.attention, "joined", None)
    if joined is not None:
        width = joined.kernel[...].shape[1] // ways
        shape = after_attention.Shape(*sizes, width, B * T)
        fits = width % after_attention.SLAB == 0
        if fits and block.attention.takes_summands(cache, shape.products[3].shares):
            return shape, True
    return after_attention.Shape(*sizes, 0, B * T), False
