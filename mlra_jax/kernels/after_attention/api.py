"""A layer of a decoding step from its attention's answer to what the next one asks its cache."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mlra_jax.kernels import target
from mlra_jax.kernels.absorbed_decode.mosaic_gpu import Parts
from mlra_jax.kernels.after_attention import mosaic_gpu, plan, reference
from mlra_jax.kernels.after_attention.plan import SLAB, Shape
from mlra_jax.kernels.exchange import Exchange
from mlra_jax.kernels.exchange.mosaic_gpu import INBOXES
from mlra_jax.kernels.words import EMPTY

# What was measured. With more rows CTAs tell each other more; larger weights XLA's products read at
# nearly the pace of memory, one after the other.
_MOST_ROWS = 8
_MOST_BYTES = 128 << 20


def supports(device: Any, shape: Shape, dtypes: Sequence[Any]) -> str | None:
    """None if an `AfterAttention` serves these sizes and dtypes, otherwise why not, in one phrase.

    That there is an `Exchange` is supposed.
    """
    if getattr(device, "core_count", plan.CTAS) < plan.CTAS:
        # All CTAs wait for each other, so that all must run.
        return f"the device has less than {plan.CTAS} multiprocessors"
    if {jnp.dtype(dtype) for dtype in dtypes} != {jnp.dtype("bfloat16")}:
        return "not all is bfloat16"
    if shape.rows % 8 or shape.rows > _MOST_ROWS:
        return f"{shape.rows} rows are no multiple of 8 up to {_MOST_ROWS}"
    for name, width, step in [
        ("answer", shape.answer, SLAB),
        ("stream", shape.stream, 2 * SLAB),
        ("MLP", shape.mlp, 2 * SLAB),
    ]:
        if width % step:
            return f"the width of the {name} on a device, {width}, is no multiple of {step}"
    if any(product.tiles > plan.CTAS for product in shape.products):
        return "a product is wider than all multiprocessors take at once"
    most = plan.CTAS * plan.MULTIPLIERS
    if max(shape.stream, shape.mlp) // SLAB > most:
        return f"the stream or the MLP is wider than {most * SLAB}"
    if (size := sum(2 * p.contracted * p.columns for p in shape.products)) > _MOST_BYTES:
        return f"a layer's weights, {size >> 20} MiB on a device, are more than {_MOST_BYTES >> 20}"
    if shape.memory > plan.ROWS_BYTES:
        return f"{shape.rows} rows do not fit shared memory"
    return None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["entry", "query", "scales", "turns", "places", "first", "latents", "k_rope"],
    meta_fields=["factors", "eps", "of_query", "of_latents", "of_k_rope"],
)
@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention that follows, of latents.

    Attributes:
      entry, query: weights of what it makes of its input, `[D, E]`, each device's columns side by
        side, and of its queries, `[Q, H, K + R]`.
      scales: of the norms of the query's latent and of all latents; `factors` multiply them.
      turns: float32 `[2, R, rows]`, cosines and sines of the rows' positions, for a rotary vector
        and for it with its halves exchanged.
      places: int32 `[N, rows]`, for each device the number of a row's slot in its cache, less than
        0 where it keeps nothing.
      first: int32 `[N]`, the first latent of each device's cache.
      latents, k_rope: the cache, `[B, S, L, C]` and `[B, S, R]`.
      of_query, of_latents, of_k_rope: how they are split.
    """

    entry: jax.Array
    query: jax.Array
    scales: tuple[jax.Array, jax.Array]
    turns: jax.Array
    places: jax.Array
    first: jax.Array
    latents: jax.Array
    k_rope: jax.Array
    factors: tuple[float, float]
    eps: tuple[float, float]
    of_query: PartitionSpec
    of_latents: PartitionSpec
    of_k_rope: PartitionSpec

    def specs(self, own: PartitionSpec) -> "Attention":
        """How its arrays are split, where `own` says that each device has one of its own."""
        whole = PartitionSpec()
        return dataclasses.replace(
            self,
            entry=PartitionSpec(None, *own),
            query=self.of_query,
            scales=(whole, whole),
            turns=whole,
            places=own,
            first=own,
            latents=self.of_latents,
            k_rope=self.of_k_rope,
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["out", "widen", "narrow", "scales"],
    meta_fields=["factors", "eps", "of_answer", "of_weights"],
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer has behind its attention.

    Attributes:
      out, widen, narrow: weights of the output projection `[..., D]` and of the MLP, `[D, 2, F]`
        and `[F, D]`.
      scales: of the MLP's norm and of the next one; `factors` multiply them, `eps` are the norms'.
      of_answer, of_weights: how the answer, if it is not in parts, and the weights are split.
    """

    out: jax.Array
    widen: jax.Array
    narrow: jax.Array
    scales: tuple[jax.Array, jax.Array]
    factors: tuple[float, float]
    eps: tuple[float, float]
    of_answer: PartitionSpec
    of_weights: tuple[PartitionSpec, ...]

    def specs(self) -> "Layer":
        """How its arrays are split."""
        whole, (out, widen, narrow) = PartitionSpec(), self.of_weights
        changes = dict(out=out, widen=widen, narrow=narrow, scales=(whole, whole))
        return dataclasses.replace(self, **changes)


class AfterAttention:
    """The layers of one decoding step, made while it is traced and called once for each.

    It exchanges by `exchange`, whose first exchange of the step is another's. All layers have
    `shape`, but that no attention follows the last.
    """

    def __init__(self, exchange: Exchange, shape: Shape):
        self.exchange, self.shape, self.board = exchange, shape, None
        if exchange.inbox is not None:
            there = jax.NamedSharding(exchange.mesh, PartitionSpec(exchange.axes))
            board = jnp.full((exchange.mesh.size, shape.board_size), EMPTY, jnp.int32)
            self.board = jax.lax.with_sharding_constraint(board, there)

    def __call__(
        self, answer: jax.Array, x_DR: jax.Array, layer: Layer, attention: Attention | None
    ) -> tuple[jax.Array, Any]:
        """The stream after the layer, and what follows.

        Args:
          answer: `[B, T, ...]`, what the output projection reads, or each device's `Parts` of it.
          x_DR: the stream before, on every device, features first.

        Returns:
          (the stream; its norm `[R, D]`, or of the next attention its queries but for their rotary
          parts `[R, H, K]`, these `[R, H, R]`, and its cache with the latents and rotary keys).
        """
        exchange = self.exchange
        how = dict(mesh=exchange.mesh, axes=exchange.axes)
        if self.board is None:
            return _in_plain(answer, x_DR, layer, attention, **how)
        turn = np.array([exchange.turn % INBOXES], np.int32)
        x_DR, following, exchange.inbox, self.board = _by_kernel(
            answer,
            x_DR,
            layer,
            attention,
            exchange.inbox,
            exchange.far,
            self.board,
            turn,
            shape=self.shape,
            **how,
        )
        exchange.turn += 2
        return x_DR, following


def _split(answer, layer, attention, axes):
    """How (answer, stream, layer, attention) and (stream, what follows) are split."""
    whole, own = PartitionSpec(), PartitionSpec(axes)
    of_answer = own if isinstance(answer, Parts) else layer.of_answer
    if attention is None:
        return (of_answer, whole, layer.specs(), None), (whole, whole)
    _, heads, columns = (*attention.of_query, None, None)[:3]
    queries = PartitionSpec(None, heads, columns)
    following = queries, queries, attention.of_latents, attention.of_k_rope
    specs = of_answer, whole, layer.specs(), attention.specs(own)
    return specs, (whole, following)


def _matrices(answer, x_DR, layer, attention):
    """The answer, if it is not in parts, and the weights as matrices."""
    D, R = x_DR.shape
    weights = [layer.out.reshape(-1, D), layer.widen.reshape(D, -1), layer.narrow]
    if attention is not None:
        weights += [attention.entry, attention.query.reshape(len(attention.query), -1)]
    if isinstance(answer, Parts):
        return jax.tree.map(lambda x: x[0], answer), weights
    return answer.reshape(R, -1), weights


def _in_plain(answer, x_DR, layer, attention, *, mesh, axes):
    def local(answer, x_DR, layer, attention):
        answer_RK, weights = _matrices(answer, x_DR, layer, attention)
        how = dict(axes=axes, factors=layer.factors, eps=layer.eps)
        x_DR, normed_RD = reference.after_attention(
            answer_RK, x_DR, layer.scales, weights[:3], **how
        )
        if attention is None:
            return x_DR, normed_RD
        heads = attention.query.shape[1:]
        return x_DR, reference.enter(normed_RD, weights[3:], attention, heads)

    split, follows = _split(answer, layer, attention, axes)
    return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=follows, check_vma=False)(
        answer, x_DR, layer, attention
    )


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames=("mesh", "axes", "shape"))
@target.int32_indices
def _by_kernel(answer, x_DR, layer, attention, inbox, far, board, turn, *, mesh, axes, shape):
    def local(answer, x_DR, layer, attention, inbox_1, far_1, board_1, turn):
        answer, weights = _matrices(answer, x_DR, layer, attention)
        factors, eps, entering, cache = layer.factors, layer.eps, (), ()
        if attention is not None:
            a = attention
            factors, eps = (*factors, *a.factors), (*eps, *a.eps)
            entering, cache = (*a.scales, a.turns, a.places[0], a.first), (a.latents, a.k_rope)
        ours = inbox_1[0], far_1[0], board_1[0], turn
        arrays = answer, x_DR, layer.scales, weights, *ours, entering, cache
        how = dict(factors=factors, eps=eps, shape=shape)
        x_DR, following, inbox, board = mosaic_gpu.after_attention(*arrays, **how)
        if attention is None:
            (following,) = following
        else:
            queries = (x.reshape(len(x), shape.heads, -1) for x in following[:2])
            following = *queries, *following[2:]
        return x_DR, following, inbox[None], board[None]

    whole, own = PartitionSpec(), PartitionSpec(axes)
    split, follows = _split(answer, layer, attention, axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*split, own, own, own, whole),
        out_specs=(*follows, own, own),
        check_vma=False,
    )(answer, x_DR, layer, attention, inbox, far, board, turn)
