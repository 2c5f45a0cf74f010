"""What a GPU does in one call of a compiled program: its kernels, by name, from a profile."""

import collections
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a call, on the first device."""

    name: str
    launches: float
    microseconds: float


def kernels(call: Callable[[], Any], repeats: int = 3) -> list[Kernel]:
    """The kernels (and copies) of one call, the longest in all first; their sums are a call's.

    Args:
      call: runs the compiled program; called once before the profile begins.
      repeats: calls in the profile.

    Raises:
      ValueError: the profiler saw no GPU.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                result = call()
            jax.block_until_ready(result)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in ProfileData.from_file(str(trace)).planes if "GPU:0" in p.name]
        if not planes:
            raise ValueError("the profiler saw no GPU in the call")
        launches: collections.Counter[str] = collections.Counter()
        nanoseconds: collections.Counter[str] = collections.Counter()
        for line in planes[0].lines:
            if "XLA" in line.name:  # The same time again, by operations and modules.
                continue
            for event in line.events:
                launches[event.name] += 1
                nanoseconds[event.name] += event.duration_ns
    return [
        Kernel(name, launches[name] / repeats, total / repeats / 1e3)
        for name, total in nanoseconds.most_common()
    ]
