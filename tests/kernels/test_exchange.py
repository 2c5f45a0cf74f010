"""The exchange of decoding steps. No GPU here: its numbers in plain JAX, and that it lowers."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mlra_jax import sharding
from mlra_jax.kernels import exchange, target
from mlra_jax.sharding import make_mesh

EPS = 1e-5


def arguments(devices, rows, width, dtype, rng=None):
    """Two summands of each device."""
    draw = (rng or np.random.default_rng(0)).standard_normal
    shapes = (2 * devices, rows, width), (rows, width), (width,)
    return [draw(s).astype(t) for s, t in zip(shapes, ("float32", dtype, "float32"), strict=True)]


def chained(mesh, times, parts_NRD, x_RD, scale_D):
    """So many exchanges of one step; what each normed is every device's next part."""
    N, rows, width = parts_NRD.shape
    exchanged = exchange.Exchange(mesh, sharding.MODEL, rows, width)
    for _ in range(times):
        x_RD, normed_RD = exchanged(parts_NRD, x_RD, scale_D, factor=1.5, eps=EPS, dtype="bfloat16")
        parts_NRD = jnp.broadcast_to(normed_RD.astype(jnp.float32), parts_NRD.shape)
    return x_RD, normed_RD


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(tensor=3, context=2)])
def test_adds_what_all_devices_have_and_norms_it(sizes, dtype):
    mesh = make_mesh(**sizes)
    parts, x, scale = arguments(mesh.size, 5, 40, dtype)
    got_x, got = jax.jit(functools.partial(chained, mesh, 1))(parts, x, scale)
    assert (got_x.dtype, got.dtype) == (dtype, "bfloat16")
    got_x, got = (np.asarray(y, np.float64) for y in (got_x, got))
    want = x.astype(np.float64) + parts.astype(np.float64).sum(0)
    step = 2**-8 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(got_x, want, rtol=step, atol=1e-6)
    want = got_x / np.sqrt(np.mean(got_x**2, axis=-1, keepdims=True) + EPS) * scale * 1.5
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "width"),
    [(dict(tensor=2), 3072), (dict(context=4), 768), (dict(tensor=4, context=2), 1152)],
)
def test_only_the_first_exchange_of_a_step_has_a_barrier(sizes, width, monkeypatch):
    """On Hopper GPUs; and the inboxes are one memory from first to last."""
    monkeypatch.setattr(target, "is_hopper", lambda device: True)
    mesh = make_mesh(**sizes)
    function = jax.jit(functools.partial(chained, mesh, 5))
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments(mesh.size, 3, width, "f4")]
    safe = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with jax.enable_x64(mesh.size == 4):
        exported = export.export(function, platforms=["cuda"], disabled_checks=safe)(*structs)
    text = exported.mlir_module()
    constants = dict(re.findall(r"(%\S+) = stablehlo.constant dense<(\d)> : tensor<1xi32>", text))
    calls = re.findall(r"call @(_by_kernel\w*)\(.*?, (%\w+)\) : ", text)
    assert [constants[turn] for _, turn in calls] == ["0", "1", "2", "0", "1"]
    kernels = re.split(r"func.func private @(_by_kernel\w*)", text)[1:]
    barriers = {
        name: "skip_device_barrier = false" in kernel
        for name, kernel in zip(kernels[::2], kernels[1::2], strict=True)
    }
    assert [barriers[name] for name, _ in calls] == [True] + [False] * 4
    for name, kernel in zip(kernels[::2], kernels[1::2], strict=True):
        assert "uses_xla_collective_metadata = true" in kernel
        # The first tells besides how far it is to the others' inboxes.
        output = 3 if barriers[name] else 2
        assert f"output_tuple_indices = [{output}], operand_index = 4" in kernel
    assert "all_reduce" not in text and "all_gather" not in text


def gathered(mesh, rows, width, x_RV, *arrays):
    """The end of a step of one exchange."""
    exchanged = exchange.Exchange(mesh, sharding.MODEL, rows, width, gathered=x_RV.shape[1])
    stream = exchanged(*arrays, factor=1.5, eps=EPS, dtype="bfloat16")
    return stream, exchanged.gather(x_RV)


@pytest.mark.parametrize(
    ("rows", "columns", "by_kernel"),
    [(8, 1600, True), (3, 512, True), (8, 1608, False), (328, 1600, False)],
)
def test_logits_are_gathered_by_an_inbox_that_the_barrier_says_is_empty(
    rows, columns, by_kernel, monkeypatch
):
    """On Hopper GPUs, where columns divide and are not too many."""
    monkeypatch.setattr(target, "is_hopper", lambda device: True)
    mesh = make_mesh(tensor=4)
    arrays = np.zeros((rows, columns), "f4"), *arguments(mesh.size, rows, 256, "f4")
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    function = jax.jit(functools.partial(gathered, mesh, rows, 256))
    safe = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    text = export.export(function, platforms=["cuda"], disabled_checks=safe)(*structs).mlir_module()
    kernels = text.split("func.func private @")[1:]
    [first] = [kernel for kernel in kernels if kernel.startswith("_by_kernel")]
    assert "skip_device_barrier = false" in first
    # Its place is behind the inboxes, so that it is emptied with them.
    words = 3 * 4 * rows * 256 + rows * columns * by_kernel
    assert f"tensor<4x{words}xi32>" in first
    last = [kernel for kernel in kernels if kernel.startswith("_gathered")]
    assert len(last) == by_kernel
    assert all("uses_xla_collective_metadata = false" in kernel for kernel in last)


def test_gathers_what_all_devices_have():
    mesh = make_mesh(tensor=2, context=2)
    x = np.random.default_rng(0).standard_normal((5, 24)).astype("f4")
    arrays = arguments(mesh.size, 5, 40, "f4")
    _, got = jax.jit(functools.partial(gathered, mesh, 5, 40))(x, *arrays)
    np.testing.assert_array_equal(got, x)


def hopper(process=0):
    return types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", process_index=process
    )


def described(devices, **sizes):
    shape = dict.fromkeys(sharding.MESH_AXES, 1) | sizes
    return types.SimpleNamespace(devices=np.array(devices), shape=shape, size=len(devices))


@pytest.mark.parametrize(
    ("devices", "sizes", "rows", "width", "why"),
    [
        ([hopper()] * 8, dict(tensor=8), 8, 3072, None),
        ([hopper()] * 8, dict(tensor=2, context=4), 128, 3072, None),
        ([hopper()], dict(), 8, 3072, "one device"),
        ([hopper()] * 8, dict(tensor=8), 8, 3073, "no multiple of 128"),
        ([hopper()] * 8, dict(tensor=8), 171, 3072, "more than 524288"),
        ([hopper()] * 8, dict(tensor=8), 8, 8320, "up to 8192"),
        ([hopper()] * 8, dict(tensor=4, data=2), 8, 3072, "more axes"),
        ([hopper()] * 4, dict(tensor=4), 8, 3072, "not all devices of one process"),
        ([hopper(0), hopper(1)] * 4, dict(tensor=8), 8, 3072, "not all devices of one process"),
    ],
)
def test_serves_whole_meshes_of_one_process(devices, sizes, rows, width, why):
    assert jax.local_device_count() == 8
    answer = exchange.supports(described(devices, **sizes), sharding.MODEL, rows, width)
    assert answer is None if why is None else why in answer


def test_cpu_devices_sum_by_xla():
    mesh = make_mesh(tensor=2)
    assert "no Hopper GPUs" in exchange.supports(mesh, sharding.MODEL, 8, 3072)
