"""Step time and memory of each process of a run."""

import math

import jax
import numpy as np
from jax.experimental import multihost_utils


def by_host(step_seconds: float) -> dict[str, float]:
    """Step time and memory of all processes, by name, for the metrics of a step.

    `step_seconds` and `memory_gib`, the most that any device of the process has held so far; with
    several processes `step_seconds/3` is of process 3. Memory is left out where the backend does
    not count it, as on CPUs. All processes must call this at the same step.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    mine = np.array([step_seconds, max(peaks, default=math.nan) / 2**30], np.float32)
    if jax.process_count() == 1:
        return _named(mine, "")
    gathered = np.asarray(multihost_utils.process_allgather(mine))
    return {k: v for i, row in enumerate(gathered) for k, v in _named(row, f"/{i}").items()}


def _named(values: np.ndarray, suffix: str) -> dict[str, float]:
    named = zip(("step_seconds", "memory_gib"), map(float, values), strict=True)
    return {name + suffix: value for name, value in named if math.isfinite(value)}
