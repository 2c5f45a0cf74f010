"""How every benchmark takes its times: bursts with pauses, compiled side by side."""

import concurrent.futures
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Host-clock times of `repeats` calls, after one that counts for nothing.

    Before each is a pause, so that the power limit does not decide the result.
    """
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        time.sleep(4e-3)
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return times


def queued_seconds(function: Callable[[jax.Array], Any], x: jax.Array, start: float) -> float:
    """Median seconds of one call on `x` of ten queued at once, so that starting them hides.

    Args:
      function: jitted.
      start: the time of starting a program, subtracted once.
    """
    times = seconds(lambda: [function(x) for _ in range(10)], 10)
    return statistics.median((t - start) / 10 for t in times)


def poison() -> None:
    """Leaves NaN in the memory that the next outputs will be given."""
    jax.block_until_ready(jnp.full([1 << 28], jnp.nan, jnp.float32))


def compile_all(jobs: Mapping[Hashable, Callable[[], Any]], workers: int = 16) -> dict:
    """Calls {key: compile} side by side; a failure becomes its first line."""
    done = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(build): key for key, build in jobs.items()}
        waiting = concurrent.futures.as_completed(futures)
        for future in tqdm(waiting, total=len(futures), desc="compile", file=sys.stderr):
            try:
                done[futures[future]] = future.result()
            except Exception as error:  # Compilers raise many types; the table says which row.
                done[futures[future]] = str(error).strip().split("\n")[0][:200]
    return done
