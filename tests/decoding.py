"""Decodes random tokens step by step and compares with whole passes on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx
from jax.sharding import Mesh
from tiny import random_model, relative_error

from mlra_jax import cache as kv
from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.config import AttentionConfig, ModelConfig
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.generation import programs
from mlra_jax.sharding import make_mesh

STEPS = 5
# With the steps the longest row fills the cache to its last slot on every mesh.
RAGGED = (9, 4, 27)


@functools.lru_cache(maxsize=4)
def _whole_pass(config: ModelConfig, seed: int):
    """Tokens, and the logits of whole passes, each row by itself."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (len(RAGGED), max(RAGGED) + STEPS), np.int32)
    return tokens, whole_pass(random_model(config, make_mesh(), seed), tokens)


def whole_pass(model: models.Model, tokens_BT, positions_BT=None) -> np.ndarray:
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, *arrays: nnx.merge(graphdef, state)(*arrays))
    return np.asarray(forward(state, tokens_BT, positions_BT))


@functools.lru_cache(maxsize=1)
def _decoder(config: ModelConfig, mesh: Mesh, seed: int) -> Decoder:
    return Decoder.from_model(random_model(config, mesh, seed))


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
    config, mesh = tiny.config(attention, num_layers), make_mesh(tensor=tensor, context=context)
    tokens, whole = _whole_pass(config, seed)
    decoder = _decoder(config, mesh, seed)
    capacity = kv.round_capacity(max(lengths) + STEPS, mesh)
    prefill = jax.jit(lambda decoder, *prompts: decoder.prefill(*prompts, capacity))
    step = jax.jit(Decoder.step, donate_argnums=2)

    prompts = np.zeros((len(lengths), max(lengths) + 1), np.int32)
    for row, length in enumerate(lengths):
        prompts[row, :length] = tokens[row, :length]
    logits, cache = prefill(decoder, prompts, jnp.asarray(lengths))
    got = [np.asarray(logits)[:, None]]
    for i in range(0, STEPS - STEPS % queries, queries):
        new = np.stack([tokens[row, n + i : n + i + queries] for row, n in enumerate(lengths)])
        logits, cache = step(decoder, new, cache)
        got.append(np.asarray(logits))
    got = np.concatenate(got, axis=1)
    want = np.stack([whole[row, n - 1 : n - 1 + got.shape[1]] for row, n in enumerate(lengths)])
    return relative_error(got, want)


def lower_step(config: ModelConfig, mesh: Mesh, batch: int, slots: int, **vocabulary):
    """The decoding program that users run, lowered for a batch and a cache."""
    scalar = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.named(mesh))
    decoder = abstract_decoder(config, mesh, **vocabulary)
    cache = abstract_cache(config, mesh, batch, slots)
    return programs.step.lower(decoder, cache, scalar(batch))
