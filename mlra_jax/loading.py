"""A model from a checkpoint folder, ready to evaluate and to decode."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import checkpoints, sharding
from mlra_jax import model as models
from mlra_jax.data import tokenizers

_GPT2_TOKENS, _GPT2_PADDED = 50257, 50304


def load_model(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    step: int | None = None,
) -> models.Model:
    """The model of a training run's or a converted checkpoint.

    Args:
      path: the folder that training or conversion wrote; the latest finished step is taken.
      mesh: from `make_mesh`; by default one device. Each device reads its own part.
      dtype: of parameters and products, such as "bfloat16". By default parameters are as stored
        and products as the checkpoint's config says.
      step: another step than the latest.

    Returns:
      a `Model` with its layers apart (`model.unstack()`), the checkpoint's tokenizer name in
      `model.tokenizer` and the number of ids that mean something in `model.num_tokens`.

    Raises:
      CheckpointError: missing or damaged. ConfigError: sizes that do not divide over the mesh.
    """
    checkpoint = checkpoints.open_checkpoint(path, step)
    config = checkpoint.model
    if dtype is not None:
        config = dataclasses.replace(config, dtype=str(dtype), param_dtype=str(dtype))
    mesh = sharding.make_mesh() if mesh is None else mesh
    graphdef, state = models.abstract_state(config, mesh)
    params = checkpoint.restore("params", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, params)
    model = nnx.merge(graphdef, state)
    model.unstack()
    model.tokenizer = checkpoint.tokenizer
    model.num_tokens = _num_tokens(checkpoint.tokenizer, config.vocab_size)
    return jax.block_until_ready(model)


def tokenizer_of(model: models.Model, name: str | Path | None = None) -> tokenizers.Tokenizer:
    """The tokenizer that the model's checkpoint names (GPT-2's if none), or `name`.

    Raises:
      ValueError: `name` is another tokenizer than the checkpoint's, or larger than its vocabulary.
      FileNotFoundError, ConnectionError: as `get_tokenizer`.
    """
    tokenizer = tokenizers.get_tokenizer(name or model.tokenizer or "gpt2")
    if model.tokenizer is not None and tokenizer.name != model.tokenizer:
        raise ValueError(
            f"tokenizer {name} is {tokenizer.name}, and the checkpoint's is {model.tokenizer}"
        )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, and the model knows "
            f"{model.config.vocab_size}: give the model's with --tokenizer"
        )
    return tokenizer


def _num_tokens(tokenizer: str | None, vocab_size: int) -> int:
    """Ids below this mean something; the published vocabularies are padded beyond GPT-2's."""
    if tokenizer == "gpt2" or (tokenizer is None and vocab_size == _GPT2_PADDED):
        return min(_GPT2_TOKENS, vocab_size)
    if tokenizer is not None and (tokenizer == "bytes" or Path(tokenizer).is_file()):
        return min(tokenizers.get_tokenizer(tokenizer).vocab_size, vocab_size)
    return vocab_size
