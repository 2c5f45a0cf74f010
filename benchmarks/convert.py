"""Converts a synthetic 2.9B MLRA-4 checkpoint and loads it on four devices; prints time and memory.

    python -m benchmarks.convert [--preset=mlra_4] [--layers=24] [--folder=DIR]

Writes about 24 GB to a temporary folder (made in --folder) and deletes it at the end: random
float32 weights in the released layout, three shards as torch.save writes them, and their
conversion. Conversion and loading run in processes of their own, whose peak memory is the kernel's
VmHWM. The model is loaded in bfloat16 on four virtual CPU devices (tensor=4); what they read
together is the kernel's count of bytes read (rchar), beside the bytes of the arrays.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mlra_jax.config import ModelConfig, preset
from mlra_jax.convert.released import EMBEDDING, HEAD, layout, released_values
from mlra_jax.convert.torch_format.unpickle import Storage
from mlra_jax.convert.torch_format.writer import contiguous, write_torch_file

SHARDS = 3
PIECE = 4 << 20

CONVERT = """
import sys
from mlra_jax.convert.__main__ import main
code = main(sys.argv[1:])
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print("peak_kb", peak)
sys.exit(code)
"""
LOAD = """
import json, sys, time
import jax, mlra_jax
from mlra_jax import checkpoints

def counters():
    io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return int(io["rchar"])

folder, ways = sys.argv[1], int(sys.argv[2])
mesh = mlra_jax.make_mesh(tensor=ways)
begun, start = counters(), time.time()
model = mlra_jax.load_model(folder, mesh=mesh, dtype="bfloat16")
seconds, read = time.time() - start, counters() - begun
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(json.dumps({"seconds": seconds, "read": read, "peak_kb": int(peak)}))
"""


def synthesise(folder: Path, config: ModelConfig) -> int:
    """Writes the released layout with random numbers and returns the bytes of its tensors."""
    shapes = layout(config).tensors
    names = [name for name in shapes if name != HEAD]
    sizes = {name: math.prod(shapes[name]) for name in names}
    total = sum(sizes.values())
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    done = 0
    for name in names:
        shards[min(SHARDS - 1, done * SHARDS // total)].append(name)
        done += sizes[name]
    weight_map = {}
    rng = np.random.default_rng(0)
    with tqdm(desc="synthesising", total=4 * total, unit="B", unit_scale=True) as bar:

        def numbers(count):
            for start in range(0, count, PIECE):
                piece = rng.random(min(PIECE, count - start), np.float32) - 0.5
                bar.update(piece.nbytes)
                yield piece.tobytes()

        for i, members in enumerate(shards):
            file = f"pytorch_model-{i + 1:05d}-of-{SHARDS:05d}.bin"
            tensors, storages = {}, {}
            for key, name in enumerate(members):
                storage = Storage(str(key), np.dtype(np.float32), sizes[name])
                tensors[name] = contiguous(storage, shapes[name])
                storages[str(key)] = numbers(sizes[name])
            if EMBEDDING in tensors:
                tensors[HEAD] = tensors[EMBEDDING]
            weight_map |= dict.fromkeys(tensors, file)
            write_torch_file(folder / file, tensors, storages)
    index = {"metadata": {"total_size": 4 * total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(released_values(config, "float32")))
    return 4 * total


def run(program: str, *arguments: str, devices: int = 1) -> tuple[float, str]:
    """Runs a Python program in a process of its own; (seconds, its last line)."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=env, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return time.time() - start, done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mlra_4")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick trial")
    parser.add_argument("--folder", help="where to make the temporary folder")
    parser.add_argument("--ways", type=int, default=4, help="devices that load it")
    flags = parser.parse_args()
    config = preset(flags.preset, num_layers=flags.layers)
    temporary = Path(tempfile.mkdtemp(prefix="convert-", dir=flags.folder))
    try:
        start = time.time()
        source = temporary / "source"
        source.mkdir()
        size = synthesise(source, config)
        print(f"synthesised {size / 1e9:.2f} GB in {time.time() - start:.0f} s")
        destination = f"{temporary / 'converted'}"
        seconds, line = run(
            CONVERT, f"--source={source}", f"--destination={destination}",
            f"--variant={flags.preset}",
        )  # fmt: skip
        largest = 4 * config.vocab_size * config.embed_dim / 1e9
        peak = int(line.split()[1]) * 1024 / 1e9
        print(f"converted in {seconds:.0f} s ({size / 1e9 / seconds:.3f} GB/s), checks included")
        print(
            f"peak memory {peak:.2f} GB; largest tensor {largest:.2f} GB, limit {largest + 1:.2f}"
        )
        shutil.rmtree(source)
        _, line = run(LOAD, destination, str(flags.ways), devices=flags.ways)
        found = json.loads(line)
        print(
            f"{flags.ways}-way load in {found['seconds']:.0f} s: {found['read'] / 1e9:.3f} GB; "
            f"arrays are {size / 1e9:.3f} GB, ratio {found['read'] / size:.4f}; "
            f"peak memory {found['peak_kb'] * 1024 / 1e9:.2f} GB"
        )
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
