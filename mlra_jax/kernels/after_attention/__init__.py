"""A layer of a decoding step from its attention's answer to what the next one asks its cache."""

from mlra_jax.kernels.after_attention.api import AfterAttention, Attention, Layer, supports
from mlra_jax.kernels.after_attention.plan import SLAB, Shape

__all__ = ["SLAB", "AfterAttention", "Attention", "Layer", "Shape", "supports"]
