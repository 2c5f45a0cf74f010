"""What runs on the devices: prefill, one token a step, the draw. Compiled once for each shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mlra_jax import sharding
from mlra_jax.attention import mechanism
from mlra_jax.cache import Cache, Policy
from mlra_jax.decoder import Decoder, abstract_cache
from mlra_jax.generation.sampling import Draws, sample


@functools.partial(jax.jit, static_argnames="capacity")
def prefill(
    decoder: Decoder, tokens_BT: jax.Array, lengths_B: jax.Array, *, capacity: int
) -> tuple[jax.Array, Cache]:
    """(logits `[B, V]` after each row's last token, the cache) from right-padded prompts."""
    logits_BV, cache = decoder.prefill(tokens_BT, lengths_B, capacity)
    return _everywhere(logits_BV, decoder), cache


@functools.partial(jax.jit, static_argnames=("batch", "capacity"))
def empty(decoder: Decoder, *, batch: int, capacity: int) -> tuple[jax.Array, Cache]:
    """(logits `[B, V]` of zeros, a cache that holds nothing): where a prompt in chunks begins."""
    logits_BV = jnp.zeros((batch, decoder.config.vocab_size), jnp.float32)
    shapes = abstract_cache(decoder.config, decoder.mesh, batch, capacity)
    place = lambda x: jax.lax.with_sharding_constraint(jnp.zeros(x.shape, x.dtype), x.sharding)
    return _everywhere(logits_BV, decoder), jax.tree.map(place, shapes)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="over")
def extend(
    decoder: Decoder,
    logits_BV: jax.Array,
    cache: Cache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    start: jax.Array,
    *,
    over: str | None = None,
) -> tuple[jax.Array, Cache]:
    """The chunk of right-padded prompts from position `start` on -> (logits, cache) after it.

    One program for all chunks of all prompts, for a width and a capacity. The cache is changed in
    place; a row whose prompt ended before keeps its logits.
    """
    counts_B = jnp.clip(lengths_B - start, 0, tokens_BT.shape[1])
    new_BV, cache = decoder.extend(tokens_BT, counts_B, cache, over)
    logits_BV = jnp.where((counts_B > 0)[:, None], new_BV, logits_BV)
    return _everywhere(logits_BV, decoder), cache


@functools.partial(jax.jit, donate_argnames="cache", static_argnames=("policy", "new"))
def make_room(decoder: Decoder, cache: Cache, *, policy: Policy, new: int) -> Cache:
    """The cache with room for `new` tokens in each row; rows that have it stay as they are."""
    full_B = cache.lengths + new > cache.capacity
    stay_S = jnp.arange(cache.capacity, dtype=jnp.int32)
    attention, layers = mechanism(decoder.config.attention), []
    for number, layer in enumerate(cache.layers):
        kept = policy.kept(number, len(cache.layers))
        # What lies behind them is hidden by the lengths.
        slots_S = stay_S.at[: len(kept)].set(kept)
        slots_BS = jnp.where(full_B[:, None], slots_S, stay_S)
        layers.append(attention.moved(decoder.config, layer, slots_BS))
    return Cache(tuple(layers), cache.lengths - policy.dropped * full_B)


@functools.partial(jax.jit, donate_argnames="cache")
def step(decoder: Decoder, cache: Cache, tokens_B: jax.Array) -> tuple[jax.Array, Cache]:
    """(logits `[B, V]` after `tokens_B`, the cache with them); the cache is changed in place."""
    logits_BTV, cache = decoder.step(tokens_B[:, None], cache)
    return _everywhere(logits_BTV[:, -1], decoder), cache


@functools.partial(jax.jit, static_argnames="num_tokens")
def draw(
    logits_BV: jax.Array, before_B: jax.Array, draws: Draws, n: jax.Array, *, num_tokens: int
) -> jax.Array:
    """Draw `n` of every row, int32 `[B]`; a program of its own, small beside a step.

    `before_B` are the tokens of draw `n - 1`, of which the first draw has none: a row that has
    ended repeats its stop token.
    """
    tokens_B = sample(logits_BV, draws, n, num_tokens)
    return jnp.where((n > 0) & _ended(before_B, draws), before_B, tokens_B)


def _ended(tokens_B, draws):
    return tokens_B == draws.stop


@functools.partial(jax.jit, donate_argnames="cache", static_argnames=("count", "num_tokens"))
def several(
    decoder: Decoder,
    cache: Cache,
    tokens_B: jax.Array,
    draws: Draws,
    n: jax.Array,
    *,
    count: int,
    num_tokens: int,
) -> tuple[jax.Array, jax.Array, Cache]:
    """(tokens `[count, B]` of the draws from `n` on, the last of them, the cache) after `tokens_B`.

    `count` times `step` and `draw` in one program; the cache is changed in place. Rows that have
    ended stay as long as they are.
    """

    def one(carry, n):
        before_B, cache = carry
        lengths_B = cache.lengths
        logits_BV, cache = step(decoder, cache, before_B)
        lengths_B = jnp.where(_ended(before_B, draws), lengths_B, cache.lengths)
        tokens_B = draw(logits_BV, before_B, draws, n, num_tokens=num_tokens)
        return (tokens_B, dataclasses.replace(cache, lengths=lengths_B)), tokens_B

    numbers = n + jnp.arange(count, dtype=jnp.int32)
    (last_B, cache), tokens_NB = jax.lax.scan(one, (tokens_B, cache), numbers)
    return tokens_NB, last_B, cache


def _everywhere(logits_BV, decoder):
    return jax.lax.with_sharding_constraint(logits_BV, sharding.named(decoder.mesh))
