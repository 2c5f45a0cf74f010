"""Prefill, then one token a step."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mlra_jax import cache as kv
from mlra_jax import sharding
from mlra_jax.decoder import Decoder
from mlra_jax.generation import programs
from mlra_jax.generation.padding import pad
from mlra_jax.generation.sampling import Sampling, draws

_CACHE_BUCKET = 128
_CHUNK_WIDTH, _CHUNK_TOKENS = 2048, 8192
"""Of one program of a long prompt: the most positions, and the most tokens of all rows of a
device."""


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
    cache_policy: str | None = None,
    tokens_per_call: int | None = None,
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
      cache_policy: `window:SLOTS` or `ladder:SLOTS` (`cache.policy`), a cache of so many slots for
        prompts and texts of any length, of which it keeps a part; None keeps all.
      tokens_per_call: how many tokens of each row one program makes; changes no token. By default
        1; over several GPUs 8, as their host takes longer to start a step than they to compute it.

    Raises:
      ValueError: empty prompt, token outside the vocabulary, no new tokens, a prompt that does not
        fit the cache, a batch that does not divide over the mesh, settings outside their range or
        of another number than the prompts.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    steps = Stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=_sampling(len(prompts), temperature=temperature, top_k=top_k, top_p=top_p),
        seed=seed,
        cache_length=cache_length,
        cache_policy=cache_policy,
        stop_token=stop_token,
        tokens_per_call=tokens_per_call,
    )
    for tokens_B in steps:
        for row, token in zip(rows, tokens_B, strict=True):
            if token != stop_token:
                row.append(token)
    return rows


class Stream:
    """Like `generate`, but iterates over lists `[B]` of new tokens as they come.

    The device is always one call ahead of the caller, but for the first token, which comes before
    the program of the others is compiled. Prompts longer than a chunk are prefilled chunk by chunk;
    `on_chunk` is called with the number of positions that are done, while the next are on the way.
    A row that has ended repeats its stop token, and when all have, that list of them is the last.
    Arguments are checked here, not at the first token. `capacity` is the number of cache slots.
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
        cache_policy: str | None = None,
        stop_token: int | None = None,
        tokens_per_call: int | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if tokens_per_call is not None and tokens_per_call < 1:
            raise ValueError(f"tokens_per_call={tokens_per_call} must be at least 1")
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
        self.policy = _policy(cache_policy, cache_length, model.mesh)
        if self.policy is not None:
            cache_length = self.policy.slots
        elif cache_length is None:
            cache_length = max(-(-needed // _CACHE_BUCKET) * _CACHE_BUCKET, tokens_BT.shape[1])
        elif needed > cache_length:
            raise ValueError(
                f"a prompt of {self.lengths_B.max()} tokens and {max_new_tokens} new ones need "
                f"{needed} cache slots and cache_length is {cache_length}: raise it or shorten them"
            )
        self.model, self.max_new_tokens = model, max_new_tokens
        several = model.mesh.size > 1 and sharding.platform(model.mesh) == "gpu"
        self.tokens_per_call = tokens_per_call or (8 if several else 1)
        self.on_chunk = on_chunk
        self.chunk = min(_CHUNK_WIDTH, max(_CHUNK_TOKENS * ways // len(prompts), 1))
        if self.policy is not None:
            self.chunk = min(self.chunk, self.policy.dropped)
            if self.tokens_per_call > self.policy.dropped:
                raise ValueError(
                    f"tokens_per_call={self.tokens_per_call} and cache policy {cache_policy!r} do "
                    f"not go together: at most {self.policy.dropped}, or more slots"
                )
        self.tokens_BT = tokens_BT if self.policy else tokens_BT[:, :cache_length]
        self.capacity = kv.round_capacity(cache_length, model.mesh)
        self.draws = draws(sampling or Sampling(), seed, len(prompts), stop_token)

    def __iter__(self) -> Iterator[list[int]]:
        for tokens_B in self._tokens():
            yield tokens_B.tolist()
            if (tokens_B == self.draws.stop).all():
                return

    def _tokens(self) -> Iterator[np.ndarray]:
        num_tokens = self.model.vocabulary.num_tokens
        # Sent to the devices once, not with every token.
        settings = jax.device_put(self.draws, sharding.named(self.model.mesh))
        draw = functools.partial(programs.draw, draws=settings, num_tokens=num_tokens)
        logits_BV, cache = self._prefilled()
        nothing_B = jax.device_put(np.zeros_like(self.lengths_B), sharding.named(self.model.mesh))
        tokens_B = draw(logits_BV, nothing_B, n=np.int32(0))
        yield np.asarray(tokens_B)
        waiting: jax.Array | None = None
        for n in range(1, self.max_new_tokens, self.tokens_per_call):
            cache = self._with_room(cache, self.tokens_per_call, self.tokens_per_call)
            if self.tokens_per_call == 1:
                logits_BV, cache = programs.step(self.model, cache, tokens_B)
                made = tokens_B = draw(logits_BV, tokens_B, n=np.int32(n))
            else:
                made, tokens_B, cache = programs.several(
                    self.model,
                    cache,
                    tokens_B,
                    settings,
                    np.int32(n),
                    count=self.tokens_per_call,
                    num_tokens=num_tokens,
                )
            if waiting is not None:
                yield from self._rows(waiting)
            waiting = made
        if waiting is not None:
            left = (self.max_new_tokens - 2) % self.tokens_per_call + 1
            yield from self._rows(waiting)[:left]

    def _rows(self, tokens: jax.Array) -> np.ndarray:
        return np.asarray(tokens).reshape(-1, len(self.lengths_B))

    def _prefilled(self) -> tuple[jax.Array, kv.Cache]:
        """(logits `[B, V]` after each prompt, the cache)."""
        model, width, (B, T) = self.model, self.chunk, self.tokens_BT.shape
        self._filled_B = np.zeros_like(self.lengths_B)
        if width >= T:
            self._filled_B += self.lengths_B
            return programs.prefill(model, self.tokens_BT, self.lengths_B, capacity=self.capacity)
        logits_BV, cache = programs.empty(model, batch=B, capacity=self.capacity)
        for start in range(0, int(self.lengths_B.max()), width):
            before_BV, tokens_BT = logits_BV, np.zeros((B, width), np.int32)
            part = self.tokens_BT[:, start : start + width]
            tokens_BT[:, : part.shape[1]] = part
            cache = self._with_room(cache, width, np.clip(self.lengths_B - start, 0, width))
            logits_BV, cache = programs.extend(
                model, before_BV, cache, tokens_BT, self.lengths_B, np.int32(start)
            )
            if self.on_chunk is not None:
                jax.block_until_ready(before_BV)
                self.on_chunk(start)
        return logits_BV, cache

    def _with_room(self, cache: kv.Cache, new: int, grows_B: np.ndarray | int) -> kv.Cache:
        """The cache with room for `new` tokens in each row, of which `grows_B` will stay.

        Rows are known here to fill at most so many slots: they end on the devices.
        """
        if self.policy is None:
            return cache
        full_B = self._filled_B + new > self.capacity
        if full_B.any():
            cache = programs.make_room(self.model, cache, policy=self.policy, new=new)
            self._filled_B = self._filled_B - self.policy.dropped * full_B
        self._filled_B = self._filled_B + grows_B
        return cache


def _policy(text: str | None, cache_length: int | None, mesh: Mesh) -> kv.Policy | None:
    if text is None:
        return None
    policy = kv.parse_policy(text)
    if cache_length is not None:
        raise ValueError(f"cache policy {text!r} says how many slots: leave cache_length out")
    if (context := sharding.size(mesh, sharding.CONTEXT)) > 1:
        raise ValueError(
            f"cache policy {text!r} keeps rows whole and context={context} cuts them: use a mesh "
            "with context=1"
        )
    return policy


def _sampling(rows: int, **settings) -> list[Sampling]:
    """Of each row, from settings that are one for all rows or one for each."""
    for name, value in settings.items():
        if np.ndim(value) and len(value) != rows:
            raise ValueError(f"{len(value)} values of {name} for {rows} prompts")
    of_row = lambda value, b: value[b] if np.ndim(value) else value
    return [Sampling(**{n: of_row(v, b) for n, v in settings.items()}) for b in range(rows)]
