"""What runs on the devices: prefill, and one token a step. Compiled once for each shape."""

import functools

import jax

from mlra_jax import sharding
from mlra_jax.cache import Cache
from mlra_jax.decoder import Decoder
from mlra_jax.generation.sampling import Draws, sample


@functools.partial(jax.jit, static_argnames="capacity")
def prefill(
    decoder: Decoder, tokens_BT: jax.Array, lengths_B: jax.Array, draws: Draws, *, capacity: int
) -> tuple[jax.Array, Cache]:
    """(each row's first token int32 `[B]`, the cache) from right-padded prompts."""
    logits_BV, cache = decoder.prefill(tokens_BT, lengths_B, capacity)
    return _draw(decoder, logits_BV, draws, 0), cache


@functools.partial(jax.jit, donate_argnames="cache")
def step(
    decoder: Decoder, cache: Cache, tokens_B: jax.Array, draws: Draws, n: jax.Array
) -> tuple[jax.Array, Cache]:
    """(draw `n` of every row, the cache with `tokens_B`); the cache is changed in place."""
    logits_BTV, cache = decoder.step(tokens_B[:, None], cache)
    return _draw(decoder, logits_BTV[:, -1], draws, n), cache


def _draw(decoder, logits_BV, draws, n):
    tokens_B = sample(logits_BV, draws, n, decoder.vocabulary.num_tokens)
    return jax.lax.with_sharding_constraint(tokens_B, sharding.named(decoder.mesh))
