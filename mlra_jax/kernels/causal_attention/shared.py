"""Keys of which all heads share a part."""

import jax
import jax.numpy as jnp


def with_shared(x_BSJK: jax.Array, rope_BSR: jax.Array) -> jax.Array:
    """`[B, S, J, K + R]`: each head's vector and the rotary key that all heads share."""
    rope_BSJR = jnp.broadcast_to(rope_BSR[:, :, None], (*x_BSJK.shape[:3], rope_BSR.shape[-1]))
    return jnp.concatenate([x_BSJK, rope_BSJR], axis=-1)
