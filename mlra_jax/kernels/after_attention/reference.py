"""The same in plain JAX: what the kernel is tested against, and what other devices compute."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def after_attention(
    answer_RK: jax.Array,
    x_DR: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    weights: Sequence[jax.Array],
    *,
    axes: tuple[str, ...],
    factors: tuple[float, float],
    eps: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """As `mosaic_gpu.after_attention`, within `shard_map`, without inboxes; one summand."""
    dtype = x_DR.dtype
    out, widen, narrow, *entry = weights
    multiply = lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32)

    def add(x_RD, part_RD):
        return (x_RD.astype(jnp.float32) + lax.all_gather(part_RD, axes).sum(0)).astype(dtype)

    def normed(x_RD, i):
        wide_RD = x_RD.astype(jnp.float32)
        wide_RD *= lax.rsqrt(jnp.mean(wide_RD**2, axis=-1, keepdims=True) + eps[i])
        return (wide_RD * (scales[i].astype(jnp.float32) * factors[i])).astype(dtype)

    x_RD = add(x_DR.T, multiply(answer_RK, out))
    gate_RF, up_RF = jnp.split(multiply(normed(x_RD, 0), widen).astype(dtype), 2, axis=-1)
    x_RD = add(x_RD, multiply(jax.nn.silu(gate_RF) * up_RF, narrow))
    following = normed(x_RD, 1)
    return x_RD.T, multiply(following, *entry)[None] if entry else following
