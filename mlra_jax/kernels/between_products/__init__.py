"""What lies between the products of a decoding step: sums, norms, rotation, cache writes."""

from mlra_jax.kernels.between_products.mosaic_gpu import (
    enter,
    enters,
    sum_and_norm,
    summands,
    sums,
    turn,
    turning,
    turns,
)

__all__ = ["enter", "enters", "sum_and_norm", "summands", "sums", "turn", "turning", "turns"]
