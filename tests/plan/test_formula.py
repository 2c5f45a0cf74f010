"""Products, memory, exchanges and times of steps whose numbers are known by hand."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny

from mlra_jax.config import preset
from mlra_jax.costs import cache_bytes_per_device, flops_per_token
from mlra_jax.plan import planning, roofline, topology
from mlra_jax.plan.chips import CHIPS
from mlra_jax.plan.formula import Decoding, Training, Work
from mlra_jax.plan.program import Collective
from mlra_jax.plan.search import _candidates, search
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings

ROOT, GIB = Path(__file__).parents[2], 2**30
T, L, D, H, V, K = 1024, 3, 40, 8, tiny.VOCAB, tiny.K


def training(remat, mesh=None, batch=8, **data):
    model = tiny.config("mha", L, context_length=T, remat=remat, dtype="bfloat16")
    experiment = Experiment(
        model=model,
        data=DataSettings(source="x", global_batch=batch, **data),
        mesh=MeshSettings(**mesh or {}),
        loss_chunk=256,
    )
    return Training(experiment, planning.parameters(experiment))


def test_products_of_a_step_and_of_what_is_computed_again():
    none, N = training("none").work(), training("none").parameters
    tokens = 8 * T
    scores = L * T / 2 * H * 2 * K  # products and sums of a token's forward pass, halved
    assert none.model_flops == tokens * (6 * N + 6 * scores)
    # Two blocks of 512: 3 of 4 are computed where 2 of 4 are needed; 7 products behind 2.
    assert none.flops == tokens * (6 * N + 2 * 4.5 * 1.5 * scores)
    again = 2 * (N - V * D)
    assert training("products").work().flops == none.flops
    assert training("attention").work().flops == none.flops + tokens * again
    assert training("block").work().flops == none.flops + tokens * (again + 3 * scores)
    split = training("block", dict(data=2, fsdp=2, tensor=2)).work()
    assert split.flops == training("block").work().flops / 8


def test_memory_of_a_step():
    step = training("block", dict(data=2, fsdp=2, tensor=2))
    memory, N = step.memory(), step.parameters
    assert memory.parameters == N and memory.optimizer == 2 * N  # four bytes, four devices
    # A block's input of bfloat16 in each layer, and the last output.
    assert memory.activations == 2 * T * D * 2 * (L + 1)
    parts = training("block", dict(data=2, fsdp=2, tensor=2), accumulate=2).memory()
    assert parts.activations == memory.activations / 2
    kept, alone = training("none", dict(fsdp=2)).memory(), training("none").memory()
    assert kept.activations == alone.activations / 2 + 2 * (N - V * D)  # gathered weights
    order = [training(remat).memory().bytes for remat in ("none", "products", "attention", "block")]
    assert order == sorted(order, reverse=True)
    loop = Training(training("none").experiment, N, in_loop=True).memory()
    assert loop.activations > training("none").memory().activations


def test_exchanges_of_a_step():
    step = training("block", dict(data=2, fsdp=4))
    sums = lambda found: {(c.kind, c.axes): c.bytes for c in found}
    one, two = sums(step.collectives()), sums(step.collectives(slices=2))
    N, table = step.parameters, V * D
    assert one["all-gather", ("fsdp",)] == 2 * 2 * N * 3 / 4
    kept = sums(training("none", dict(data=2, fsdp=4)).collectives())
    assert kept["all-gather", ("fsdp",)] == 2 * (N + table) * 3 / 4
    assert one["reduce-scatter", ("fsdp",)] == 4 * N * 3 / 4
    assert one["all-reduce", ("data",)] == 4 * N / 4
    assert two["all-reduce", ("slices",)] == 4 * N / 4 and ("all-reduce", ("data",)) not in two
    crossing = sums(training("block", dict(fsdp=8)).collectives(slices=2))
    assert crossing["reduce-scatter", ("slices",)] == 4 * N / 4 / 2
    assert crossing["reduce-scatter", ("fsdp",)] == 4 * N * 3 / 4


def test_a_decoding_step_reads_weights_and_cache():
    config, mesh = preset("mlra_4"), MeshSettings(data=2, tensor=4)
    work, memory, found = Decoding(8, 131072).plan(config, mesh, 2_872_000_000)
    held = cache_bytes_per_device(config, batch=4, capacity=131072, tensor=4)
    assert memory.optimizer == held == 4 * 131072 * 24 * 192 * 2
    assert memory.parameters == 2_872_000_000 * 2 // 4 and work.traffic == memory.bytes
    [summed] = found
    assert summed.count == 48 and summed.bytes == 48 * 2 * 4 * 3072 * 2 * 3 // 4


def test_times_are_work_over_rates():
    found = [Collective("all-gather", ("fsdp",), 2, 1, 4 * 10**9)]
    found += [Collective("all-reduce", ("slices",), 0, 1, 10**9)]
    times = roofline.times(Work(1e12, 1.97e13, 819e9), found, CHIPS["v5e"])
    assert times == roofline.Times(0.1, 1.0, 0.04, 0.32)
    assert times.least == 1.0 and times.most == pytest.approx(1.46) and times.bound == "memory"
    # A GPU's links are told as one.
    assert roofline.times(Work(0, 0, 0), found, CHIPS["h100"]).links == pytest.approx(4 / 450)


def test_a_plan_says_rate_share_and_chip_hours():
    experiment = dataclasses.replace(
        training("none", dict(data=8)).experiment, steps=3600, loss_chunk=T
    )
    found = planning.estimated(experiment, topology.describe("h100:8"))
    seconds = found.times.least
    assert found.tokens_per_second == pytest.approx(8 * T / seconds)
    assert found.chip_hours[0] == pytest.approx(8 * seconds)
    useful = flops_per_token(experiment.model, planning.parameters(experiment)) * T
    assert found.share_of_peak == pytest.approx(useful / seconds / 989e12)


def test_a_search_gives_the_best_of_all_that_fit():
    experiment = Experiment(
        model=preset("mlra_4_small"), data=DataSettings(source="x", global_batch=16)
    )
    where = topology.describe("h100:4")
    found = search(experiment, where, lambda line: None, keep=2)
    everything = [p for p in _candidates(experiment, where, None) if p.fits]
    assert len(everything) > 100
    fastest = sorted(p.times.most for p in everything)
    assert [p.times.most for p in found] == fastest[:2]
    meshes = {tuple(dataclasses.asdict(p.experiment.mesh).values()) for p in everything}
    assert (1, 4, 1, 1) in meshes and (4, 1, 1, 1) in meshes and (1, 1, 4, 1) in meshes


def measured():
    """Steps that were measured on one H100, with their plans."""
    results = json.loads((ROOT / "benchmarks/results/train_h100.json").read_text())
    for row in (row for block in results for row in block["rows"]):
        changes = {name.split(".")[-1]: value for name, value in row["changes"].items()}
        moments = changes.pop("moment_dtype", "")
        if row["mesh"] or "milliseconds" not in row or "float32_stream" in changes:
            continue
        experiment = Experiment(
            model=preset(row["model"], **changes),
            data=DataSettings(source="x", global_batch=row["batch"]),
            optimizer=OptimizerSettings(moment_dtype=moments),
        )
        yield row, planning.estimated(experiment, topology.describe("h100:1"))


def test_the_formulas_are_near_what_was_measured():
    rows = [(row, found) for row, found in measured() if row.get("peak_GiB")]
    assert len(rows) >= 10
    for row, found in rows:
        assert found.memory.bytes == pytest.approx(row["peak_GiB"] * GIB, rel=0.12), row["changes"]
        # At the chip's peaks; real steps take half as long again as all resources one by one.
        times = found.times
        assert times.least < row["milliseconds"] / 1e3 < 1.7 * times.most, row["changes"]
    order = lambda time: [row["changes"] for row, _ in sorted(block, key=time)]
    block = [pair for pair in rows if pair[0]["batch"] == 2 and len(pair[0]["changes"]) == 1]
    assert order(lambda pair: pair[0]["milliseconds"]) == order(lambda pair: pair[1].times.most)
