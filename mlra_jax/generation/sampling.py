"""The next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ValueError for values outside their range."""

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples the model's distribution."""
    top_k: int = 0
    """Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling, num_tokens: int) -> jax.Array:
    """int32 `[B]`: one token a row from float32 logits; ids from `num_tokens` on are never drawn.

    Rows draw independently: row `b` depends on `key`, `b` and its own logits only.
    """
    B, V = logits_BV.shape
    logits_BV = jnp.where(jnp.arange(V) < num_tokens, logits_BV, -jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < num_tokens:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        descending_BV = -jnp.sort(-logits_BV, axis=-1)
        weights_BV = jax.nn.softmax(descending_BV, axis=-1)
        # A token is kept while those before it do not reach top_p, so the first always is.
        kept_B = (jnp.cumsum(weights_BV, axis=-1) - weights_BV < sampling.top_p).sum(-1)
        least_B1 = jnp.take_along_axis(descending_BV, kept_B[:, None] - 1, axis=-1)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
