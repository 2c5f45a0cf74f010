"""Times whole training steps of the published 2.9B models beside what their products take.

    python -m benchmarks.train_step [--models=mlra_4,mla] [--mesh=fsdp=2] [--batch=2,4] [--seq=2048]
        [--remat=block,attention] [--set=NAME=VALUE ...] [--materialise] [--no_profile]
        [--output=FILE.json]

A step is the one that `train.py` runs: forward, backward, AdamW; weights and tokens are random,
which does not change the time. Steps follow each other as they do there; the median of several runs
counts. Model FLOP/s are those of `mlra_jax.costs.flops_per_token`: 6 per parameter and token, and 6
per score and weighted value of the causal half of attention; what is computed a second time does
not count. The matrix rate beside them is that of a bfloat16 product, measured in the same process.

`--batch` counts sequences per share of the batch (data x fsdp of the mesh). `--set` changes any
setting of the experiment, as in `--set=model.num_layers=6 --set=loss_chunk=1024`. `--tiny` shrinks
the model so that a CPU can run it. A point that fails is written down with its error.
"""

import argparse
import ast
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from benchmarks.limits import launch_seconds, matrix_rate, random_pool, tiny_pool
from benchmarks.profile import profile
from mlra_jax import sharding
from mlra_jax.attention import latent
from mlra_jax.command import claim_gpu_memory
from mlra_jax.config import preset
from mlra_jax.costs import flops_per_token
from mlra_jax.profile import by_kind
from mlra_jax.training.__main__ import GPU_MEMORY
from mlra_jax.training.fitting import bytes_needed, compile_step
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings
from mlra_jax.training.state import abstract_state, create_state
from mlra_jax.training.step import abstract_batch, make_train_step

_STEPS, _RUNS = 4, 5
_TINY = dict(num_layers=2, embed_dim=128, mlp_dim=192, vocab_size=512)


def experiment_of(name: str, mesh: Mesh, batch: int, seq: int, tiny: bool, changes: dict) -> Any:
    """The experiment of a point: the paper's recipe, `changes` by dotted names."""
    rows = batch * sharding.size(mesh, sharding.BATCH)
    experiment = Experiment(
        model=dataclasses.replace(preset(name), context_length=seq, **_TINY if tiny else {}),
        data=DataSettings(source="random", global_batch=rows),
        mesh=MeshSettings(**dict(mesh.shape)),
        loss_chunk=1024,
    )
    settings = experiment.to_config_dict()
    settings.update_from_flattened_dict(changes)
    return Experiment.from_dict(settings.to_dict())


def measure(experiment: Experiment, mesh: Mesh, matrix: float, profiled: bool) -> dict[str, Any]:
    """One point; `matrix` is the FLOP per second of a product on one device."""
    abstract = abstract_state(experiment, mesh), abstract_batch(experiment, mesh)
    began, said = time.perf_counter(), []
    program = compile_step(make_train_step, experiment, mesh, abstract, said.append)
    row: dict[str, Any] = dict(compile_seconds=time.perf_counter() - began, chosen=said)
    row["planned_GiB"] = bytes_needed(program) / 2**30
    row["work_GiB"] = program.memory_analysis().temp_size_in_bytes / 2**30

    peak_before = _peak_bytes()
    state, rng = create_state(experiment, mesh), np.random.default_rng()
    draw = lambda s: rng.integers(0, experiment.model.vocab_size - 1, s.shape, np.int32)
    tokens = {n: jax.device_put(draw(s), s.sharding) for n, s in abstract[1].items()}
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))

    def run(steps=_STEPS):
        nonlocal state
        for _ in range(steps):
            state, metrics = program(state, tokens)
        return metrics

    row["first_loss"] = float(run(1)["loss"])
    jax.block_until_ready(run(1))
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        metrics = jax.block_until_ready(run())
        seconds.append((time.perf_counter() - began) / _STEPS)
    middle = statistics.median(seconds)
    rate = experiment.tokens_per_step / middle
    flops = rate * flops_per_token(experiment.model, parameters) / mesh.size
    row |= dict(
        last_loss=float(metrics["loss"]),
        milliseconds=1e3 * middle,
        spread=[1e3 * min(seconds), 1e3 * max(seconds)],
        tokens_per_second=rate,
        tokens_per_second_per_device=rate / mesh.size,
        model_TFLOP_per_second_per_device=flops / 1e12,
        share_of_matrix_rate=flops / matrix,
        parameters=parameters,
    )
    # The device counts the most since the process began: said only where this point was the most.
    peak = _peak_bytes()
    row["peak_GiB"] = peak / 2**30 if peak > peak_before else None
    if profiled and sharding.platform(mesh) == "gpu":
        found = profile(lambda: run(1)).kernels
        row["kernels"] = sum(k.launches for k in found)
        row["by_kind"] = by_kind(found, program.as_text())
        row["longest"] = [dataclasses.astuple(k) for k in found[:40]]
    return row


