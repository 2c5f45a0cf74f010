"""What of a block the backward pass finds kept, and what it computes again.

| name | kept of each block | computed again |
|---|---|---|
| `none` | everything | nothing |
| `products` | its input, what matrix products and attention gave | what is element-wise |
| `attention` | its input, what attention gave | everything else |
| `block` | its input | everything |
| `offload` | as `attention`, in the memory of the host | everything else |

`auto`, where nobody has chosen one of them, is `block`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import Offloadable, checkpoint_name, checkpoint_policies

STREAM, ATTENTION = "stream", "attention"
"""Names of values: a block's input; what whole-sequence attention gave, and its log-sum-exp."""


def name_stream(x_BTD: jax.Array) -> jax.Array:
    """The same, named as a block's input."""
    return checkpoint_name(x_BTD, STREAM)


def checkpointed(block: Callable, remat: str, *, in_loop: bool) -> Callable:
    """`block` with a backward pass that finds kept what the policy says, one of `execution.REMAT`.

    `in_loop` says that forward and backward pass run in loops of their own, so that the compiler
    cannot take what is computed again for what was computed before.
    """
    if remat == "none":
        return block
    return jax.checkpoint(block, policy=_POLICIES[remat], prevent_cse=not in_loop)


def _attention(primitive: Any, *_: Any, **params: Any) -> bool:
    # cuDNN's log-sum-exp has no name: the call itself is kept.
    cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return cudnn or (primitive.name == "name" and params["name"] == ATTENTION)


def _offload(primitive: Any, *inputs: Any, **params: Any) -> Any:
    stream = primitive.name == "name" and params["name"] == STREAM
    if stream or _attention(primitive, *inputs, **params):
        return Offloadable(src="device", dst="pinned_host")
    return False


_POLICIES = {
    "auto": None,
    "block": None,
    "attention": _attention,
    "products": checkpoint_policies.save_from_both_policies(
        _attention, checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "offload": _offload,
}
