"""How two GPUs that split heads exchange activations in training: by copies, beside products.

An exchange of an activation's gradient waits for the product before it, and the next product waits
for the exchange: only products that make gradients of weights, which nothing waits for, can go on
beside it. XLA's scheduler takes calls of products for next to nothing and puts them anywhere. A
barrier over what was exchanged and the gradient of a weight, whose product needs nothing of it, has
XLA put that product between the exchange's begin and end. There NCCL's kernels hardly ran beside
it; engines that copy do (`benchmarks/NOTES_TRAIN.md`).
"""

import functools
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mlra_jax import sharding
from mlra_jax.layers import Exchanges, Projection, Spread, weigh

Axes = Sequence[str | None]
SUMMANDS = "latent"
"""Logical axis of arrays `[ways, ...]` of which each device that splits heads has one, whole: its
summand of a sum, or its own copy."""


class ByCopies(Exchanges):
    """The exchanges of one module, its gradients' hidden by products of `hidden_by`'s weights.

    Weights must be read after the exchange here that they were given to.
    """

    copied = True

    def __init__(self, mesh: Mesh, hidden_by: nnx.Module):
        weights = (x for _, x in nnx.iter_graph(hidden_by) if isinstance(x, nnx.Param))
        self._mesh, self._left = mesh, [weight for weight in weights if weight.ndim > 1]

    def spread(self, x: jax.Array) -> Spread:
        """For `columns`; all weights that are left hide the sum of its gradients."""
        weights, self._left = self._left, []
        return Spread(x, self._beside(weights, _copies, None, x))

    def columns(self, projection: Projection, x: Spread) -> jax.Array:
        at = _split(projection, range(projection.num_in, projection.kernel.ndim))
        if at is None:
            return projection(x.whole)
        to = x.copies.ndim - 1 - 2 * projection.num_in + at
        y = jnp.moveaxis(self._of_each(projection, x.copies, at), 0, to)
        return y.reshape(*y.shape[:to], -1, *y.shape[to + 2 :])

    def rows(self, projection: Projection, x: jax.Array) -> jax.Array:
        at = _split(projection, range(projection.num_in))
        if at is None:
            return projection(x)
        of_x = x.ndim - projection.num_in + at
        x_W = jnp.moveaxis(self._cut(x, of_x), of_x, 0)
        return _sum(self._mesh, None, self._of_each(projection, x_W, at), [])[0]

    def gathered(self, x: jax.Array, *axes: str | None, hidden: bool = True) -> jax.Array:
        """The copies `[ways, ...]` of an activation that devices split as `axes` say."""
        weights = [self._left.pop()] if hidden else []
        return self._beside(weights, _copies, axes, x)

    def scattered(self, x_W: jax.Array, *axes: str | None) -> jax.Array:
        """The sum of devices' summands `[ways, ...]`, split as `axes` say."""
        return self._beside([self._left.pop()], _sum, axes, x_W)

    def _beside(self, weights, exchange, axes, x):
        x, arrays = exchange(self._mesh, axes, x, [weight[...] for weight in weights])
        for weight, array in zip(weights, arrays, strict=True):
            weight[...] = array
        return x

    def _of_each(self, projection, x_W, at):
        """`[ways, ...]`: each device's projection, by its part of the kernel's dimension `at`."""
        kernel, letters = self._cut(projection.kernel[...], at), string.ascii_lowercase
        rows = x_W.ndim - 1 - projection.num_in
        of_rows, of_kernel = letters[:rows], letters[rows : rows + kernel.ndim - 1]
        inner, outer = of_kernel[: projection.num_in], of_kernel[projection.num_in :]
        kernel_W = f"{of_kernel[:at]}w{of_kernel[at:]}"
        return weigh(x_W, kernel, f"w{of_rows}{inner},{kernel_W}->w{of_rows}{outer}")

    def _cut(self, x, at):
        ways = sharding.size(self._mesh, sharding.MODEL)
        return x.reshape(*x.shape[:at], ways, -1, *x.shape[at + 1 :])


