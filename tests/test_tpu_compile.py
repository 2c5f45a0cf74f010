"""The published 2.9B MLRA-4 compiles for TPU pods, by the TPU compiler and without a TPU.

It takes what the committed table of plans says: these are two of its rows.
"""

import importlib.util
import math
import re

import pytest
from decoding import lower_step

from benchmarks.plan import of_row
from mlra_jax.config import preset
from mlra_jax.costs import cache_bytes_per_device
from mlra_jax.decoder import Vocabulary
from mlra_jax.plan import compiled, topology
from mlra_jax.sharding import all_axes
from tests.plan.table import ROWS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (pip install libtpu)",
)
GIB = 2**30
V5E_MEMORY = 16 * GIB
ROUNDING = 2**14
"""Small arrays take whole tiles of memory."""


@pytest.fixture(scope="module")
def v5e_16():
    return topology.describe("v5e:4x4")


D, H, C, Q, V = 3072, 24, 128, 1024, 50304
QUERIES_AND_OUTPUT = D * Q + Q * H * (128 + 64) + H * 128 * D


def parameters_per_device(fsdp: int, split: int, F: int = 9880) -> int:
    """Of the published MLRA-4, by hand: `split` devices share what `tensor` and `context` split."""
    latent = D * 4 * C + 2 * (4 * H * C * 128)
    layer = (QUERIES_AND_OUTPUT + latent + 3 * D * F) // (fsdp * split)
    layer += D * 64 // fsdp  # the rotary key's projection belongs to all heads
    layer += 2 * D + Q + 4 * C  # norms are whole
    return 24 * layer + V * D // (fsdp * split) + D


def report(what: str, found: compiled.Compiled, row: dict, capsys) -> None:
    """Prints the compiler's memory per device; it is what the table has, to a tenth."""
    with capsys.disabled():
        print(
            f"\n{what}: {found.bytes / GIB:.2f} GiB per device ({found.arguments / GIB:.2f} held, "
            f"{found.temporaries / GIB:.2f} work)"
        )
    assert found.fits and found.bytes < V5E_MEMORY
    assert found.bytes == pytest.approx(sum(row["memory"].values()), rel=0.1)
    kinds = lambda each: {kind: sum(b for k, b in each if k == kind) for kind, _ in each}
    stored = kinds([(c["kind"], c["bytes"]) for c in row["collectives"]])
    sent = kinds([(c.kind, c.bytes) for c in found.collectives if c.bytes >= 1e6])
    for kind in (kind for kind in stored if stored[kind] > 0.05 * sum(stored.values())):
        assert sent[kind] == pytest.approx(stored[kind], rel=0.1), kind


def test_training_step(v5e_16, capsys):
    row = ROWS["v5e:4x4", 1, 2048, None, None, None]
    run, mesh = of_row(row), v5e_16.mesh(all_axes(row["mesh"]))
    found = compiled.compile_for(compiled.lower_training(run, mesh), mesh, None, lambda line: None)
    report(
        f"2.9B MLRA-4 training step, v5e 4x4, {row['mesh']}, 512 x 2048 tokens", found, row, capsys
    )
    # Weights and moments, 12 bytes a parameter; three counters; tokens and targets of its rows.
    batch = 2 * 512 // (run.mesh.data * run.mesh.fsdp) * 4 * 2048
    held = 12 * parameters_per_device(fsdp=run.mesh.fsdp, split=run.mesh.tensor) + 3 * 4
    # A sixteenth of the model's width is one tile and a half.
    assert 0 <= found.arguments - held - batch < 0.03 * held
    assert found.outputs < ROUNDING, "what the step changes is not changed in place"
    part = batch // 8 // run.data.accumulate  # tokens computed together
    kept = 24 * part * D * 2
    gradients = 2 * 4 * held // 12
    assert found.temporaries < 3 * (kept + gradients), "blocks keep more than their inputs"


def test_decoding_step(v5e_16, capsys):
    config = preset("mlra_4", param_dtype="bfloat16")
    batch, slots = 4, 131072
    row = ROWS["v5e:4x4", 1, None, f"{batch}x{slots}", None, None]
    mesh = v5e_16.mesh(all_axes(row["mesh"]))
    program = lower_step(config, mesh, batch, slots, vocabulary=Vocabulary(50257)).compile()
    memory, text = program.memory_analysis(), program.as_text()
    found = compiled.of_program(program, mesh, 0.0)
    name = "2.9B MLRA-4 decoding step, v5e 4x4, data=4 x tensor=4, 4 x 131072 positions"
    report(name, found, row, capsys)

    held = cache_bytes_per_device(config, batch=1, capacity=slots, tensor=4)
    assert held == config.num_layers * slots * (128 + 64) * 2
    # A device's 2470 columns of the MLP take whole tiles.
    given = held + 2 * parameters_per_device(fsdp=1, split=4, F=4 * 2560)
    # Each of them makes the queries of all heads, and its part of their outputs, by itself.
    given += 2 * 24 * (QUERIES_AND_OUTPUT - QUERIES_AND_OUTPUT // 4)
    # Its key-up and value-up projections are in these.
    given -= 2 * 24 * 2 * H * C * 128
    assert 0 <= memory.argument_size_in_bytes - given < ROUNDING
    assert memory.alias_size_in_bytes >= held, "the cache is not changed in place"
    assert memory.temp_size_in_bytes < held / config.num_layers, "a layer's cache is copied"
    assert text.count("tpu_custom_call") >= config.num_layers, "the kernel is not used"
    moved = re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:all-|reduce-scatter|collective)", text)
    assert moved, "no collectives found: has the text form changed?"
    sizes = {math.prod(map(int, dims.split(","))) for dims in moved}
    # The draw wants the logits of all rows; nothing else has the size of a cache or a weight.
    assert max(sizes - {batch * V, V}) <= batch * D
