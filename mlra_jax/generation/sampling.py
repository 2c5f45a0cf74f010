"""The next token from logits; every row has its own settings and its own draws."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.settings_tree import at_least, require, within


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ConfigError for values outside their range, in float32."""

    temperature: float = 0.0
    """In [0, inf). 0 takes the most likely token, as does what float32 has no number for (below
    1.2e-38); 1 samples the model's distribution."""
    top_k: int = 0
    """In [0, 2**31). Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """In (0, 1]. Only the most likely tokens that together reach this probability."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # Numbers of NumPy and JAX.
            if hasattr(value, "item"):
                object.__setattr__(self, field.name, value.item())
        within(self, "", temperature="[0, inf)", top_p="(0, 1]")
        at_least(0, self, "", "top_k")
        require(self.top_k < 2**31, f"top_k={self.top_k} must lie in [0, 2**31)")

    @property
    def greedy(self) -> bool:
        """Nothing is drawn: a device would take a smaller temperature for 0."""
        return self.temperature < float(np.finfo(np.float32).tiny)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "stop", "keys"],
    meta_fields=["drawn", "narrow"],
)
@dataclasses.dataclass(frozen=True)
class Draws:
    """The settings of every row as arrays `[B]`: other values are no other program, but for what
    no row needs."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    stop: jax.Array | np.ndarray
    """The token that ends a row, -1 where none does."""
    keys: jax.Array
    """Random keys; draw `n` of row `b` is made with `fold_in(keys[b], n)`."""
    drawn: bool
    """Some row is not greedy; where all are, there are no random numbers."""
    narrow: bool
    """Some row has `top_k` or `top_p`; where none has, nothing is sorted."""


def draws(
    sampling: Sampling | Sequence[Sampling],
    seed: int | Sequence[int],
    rows: int,
    stop_token: int | None = None,
) -> Draws:
    """The settings of `rows` rows, from one for all of them or from one for each.

    A seed of a row's own gives it the draws that it has alone. One seed for all gives each row its
    own draws, of the seed and the row's place. Seeds are in [0, 2**32).

    Raises ValueError for other seeds, and for more or fewer settings or seeds than rows.
    """
    for each in seed if isinstance(seed, Sequence | np.ndarray) else [seed]:
        if not hasattr(each, "__index__") or not 0 <= each < 2**32:
            raise ValueError(f"seed={each!r} must be a whole number in [0, 2**32)")
    sampling = [sampling] * rows if isinstance(sampling, Sampling) else list(sampling)
    if isinstance(seed, Sequence | np.ndarray):
        keys_B = jax.vmap(jax.random.key)(jnp.asarray(seed, jnp.uint32))
    else:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    for name, given in (("sampling settings", len(sampling)), ("seeds", len(keys_B))):
        if given != rows:
            raise ValueError(f"{given} {name} for {rows} prompts: give one, or one for each")
    column = lambda name, dtype: np.array([getattr(s, name) for s in sampling], dtype)
    return Draws(
        temperature=np.array([0 if s.greedy else s.temperature for s in sampling], np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        stop=np.full(rows, -1 if stop_token is None else stop_token, np.int32),
        keys=keys_B,
        drawn=not all(s.greedy for s in sampling),
        narrow=any(not s.greedy and (s.top_k > 0 or s.top_p < 1) for s in sampling),
    )


def sample(logits_BV: jax.Array, draws: Draws, step: jax.Array, num_tokens: int) -> jax.Array:
    """int32 `[B]`: one token a row from float32 logits; ids from `num_tokens` on are never drawn.

    Row `b` depends on its own logits, settings and key, and on the step's number only. There is no
    branch on a device's value, for which a GPU's queue would have to run empty.
    """
    V = logits_BV.shape[1]
    logits_BV = jnp.where(jnp.arange(V) < num_tokens, logits_BV, -jnp.inf)
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    if not draws.drawn:
        return greedy_B.astype(jnp.int32)
    warm_B = draws.temperature > 0
    # From the largest on down, so that a small temperature makes no two of them infinite.
    heated_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    heated_BV = heated_BV / jnp.where(warm_B, draws.temperature, 1.0)[:, None]
    if draws.narrow:
        heated_BV = _likeliest(heated_BV, draws, num_tokens)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(draws.keys, step)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, heated_BV)
    return jnp.where(warm_B, drawn_B, greedy_B).astype(jnp.int32)


def _likeliest(logits_BV, draws, num_tokens):
    """-inf for tokens that top_k, or top_p among those that top_k leaves, excludes."""
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    top_k_B1, top_p_B1 = draws.top_k[:, None], draws.top_p[:, None]
    kth_B1 = jnp.take_along_axis(descending_BV, jnp.clip(top_k_B1, 1, num_tokens) - 1, axis=-1)
    # As likely as the last of the k is likely enough.
    least_B1 = jnp.where((top_k_B1 > 0) & (top_k_B1 < num_tokens), kth_B1, -jnp.inf)
    descending_BV = jnp.where(descending_BV >= least_B1, descending_BV, -jnp.inf)
    weights_BV = jax.nn.softmax(descending_BV, axis=-1)
    # A token is kept while those before it do not reach top_p, so the first always is.
    before_BV = jnp.cumsum(weights_BV, axis=-1) - weights_BV
    kept_B1 = (before_BV < top_p_B1).sum(-1, keepdims=True)
    last_B1 = jnp.take_along_axis(descending_BV, kept_B1 - 1, axis=-1)
    least_B1 = jnp.maximum(least_B1, jnp.where(top_p_B1 < 1, last_B1, -jnp.inf))
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
