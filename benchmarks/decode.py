"""Times whole decoding steps of the published 2.9B models beside what their bytes take.

    python -m benchmarks.decode [--mesh=tensor=2] [--models=mlra_4,mla] [--points=1x2K,8x128K]
                                [--kernels] [--output=FILE.json]

A step is the compiled program that `generate` runs: embedding, layers, head, greedy draw; weights
and caches are random, which does not change the time. Steps follow each other as they do there, the
host one ahead; the median of several runs of 32 counts. The floor is one device's weights and cache
over the read bandwidth measured in the same process.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.limits import launch_seconds, random_pool, read_bandwidth
from benchmarks.profile import kernels
from mlra_jax import sharding
from mlra_jax.cache import Cache, round_capacity
from mlra_jax.config import preset
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.generation import Sampling, programs
from mlra_jax.generation.sampling import draws

_K = 1024
_STEPS, _RUNS = 32, 5
MODELS = "mlra_4,mlra_2,mla,gla_2,gqa"
POINTS = "1x2K,1x16K,1x128K,8x2K,8x128K,32x2K,32x32K,128x1K,128x4K"


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "where"))
def _random(key, shape, dtype, where):
    x = 0.02 * jax.random.normal(key, shape, dtype)
    return jax.lax.with_sharding_constraint(x, where)


def random_tree(shapes):
    """Random numbers in the shapes and places of a tree of `jax.ShapeDtypeStruct`s."""
    leaves, tree = jax.tree.flatten(shapes)
    seed = time.time_ns() % 2**31
    keys = (jax.random.key(seed + i, impl="unsafe_rbg") for i in range(len(leaves)))
    made = [_random(k, x.shape, x.dtype, x.sharding) for k, x in zip(keys, leaves, strict=True)]
    return jax.block_until_ready(jax.tree.unflatten(tree, made))


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a tree of arrays or shapes."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def measure(decoder: Decoder, batch: int, context: int, read: float, profile: bool) -> dict:
    """One point: time of a step, floor, compile time; with `profile` its kernels too."""
    config, mesh = decoder.config, decoder.mesh
    # The caches fill up around the context, which is their mean.
    shapes = abstract_cache(config, mesh, batch, round_capacity(context + _RUNS * _STEPS, mesh))
    settings, num_tokens = draws(Sampling(), 0, batch), decoder.vocabulary.num_tokens
    tokens = jax.device_put(np.arange(batch, dtype=np.int32), sharding.named(mesh))
    began = time.perf_counter()
    step = programs.step.lower(decoder, shapes, tokens).compile()
    compiling = time.perf_counter() - began

    begin = context - _RUNS * _STEPS // 2
    lengths = jnp.full(batch, begin, jnp.int32, device=shapes.lengths.sharding)
    cache = Cache(random_tree(shapes.layers), lengths)

    def run(steps=_STEPS):
        nonlocal cache, tokens
        for n in range(steps):
            logits, cache = step(decoder, cache, tokens)
            tokens = programs.draw(logits, settings, np.int32(n), num_tokens=num_tokens)
        return tokens

    jax.block_until_ready(run(4))
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - began) / _STEPS)
    share = context / (context + _RUNS * _STEPS)
    held = bytes_per_device(decoder.weights) + share * bytes_per_device(shapes.layers)
    milliseconds = 1e3 * statistics.median(seconds)
    row = dict(
        batch=batch,
        context=context,
        milliseconds=milliseconds,
        spread=[1e3 * min(seconds), 1e3 * max(seconds)],
        floor=1e3 * held / read,
        ratio=milliseconds * read / held / 1e3,
        tokens_per_second=batch / milliseconds * 1e3,
        compile_seconds=compiling,
    )
    if profile:
        found = kernels(lambda: run(1))
        row["kernels"] = sum(k.launches for k in found)
        row["busy_milliseconds"] = sum(k.microseconds for k in found) / 1e3
        row["longest"] = [dataclasses.astuple(k) for k in found[:24]]
    statistics_of = jax.devices()[0].memory_stats() or {}
    row["peak_GB"] = statistics_of.get("peak_bytes_in_use", 0) / 1e9
    return row


def parse_points(text: str) -> list[tuple[int, int]]:
    """(batch, context) pairs of `1x2K,8x128K`."""
    pairs = []
    for point in text.split(","):
        batch, _, context = point.partition("x")
        pairs.append((int(batch), int(context.rstrip("K")) * (_K if "K" in context else 1)))
    return pairs


def line(row: dict) -> str:
    name = (
        f"{row['model']:8} {row['mesh'] or 'one device':20} {row['batch']:4} x {row['context']:7}"
    )
    if "error" in row:
        return f"{name}  {row['error'][:120]}"
    return (
        f"{name} {row['milliseconds']:8.3f} ms {row['floor']:8.3f} floor {row['ratio']:5.2f}x "
        f"{row['tokens_per_second']:9.0f} tok/s  compile {row['compile_seconds']:5.1f} s"
        + (f"  {row['kernels']:.0f} kernels" if "kernels" in row else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--mesh", default="", help="as in tensor=2; several with ; between")
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--points", default=POINTS, help="batch x context, commas between")
    parser.add_argument("--kernels", action="store_true", help="name the kernels of each point")
    parser.add_argument("--output", type=Path, help="JSON, written after every point")
    flags = parser.parse_args()
    device = jax.devices()[0]
    pool = random_pool(0)
    read = read_bandwidth(pool, launch_seconds())["read"]
    del pool
    print(f"{device.device_kind}, JAX {jax.__version__}, reads {read / 1e12:.2f} TB/s", flush=True)
    result = dict(device=device.device_kind, jax=jax.__version__, read=read, rows=[])
    models, meshes, points = flags.models.split(","), flags.mesh.split(";"), flags.points
    bar = tqdm(total=len(models) * len(meshes) * len(parse_points(points)), file=sys.stderr)
    for text in meshes:
        mesh = sharding.parse_mesh(text)
        for name in models:
            decoder = random_tree(abstract_decoder(preset(name), mesh))
            for batch, context in parse_points(points):
                row = dict(model=name, mesh=text, batch=batch, context=context)
                try:
                    row |= measure(decoder, batch, context, read, flags.kernels)
                except Exception as error:  # Out of memory at one point is no end of the others.
                    row["error"] = " ".join(str(error).split())[:300]
                result["rows"].append(row)
                print(line(row), flush=True)
                bar.update()
                if flags.output:
                    flags.output.write_text(json.dumps(result, indent=1) + "\n")
            del decoder
    return 0


if __name__ == "__main__":
    sys.exit(main())
