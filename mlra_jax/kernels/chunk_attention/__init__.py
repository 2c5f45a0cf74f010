"""Attention of a chunk of a prompt to what came before it, and to itself."""

from mlra_jax.kernels.chunk_attention.api import chunk_attention

__all__ = ["chunk_attention"]
