"""Training of a published 2.9B model on the devices of this host.

python -m benchmarks.end_to_end [--preset=mlra_4] [--mesh=tensor=4] [--output=FILE.json]

Random weights and tokens: neither changes the time. Prints tokens/s of whole training steps
(forward, backward, AdamW).
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from mlra_jax import sharding
from mlra_jax.config import preset
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mlra_4")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    mesh, name = sharding.parse_mesh(arguments.mesh), arguments.preset
    device = jax.devices()[0]
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "mesh": dict(mesh.shape),
        "preset": name,
        "train": [],
    }
    print(f"{device.device_kind}, JAX {jax.__version__}")

    def attempt(rows, function, *args, **kwargs):
        try:
            rows.append(function(*args, **kwargs))
        except Exception as error:
            rows.append({"arguments": repr(args[2:]), "error": str(error)[:300]})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")

    for batch in (4, 8, 1):
        attempt(result["train"], train, name, mesh, batch)


if __name__ == "__main__":
    main()
