"""A converted model's logits against those that others computed with the released weights."""

import dataclasses
import zipfile

import jax
import numpy as np
from flax import nnx

from mlra_jax import checkpoints, sharding
from mlra_jax.config import ModelConfig
from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.model import structure
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike

TOLERANCE = 1e-3
"""Of the difference's norm to the logits'. In float32 two programs agree to about 1e-5; logits of a
bfloat16 model are 1e-2 away."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a file says that the model gives."""

    path: AnyPath
    tokens_BT: np.ndarray
    logits_BTV: np.ndarray


def read_expected(path: PathLike, config: ModelConfig) -> Expected:
    """Reads `tokens` (whole numbers [B, T]) and `logits` ([B, T, V]) of an .npz file.

    Raises CheckpointFileError: no such file, other arrays, or not of this model's vocabulary.
    """
    path = paths.path(path)
    try:
        # Never an object of Python's: reading one would run code.
        with path.open("rb") as data, np.load(data, allow_pickle=False) as file:
            tokens, logits = file["tokens"], file["logits"]
    except (OSError, KeyError, ValueError, AttributeError, TypeError, zipfile.BadZipFile):
        raise CheckpointFileError(
            f"--expected={path} is no .npz file with arrays `tokens` and `logits`"
        ) from None
    whole = np.issubdtype(tokens.dtype, np.integer) and tokens.ndim == 2 and tokens.size
    if not whole or logits.shape != (*tokens.shape, config.vocab_size):
        raise CheckpointFileError(
            f"--expected={path} has tokens {list(tokens.shape)} and logits {list(logits.shape)}; "
            f"this model takes whole numbers [B, T] and gives [B, T, {config.vocab_size}]"
        )
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise CheckpointFileError(
            f"--expected={path} has a token outside 0 to {config.vocab_size - 1}"
        )
    return Expected(path, tokens.astype(np.int32), logits.astype(np.float64))


def check_logits(folder: AnyPath, expected: Expected) -> float:
    """How far the logits of the checkpoint in `folder`, computed in float32, are from those.

    Raises CheckpointFileError if it is more than `TOLERANCE`.
    """
    found = checkpoints.open_checkpoint(folder)
    config = dataclasses.replace(found.model, param_dtype="float32", dtype="float32")
    definition, shapes = structure(config, sharding.make_mesh())
    params = found.restore("params", shapes)
    logits = jax.jit(lambda params, tokens: nnx.merge(definition, params)(tokens))
    # A row at a time: logits are large.
    rows = [np.asarray(logits(params, row[None])[0]) for row in expected.tokens_BT]
    wanted = expected.logits_BTV
    error = float(np.linalg.norm(np.stack(rows) - wanted) / np.linalg.norm(wanted))
    if not error <= TOLERANCE:
        raise CheckpointFileError(
            f"the logits are {error:.1e} away from those of --expected={expected.path}, more than "
            f"{TOLERANCE:g}: another variant (--variant), or other weights; nothing written"
        )
    return error
