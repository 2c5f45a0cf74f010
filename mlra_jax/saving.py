"""A model into a checkpoint folder, and out of one in the form that is trained."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh

from mlra_jax import checkpoints, sharding
from mlra_jax import model as models
from mlra_jax.attention import joined
from mlra_jax.checkpoints import CheckpointError
from mlra_jax.data.tokenizers import RANKS_FILE, get_tokenizer, keep_ranks
from mlra_jax.decoder import Decoder, recipe
from mlra_jax.execution import DTypeLike, dtype_name
from mlra_jax.model import Model
from mlra_jax.storage import paths

_NAMED = ("bytes", "gpt2")


def load_trainable(
    path: str | Path,
    mesh: Mesh | None = None,
    param_dtype: DTypeLike = "float32",
    step: int | None = None,
) -> Model:
    """The training form of a run's or a converted checkpoint's model.

    Args:
      path: the folder that training, conversion or `save_model` wrote.
      mesh: from `make_mesh`; by default one device. Each device reads its own part.
      param_dtype: of the parameters; updates smaller than a bfloat16 can tell need float32.
      step: another step than the latest.

    Raises:
      CheckpointError: missing or damaged.
      ConfigError: sizes that do not divide over the mesh, another dtype than `execution.DTYPES`.
    """
    checkpoint = checkpoints.open_checkpoint(path, step)
    dtype = dtype_name(param_dtype, "param_dtype")
    config = dataclasses.replace(checkpoint.model, param_dtype=dtype)
    mesh = sharding.make_mesh() if mesh is None else mesh
    definition, shapes = models.structure(config, mesh)
    return nnx.merge(definition, checkpoint.restore("params", shapes))


def save_model(
    model: Model | Decoder,
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    step: int = 0,
) -> None:
    """Writes a checkpoint that `load_model`, decoding, evaluation, export and `init_from` take.

    Parameters are stored in the widest dtype that the model has them in, without loss. With several
    processes all must call this, on a model in its training form and with one path that all see.

    Args:
      model: from `load_trainable`, `load_model` or the model classes, trained or edited.
      path: a folder; made if it does not exist, and several steps may be saved to it.
      tokenizer: `bytes`, `gpt2` or a ranks file, for decoding; by default what a decoder's
        checkpoint named.
      step: the checkpoint's number.

    Raises:
      CheckpointError: the folder has this step or a later one already, or a name in which
        checkpoints are not found again.
      FileNotFoundError, ValueError: no such tokenizer.
      ValueError: a decoder of several devices whose up-projections are part of other weights
        (`attention.absorbed`).
    """
    name = _tokenizer_name(model, tokenizer)
    steps = checkpoints.finished_steps(path)
    if steps and steps[-1] >= step:
        raise CheckpointError(
            f"{path} has step {steps[-1]} already; choose another folder or a later step"
        )
    params = _params(model)
    dtype = jnp.result_type(*jax.tree.leaves(params)).name
    config = dataclasses.replace(model.config, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    with checkpoints.make_manager(path) as manager:
        described = checkpoints.describe(config, name)
        checkpoints.save(manager, step, params=params, model=described)
    if jax.process_index() == 0:
        keep_ranks(name, paths.path(path) / RANKS_FILE)


def _params(model: Model | Decoder) -> dict[str, Any]:
    if isinstance(model, Decoder):
        return _training_params(model)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _training_params(decoder: Decoder) -> dict:
    """The training form's parameters, a nested dict with layers stacked, in the weights' dtypes.

    What a recipe does is to place numbers. It is shown their numbers, from 1 on, so that what it
    makes says where each came from; 0 is filling. An `absorbed` form's recipes multiply.
    """
    if joined.is_absorbed(decoder.config, decoder.mesh):
        raise ValueError(
            "this decoder has its up-projections in other weights, as its mesh of several devices "
            "wants them, and cannot be saved; save what load_trainable gives, or load_model on one "
            "device"
        )
    _, shapes = models.structure(decoder.config, decoder.mesh)
    stacked = traverse_util.flatten_dict(shapes["layers"])
    layers = [
        traverse_util.flatten_dict(decoder.weights["layers"][i])
        for i in range(decoder.config.num_layers)
    ]
    found = {}
    for path, like in layers[0].items():
        sources, join = recipe(path, decoder.config, like)
        sizes = [math.prod(stacked[source].shape[1:]) for source in sources]
        ends = np.cumsum(sizes)
        numbers = [
            1 + np.arange(end - size, end).reshape(stacked[source].shape[1:])
            for source, size, end in zip(sources, sizes, ends, strict=True)
        ]
        origin = np.asarray(jax.jit(join)(*numbers)).ravel()
        place = np.zeros(1 + ends[-1], np.int64)
        place[origin] = np.arange(origin.size)
        flat = np.stack([np.asarray(layer[path]).ravel()[place[1:]] for layer in layers])
        for source, part in zip(sources, np.split(flat, ends[:-1], axis=1), strict=True):
            where = stacked[source]
            found[source] = jax.device_put(part.reshape(where.shape), where.sharding)
    modules = {name: decoder.weights[name] for name in ("embed", "final_norm")}
    return modules | {"layers": traverse_util.unflatten_dict(found)}


def _tokenizer_name(model: Model | Decoder, given: str | Path | None) -> str | None:
    if given is None:
        return model.vocabulary.tokenizer if isinstance(model, Decoder) else None
    return str(given) if str(given) in _NAMED else get_tokenizer(given).name
