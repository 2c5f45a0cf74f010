"""What arrays hold now, copied to the host, so that a step may overwrite them while it is written.

A GPU copies to pinned memory of the host at the speed of its link (55 GB/s where ordinary memory
takes 1.6), but pinning is as slow as that. So `reserve` pins once, beforehand; JAX keeps what it
has pinned in a process for later copies. Elsewhere, and where the host has too little memory to
leave it pinned, copies go to ordinary memory.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

Part = tuple[Any, jax.Array | np.ndarray]
"""(where in the whole array, values). `np.asarray` of the values copies nothing."""

_PLATFORMS = ("gpu",)
_PINNED = "pinned_host"
# What JAX pins at a time doubles, so that it may hold twice what is asked for.
_POOL = 2
_reserved = False


def reserve(arrays: Sequence[jax.Array], say: Callable[[str], None]) -> None:
    """On GPUs, has the memory for a copy of `arrays` pinned, for all that `take` copies later.

    Half of the host's free memory is left alone. Takes about a second a gigabyte, of which
    `say` prints a line, and must end before an array is donated.
    """
    global _reserved
    shards = [shard.data for x in arrays for shard in _own_shards(x)]
    if any(x.device.platform not in _PLATFORMS for x in shards):
        return
    wanted, free = _POOL * sum(x.nbytes for x in shards), free_memory()
    shown = f"up to {wanted / 1e9:.1f} GB of the host's memory, {free / 1e9:.1f} GB free"
    if wanted > free / 2:
        say(f"saves stop the run for longer: pinning {shown}, would take more than half")
        return
    say(f"pinning {shown}, so that saves do not stop the run")
    copies = _pinned(shards)
    _reserved = copies is not None
    for copy in copies or ():
        copy.delete()
    if not _reserved:
        say("saves stop the run for longer: XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB allows no more")


def take(arrays: Sequence[jax.Array]) -> list[list[Part]]:
    """Of each array the parts that this process writes. They may be donated when this returns."""
    shards = [_own_shards(x) for x in arrays]
    data = [shard.data for those in shards for shard in those]
    copies = (_pinned(data) if _reserved else None) or _pageable(data)
    following = iter(copies)
    return [[(shard.index, next(following)) for shard in those] for those in shards]


def free_memory() -> int:
    """Bytes of memory that the host, or the container this runs in, has free; 0 if none is said."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # There is no container, or "max" is its limit.
        return free


def _own_shards(value: jax.Array) -> list[jax.Shard]:
    """Each part of an array is written by one of the devices that hold it."""
    return [shard for shard in value.addressable_shards if shard.replica_id == 0]


def _pinned(shards: Sequence[jax.Array]) -> list[jax.Array] | None:
    """Copies in pinned memory, or None where JAX's limit for it is reached."""
    where = [SingleDeviceSharding(x.device, memory_kind=_PINNED) for x in shards]
    try:
        return jax.block_until_ready(jax.device_put(list(shards), where))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _pageable(shards: Sequence[jax.Array]) -> list[np.ndarray]:
    for x in shards:
        x.copy_to_host_async()
    return [np.asarray(x) for x in shards]
