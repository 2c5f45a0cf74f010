"""Training and decoding of a published 2.9B model on the devices of this host.

python -m benchmarks.end_to_end [--preset=mlra_4] [--mesh=tensor=4] [--output=FILE.json]

Random weights and tokens: neither changes the time. Prints tokens/s of whole training steps
(forward, backward, AdamW) and the time of a decoding step at several batches and contexts, beside
the time that reading the weights and the cache once would take at the read bandwidth measured in
the same run.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.limits import launch_seconds, random_pool, read_bandwidth
from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.config import preset
from mlra_jax.costs import cache_bytes_per_device
from mlra_jax.decoder import Decoder
from mlra_jax.generation import Sampling, Stream
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings
from mlra_jax.training.state import create_state
from mlra_jax.training.step import abstract_batch, make_train_step


def train(name: str, mesh, batch: int, steps: int = 10) -> dict:
    """Tokens a second of whole steps; the first compiles."""
    settings = MeshSettings(**dict(mesh.shape))
    data = DataSettings(source="random", global_batch=batch)
    experiment = Experiment(model=preset(name), data=data, mesh=settings, loss_chunk=1024)
    state, step = create_state(experiment, mesh), make_train_step(experiment, mesh)
    rng = np.random.default_rng(0)
    tokens = {
        n: jax.device_put(rng.integers(0, 50257, s.shape, np.int32), s.sharding)
        for n, s in abstract_batch(experiment, mesh).items()
    }
    started = time.perf_counter()
    state, metrics = step(state, tokens)
    loss = float(metrics["loss"])
    compiling = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, tokens)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - started) / steps
    return {
        "batch": batch,
        "tokens_per_second": experiment.tokens_per_step / seconds,
        "compile_seconds": compiling,
        "first_loss": loss,
        "last_loss": float(metrics["loss"]),
    }


def decode(model, batch: int, context: int, bandwidth: float, steps: int = 48) -> dict:
    """Milliseconds a step, beside reading weights and cache once."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 50257, (batch, 64)).tolist()
    stream = Stream(
        model, prompts, max_new_tokens=steps, sampling=Sampling(), cache_length=context + steps + 64
    )
    times = []
    for tokens in stream.from_filled(context):
        assert len(tokens) == batch
        times.append(time.perf_counter())
    milliseconds = 1000 * float(np.median(np.diff(times[8:])))
    config, ways = model.config, model.mesh.shape
    weights = sum(x.nbytes for x in jax.tree.leaves(model)) / model.mesh.size
    size = {axis: ways[axis] for axis in ("tensor", "context")}
    cache = cache_bytes_per_device(config, batch=batch, capacity=context, **size)
    floor = 1000 * (weights + cache) / bandwidth
    return {"batch": batch, "context": context, "milliseconds": milliseconds, "floor": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mlra_4")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--skip", choices=["train", "decode"], action="append", default=[])
    arguments = parser.parse_args()
    mesh, name = sharding.parse_mesh(arguments.mesh), arguments.preset
    device = jax.devices()[0]
    bandwidth = read_bandwidth(random_pool(0), launch_seconds())["read"]
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "mesh": dict(mesh.shape),
        "preset": name,
        "read_TB_per_second": bandwidth / 1e12,
        "train": [],
        "decode": [],
    }
    print(f"{device.device_kind}, JAX {jax.__version__}, reads {bandwidth / 1e12:.2f} TB/s")

    def attempt(rows, function, *args, **kwargs):
        try:
            rows.append(function(*args, **kwargs))
        except Exception as error:
            rows.append({"arguments": repr(args[2:]), "error": str(error)[:300]})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    if "decode" not in arguments.skip:
        config = dataclasses.replace(preset(name), param_dtype="bfloat16")
        model = Decoder.from_model(models.create(config, mesh))
        for batch, context in [(1, 2048), (1, 32768), (32, 2048), (32, 32768), (1, 131072)]:
            attempt(result["decode"], decode, model, batch, context, bandwidth)
        del model
    if "train" not in arguments.skip:
        for batch in (4, 8, 1):
            attempt(result["train"], train, name, mesh, batch)


if __name__ == "__main__":
    main()
