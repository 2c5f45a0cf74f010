"""Decodes random tokens step by step and compares with whole passes on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlra_jax import cache as kv
from mlra_jax import model as models
from mlra_jax.config import AttentionConfig, ModelConfig
from mlra_jax.generation.loop import fill
from mlra_jax.sharding import make_mesh

STEPS = 5
RAGGED = (9, 4, 13)


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def small_config(attention: AttentionConfig, num_layers: int = 1) -> ModelConfig:
    return ModelConfig(
        attention,
        vocab_size=88,
        num_layers=num_layers,
        embed_dim=40,
        mlp_dim=56,
        dtype="float32",
        zero_init=False,
    )


@functools.lru_cache(maxsize=4)
def _whole_pass(config: ModelConfig, seed: int):
    """A model's parameters, tokens, and the logits of whole passes, each row by itself."""
    model = models.create(config, make_mesh(), seed=seed)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (len(RAGGED), max(RAGGED) + STEPS), np.int32)
    return nnx.state(model), tokens, np.asarray(model(tokens))


def decoding_error(
    attention: AttentionConfig,
    tensor: int,
    context: int,
    lengths: tuple[int, ...] = RAGGED,
    num_layers: int = 1,
    queries: int = 1,
    seed: int = 0,
) -> float:
    """Relative error of the logits of prefill and `STEPS` tokens, `queries` at a time.

    Row `b` is a prompt of `lengths[b]` tokens; it should give what it gives alone.
    """
    config, mesh = small_config(attention, num_layers), make_mesh(tensor=tensor, context=context)
    state, tokens, whole = _whole_pass(config, seed)
    _, shapes = models.abstract_state(config, mesh)
    placed = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), state, shapes)
    model = models.from_state(config, mesh, placed)
    model.unstack()
    graphdef, state = nnx.split(model)
    capacity = kv.round_capacity(max(lengths) + STEPS + 2, mesh)

    @jax.jit
    def prefill(state, prompts_BT, lengths_B):
        return fill(nnx.merge(graphdef, state), prompts_BT, lengths_B, capacity)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(state, cache, tokens_BT):
        return nnx.merge(graphdef, state).decode(tokens_BT, cache)

    prompts = np.zeros((len(lengths), max(lengths) + 1), np.int32)
    for row, length in enumerate(lengths):
        prompts[row, :length] = tokens[row, :length]
    logits, cache = prefill(state, prompts, jnp.asarray(lengths))
    got = [np.asarray(logits)[:, None]]
    for i in range(0, STEPS - STEPS % queries, queries):
        new = np.stack([tokens[row, n + i : n + i + queries] for row, n in enumerate(lengths)])
        logits, cache = step(state, cache, new)
        got.append(np.asarray(logits))
    got = np.concatenate(got, axis=1)
    want = np.stack([whole[row, n - 1 : n - 1 + got.shape[1]] for row, n in enumerate(lengths)])
    return relative_error(got, want)
