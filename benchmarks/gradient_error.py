"""How far the gradients of a bfloat16 step are from those of float32.

    python -m benchmarks.gradient_error [--models=mlra_4,gqa] [--layers=20] [--length=128]
        [--seeds=3] [--published] [--mesh=fsdp=2] [--remat=none,block] [--kernels=auto,reference]
        [--chunks=64] [--output=FILE.json]

A model of the published shape at small widths, normal weights, tokens of a Zipf law. The error of a
tensor is the norm of the difference over the norm of the float32 gradient; the table has that of
the embedding, median and maximum over all tensors of all layers, and that of all gradients as one
vector, each the median over seeds. "Rounded" rows say what a step would give whose products leave
weights' gradients in bfloat16, as they are summed over devices then.

With `--published` the widths, heads and vocabulary are those of the presets of these names, as many
layers as asked for. The float32 gradients are those of one device and plain attention; the others
those of `--mesh` with every pair of `--remat` and `--kernels` (`attention_kernel`) and every number
of positions in a chunk of the loss (`--chunks`).
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.config import GroupedConfig, LatentConfig, ModelConfig, TensorProductConfig, preset
from mlra_jax.training.step import loss_sum

_LATENT = dict(num_heads=8, latent_dim=128, q_latent_dim=96, nope_dim=32, rope_dim=16)
ATTENTIONS = {
    "mlra_4": LatentConfig(groups=1, branches=4, **_LATENT),
    "mla": LatentConfig(groups=1, branches=1, **_LATENT),
    "gqa": GroupedConfig(8, 2, 32),
    "tpa": TensorProductConfig(8, 32, 2, 6),
}
STREAMS = {"bfloat16": False, "float32": True}


ROWS = 4

Gradients = dict[str, jax.Array]


def gradients(config: ModelConfig, mesh: Mesh, seed: int, chunk: int) -> Gradients:
    """Of the mean loss by name, float32 on the mesh's first device; the layers' stacks cut."""
    rng = np.random.default_rng(seed)
    model = models.create(config, mesh, seed=seed)
    definition, params = nnx.split(model)
    weights = 1 / np.arange(1, config.vocab_size + 1)
    shape = (ROWS, config.context_length + 1)
    tokens = rng.choice(config.vocab_size, shape, p=weights / weights.sum()).astype(np.int32)
    where = sharding.named(mesh, "batch", "length")
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch = {name: jax.device_put(x, where) for name, x in batch.items()}

    def loss(params, batch):
        return loss_sum(nnx.merge(definition, params), batch, chunk) / batch["targets"].size

    found = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params, batch))
    named = {}
    for path, value in jax.tree.flatten_with_path(found)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        value = jax.device_put(value, mesh.devices.flat[0]).astype(jnp.float32)
        parts = enumerate(value) if name.startswith("layers.") else [("", value)]
        named |= {f"{name}{i}": part for i, part in parts}
    return named


@jax.jit
def _squares(got: Gradients, want: Gradients) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By name, the sum of the squares of the differences and of what is wanted."""
    return {n: (jnp.sum((got[n] - g) ** 2), jnp.sum(g**2)) for n, g in want.items()}


def errors(got: Gradients, want: Gradients) -> dict[str, float]:
    """Of the embedding, median and maximum over all tensors, and of all as one vector."""
    squares = jax.device_get(_squares(got, want))
    relative = {n: np.sqrt(difference / of) for n, (difference, of) in squares.items()}
    difference, of = np.sum(list(squares.values()), axis=0)
    return dict(
        embedding=float(relative["embed.embedding"]),
        median=float(np.median(list(relative.values()))),
        maximum=float(max(relative.values())),
        all=float(np.sqrt(difference / of)),
    )


def config_of(name: str, flags: argparse.Namespace) -> ModelConfig:
    """In float32, everything kept, in plain JAX."""
    shape = dict(num_layers=flags.layers, context_length=flags.length, zero_init=False)
    how = dict(dtype="float32", remat="none", unroll=1, attention_kernel="reference")
    if flags.published:
        return preset(name, **shape, **how)
    small = dict(vocab_size=512, embed_dim=256, mlp_dim=512)
    return ModelConfig(ATTENTIONS[name], **small, **shape, **how)


def table(name: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    config, mesh = config_of(name, flags), sharding.parse_mesh(flags.mesh)
    one = sharding.make_mesh(devices=mesh.devices.flat[:1])
    kept, kernels = flags.remat.split(","), flags.kernels.split(",")
    ways = list(itertools.product(STREAMS, kept, kernels, map(int, flags.chunks.split(","))))
    found: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for seed in range(flags.seeds):
        want = gradients(config, one, seed, flags.length)
        for stream, remat, kernel, chunk in ways:
            how = dict(dtype="bfloat16", remat=remat, attention_kernel=kernel, unroll=0)
            narrow = dataclasses.replace(config, float32_stream=STREAMS[stream], **how)
            got = gradients(narrow, mesh, seed, chunk)
            rounded = {n: g.astype(jnp.bfloat16).astype(jnp.float32) for n, g in got.items()}
            for is_rounded, gradient in ((False, got), (True, rounded)):
                row = (stream, remat, kernel, chunk, is_rounded)
                found.setdefault(row, []).append(errors(gradient, want))
    names = ("stream", "remat", "kernel", "chunk", "rounded")
    return [
        dict(model=name, mesh=flags.mesh, layers=flags.layers)
        | dict(zip(names, row, strict=True))
        | {key: statistics.median(e[key] for e in rows) for key in rows[0]}
        for row, rows in found.items()
    ]


def line(row: dict[str, Any]) -> str:
    kept = "rounded to bfloat16" if row["rounded"] else "float32"
    numbers = (f"{100 * row[k]:.2f}%" for k in ("embedding", "median", "maximum", "all"))
    how = (row["mesh"], row["layers"], row["remat"], row["kernel"], row["chunk"], row["stream"])
    return f"| {' | '.join(map(str, (row['model'], *how, kept, *numbers)))} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_error",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default="mlra_4,gqa", help=f"of {', '.join(ATTENTIONS)}")
    parser.add_argument("--published", action="store_true", help="at the presets' own widths")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--length", type=int, default=128, help="positions of a sequence")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mesh", default="", help="of the bfloat16 step, as in fsdp=2")
    parser.add_argument("--remat", default="none", help="values of model.remat")
    parser.add_argument("--kernels", default="auto", help="values of model.attention_kernel")
    parser.add_argument("--chunks", default="64", help="positions in a chunk of the loss")
    parser.add_argument("--output", type=Path, help="JSON, written after every model")
    flags = parser.parse_args()
    device = jax.devices()[0].device_kind
    result: dict[str, Any] = dict(jax=jax.__version__, device=device, rows=[])
    result["arguments"] = [a for a in sys.argv[1:] if not a.startswith("--output")]
    print("| model | mesh | layers | remat | kernel | chunk | stream | weights' gradients "
          "| embedding | median | maximum | all |")  # fmt: skip
    print(f"|{'---|' * 12}")
    for name in flags.models.split(","):
        rows = table(name, flags)
        print("\n".join(map(line, rows)), flush=True)
        result["rows"] += rows
        if flags.output:
            flags.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
