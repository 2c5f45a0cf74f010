"""A layer of a decoding step from its attention's answer to the next attention's entry."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mlra_jax.kernels import target
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
        ("entry", shape.entry, SLAB),
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


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer has behind its attention, and its successor in front of it.

    Attributes:
      out, widen, narrow: weights of the output projection `[..., D]` and of the MLP, `[D, 2, F]`
        and `[F, D]`.
      entry: weights of the next attention, `[D, E]`, or None.
      scales: of the MLP's norm and of the next one; `factors` multiply them, `eps` are the norms'.
      of_answer, of_weights: how the answer and the four weights are split.
    """

    out: jax.Array
    widen: jax.Array
    narrow: jax.Array
    entry: jax.Array | None
    scales: tuple[jax.Array, jax.Array]
    factors: tuple[float, float]
    eps: tuple[float, float]
    of_answer: PartitionSpec
    of_weights: tuple[PartitionSpec, ...]


class AfterAttention:
    """The layers of one decoding step, made while it is traced and called once for each.

    It exchanges by `exchange`, whose first exchange of the step is another's. All layers have
    `shape`, but that the last has no entry.
    """

    def __init__(self, exchange: Exchange, shape: Shape):
        self.exchange, self.shape, self.board = exchange, shape, None
        if exchange.inbox is not None:
            there = jax.NamedSharding(exchange.mesh, PartitionSpec(exchange.axes))
            board = jnp.full((exchange.mesh.size, shape.board_size), EMPTY, jnp.int32)
            self.board = jax.lax.with_sharding_constraint(board, there)

    def __call__(
        self, answer: jax.Array, x_DR: jax.Array, layer: Layer
    ) -> tuple[jax.Array, jax.Array]:
        """The stream after the layer, and what follows.

        Args:
          answer: `[B, T, ...]`, what the output projection reads.
          x_DR: the stream before, on every device, features first.

        Returns:
          (the stream; its norm `[R, D]`, or with an entry float32 `[N, R, E]` of each device, which
          add up to the product of that and the entry's weights).
        """
        exchange = self.exchange
        weights = [layer.out, layer.widen, layer.narrow]
        weights += [] if layer.entry is None else [layer.entry]
        split = layer.of_answer, layer.of_weights[: len(weights)]
        how = dict(mesh=exchange.mesh, axes=exchange.axes, factors=layer.factors, eps=layer.eps)
        arrays = answer, x_DR, layer.scales, weights
        if self.board is None:
            return _in_plain(*arrays, split=split, **how)
        turn = np.array([exchange.turn % INBOXES], np.int32)
        x_DR, following, exchange.inbox, self.board = _by_kernel(
            *arrays, exchange.inbox, self.board, turn, split=split, shape=self.shape, **how
        )
        exchange.turn += 2
        return x_DR, following


def _flat(answer, x_DR, weights):
    """The answer and the weights as matrices."""
    D, R = x_DR.shape
    out, widen, *rest = weights
    return answer.reshape(R, -1), [out.reshape(-1, D), widen.reshape(D, -1), *rest]


def _in_plain(answer, x_DR, scales, weights, *, split, mesh, axes, **how):
    def local(answer, x_DR, scales, weights):
        answer_RK, weights = _flat(answer, x_DR, weights)
        return reference.after_attention(answer_RK, x_DR, scales, weights, axes=axes, **how)

    whole, own = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split[0], whole, whole, list(split[1])),
        out_specs=(whole, own if len(weights) > 3 else whole),
        check_vma=False,
    )(answer, x_DR, scales, weights)


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames=("split", "mesh", "axes", "factors", "eps", "shape"))
@target.int32_indices
def _by_kernel(answer, x_DR, scales, weights, inbox, board, turn, *, split, mesh, axes, **how):
    def local(answer, x_DR, scales, weights, inbox_1, board_1, turn):
        answer_RK, weights = _flat(answer, x_DR, weights)
        inbox = inbox_1[0].reshape(*inbox_1.shape[1:3], -1)
        arrays = answer_RK, x_DR, scales, weights, inbox, board_1[0], turn
        x_DR, following, inbox, board = mosaic_gpu.after_attention(
            *arrays, mesh=mesh, axes=axes, **how
        )
        return x_DR, following, inbox.reshape(inbox_1.shape), board[None]

    whole, own = PartitionSpec(), PartitionSpec(axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split[0], whole, whole, list(split[1]), own, own, whole),
        out_specs=(whole, own if len(weights) > 3 else whole, own, own),
        check_vma=False,
    )(answer, x_DR, scales, weights, inbox, board, turn)
