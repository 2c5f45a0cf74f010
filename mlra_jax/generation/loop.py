"""Prefill, then one token a step."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import cache as kv
from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.config import ModelConfig
from mlra_jax.generation.padding import pad
from mlra_jax.generation.sampling import Sampling, sample

_CACHE_BUCKET = 128


def generate(
    model: models.Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
    cache_length: int | None = None,
) -> list[list[int]]:
    """Continues each prompt; token lists in, lists of new tokens out.

    Args:
      model: from `load_model`, or any model after `model.unstack()`.
      prompts: token lists of any lengths, decoded as one batch.
      max_new_tokens: at least 1.
      temperature, top_k, top_p: see `Sampling`; the default is greedy.
      seed: of the draws; the same seed and batch give the same tokens.
      stop_token: ends its row; not part of the result.
      cache_length: slots of the cache; by default what the prompts and new tokens need.

    Raises:
      ValueError: empty prompt, token outside the vocabulary, no new tokens, a prompt that does not
        fit the cache, a batch that does not divide over the mesh.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    steps = Stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        cache_length=cache_length,
    )
    for tokens_B in steps:
        for b, token in enumerate(tokens_B):
            going[b] = going[b] and token != stop_token
            if going[b]:
                rows[b].append(token)
        if not any(going):
            break
    return rows


class Stream:
    """Like `generate`, but iterates over lists `[B]` of new tokens as they come.

    The device is always one step ahead of the caller. Arguments are checked here, not at the first
    token. `capacity` is the number of cache slots.
    """

    def __init__(
        self,
        model: models.Model,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        cache_length: int | None = None,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if isinstance(model.layers, models.Block):
            raise ValueError("the layers are stacked: call model.unstack() before decoding")
        tokens_BT, self.lengths_B = pad(prompts, model.num_tokens)
        ways = sharding.size(model.mesh, sharding.BATCH)
        if len(prompts) % ways:
            raise ValueError(
                f"{len(prompts)} prompts do not divide over the {ways} devices that split the "
                f"batch; give a multiple of {ways} or a mesh with data=1 and fsdp=1"
            )
        # The last token is never read again, so it needs no slot.
        needed = int(self.lengths_B.max()) + max_new_tokens - 1
        if cache_length is None:
            cache_length = max(-(-needed // _CACHE_BUCKET) * _CACHE_BUCKET, tokens_BT.shape[1])
        elif needed > cache_length:
            raise ValueError(
                f"a prompt of {self.lengths_B.max()} tokens and {max_new_tokens} new ones need "
                f"{needed} cache slots and cache_length is {cache_length}: raise it or shorten them"
            )
        self.model, self.seed, self.max_new_tokens = model, seed, max_new_tokens
        self.tokens_BT = tokens_BT[:, :cache_length]
        self.capacity = kv.round_capacity(cache_length, model.mesh)
        self.programs = compiled(model.config, model.mesh, sampling or Sampling(), model.num_tokens)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._steps(None)

    def from_filled(self, length: int) -> Iterator[list[int]]:
        """As if `length` tokens came before: for measuring at a context without prefilling it.

        The cache must have room; what it holds before the prompt's end is the prompt and zeros.
        """
        yield from self._steps(length)

    def _steps(self, length: int | None) -> Iterator[list[int]]:
        prefill, step = self.programs
        state, key = nnx.state(self.model), jax.random.key(self.seed)
        tokens_B, cache = prefill(
            state, self.tokens_BT, self.lengths_B, key, capacity=self.capacity
        )
        if length is not None:
            cache = dataclasses.replace(cache, length=jnp.full_like(cache.length, length))
        for n in range(1, self.max_new_tokens):
            ahead_B, cache = step(state, cache, tokens_B, key, np.int32(n))
            yield np.asarray(tokens_B).tolist()
            tokens_B = ahead_B
        yield np.asarray(tokens_B).tolist()


@functools.lru_cache(maxsize=16)
def compiled(config: ModelConfig, mesh: Mesh, sampling: Sampling, num_tokens: int):
    """(prefill, step), jitted; the step's cache is donated and changed in place."""
    graphdef, _ = models.abstract_state(config, mesh, unstacked=True)
    everywhere = sharding.named(mesh)

    def draw(logits_BV, key, n):
        key = jax.random.fold_in(key, n)
        tokens_B = sample(logits_BV, key, sampling, num_tokens)
        return jax.lax.with_sharding_constraint(tokens_B, everywhere)

    @functools.partial(jax.jit, static_argnames="capacity")
    def prefill(state, tokens_BT, lengths_B, key, capacity):
        logits_BV, cache = fill(nnx.merge(graphdef, state), tokens_BT, lengths_B, capacity)
        return draw(logits_BV, key, 0), cache

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(state, cache, tokens_B, key, n):
        model = nnx.merge(graphdef, state)
        logits_BTV, cache = model.decode(tokens_B[:, None], cache)
        return draw(logits_BTV[:, -1], key, n), cache

    return prefill, step


def fill(
    model: models.Model, tokens_BT: jax.Array, lengths_B: jax.Array, capacity: int
) -> tuple[jax.Array, kv.Cache]:
    """(logits `[B, V]` after each row's last token, the cache), from right-padded prompts.

    `capacity` is the number of slots, a multiple of the context axis. Moving a row's entries to
    where left padding puts them is right because scores depend on differences of positions only.
    """
    x_BTD, entries = model.prefill(tokens_BT)
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    length = lengths_B.max().astype(jnp.int32)
    starts_B = (length - lengths_B).astype(jnp.int32)
    shares = sharding.size(model.mesh, sharding.CONTEXT)
    layers = []
    for block, entry in zip(model.layers, entries, strict=True):
        layer = {}
        for name, axes in block.attention.cache_axes.items():
            # Whole along the positions first: each device then picks its share by itself.
            whole = sharding.constrain(entry[name], model.mesh, axes[0], "length", *axes[2:])
            stored = kv.from_prompt(whole, starts_B, capacity, shares)
            layer[name] = sharding.constrain(stored, model.mesh, *axes)
        layers.append(layer)
    return model.logits(last_B1D)[:, 0], kv.Cache(tuple(layers), length, starts_B)
