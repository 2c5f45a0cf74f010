"""Kills a run in a bucket at random moments and compares its losses with an undisturbed local one.

    python -m benchmarks.bucket_kills [--steps=300] [--kills=3] [--faults=0.02] [--seed=0]

Trains the quickstart's model on token shards, first on the disk, then with workdir and shards in
an emulated bucket of which a share of the answers are 429, 500, late or cut. Every loss of every
step and the weights of the last must be the same, bit for bit.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlra_jax import checkpoints
from mlra_jax.command import use_cpu
from mlra_jax.data.inputs import open_input
from mlra_jax.data.prepare import prepare
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.training.metrics import METRICS_FILE
from tests.bucket import Bucket, serve

SHARD_TOKENS = 100_000
FAULTS = [429, 500, 503, 1.0, "cut", "lost", "silent"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--faults", type=float, default=0.02, help="share of all requests")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    use_cpu()
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as folder, serve() as (bucket, environment):
        shards, here = Path(folder, "shards"), Path(folder, "run")
        prepare(
            open_input("pydoc"),
            shards,
            tokenizer=get_tokenizer("bytes"),
            name="pydoc",
            shard_tokens=SHARD_TOKENS,
            validation_first_shard=True,
            workers=1,
        )
        for path in shards.glob("*.bin"):
            bucket.put(f"shards/{path.name}", path.read_bytes())
        print("a run on the disk:", flush=True)
        assert follow(here, shards, flags.steps, folder) == flags.steps
        bucket.fault = faults(random.Random(flags.seed), flags.faults)
        os.environ.update(environment)
        for number in range(flags.kills):
            # Each in its own part of the run: one before the last checkpoint would kill nothing.
            step = int(flags.steps * (number + rng.random()) / flags.kills)
            reached = follow(
                "gs://bucket/run", "gs://bucket/shards", flags.steps, folder, step, 3 * rng.random()
            )
            print(f"killed after step {reached}", flush=True)
            assert reached < flags.steps, "it had ended before it was killed"
        assert follow("gs://bucket/run", "gs://bucket/shards", flags.steps, folder) == flags.steps
        bucket.fault = lambda method, path: None
        wrong = differences(here, bucket, "gs://bucket/run")
    print("\n".join(wrong) or "all losses and weights are the same", flush=True)
    return bool(wrong)


def follow(
    workdir: Path | str,
    source: Path | str,
    steps: int,
    cache: str,
    kill_at: int | None = None,
    delay: float = 0.0,
) -> int:
    """The step that a run told of last; it is killed some seconds after it has told of one from
    `kill_at` on."""
    command = [sys.executable, "train.py", "--config=configs/quickstart.py"]
    command += [f"--workdir={workdir}", f"--config.data.source={source}", "--config.log_every=1"]
    command += [f"--config.steps={steps}", "--config.save_every=20", "--config.validate_every=50"]
    command += [f"--compilation_cache={cache}/programs"]
    step = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step "):
                step = int(line.split()[1].partition("/")[0])
                if kill_at is not None and step >= kill_at and run.poll() is None:
                    time.sleep(delay)
                    run.kill()
            else:
                print("   ", line, end="", flush=True)
    return step


def faults(rng: random.Random, share: float):
    """What goes wrong with a request, at random."""

    def fault(method: str, path: str) -> int | float | str | None:
        return rng.choice(FAULTS) if rng.random() < share else None

    return fault


def differences(here: Path, bucket: Bucket, there: str) -> Iterator[str]:
    """A line for each step whose numbers, and each weight that, are not the same."""
    pairs = [(here / METRICS_FILE).read_bytes(), bucket.objects[f"run/{METRICS_FILE}"].data]
    one, other = ([json.loads(line) for line in data.splitlines()] for data in pairs)
    losses = lambda line: [line.get(n) for n in ("step", "loss", "validation_loss", "grad_norm")]
    found = [f"{losses(a)} and {losses(b)}" for a, b in zip(one, other, strict=False)
             if losses(a) != losses(b)]  # fmt: skip
    if len(one) != len(other):
        found.append(f"{len(one)} lines and {len(other)}")
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    opened = [checkpoints.open_checkpoint(folder) for folder in (here, there)]
    for item in ("params", "optimizer"):
        tree = ocp.PyTreeCheckpointHandler().metadata(opened[0].folder / item).tree
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
        )
        a, b = (jax.tree.leaves(each.restore(item, wanted)) for each in opened)
        bad = sum(
            np.asarray(x).tobytes() != np.asarray(y).tobytes() for x, y in zip(a, b, strict=True)
        )
        found += [f"{bad} arrays of {item}"] if bad else []
    return found


if __name__ == "__main__":
    sys.exit(main())
