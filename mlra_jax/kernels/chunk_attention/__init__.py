"""Attention of a chunk of a prompt to what came before it, and to itself."""

from mlra_jax.kernels.chunk_attention.api import WIDEST, chunk_attention

__all__ = ["WIDEST", "chunk_attention"]
