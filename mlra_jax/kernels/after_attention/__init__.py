"""A layer of a decoding step from its attention's answer to the next attention's entry."""

from mlra_jax.kernels.after_attention.api import AfterAttention, Layer, supports
from mlra_jax.kernels.after_attention.plan import SLAB, Shape

__all__ = ["SLAB", "AfterAttention", "Layer", "Shape", "supports"]
