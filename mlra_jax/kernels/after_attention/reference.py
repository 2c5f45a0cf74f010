"""The same in plain JAX: what the kernel is tested against, and what other devices compute."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mlra_jax.kernels.exchange.reference import normed


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
    """(the stream, its norm) as of `mosaic_gpu.after_attention`, within `shard_map`."""
    dtype = x_DR.dtype
    out, widen, narrow = weights

    def add(x_RD, part_RD):
        return (x_RD.astype(jnp.float32) + lax.all_gather(part_RD, axes).sum(0)).astype(dtype)

    def normed_by(i, x_RD):
        return normed(x_RD, scales[i], factors[i], eps[i]).astype(dtype)

    x_RD = add(x_DR.T, _multiply(answer_RK, out))
    gate_RF, up_RF = jnp.split(_multiply(normed_by(0, x_RD), widen).astype(dtype), 2, axis=-1)
    x_RD = add(x_RD, _multiply(jax.nn.silu(gate_RF) * up_RF, narrow))
    return x_RD.T, normed_by(1, x_RD)


def enter(
    x_RD: jax.Array, weights: Sequence[jax.Array], attention: Any, heads: tuple[int, int]
) -> tuple[jax.Array, ...]:
    """What follows where an attention does, of its input, within `shard_map`.

    Args:
      weights: of the entry, `[D, E]`, and of the queries, `[Q, H * (K + R)]`.
      attention: as `api.Attention`, one device's part.
      heads: H and K + R.
    """
    entry, query = weights
    latents, k_rope = attention.latents, attention.k_rope
    (_, S, held, C), R, Q = latents.shape, k_rope.shape[-1], len(query)
    (cos, sin), dtype = attention.turns.swapaxes(1, 2), latents.dtype
    (q_scale, kv_scale), (q_factor, kv_factor) = attention.scales, attention.factors

    def turned(x, cos, sin):
        return (x * cos + jnp.roll(x, R // 2, axis=-1) * sin).astype(dtype)

    q_RQ, c_RE, rope_RR = jnp.split(_multiply(x_RD, entry), [Q, entry.shape[1] - R], axis=-1)
    c_RLC, first = c_RE.reshape(len(c_RE), -1, C), attention.first[0]
    if c_RLC.shape[1] > held:
        c_RLC = lax.dynamic_slice_in_dim(c_RLC, first, held, axis=1)
    scale_LC = lax.dynamic_slice_in_dim(kv_scale.reshape(-1, C), first, held)
    c_RLC = normed(c_RLC, scale_LC, kv_factor, attention.eps[1]).astype(dtype)
    # What has no place lies behind the last one, where nothing is written.
    places = jnp.where(attention.places[0] < 0, len(latents) * S, attention.places[0])
    put = lambda to, x: to.reshape(-1, *x.shape[1:]).at[places].set(x, mode="drop")
    latents = put(latents, c_RLC).reshape(latents.shape)
    k_rope = put(k_rope, turned(rope_RR, cos, sin)).reshape(k_rope.shape)
    q_RQ = normed(q_RQ, q_scale, q_factor, attention.eps[0]).astype(dtype)
    q_RHX = _multiply(q_RQ, query).reshape(len(q_RQ), *heads)
    nope_RHK, rope_RHR = jnp.split(q_RHX, [heads[1] - R], axis=-1)
    return nope_RHK.astype(dtype), turned(rope_RHR, cos[:, None], sin[:, None]), latents, k_rope


def _multiply(x, y):
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
