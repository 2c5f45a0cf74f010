"""How far the gradients of a bfloat16 step are from those of float32, by what is kept in float32.

    python -m benchmarks.gradient_error [--models=mlra_4,gqa] [--layers=20] [--seeds=3]
        [--output=FILE.json]

A model of the published shape at small widths, normal weights, tokens of a Zipf law, on a CPU. The
error of a tensor is the norm of the difference over the norm of the float32 gradient; the table has
that of the embedding, and median and maximum over all tensors of all layers, each the median over
seeds. "Rounded" rows say what a step would give whose products leave weights' gradients in
bfloat16, as they are summed over devices then.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.config import GroupedConfig, LatentConfig, ModelConfig, TensorProductConfig
from mlra_jax.training.step import loss_sum

_LATENT = dict(num_heads=8, latent_dim=128, q_latent_dim=96, nope_dim=32, rope_dim=16)
ATTENTIONS = {
    "mlra_4": LatentConfig(groups=1, branches=4, **_LATENT),
    "mla": LatentConfig(groups=1, branches=1, **_LATENT),
    "gqa": GroupedConfig(8, 2, 32),
    "tpa": TensorProductConfig(8, 32, 2, 6),
}
STREAMS = {"bfloat16": False, "float32": True}


def gradients(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Of the mean loss by name; float64, the layers' stacks cut."""
    mesh, rng = sharding.make_mesh(), np.random.default_rng(seed)
    definition, _ = models.structure(config, mesh)
    params = models.fresh_params(config, mesh, seed)
    weights = 1 / np.arange(1, config.vocab_size + 1)
    shape = (4, config.context_length + 1)
    tokens = rng.choice(config.vocab_size, shape, p=weights / weights.sum()).astype(np.int32)
    batch = {"inputs": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}

    def loss(params):
        return loss_sum(nnx.merge(definition, params), batch, 64) / batch["targets"].size

    found, _ = jax.tree.flatten_with_path(jax.device_get(jax.jit(jax.grad(loss))(params)))
    named = {}
    for path, value in found:
        name, value = jax.tree_util.keystr(path, simple=True, separator="."), np.float64(value)
        parts = enumerate(value) if name.startswith("layers.") else [("", value)]
        named |= {f"{name}{i}": part for i, part in parts}
    return named


def errors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """Of the embedding, and median and maximum over all tensors."""
    relative = {n: np.linalg.norm(got[n] - g) / np.linalg.norm(g) for n, g in want.items()}
    return dict(
        embedding=float(relative["embed.embedding"]),
        median=float(np.median(list(relative.values()))),
        maximum=float(max(relative.values())),
    )


def table(name: str, layers: int, seeds: int) -> list[dict[str, Any]]:
    config = ModelConfig(
        ATTENTIONS[name],
        vocab_size=512,
        num_layers=layers,
        embed_dim=256,
        mlp_dim=512,
        context_length=128,
        zero_init=False,
        dtype="float32",
        remat="none",
        unroll=1,
    )
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for seed in range(seeds):
        want = gradients(config, seed)
        for stream, wide in STREAMS.items():
            narrow = dataclasses.replace(config, dtype="bfloat16", float32_stream=wide)
            got = gradients(narrow, seed)
            rounded = {n: np.float64(g.astype(jnp.bfloat16)) for n, g in got.items()}
            found.setdefault((stream, False), []).append(errors(got, want))
            found.setdefault((stream, True), []).append(errors(rounded, want))
    return [
        dict(model=name, layers=layers, stream=stream, rounded=rounded)
        | {key: statistics.median(e[key] for e in rows) for key in rows[0]}
        for (stream, rounded), rows in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_error",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default="mlra_4,gqa", help=f"of {', '.join(ATTENTIONS)}")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON")
    flags = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| model | layers | stream | weights' gradients | embedding | median | maximum |")
    print("|---|---|---|---|---|---|---|")
    for name in flags.models.split(","):
        for row in table(name, flags.layers, flags.seeds):
            kept = "rounded to bfloat16" if row["rounded"] else "float32"
            numbers = " | ".join(f"{100 * row[k]:.2f}%" for k in ("embedding", "median", "maximum"))
            print(
                f"| {name} | {row['layers']} | {row['stream']} | {kept} | {numbers} |", flush=True
            )
            rows.append(row)
    if flags.output:
        result = dict(jax=jax.__version__, platform="cpu", rows=rows)
        flags.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
