"""cuDNN's causal attention by the function that takes values of another width than keys.

That of `jax.nn` refuses those. This one is JAX's own: `api` asks first whether it is there.
"""

from typing import Any

import jax


def attend(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJV: jax.Array, *, scale: float, **how: Any
) -> Any:
    """As `api.causal_attention`; `how` is the function's own."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    causal = library.MaskType.CAUSAL
    return library.dot_product_attention(
        q_BTHK, k_BTJK, v_BTJV, scale=scale, mask_type=causal, **how
    )
