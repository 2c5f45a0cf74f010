"""Slices of chips that are not there."""

import dataclasses
import os
import re
from typing import Any

import jax

from mlra_jax import sharding
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.model import structure
from mlra_jax.plan import chips

_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
"""What keeps the TPU compiler from looking for TPUs, and from asking to be the only one."""


@dataclasses.dataclass(frozen=True)
class _GPU:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    device_kind: str
    platform: str = "gpu"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` times the same chips: a TPU slice as "v5p:4x4x4", or hosts of GPUs as "h100:8"."""

    name: str
    slices: int
    chip: chips.Chip
    each: int
    """Devices of a slice."""
    devices: tuple[Any, ...]
    """What the compiler and a mesh take for them."""
    compiles: bool
    """Whether what is said of it is the compiler's, or all by formula."""

    @property
    def size(self) -> int:
        return self.slices * self.each

    def by_formula(self) -> "Topology":
        """The same without its compiler."""
        return dataclasses.replace(self, compiles=False)

    def mesh(self, sizes: dict[str, int]) -> jax.sharding.Mesh:
        """Of all devices; ConfigError unless the sizes make up their number."""
        return sharding.make_mesh(**sizes, devices=self.devices)

    def divides(self, model: ModelConfig, sizes: dict[str, int]) -> None:
        """Raises ConfigError where the model's sizes do not divide over such a mesh."""
        structure(model, self.mesh(sizes))


def describe(name: str, slices: int = 1) -> Topology:
    """Raises ConfigError for a chip or a shape that is not known, and without the TPU compiler."""
    kind, _, shape = name.partition(":")
    chip = chips.find(kind)
    if slices < 1 or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(
            f"--topology={name} --slices={slices}: give a chip and a shape, as in v5e:4x4, "
            "v5p:4x4x4 or h100:8, and slices from 1 on"
        )
    if not chip.is_tpu:
        if "x" in shape:
            raise ConfigError(f"--topology={name}: give the GPUs of a host, as in {kind}:8")
        each = int(shape)
        gpus = tuple(_GPU(i, i // each, chip.kind) for i in range(slices * each))
        return Topology(name, slices, chip, each, gpus, compiles=False)
    devices = _tpus(name, slices)
    return Topology(name, slices, chip, len(devices) // slices, devices, compiles=True)


def _tpus(name: str, slices: int) -> tuple[Any, ...]:
    from jax.experimental import topologies

    for variable, value in _ALONE.items():
        os.environ.setdefault(variable, value)
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except Exception as error:  # Of several libraries, in several lines.
        if "TPU support not installed" in str(error):
            raise ConfigError(
                f"--topology={name}: the TPU compiler is not installed; pip install 'libtpu<0.1'"
            ) from None
        reason = " ".join(str(error).split())
        raise ConfigError(f"--topology={name}: {reason[:200]}") from None
    return tuple(found.devices)
