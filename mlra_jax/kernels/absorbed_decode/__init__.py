"""Attention of a few queries over a cache of latents that serve as keys and as values."""

from mlra_jax.kernels.absorbed_decode.api import (
    absorbed_decode,
    autotune,
    has_kernel,
    leaves_parts,
)
from mlra_jax.kernels.absorbed_decode.problem import Problem
from mlra_jax.kernels.softmax import merge_partials
from mlra_jax.kernels.tuning import load_tuned, save_tuned

__all__ = [
    "Problem",
    "absorbed_decode",
    "autotune",
    "has_kernel",
    "leaves_parts",
    "load_tuned",
    "merge_partials",
    "save_tuned",
]
