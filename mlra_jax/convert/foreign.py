"""What trainers leave around the released names in weight files, and does no harm."""

import re
from collections.abc import Iterable

import numpy as np

from mlra_jax.convert.errors import CheckpointFileError

# torch.compile and DistributedDataParallel put these before every name, in either order.
_PREFIXES = ("_orig_mod.", "module.")
# Tables that follow from a model's sizes. What is called `weight` is learned, wherever it is.
_BUFFER = re.compile(
    r"(.*\.)?(inv_freq|(cos|sin)_cached|((attn|attention|causal)_)?mask|masked_bias|tril)"
    r"|(.*\.)?attn\.bias|(.*\.)?rotary[^.]*(\..*)?"
)
_ROPE_BASE = 10000.0


def plain_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The names without the prefixes that all of them have.

    Returns:
      Plain name to the one in the file, and notes for the user, a line each.
    """
    plain, removed = {name: name for name in names}, ""
    while found := next((p for p in _PREFIXES if all(n.startswith(p) for n in plain)), None):
        if not plain:
            break
        plain = {name.removeprefix(found): stored for name, stored in plain.items()}
        removed += found
    notes = [f"every tensor's name begins with {removed}; read without it"] if removed else []
    return plain, notes


def is_buffer(name: str) -> bool:
    """Whether a tensor is a mask or a rotary table: in no released file, and never learned."""
    return bool(_BUFFER.fullmatch(name)) and not name.endswith(".weight")


def check_frequencies(name: str, values: np.ndarray) -> None:
    """Raises CheckpointFileError if rotary frequencies are not those the released models have.

    Without them the model would be computed with other positions than it was trained with.
    """
    if not name.endswith("inv_freq") or values.ndim != 1:
        return
    expected = _ROPE_BASE ** -(np.arange(len(values)) / len(values))
    # bfloat16 keeps eight bits.
    if not np.allclose(values.astype(np.float64), expected, rtol=1e-2, atol=0):
        raise CheckpointFileError(
            f"tensor {name}: rotary frequencies of another base than {_ROPE_BASE:.0f}, which the "
            "released models have"
        )
