"""What a GPU does in one call of a compiled program: its kernels, by name, from a profile."""

import dataclasses
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from mlra_jax.profile import Kernel, kernels_of

_EXCHANGE = re.compile(
    "nccl|exchange|barrier|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|permute", re.I
)


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
        if not (found := kernels_of(trace, repeats)):
            raise ValueError("the profiler saw no GPU in the call")
        planes = ProfileData.from_file(str(trace)).planes
        lines = (line for p in planes if "GPU:" not in p.name for line in p.lines)
        graphs = sum("GraphLaunch" in event.name for line in lines for event in line.events)
    return Profile(tuple(found), graphs / repeats)
