"""Attention of a few queries over a cache of keys and values that groups of heads share."""

from mlra_jax.kernels.grouped_decode.api import grouped_decode

__all__ = ["grouped_decode"]
