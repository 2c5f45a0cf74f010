"""Prefill, then one token a step."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from mlra_jax import cache as kv
from mlra_jax import sharding
from mlra_jax.decoder import Decoder
from mlra_jax.generation import programs
from mlra_jax.generation.padding import pad
from mlra_jax.generation.sampling import Sampling, draws

_CACHE_BUCKET = 128


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    stop_token: int | None = None,
    cache_length: int | None = None,
) -> list[list[int]]:
    """Continues each prompt; token lists in, lists of new tokens out.

    Args:
      model: from `load_model` or `Decoder.from_model`.
      prompts: token lists of any lengths, decoded as one batch.
      max_new_tokens: at least 1.
      temperature, top_k, top_p: see `Sampling`, one for all prompts or one for each; the default
        is greedy.
      seed: of the draws. One for all: the same seed and batch give the same tokens. One for each: a
        prompt draws what it draws alone with this seed, in `[seed]`.
      stop_token: ends its row; not part of the result.
      cache_length: slots of the cache; by default what the prompts and new tokens need.

    Raises:
      ValueError: empty prompt, token outside the vocabulary, no new tokens, a prompt that does not
        fit the cache, a batch that does not divide over the mesh, settings outside their range or
        of another number than the prompts.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    steps = Stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=_sampling(len(prompts), temperature=temperature, top_k=top_k, top_p=top_p),
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
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] | None = None,
        seed: int | Sequence[int] = 0,
        cache_length: int | None = None,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not isinstance(model, Decoder):
            raise ValueError(
                "this model is in its training form: decode with Decoder.from_model(model)"
            )
        tokens_BT, self.lengths_B = pad(prompts, model.vocabulary.num_tokens)
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
        self.model, self.max_new_tokens = model, max_new_tokens
        self.tokens_BT = tokens_BT[:, :cache_length]
        self.capacity = kv.round_capacity(cache_length, model.mesh)
        self.draws = draws(sampling or Sampling(), seed, len(prompts))

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._steps(None)

    def from_filled(self, length: int) -> Iterator[list[int]]:
        """As if `length` tokens came before: for measuring at a context without prefilling it.

        What the cache holds beyond the prompts is padding and zeros. Raises ValueError if it has no
        room for the new tokens after so many.
        """
        if length + self.max_new_tokens - 1 > self.capacity:
            raise ValueError(
                f"{length} tokens and {self.max_new_tokens} new ones need "
                f"{length + self.max_new_tokens - 1} cache slots and there are {self.capacity}: "
                "raise cache_length"
            )
        return self._steps(length)

    def _steps(self, length: int | None) -> Iterator[list[int]]:
        logits_BV, cache = programs.prefill(
            self.model, self.tokens_BT, self.lengths_B, capacity=self.capacity
        )
        if length is not None:
            cache = dataclasses.replace(cache, lengths=jnp.full_like(cache.lengths, length))
        num_tokens = self.model.vocabulary.num_tokens
        for n in range(self.max_new_tokens):
            tokens_B = programs.draw(logits_BV, self.draws, np.int32(n), num_tokens=num_tokens)
            if n < self.max_new_tokens - 1:
                logits_BV, cache = programs.step(self.model, cache, tokens_B)
            yield np.asarray(tokens_B).tolist()


def _sampling(rows: int, **settings) -> list[Sampling]:
    """Of each row, from settings that are one for all rows or one for each."""
    for name, value in settings.items():
        if np.ndim(value) and len(value) != rows:
            raise ValueError(f"{len(value)} values of {name} for {rows} prompts")
    of_row = lambda value, b: value[b] if np.ndim(value) else value
    return [Sampling(**{n: of_row(v, b) for n, v in settings.items()}) for b in range(rows)]
