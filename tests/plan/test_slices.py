"""Meshes over several slices: which axis crosses, and what of a training step does."""

import importlib.util

import numpy as np
import pytest
import tiny

from mlra_jax.config import ConfigError, LatentConfig
from mlra_jax.plan import compiled, planning, topology
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings
from mlra_jax.training.state import abstract_state

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (pip install libtpu)",
)


@pytest.fixture(scope="module")
def two_slices():
    return topology.describe("v5e:2x2", 2)


def slices_along(mesh, axis):
    """For each index along an axis, the slices that its devices are of."""
    grid = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    return [{device.slice_index for device in part.ravel()} for part in grid]


@pytest.mark.parametrize(
    "sizes, crosses",
    [
        (dict(data=2, fsdp=2, tensor=2), "data"),
        (dict(data=4, fsdp=2), "data"),
        (dict(fsdp=4, tensor=2), "fsdp"),
        (dict(data=1, fsdp=2, tensor=2, context=2), "fsdp"),
    ],
)
def test_data_crosses_or_else_fsdp(two_slices, sizes, crosses):
    mesh = two_slices.mesh(sizes)
    along = slices_along(mesh, crosses)
    half = len(along) // 2
    assert along == [{0}] * half + [{1}] * half
    others = [a for a in mesh.axis_names if a != crosses]
    assert all(part == {0, 1} for a in others for part in slices_along(mesh, a))
    assert len(set(mesh.devices.flat)) == 8


def test_one_slice_of_several_is_a_mesh_of_its_own(two_slices):
    mesh = two_slices.mesh(dict(tensor=4))
    assert {device.slice_index for device in mesh.devices.flat} == {0}


def test_meshes_that_slices_do_not_allow(two_slices):
    words = r"data=1 x fsdp=1 cannot cross 2 slices; make data \(or else fsdp\) a multiple of 2"
    with pytest.raises(ConfigError, match=words):
        two_slices.mesh(dict(tensor=4, context=2))
    with pytest.raises(ConfigError, match=r"\{0: 4, 1: 2\}; use whole slices"):
        two_slices.mesh(dict(data=2, tensor=3))


def test_hosts_of_gpus_are_crossed_where_they_can_be():
    gpus = topology.describe("h100:2", 2)
    assert slices_along(gpus.mesh(dict(fsdp=4)), "fsdp") == [{0}, {0}, {1}, {1}]
    assert [device.id for device in gpus.mesh(dict(tensor=4)).devices.flat] == [0, 1, 2, 3]


def test_axes_that_are_no_direction_of_the_torus_are_parts_of_it():
    mesh = topology.describe("v5e:16x16").mesh(dict(fsdp=32, tensor=8))
    assert len(set(mesh.devices.flat)) == 256
    # A group of neighbours: eight chips in a row, or two rows of four.
    for group in mesh.devices.reshape(32, 8):
        spread = np.ptp([device.coords for device in group], axis=0)
        assert sorted(spread + 1) in ([1, 1, 8], [1, 2, 4])


def test_only_reduced_shards_of_gradients_cross(two_slices):
    attention = LatentConfig(
        groups=1, branches=4, num_heads=4, latent_dim=512, q_latent_dim=256, nope_dim=128,
        rope_dim=128,
    )  # fmt: skip
    sizes = dict(embed_dim=256, mlp_dim=512, vocab_size=512, context_length=16)
    experiment = Experiment(
        model=tiny.config(attention, 2, remat="block", attention_kernel="reference", **sizes),
        data=DataSettings(source="x", global_batch=8),
        mesh=MeshSettings(data=2, fsdp=2, tensor=2),
    )
    mesh = two_slices.mesh(dict(data=2, fsdp=2, tensor=2))
    found = compiled.compile_for(compiled.lower_training(experiment, mesh), mesh, None)
    crossing = {c.kind: c.bytes for c in found.collectives if c.axes == ("slices",)}
    # Two slices: each sends as much as it has, its shard of the gradient, which a slice has
    # reduced before. Norms take whole tiles; so few tokens' vectors are gathered as they are.
    shard = planning.held(abstract_state(experiment, mesh).params)
    whole = 4 * planning.parameters(experiment)
    assert shard < 1.05 * whole / 4
    assert shard <= crossing.pop("all-reduce") < 1.05 * shard
    assert sum(crossing.values()) <= 8 * 16 * 256 * 4
    assert any(c.kind == "reduce-scatter" and "fsdp" in c.axes for c in found.collectives)
