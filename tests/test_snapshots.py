"""Copies of arrays on the host, by way of pinned memory and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax import checkpoints, sharding, snapshots
from tests.tiny import config

pinned_arrays = lambda: [x for x in jax.live_arrays() if x.sharding.memory_kind == "pinned_host"]


@pytest.fixture
def as_on_gpus(monkeypatch):
    """CPU devices have pinned memory, too, and are served as GPUs are."""
    monkeypatch.setattr(snapshots, "_PLATFORMS", ("cpu",))
    monkeypatch.setattr(snapshots, "_reserved", False)


def arrays():
    mesh = sharding.make_mesh(data=2, fsdp=2)
    fill = lambda *axes: jax.device_put(
        jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8), sharding.named(mesh, *axes)
    )
    return [fill("embed", None), fill(None, None), fill("batch", None)]


def whole(parts):
    array = np.full((8, 8), np.nan)
    for where, part in parts:
        assert np.isnan(array[where]).all(), "written twice"
        array[where] = np.asarray(part)
    return array


@pytest.mark.parametrize("reserved", [True, False])
def test_parts_are_as_they_were_before_the_arrays_were_donated(as_on_gpus, reserved):
    values, lines = arrays(), []
    if reserved:
        snapshots.reserve(values, lines.append)
        assert not pinned_arrays()
    taken = snapshots.take(values)
    assert len(pinned_arrays()) == (2 + 1 + 4 if reserved else 0)
    jax.jit(lambda xs: [x * 0 - 1 for x in xs], donate_argnums=0)(values)
    for parts in taken:
        assert (whole(parts) == np.arange(64).reshape(8, 8)).all()


def test_little_memory_is_left_alone(as_on_gpus, monkeypatch):
    values, lines = arrays(), []
    needed = 2 * 3 * 128
    monkeypatch.setattr(snapshots, "free_memory", lambda: 2 * needed - 1)
    snapshots.reserve(values, lines.append)
    assert "would take more than half" in lines[0]
    snapshots.take(values)
    assert not pinned_arrays()
    monkeypatch.setattr(snapshots, "free_memory", lambda: 2 * needed)
    snapshots.reserve(values, lines.append)
    assert lines[1].startswith("pinning up to")
    taken = snapshots.take(values)
    assert pinned_arrays() and taken


def test_where_no_more_can_be_pinned_ordinary_memory_serves(as_on_gpus, monkeypatch):
    values, lines = arrays(), []
    snapshots.reserve(values, lines.append)

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory")

    monkeypatch.setattr(jax, "device_put", exhausted)
    assert (whole(snapshots.take(values)[0]) == np.arange(64).reshape(8, 8)).all()
    snapshots.reserve(values, lines.append)
    assert "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB" in lines[-1]


def test_accelerators_that_gain_nothing_pin_nothing():
    lines = []
    snapshots.reserve(arrays(), lines.append)
    assert not lines and not pinned_arrays()


def test_the_memory_of_a_save_is_free_for_the_next(as_on_gpus, tmp_path):
    values = {str(i): x for i, x in enumerate(arrays())}
    snapshots.reserve(list(values.values()), lambda line: None)
    manager = checkpoints.make_manager(tmp_path)
    for step in (1, 2):
        checkpoints.save(
            manager, step, params=values, model=checkpoints.describe(config("mla"), None)
        )
        manager.wait_until_finished()
        assert not pinned_arrays()
    found = checkpoints.open_checkpoint(tmp_path).restore("params", jax.eval_shape(lambda: values))
    assert (np.asarray(found["0"]) == np.arange(64).reshape(8, 8)).all()


def test_free_memory_is_what_the_system_says():
    free = snapshots.free_memory()
    assert 1 << 20 < free < 1 << 50
