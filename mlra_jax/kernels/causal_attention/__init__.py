"""Causal attention over whole sequences: training and prefill."""

from mlra_jax.kernels.causal_attention.api import causal_attention, implementation_for

__all__ = ["causal_attention", "implementation_for"]
