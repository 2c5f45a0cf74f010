"""What is kept between decode steps: how it lies, and how it is written."""

from mlra_jax.cache.contiguous import from_prompt, write
from mlra_jax.cache.layout import Cache, bounds, round_capacity, shares, slots
from mlra_jax.cache.policy import Policy, parse_policy

__all__ = [
    "Cache",
    "Policy",
    "bounds",
    "from_prompt",
    "parse_policy",
    "round_capacity",
    "shares",
    "slots",
    "write",
]