def _peak_bytes() -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def line(row: dict[str, Any]) -> str:
    said = " ".join(f"{k}={v}" for k, v in row["changes"].items())
    name = (
        f"{row['model']:8} {row['mesh'] or 'one device':12} {row['batch']:2} x {row['seq']} {said}"
    )
    if "error" in row:
        return f"{name}\n    {row['error'][:160]}"
    peak = row["peak_GiB"]
    lines = [
        *row["chosen"],
        f"{name}\n    {row['milliseconds']:.1f} ms, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['model_TFLOP_per_second_per_device']:.0f} TFLOP/s a device, "
        f"{100 * row['share_of_matrix_rate']:.1f}% of the matrix rate, planned "
        f"{row['planned_GiB']:.1f} GiB{f', peak {peak:.1f}' if peak else ''}, "
        f"compiled in {row['compile_seconds']:.0f} s, loss {row['last_loss']:.3f}",
    ]
    kinds = row.get("by_kind", {})
    if kinds:
        lines.append("    ms: " + ", ".join(f"{k} {v:.1f}" for k, v in kinds.items()))
    return "\n".join(lines)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)


def _points(flags: argparse.Namespace):
    """(mesh text, model, changes, batch) of every point."""
    fixed = {n: _value(v) for n, _, v in (change.partition("=") for change in flags.set)}
    remats = flags.remat.split(",")
    changes = [fixed | ({"model.remat": _value(r)} if r else {}) for r in remats]
    batches = [int(b) for b in flags.batch.split(",")]
    return itertools.product(flags.mesh.split(";"), flags.models.split(","), changes, batches)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--models", default="mlra_4")
    parser.add_argument("--mesh", default="", help="as in fsdp=2; several with ; between")
    parser.add_argument("--batch", default="2,4", help="sequences per share of the batch")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--remat", default="", help="values of model.remat, commas between")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--materialise",
        action="store_true",
        help="make keys and values of all branch heads where latents would be attended to",
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no_profile", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON, written after every point")
    flags = parser.parse_args()
    claim_gpu_memory(GPU_MEMORY)
    if flags.materialise:
        latent.absorbs = lambda _: False
    device, pool = jax.devices()[0], tiny_pool() if flags.tiny else random_pool(0)
    matrix = matrix_rate(pool, launch_seconds())
    del pool
    print(f"{device.device_kind}, JAX {jax.__version__}, products {matrix / 1e12:.2f} TFLOP/s")
    result = dict(device=device.device_kind, jax=jax.__version__, matrix=matrix, rows=[])
    # Where they are written to says nothing of the numbers.
    result["arguments"] = [a for a in sys.argv[1:] if not a.startswith("--output")]
    for text, name, changes, batch in tqdm(list(_points(flags)), file=sys.stderr):
        row = dict(model=name, mesh=text, batch=batch, seq=flags.seq, changes=changes)
        try:
            mesh = sharding.parse_mesh(text)
            experiment = experiment_of(name, mesh, batch, flags.seq, flags.tiny, changes)
            row |= measure(experiment, mesh, matrix, not flags.no_profile)
        except Exception as error:  # Out of memory at one point is no end of the others.
            row["error"] = " ".join(str(error).split())[:300]
        result["rows"].append(row)
        print(line(row), flush=True)
        if flags.output:
            flags.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
