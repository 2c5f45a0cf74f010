"""What is being compiled for, which decides the kernel."""

from typing import Any

import jax

_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def device() -> Any:
    """The kind of device being compiled for; has `platform` and `device_kind`."""
    # Inside shard_map the mesh may be of other devices than the host's, as when compiling ahead of
    # time for a TPU; outside there is no mesh to ask.
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described if described is not None else jax.devices()[0]


def is_gpu(device: Any) -> bool:
    return device.platform in ("gpu", "cuda")


def is_hopper(device: Any) -> bool:
    return is_gpu(device) and any(chip in device.device_kind for chip in _HOPPER)
