"""What is kept between decode steps: how it lies, and how it is written."""

from mlra_jax.cache.contiguous import from_prompt, write
from mlra_jax.cache.layout import Cache, bounds, round_capacity, shares

__all__ = ["Cache", "bounds", "from_prompt", "round_capacity", "shares", "write"]
