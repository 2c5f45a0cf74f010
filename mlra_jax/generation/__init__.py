"""Text from a model: padding, prefill, the decode loop, sampling."""

from mlra_jax.generation.loop import Stream, generate
from mlra_jax.generation.sampling import Sampling

__all__ = ["Sampling", "Stream", "generate"]
