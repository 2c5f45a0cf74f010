"""The published 2.9B MLRA-4 compiles for TPU pods, by the TPU compiler and without a TPU."""

import importlib.util
import math
import re

import pytest
from decoding import lower_step

from mlra_jax import sharding
from mlra_jax.config import preset
from mlra_jax.costs import cache_bytes_per_device
from mlra_jax.decoder import Vocabulary
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings
from mlra_jax.training.step import abstract_batch, abstract_state, make_train_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (pip install libtpu)",
)
V5E_MEMORY = 16 * 2**30
ROUNDING = 2**14
"""Small arrays take whole tiles of memory."""


@pytest.fixture(scope="module")
def v5e_16():
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices


D, H, C, Q, V = 3072, 24, 128, 1024, 50304
QUERIES_AND_OUTPUT = D * Q + Q * H * (128 + 64) + H * 128 * D


def parameters_per_device(fsdp: int, split: int, F: int = 9880) -> int:
    """Of the published MLRA-4, by hand: `split` devices share what `tensor` and `context` split."""
    latent = D * 4 * C + 2 * (4 * H * C * 128)
    layer = (QUERIES_AND_OUTPUT + latent + 3 * D * F) // (fsdp * split)
    layer += D * 64 // fsdp  # the rotary key's projection belongs to all heads
    layer += 2 * D + Q + 4 * C  # norms are whole
    return 24 * layer + V * D // (fsdp * split) + D


def report(what: str, compiled_program, capsys) -> int:
    """Prints the compiler's memory per device, and returns it."""
    m = compiled_program.memory_analysis()
    kept, work = m.argument_size_in_bytes, m.temp_size_in_bytes
    total = kept + work + m.output_size_in_bytes - m.alias_size_in_bytes
    with capsys.disabled():
        print(
            f"\n{what}: {total / 2**30:.2f} GiB per device "
            f"({kept / 2**30:.2f} held, {work / 2**30:.2f} work)"
        )
    return total


def test_training_step(v5e_16, capsys):
    experiment = Experiment(
        model=preset("mlra_4"),
        data=DataSettings(source="tokens.bin", global_batch=16),
        mesh=MeshSettings(fsdp=4, tensor=4),
    )
    mesh = sharding.make_mesh(fsdp=4, tensor=4, devices=v5e_16)
    step = make_train_step(experiment, mesh)
    program = step.lower(abstract_state(experiment, mesh), abstract_batch(experiment, mesh))
    program = program.compile()
    name = "2.9B MLRA-4 training step, v5e 4x4, fsdp=4 x tensor=4, 16 x 2048 tokens"
    assert report(name, program, capsys) < V5E_MEMORY
    # Weights and moments, 12 bytes a parameter; three counters; tokens and targets of a row.
    given = 12 * parameters_per_device(fsdp=4, split=4) + 3 * 4 + 2 * 4 * 4 * 2048
    memory = program.memory_analysis()
    assert 0 <= memory.argument_size_in_bytes - given < ROUNDING
    # What the step changes, it changes in place.
    assert given - 2 * 4 * 4 * 2048 <= memory.alias_size_in_bytes
    assert memory.temp_size_in_bytes < 3.4 * 2**30, "a block's activations are kept"


def test_decoding_step(v5e_16, capsys):
    config = preset("mlra_4", param_dtype="bfloat16")
    batch, slots = 4, 131072
    mesh = sharding.make_mesh(data=4, tensor=4, devices=v5e_16)
    program = lower_step(config, mesh, batch, slots, vocabulary=Vocabulary(50257)).compile()
    name = "2.9B MLRA-4 decoding step, v5e 4x4, data=4 x tensor=4, 4 x 131072 positions"
    assert report(name, program, capsys) < V5E_MEMORY

    held = cache_bytes_per_device(config, batch=1, capacity=slots, tensor=4)
    assert held == config.num_layers * slots * (128 + 64) * 2
    memory = program.memory_analysis()
    # A device's 2470 columns of the MLP take whole tiles.
    given = held + 2 * parameters_per_device(fsdp=1, split=4, F=4 * 2560)
    # Each of them makes the queries of all heads, and its part of their outputs, by itself.
    given += 2 * 24 * (QUERIES_AND_OUTPUT - QUERIES_AND_OUTPUT // 4)
    assert 0 <= memory.argument_size_in_bytes - given < ROUNDING
    assert memory.alias_size_in_bytes >= held, "the cache is not changed in place"
    assert memory.temp_size_in_bytes < held / config.num_layers, "a layer's cache is copied"
    text = program.as_text()
    assert text.count("tpu_custom_call") >= config.num_layers, "the kernel is not used"
    moved = re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:all-|reduce-scatter|collective)", text)
    assert moved, "no collectives found: has the text form changed?"
    sizes = {math.prod(map(int, dims.split(","))) for dims in moved}
    # The draw wants the logits of all rows; nothing else has the size of a cache or a weight.
    assert max(sizes - {batch * V, V}) <= batch * D