def _split(projection: Projection, dims: range) -> int | None:
    """Which of these dimensions of the kernel devices that split heads have parts of."""
    axes = projection.kernel.get_metadata()["out_sharding"][-projection.kernel.ndim :]
    at = sharding.split_dimension(axes, sharding.MODEL)
    return at if at in dims else None


def copied_to_all(x: jax.Array, mesh: Mesh, axes: Axes | None) -> jax.Array:
    """`[ways, ...]`, a copy for each device of what is whole on all, or split as `axes` say."""
    ways = sharding.size(mesh, sharding.MODEL)
    if axes is None:
        return sharding.constrain(jnp.broadcast_to(x, (ways, *x.shape)), mesh, SUMMANDS)
    at = sharding.split_dimension(axes, sharding.MODEL)

    def local(part):
        sent = jnp.broadcast_to(part, (ways, *part.shape))
        received = jnp.moveaxis(jax.lax.all_to_all(sent, sharding.TENSOR, 0, 0), 0, at)
        return received.reshape(1, *received.shape[:at], -1, *received.shape[at + 2 :])

    return _on_each(mesh, local, sharding.spec(*axes), sharding.spec(SUMMANDS))(x)


def summed_by_copies(
    x_W: jax.Array, mesh: Mesh, axes: Axes | None, meanwhile: Sequence[jax.Array] = ()
) -> tuple[jax.Array, Sequence[jax.Array]]:
    """(the sum of two devices' `SUMMANDS`, whole on both or split as `axes` say; `meanwhile`).

    What is computed `meanwhile` is so before anything that needs the sum.
    """
    own, ways = sharding.spec(SUMMANDS), sharding.size(mesh, sharding.MODEL)
    if axes is None:
        send = lambda x_1: jax.lax.ppermute(x_1, sharding.TENSOR, [(0, 1), (1, 0)])
        received = _on_each(mesh, send, own, own)(x_W)
    else:
        at = sharding.split_dimension(axes, sharding.MODEL)

        def send(x_1):
            x = x_1.reshape(*x_1.shape[1 : at + 1], ways, -1, *x_1.shape[at + 2 :])
            return jax.lax.all_to_all(jnp.moveaxis(x, at, 0), sharding.TENSOR, 0, 0)

        received = _on_each(mesh, send, own, sharding.spec(None, *axes))(x_W)
    if meanwhile:
        received, meanwhile = jax.lax.optimization_barrier((received, list(meanwhile)))
    if axes is not None:
        return sharding.constrain(received.sum(0), mesh, *axes), meanwhile
    add = lambda own_1, other_1: (own_1 + other_1)[0]
    return _on_each(mesh, add, (own, own), PartitionSpec())(x_W, received), meanwhile


def _on_each(mesh, function, in_specs, out_specs):
    how = dict(mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.shard_map(function, **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _copies(mesh: Mesh, axes: Axes | None, x: jax.Array, beside: Sequence[jax.Array]):
    """(`copied_to_all`, `beside`); see `_sum`."""
    copies = jnp.broadcast_to(x, (sharding.size(mesh, sharding.MODEL), *x.shape))
    return sharding.constrain(copies, mesh, SUMMANDS), beside


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(mesh: Mesh, axes: Axes | None, x_W: jax.Array, beside: Sequence[jax.Array]):
    """(`summed_by_copies`, `beside`), of which the gradients are each the other's.

    What makes the gradients of `beside` goes on beside the exchange. What has a gradient is part of
    a training step, whose options make copies of engines; elsewhere XLA exchanges.
    """
    return sharding.constrain(x_W.sum(0), mesh, *(axes or ())), beside


def _copies_of_slope(mesh, axes, _, slopes):
    copies = copied_to_all(slopes[0], mesh, axes)
    return jax.lax.optimization_barrier((copies, slopes[1])) if slopes[1] else (copies, [])


_copies.defvjp(
    lambda mesh, axes, x, beside: ((copied_to_all(x, mesh, axes), beside), None),
    lambda mesh, axes, _, slopes: summed_by_copies(slopes[0], mesh, axes, slopes[1]),
)
_sum.defvjp(
    lambda mesh, axes, x_W, beside: ((summed_by_copies(x_W, mesh, axes)[0], beside), None),
    _copies_of_slope,
)
