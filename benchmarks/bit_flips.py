"""Flips one random bit in each of many copies of a checkpoint and reads them all.

    python -m benchmarks.bit_flips CHECKPOINT [--copies=300] [--seed=0]

CHECKPOINT is the folder of a small training run or conversion; it stays as it is. Every file of its
latest step is hit equally often, every bit of a file is as likely as any other. Each copy must be
refused in one line or give the very bytes of the original, model and training state.
"""

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

import mlra_jax
from mlra_jax import checkpoints
from mlra_jax.command import use_cpu

ITEMS = ("params", "optimizer")
JSON_ITEMS = ("model", "iterator", "progress")


def arrays_of(folder: Path) -> dict[str, Any]:
    """Item to the tree of its arrays, as they are asked for."""
    opened = checkpoints.open_checkpoint(folder)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = {
        item: ocp.PyTreeCheckpointHandler().metadata(opened.folder / item).tree
        for item in filter(opened.has, ITEMS)
    }
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), stored)


def read(folder: Path, arrays: dict[str, Any]) -> list[bytes]:
    """Everything that a checkpoint gives to those who load it or go on from it."""
    opened = checkpoints.open_checkpoint(folder)
    texts = [json.dumps(opened.read_json(item)) for item in JSON_ITEMS if opened.has(item)]
    texts.append(str((opened.step, opened.model, opened.tokenizer)))
    leaves = [opened.restore(item, wanted) for item, wanted in arrays.items()]
    leaves = jax.tree.leaves((leaves, mlra_jax.load_model(folder)))
    return [text.encode() for text in texts] + [np.asarray(leaf).tobytes() for leaf in leaves]


def outcomes(folder: Path, copies: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(kind, file, message) of each copy: `refused`, `harmless` or `WRONG`."""
    rng, arrays = random.Random(seed), arrays_of(folder)
    whole = read(folder, arrays)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        shutil.copytree(folder, copy)
        step = checkpoints.open_checkpoint(copy).folder
        files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
        for number in range(copies):
            file = files[number % len(files)]
            data = file.read_bytes()
            place = rng.randrange(8 * len(data))
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            file.write_bytes(changed)
            name = str(file.relative_to(step))
            try:
                same = read(copy, arrays) == whole
                yield ("harmless" if same else "WRONG"), name, f"bit {place}"
            except ValueError as error:
                kind = "WRONG" if "\n" in str(error) else "refused"
                yield kind, name, str(error)
            except Exception as error:
                yield "WRONG", name, f"bit {place}: {type(error).__name__}: {error}"
            file.write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bit_flips", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--copies", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    use_cpu()
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    results = outcomes(flags.checkpoint, flags.copies, flags.seed)
    for kind, file, message in tqdm(results, total=flags.copies):
        counts[file.rpartition("/")[0] + "/*" if "/d/" in file else file][kind] += 1
        if kind == "WRONG":
            tqdm.write(f"{file}: {message}")
    for file in sorted(counts):
        print(f"{file:40}", *(f"{kind} {n:4}" for kind, n in sorted(counts[file].items())))
    total = sum(counts.values(), collections.Counter())
    print(f"{'all':40}", *(f"{kind} {n:4}" for kind, n in sorted(total.items())))
    return 1 if total["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
