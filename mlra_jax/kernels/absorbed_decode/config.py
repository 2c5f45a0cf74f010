"""What a kernel is asked to do, and the store of settings that were measured to do it fastest.

A backend module (`mosaic_gpu`, `mosaic_tpu`) provides

  Config                        frozen dataclass of plain numbers: tiles, splits, stages
  supports(problem)             None, or in one phrase why the kernel cannot serve the problem
  heuristic(problem)            the Config to use when nothing was measured
  candidates(problem)           the Configs worth measuring, the heuristic's among them
  absorbed_decode(...)          the kernel; arguments as `api.absorbed_decode` normalises them
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from absl import logging

from mlra_jax.files import whole_file


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static about one call.

    Attributes:
      device_kind: as JAX names the device the call is compiled for ("NVIDIA H200", "TPU v5 lite").
      batch, queries, latents, heads, groups: B, T, L, H (per latent) and G (rotary query groups).
      width, rope: C and R.
      cache: S, the positions the cache has room for.
      dtype: of queries and cache, "bfloat16", "float16" or "float32".
    """

    device_kind: str
    batch: int
    queries: int
    latents: int
    heads: int
    groups: int
    width: int
    rope: int
    cache: int
    dtype: str


_tuned: dict[tuple[str, Problem], dict[str, Any]] = {}


def find_tuned(implementation: str, problem: Problem) -> dict[str, Any] | None:
    """The fields of the Config measured fastest for exactly this problem, if one was."""
    return _tuned.get((implementation, problem))


def remember_tuned(implementation: str, problem: Problem, config: Any) -> None:
    """Makes `config` the one that `api.absorbed_decode` uses for `problem` in this process."""
    _tuned[implementation, problem] = dataclasses.asdict(config)


def save_tuned(path: str | os.PathLike) -> None:
    """Writes all settings measured or loaded in this process as JSON, replacing `path` whole."""
    rows = [
        {"implementation": implementation, "problem": dataclasses.asdict(problem), "config": fields}
        for (implementation, problem), fields in _tuned.items()
    ]
    with whole_file(path) as file:
        json.dump({"format_version": 1, "tuned": rows}, file, indent=1)


def load_tuned(path: str | os.PathLike) -> int:
    """Adds the settings of a file that `save_tuned` wrote; returns how many there were.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not what `save_tuned` writes.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format_version"] != 1:
            raise ValueError(f"format_version {content['format_version']}, expected 1")
        rows = {
            (str(row["implementation"]), Problem(**row["problem"])): dict(row["config"])
            for row in content["tuned"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of tuned kernel settings: {error}") from None
    _tuned.update(rows)
    return len(rows)


def fastest(
    candidates: Iterable[Any], run: Callable[[Any], Callable[[], Any]], *, repeats: int = 20
) -> tuple[Any, float]:
    """Times every candidate on the present device.

    Args:
      candidates: Config objects.
      run: maps a Config to a function without arguments that starts the kernel and returns its
        result. A candidate that fails to compile or run is passed over with a log line.
      repeats: timed calls per candidate, after one to compile; their median counts.

    Returns:
      The fastest candidate and its seconds.

    Raises:
      ValueError: no candidate ran.
    """
    best = None
    for config in candidates:
        try:
            call = run(config)
            jax.block_until_ready(call())
            seconds = []
            for _ in range(repeats):
                begin = time.perf_counter()
                jax.block_until_ready(call())
                seconds.append(time.perf_counter() - begin)
        except Exception as error:  # Compilers raise many types; the next candidate may still run.
            logging.info("autotune: %s does not run: %s", config, str(error).split("\n")[0])
            continue
        median = statistics.median(seconds)
        logging.info("autotune: %s takes %.1f us", config, median * 1e6)
        if best is None or median < best[1]:
            best = config, median
    if best is None:
        raise ValueError("autotune: no candidate configuration runs on this device")
    return best
