"""A layer of a decoding step from its attention's answer to the next attention's entry."""

from mlra_jax.kernels.after_attention.api import SLAB, AfterAttention, Layer, Shape, supports

__all__ = ["SLAB", "AfterAttention", "Layer", "Shape", "supports"]
