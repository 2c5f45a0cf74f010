"""Products of a few rows with large weights, alone or as a chain in one launch."""

from mlra_jax.kernels.decode_projections.api import chain, has_kernel, product
from mlra_jax.kernels.decode_projections.steps import (
    Heads,
    Step,
    prepare,
    prepare_gated,
    prepare_heads,
)

__all__ = [
    "Heads",
    "Step",
    "chain",
    "has_kernel",
    "prepare",
    "prepare_gated",
    "prepare_heads",
    "product",
]
