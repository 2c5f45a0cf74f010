"""Causal attention over whole sequences: training and prefill."""

from mlra_jax.kernels.causal_attention.api import causal_attention, implementation_for
from mlra_jax.kernels.causal_attention.latent import implementation_for as latents_for
from mlra_jax.kernels.causal_attention.latent import latent_attention
from mlra_jax.kernels.causal_attention.shared import with_shared

__all__ = [
    "causal_attention",
    "implementation_for",
    "latent_attention",
    "latents_for",
    "with_shared",
]
