"""The all-reduce of decoding steps. No GPU here: that it lowers, and when it is asked for."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mlra_jax import sharding
from mlra_jax.kernels import all_reduce
from mlra_jax.sharding import make_mesh


def lowered(mesh, shape):
    over = sharding.spec("latent")

    def sums(x):
        return all_reduce.all_reduce(x, mesh=mesh, axis_names=sharding.MODEL, dtype=jnp.bfloat16)

    function = jax.jit(
        jax.shard_map(sums, mesh=mesh, in_specs=over, out_specs=sharding.spec(), check_vma=False)
    )
    n = sharding.size(mesh, sharding.MODEL)
    x = jax.ShapeDtypeStruct((n * shape[0], *shape[1:]), jnp.float32)
    safe = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    return export.export(function, platforms=["cuda"], disabled_checks=safe)(x).mlir_module()


@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(context=4), dict(tensor=4, context=2)])
def test_is_one_custom_call_that_knows_its_peers(sizes):
    text = lowered(make_mesh(**sizes), (8, 3072))
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
    assert "uses_xla_collective_metadata = true" in text
    assert "all_reduce" not in text.replace("all_reduce_mosaic", "").split("@main")[0]


def hopper(process=0):
    return types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", process_index=process
    )


def described(devices, **sizes):
    shape = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    return types.SimpleNamespace(devices=np.array(devices), shape=shape, size=len(devices))


@pytest.mark.parametrize(
    ("devices", "sizes", "size", "why"),
    [
        ([hopper()] * 8, dict(tensor=8), 8 * 3072, None),
        ([hopper()] * 8, dict(tensor=2, context=4), 128 * 3072, None),
        ([hopper()], dict(), 8 * 3072, "one device"),
        ([hopper()] * 8, dict(tensor=8), 8 * 3072 + 1, "no multiple of 1024"),
        ([hopper()] * 8, dict(tensor=8), 2048 * 3072, "more than 512 times"),
        ([hopper()] * 8, dict(tensor=4, data=2), 8 * 3072, "more axes"),
        ([hopper()] * 4, dict(tensor=4), 8 * 3072, "not all devices of one process"),
        ([hopper(0), hopper(1)] * 4, dict(tensor=8), 8 * 3072, "not all devices of one process"),
    ],
)
def test_serves_whole_meshes_of_one_process(devices, sizes, size, why):
    assert jax.local_device_count() == 8
    answer = all_reduce.supports(described(devices, **sizes), sharding.MODEL, size)
    assert answer is None if why is None else why in answer


def test_cpu_devices_sum_by_xla():
    mesh = make_mesh(tensor=2)
    assert "no Hopper GPUs" in all_reduce.supports(mesh, sharding.MODEL, 8 * 3072)
