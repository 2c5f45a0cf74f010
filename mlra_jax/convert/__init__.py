"""Released PyTorch weights to Orbax checkpoints, on hosts without PyTorch."""

from mlra_jax.convert.archive import CheckpointFileError
from mlra_jax.convert.conversion import convert

__all__ = ["CheckpointFileError", "convert"]
