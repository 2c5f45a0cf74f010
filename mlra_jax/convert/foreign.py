"""What trainers leave around the released names in weight files, and does no harm."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mlra_jax.convert.errors import CheckpointFileError

# torch.compile, DistributedDataParallel, DeepSpeed and Lightning put these before every name.
_PREFIXES = ("_orig_mod.", "module.", "_forward_module.", "model.")
# Tables that follow from a model's sizes. What is called `weight` is learned, wherever it is.
_BUFFER = re.compile(
    r"(.*\.)?(inv_freq|(cos|sin)_cached|((attn|attention|causal)_)?mask|masked_bias|tril)"
    r"|(.*\.)?attn\.bias|(.*\.)?rotary[^.]*(\..*)?"
)
_ROPE_BASE, _NORM_EPS = 10000.0, 1e-6
# Whose names these are, for messages: what one of them has in it, and which model that is.
_OTHERS = (
    ("lora_", "an adapter (LoRA), which must be merged into its model first"),
    ("c_attn.", "GPT-2 or nanoGPT"),
    ("model.layers.", "a model of the Llama kind in the names of transformers"),
    ("gpt_neox.", "GPT-NeoX"),
)


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


def rope_base(config: Mapping[str, Any]) -> float:
    """What `rope_theta` of config.json says, or the released models' 10000.

    Raises CheckpointFileError for what is no number, and for scaled frequencies.
    """
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = nested if isinstance(nested, Mapping) else {"rope_type": nested}
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default":
        raise CheckpointFileError(
            f"config.json: rotary frequencies are scaled ({kind!r:.40}), which these models are not"
        )
    return _number({"rope_theta": nested.get("rope_theta")} | config, "rope_theta", _ROPE_BASE)


def norm_eps(config: Mapping[str, Any]) -> float:
    """What `rms_norm_eps` of config.json says, or the released models' 1e-6."""
    return _number(config, "rms_norm_eps", _NORM_EPS)


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = default if config.get(name) is None else config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointFileError(f"config.json: {name}={value!r:.40} is no positive number")
    return float(value)


def whose(names: Iterable[str]) -> str:
    """The first names, and whose they probably are; for a message."""
    names = sorted(names)
    owner = next((who for part, who in _OTHERS if any(part in n for n in names)), "another model")
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(name[:80] for name in names[:3])}{more}, as of {owner}"


def check_frequencies(name: str, values: np.ndarray, base: float) -> None:
    """Raises CheckpointFileError if rotary frequencies are not those of the model's base.

    Without them the model would be computed with other positions than it was trained with.
    """
    if not name.endswith("inv_freq") or values.ndim != 1:
        return
    expected = base ** -(np.arange(len(values)) / len(values))
    # bfloat16 keeps eight bits.
    if not np.allclose(values.astype(np.float64), expected, rtol=1e-2, atol=0):
        raise CheckpointFileError(
            f"tensor {name}: rotary frequencies of another base than {base:.0f}; say theirs with "
            "rope_theta in config.json"
        )
