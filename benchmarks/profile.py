"""What a GPU does in one call of a compiled program: its kernels, by name, from a profile."""

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

_EXCHANGE = re.compile("nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|permute", re.I)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a call, on the first device."""

    name: str
    launches: float
    microseconds: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """One call on the first device, and what the host launched for all of them."""

    kernels: tuple[Kernel, ...]
    """The longest in all first; copies are among them."""
    graphs: float
    """CUDA graphs, as far as the profiler saw the launches."""

    @property
    def milliseconds(self) -> float:
        """Of all kernels, one after the other."""
        return sum(k.microseconds for k in self.kernels) / 1e3

    @property
    def exchanging(self) -> float:
        """The part of that time in kernels that exchange data with other devices."""
        of_names = sum(k.microseconds for k in self.kernels if _EXCHANGE.search(k.name))
        return of_names / 1e3 / self.milliseconds


def profile(call: Callable[[], Any], repeats: int = 3) -> Profile:
    """Kernels and graphs of one call.

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
        planes = list(ProfileData.from_file(str(trace)).planes)
        gpu = [p for p in planes if "GPU:0" in p.name]
        if not gpu:
            raise ValueError("the profiler saw no GPU in the call")
        launches: collections.Counter[str] = collections.Counter()
        nanoseconds: collections.Counter[str] = collections.Counter()
        for line in gpu[0].lines:
            if "XLA" in line.name:  # The same time again, by operations and modules.
                continue
            for event in line.events:
                launches[event.name] += 1
                nanoseconds[event.name] += event.duration_ns
        lines = (line for p in planes if "GPU:" not in p.name for line in p.lines)
        graphs = sum("GraphLaunch" in event.name for line in lines for event in line.events)
    return Profile(
        tuple(
            Kernel(name, launches[name] / repeats, total / repeats / 1e3)
            for name, total in nanoseconds.most_common()
        ),
        graphs / repeats,
    )
