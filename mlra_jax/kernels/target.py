"""What is being compiled for, which decides the kernel."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def device() -> Any:
    """The kind of device being compiled for; has `platform` and `device_kind`."""
    # Inside shard_map the mesh may be of other devices than the host's, as when compiling ahead of
    # time for a TPU; outside there is no mesh to ask.
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described if described is not None else jax.devices()[0]


def int32_indices(kernel: Callable) -> Callable:
    """The kernel with int32 for Python's whole numbers and int64 arrays, under `jax_enable_x64`.

    Devices count in int32, and a kernel's indices must all be of one type.
    """

    @functools.wraps(kernel)
    def traced(*arrays, **settings):
        with jax.enable_x64(False):
            narrow = lambda x: x.astype(jnp.int32) if x.dtype == jnp.int64 else x
            return kernel(*jax.tree.map(narrow, arrays), **settings)

    return traced


def is_gpu(device: Any) -> bool:
    return device.platform in ("gpu", "cuda")


def is_hopper(device: Any) -> bool:
    return is_gpu(device) and any(chip in device.device_kind for chip in _HOPPER)
