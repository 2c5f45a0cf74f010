"""Causal attention in plain JAX, one block of queries at a time."""

import jax
import jax.numpy as jnp

from mlra_jax.kernels.softmax import precision


def causal_attention(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJV: jax.Array, *, scale: float, block: int = 512
) -> jax.Array:
    """softmax(scale q kᵀ) v with query `t` seeing keys `0 ... t`; float32 softmax.

    Memory is that of one block of queries' scores, in the backward pass too.
    """
    B, T, H, _ = q_BTHK.shape
    J = k_BTJK.shape[2]
    block = min(block, T)
    num_blocks = -(-T // block)
    padding = num_blocks * block - T
    q_BTJGK = jnp.pad(q_BTHK, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(
        B, num_blocks, block, J, H // J, -1
    )
    highest = precision(q_BTHK.dtype)

    @jax.checkpoint
    def attend(index, q_BtJGK):
        scores = jnp.einsum(
            "btjgk,bsjk->bjgts",
            q_BtJGK,
            k_BTJK,
            precision=highest,
            preferred_element_type=jnp.float32,
        )
        visible = jnp.arange(T) <= (index * block + jnp.arange(block))[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores * scale, -jnp.inf), axis=-1)
        return jnp.einsum(
            "bjgts,bsjv->btjgv", weights.astype(v_BTJV.dtype), v_BTJV, precision=highest
        )

    if num_blocks == 1:
        out = attend(0, q_BTJGK[:, 0])
    else:
        blocks = jnp.moveaxis(q_BTJGK, 1, 0)
        out = jax.lax.map(lambda xs: attend(*xs), (jnp.arange(num_blocks), blocks))
        out = jnp.moveaxis(out, 0, 1)
    return out.reshape(B, num_blocks * block, H, -1)[:, :T]
