"""How much of the cache each device holds, for every variant and every way to split it.

`python -m mlra_jax.costs` prints the table.
"""

import math
import sys
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax.attention import mechanism
from mlra_jax.command import Parser, run
from mlra_jax.config import (
    NEIGHBOURS,
    VARIANTS,
    AttentionConfig,
    ConfigError,
    LatentConfig,
    ModelConfig,
    preset,
)
from mlra_jax.sharding import BATCH, mesh_axes, size

SPLITS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 2), (4, 2))


def cache_values_per_device(
    config: ModelConfig, *, batch: int, capacity: int, tensor: int = 1, context: int = 1
) -> int:
    """Values that one device caches per layer for `batch` rows of `capacity` positions.

    Raises ConfigError when the variant cannot be split so.
    """
    module, ways = mechanism(config.attention), {"tensor": tensor, "context": context}
    shapes = module.cache_shapes(config.attention, batch, capacity, tensor)
    total = 0
    for name, shape in shapes.items():
        over = mesh_axes(*module.cache_axes[name])
        split = [math.prod(ways.get(a, 1) for a in axes) for axes in over]
        total += math.prod(-(-n // s) for n, s in zip(shape, split, strict=True))
    return total


def cache_bytes_per_device(
    config: ModelConfig, *, batch: int, capacity: int, tensor: int = 1, context: int = 1
) -> int:
    """Bytes that one device caches in all layers, in the compute dtype."""
    values = cache_values_per_device(
        config, batch=batch, capacity=capacity, tensor=tensor, context=context
    )
    return values * config.num_layers * jnp.dtype(config.execution.dtype).itemsize


def table(names: Sequence[str], tokens: int, batch: int) -> str:
    """GiB per device of the published models; in brackets units of d_h a token and layer."""
    heading = [f"{t} x {c}" if t > 1 and c > 1 else f"{max(t, c)}" for t, c in SPLITS]
    lines = [
        f"Cache per device in GiB, {batch} x {tokens} tokens, bfloat16; "
        "in brackets values a token and layer in units of d_h = 128.",
        "",
        f"{'':20}{'tensor':^52}{'context':^39}{'tensor x context':^26}",
        f"{'ways':20}" + "".join(f"{h:>13}" for h in heading),
    ]
    for name in names:
        config, cells = preset(name), []
        for tensor, context in SPLITS:
            size = dict(batch=batch, capacity=tokens, tensor=tensor, context=context)
            try:
                gib = cache_bytes_per_device(config, **size) / 2**30
                widths = cache_values_per_device(config, **size) / (batch * tokens * 128)
                cells.append(f"{gib:.2f} ({widths:.3g})")
            except ConfigError:
                cells.append("-")
        lines.append(f"{name:20}" + "".join(f"{c:>13}" for c in cells))
    return "\n".join(lines)


def training_bytes_per_device(
    config: ModelConfig,
    parameters: int,
    *,
    sequences: int,
    ways: int = 1,
    loss_chunk: int = 512,
    moment_dtype: str = "",
) -> int:
    """An estimate of what training needs on each device.

    Weights, gradients and two moments; each block's input, kept for the backward pass, and one
    block's intermediates (all blocks' where `remat` is `none` or `products`; `auto` counts as
    `block`, its least); the logits of a chunk, twice.

    Args:
      config: of the model.
      parameters: their number.
      sequences: that one device computes together.
      ways: devices that split the weights.
      loss_chunk: positions whose logits exist at a time.
      moment_dtype: of both moments; empty: that of the weights.
    """
    tokens = sequences * config.context_length
    attention = config.attention
    heads = attention.num_heads * (2 * attention.query_dim + 2 * attention.value_dim)
    inside = 4 * config.embed_dim + heads + 3 * config.mlp_dim
    keeps_all = config.execution.remat in ("none", "products")
    blocks = config.num_layers if keeps_all else 1
    kept = tokens * (config.num_layers * config.embed_dim + blocks * inside)
    logits = 2 * 4 * sequences * min(loss_chunk, config.context_length) * config.vocab_size
    weight, moment = (
        jnp.dtype(name).itemsize
        for name in (config.param_dtype, moment_dtype or config.param_dtype)
    )
    state = 2 * parameters * (weight + moment)
    return state // ways + kept * jnp.dtype(config.execution.dtype).itemsize + logits


# Dense bfloat16 products per second of one device, by the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def branches_of(attention: AttentionConfig) -> int:
    """Softmaxes of a query head."""
    return attention.num_branches if isinstance(attention, LatentConfig) else 1


def flops_per_token(config: ModelConfig, parameters: int) -> float:
    """Products and sums of one training token, forward and backward, recomputation not counted.

    6 per parameter, and for each layer the causal half of scores and weighted values, once per
    branch (paper, section 3).
    """
    attention = config.attention
    branches = branches_of(attention)
    widths = attention.num_heads * (attention.query_dim + attention.value_dim)
    scores = 6 * branches * config.context_length / 2 * widths
    return 6 * parameters + config.num_layers * scores


def peak_flops(device_kind: str) -> float | None:
    """Of one device in bfloat16, None if this table does not know it."""
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def describe_cache(config: ModelConfig, mesh: Mesh, batch: int, capacity: int) -> str:
    """Bytes per device of a decoding cache, beside what MLA of the same widths would hold.

    Args:
      config: of the model that decodes.
      mesh: on which it does.
      batch: rows over all devices.
      capacity: positions of a row over all devices.
    """
    ways = {axis: mesh.shape[axis] for axis in ("tensor", "context")}
    rows = batch // size(mesh, BATCH)
    held = cache_bytes_per_device(config, batch=rows, capacity=capacity, **ways)
    line = f"cache: {held:,} bytes per device ({batch} x {capacity} positions)"
    a = config.attention
    if isinstance(a, LatentConfig) and a.num_latents > 1:
        width = a.latent_dim + a.base_dim + a.rope_dim
        width *= jnp.dtype(config.execution.dtype).itemsize
        mla = rows * capacity // ways["context"] * width * config.num_layers
        line += f"; MLA would hold {mla:,}, {mla / held:.2f} times as much"
    return line


def main(argv: list[str] | None = None) -> int:
    """Prints the table; see `command.run` for the exit codes."""
    parser = Parser(
        "mlra_jax.costs",
        "What each device caches, by variant, neighbour and split.",
    )
    parser.add_argument("--tokens", type=int, default=131072, help="context length")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    flags = parser.parse_args(argv)
    if flags.tokens < 8 or flags.batch < 1:
        parser.error("--tokens must be at least 8 and --batch at least 1")
    return run(parser, lambda: print(table((*VARIANTS, *NEIGHBOURS), flags.tokens, flags.batch)))


if __name__ == "__main__":
    sys.exit(main())
