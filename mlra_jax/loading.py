"""A model from a checkpoint folder, ready to evaluate and to decode."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import checkpoints, sharding
from mlra_jax import model as models
from mlra_jax.config import GPT2_VOCABULARY, ModelConfig
from mlra_jax.data import tokenizers
from mlra_jax.decoder import Decoder, Vocabulary
from mlra_jax.execution import DTypeLike, dtype_name
from mlra_jax.settings_tree import flatten

_GPT2_TOKENS = 50257


def load_model(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    step: int | None = None,
    allow_nonfinite: bool = False,
) -> Decoder:
    """The model of a training run's or a converted checkpoint, ready to decode.

    Args:
      path: the folder that training or conversion wrote; the latest finished step is taken.
      mesh: from `make_mesh`; by default one device. Each device reads its own part.
      dtype: of parameters and products, "bfloat16", jnp.bfloat16 or as NumPy says it. By default as
        the checkpoint's config says: weights are held in the dtype of the products, norms as they
        are stored.
      step: another step than the latest.
      allow_nonfinite: takes weights in which there are infinities or NaN, too.

    Returns:
      a `Decoder`: `model(tokens)` gives logits, `mlra_jax.generate(model, prompts)` continues. Its
      `vocabulary` has the checkpoint's tokenizer name and the number of ids that mean something.

    Raises:
      CheckpointError: missing or damaged, or a weight that is not finite in `dtype`.
      ConfigError: sizes that do not divide over the mesh, another dtype than `execution.DTYPES`.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    checkpoint = checkpoints.open_checkpoint(path, step)
    config = checkpoint.model
    if dtype is not None:
        execution = dataclasses.replace(config.execution, dtype=dtype)
        config = dataclasses.replace(config, param_dtype=dtype, execution=execution)
    mesh = sharding.make_mesh() if mesh is None else mesh
    _, shapes = models.structure(config, mesh)

    def as_used(path, x):
        # Read in the dtype of the decoder's weights, so that no wider copy is ever held.
        dtype = x.dtype if path[-1].key == "scale" else config.execution.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    params = checkpoint.restore("params", jax.tree.map_with_path(as_used, shapes))
    if not allow_nonfinite:
        _check_finite(checkpoint, params, mesh)
    vocabulary = Vocabulary(
        _num_tokens(checkpoint.tokenizer, config.vocab_size), checkpoint.tokenizer
    )
    decoder = Decoder.from_params(config, mesh, params, vocabulary, donate=True)
    return jax.block_until_ready(decoder)


def compute_line(config: ModelConfig, why: str | None = None) -> str:
    """In which dtype a loaded model computes and why, for people.

    Args:
      config: of the loaded model.
      why: what chose the dtype, if not the checkpoint.
    """
    products, weights = config.execution.dtype, config.param_dtype
    if why is not None or products == weights:
        return f"computes in {products}, {why or 'as its weights are stored'}"
    return (
        f"computes in {products}, as the checkpoint says; its weights are stored in {weights} "
        f"(--dtype={weights} computes in that)"
    )


def beyond_training(config: ModelConfig, length: int) -> str:
    """A line for people where so many tokens are more than the model was trained with, or ''."""
    if length <= config.context_length:
        return ""
    return (
        f"{length} tokens are beyond the {config.context_length} that the model was trained with: "
        "expect what lies there to be worse"
    )


def tokenizer_of(model: Decoder, name: str | Path | None = None) -> tokenizers.Tokenizer:
    """The tokenizer that the model's checkpoint names (GPT-2's if none), or `name`.

    Raises:
      ValueError: `name` is another tokenizer than the checkpoint's, or larger than its vocabulary.
      FileNotFoundError, ConnectionError: as `get_tokenizer`.
    """
    known = model.vocabulary.tokenizer
    tokenizer = tokenizers.get_tokenizer(name or known or "gpt2")
    if known is not None and tokenizer.name != known:
        raise ValueError(f"tokenizer {name} is {tokenizer.name}, and the checkpoint's is {known}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, and the model knows "
            f"{model.config.vocab_size}: give the model's with --tokenizer"
        )
    return tokenizer


def with_tokenizer(model: Decoder, tokenizer: tokenizers.Tokenizer) -> Decoder:
    """The same weights, for text in this tokenizer's ids."""
    num_tokens = min(tokenizer.vocab_size, model.config.vocab_size)
    return dataclasses.replace(model, vocabulary=Vocabulary(num_tokens, tokenizer.name))


def _check_finite(checkpoint: checkpoints.Checkpoint, params: Any, mesh: Mesh) -> None:
    count = lambda x: jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
    counts = jax.jit(lambda tree: jax.tree.map(count, tree), out_shardings=sharding.named(mesh))
    for (name, x), bad in zip(
        flatten(params).items(), flatten(jax.device_get(counts(params))).values(), strict=True
    ):
        if bad:
            raise checkpoints.CheckpointError(
                f"checkpoint {checkpoint.folder}: {name} has {bad} of {x.size} numbers that are "
                f"not finite in {x.dtype}; give --allow_nonfinite to take them"
            )


def _num_tokens(tokenizer: str | None, vocab_size: int) -> int:
    """Ids below this mean something; the published vocabularies are padded beyond GPT-2's."""
    if tokenizer == "gpt2" or (tokenizer is None and vocab_size == GPT2_VOCABULARY):
        return min(_GPT2_TOKENS, vocab_size)
    if tokenizer is not None and (tokenizer == "bytes" or Path(tokenizer).is_file()):
        return min(tokenizers.get_tokenizer(tokenizer).vocab_size, vocab_size)
    return vocab_size
