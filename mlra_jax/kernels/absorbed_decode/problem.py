"""What a kernel of absorbed decode is asked to do."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static about one call.

    Attributes:
      device_kind: as JAX names the device the call is compiled for ("NVIDIA H200", "TPU v5 lite").
      batch, queries, latents, heads, groups: B, T, L, H (per latent) and G (rotary query groups).
      width, rope: C and R.
      cache: S, the positions the cache has room for.
      dtype: of queries and cache, "bfloat16", "float16" or "float32".
    """

    device_kind: str
    batch: int
    queries: int
    latents: int
    heads: int
    groups: int
    width: int
    rope: int
    cache: int
    dtype: str

    @classmethod
    def of(
        cls, q_BTLHC: Any, q_rope_BTGHR: Any, latents_BSLC: Any, device_kind: str = ""
    ) -> "Problem":
        """The problem of a call with these arrays or `jax.ShapeDtypeStruct`s."""
        B, T, L, H, C = q_BTLHC.shape
        return cls(
            device_kind=device_kind,
            batch=B,
            queries=T,
            latents=L,
            heads=H,
            groups=q_rope_BTGHR.shape[2],
            width=C,
            rope=q_rope_BTGHR.shape[4],
            cache=latents_BSLC.shape[1],
            dtype=q_BTLHC.dtype.name,
        )
