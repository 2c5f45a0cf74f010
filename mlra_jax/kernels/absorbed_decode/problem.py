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
      rope_heads: 1 if the latents share their rotary keys, else L.
      values_only: whether the latents are values only, which no query asks.
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
    rope_heads: int = 1
    values_only: bool = False

    @classmethod
    def of(
        cls, q_BTLHC: Any, q_rope_BTGHR: Any, latents_BSLC: Any, k_rope: Any, device_kind: str = ""
    ) -> "Problem":
        """The problem of a call with these arrays or `jax.ShapeDtypeStruct`s."""
        B, T, G, H, R = q_rope_BTGHR.shape
        S, L, C = latents_BSLC.shape[1:]
        return cls(
            device_kind=device_kind,
            batch=B,
            queries=T,
            latents=L,
            heads=H,
            groups=G,
            width=C,
            rope=R,
            cache=S,
            dtype=latents_BSLC.dtype.name,
            rope_heads=k_rope.shape[2] if k_rope.ndim == 4 else 1,
            values_only=q_BTLHC is None,
        )
