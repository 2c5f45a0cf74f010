"""What runs on the devices: prefill, one token a step, the draw. Compiled once for each shape."""

import functools

import jax

from mlra_jax import sharding
from mlra_jax.cache import Cache
from mlra_jax.decoder import Decoder
from mlra_jax.generation.sampling import Draws, sample


@functools.partial(jax.jit, static_argnames="capacity")
def prefill(
    decoder: Decoder, tokens_BT: jax.Array, lengths_B: jax.Array, *, capacity: int
) -> tuple[jax.Array, Cache]:
    """(logits `[B, V]` after each row's last token, the cache) from right-padded prompts."""
    logits_BV, cache = decoder.prefill(tokens_BT, lengths_B, capacity)
    return _everywhere(logits_BV, decoder), cache


@functools.partial(jax.jit, donate_argnames="cache")
def step(decoder: Decoder, cache: Cache, tokens_B: jax.Array) -> tuple[jax.Array, Cache]:
    """(logits `[B, V]` after `tokens_B`, the cache with them); the cache is changed in place."""
    logits_BTV, cache = decoder.step(tokens_B[:, None], cache)
    return _everywhere(logits_BTV[:, -1], decoder), cache


@functools.partial(jax.jit, static_argnames="num_tokens")
def draw(logits_BV: jax.Array, draws: Draws, n: jax.Array, *, num_tokens: int) -> jax.Array:
    """Draw `n` of every row, int32 `[B]`; a program of its own, small beside a step."""
    return sample(logits_BV, draws, n, num_tokens)


def _everywhere(logits_BV, decoder):
    return jax.lax.with_sharding_constraint(logits_BV, sharding.named(decoder.mesh))
