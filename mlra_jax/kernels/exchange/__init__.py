"""The residual stream of a decoding step whose additions several GPUs hold in parts."""

from mlra_jax.kernels.exchange.api import Exchange, supports

__all__ = ["Exchange", "supports"]
