"""Released PyTorch weights to Orbax checkpoints, on hosts without PyTorch."""

from mlra_jax.convert.conversion import convert
from mlra_jax.convert.errors import CheckpointFileError

__all__ = ["CheckpointFileError", "convert"]
