"""The settings that were measured to be fastest, kept for every op that has kernels to tune.

A backend module of an op (`absorbed_decode.mosaic_gpu`, say) provides

  Config                        frozen dataclass of plain numbers: tiles, splits, stages
  supports(problem)             None, or in one phrase why the kernel cannot serve the problem
  heuristic(problem)            the Config to use when nothing was measured
  candidates(problem)           the Configs worth measuring, the heuristic's among them

and the kernel itself. A problem is a frozen dataclass of plain values, everything static about a
call. Settings hold for exactly the op, implementation and problem that they were measured for.
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

# By op, implementation, and the problem's fields with their names.
_Key = tuple[str, str, frozenset[tuple[str, Any]]]
_tuned: dict[_Key, dict[str, Any]] = {}

# Files of the time when one op had settings do not name it.
_FIRST_OP = "absorbed_decode"


def _key(op: str, implementation: str, problem: dict[str, Any]) -> _Key:
    return op, implementation, frozenset(problem.items())


def _fields(problem: Any) -> dict[str, Any]:
    """Without those at their default, which files of before they came do not have."""
    return {
        field.name: value
        for field in dataclasses.fields(problem)
        if (value := getattr(problem, field.name)) != field.default
    }


def find_tuned(op: str, implementation: str, problem: Any) -> dict[str, Any] | None:
    """The fields of the Config measured fastest for exactly this problem, if one was."""
    return _tuned.get(_key(op, implementation, _fields(problem)))


def remember_tuned(op: str, implementation: str, problem: Any, config: Any) -> None:
    """Makes `config` the one that the op uses for `problem` in this process."""
    key = _key(op, implementation, _fields(problem))
    _tuned[key] = dataclasses.asdict(config)


def save_tuned(path: str | os.PathLike) -> None:
    """Writes all settings measured or loaded in this process as JSON, replacing `path` whole."""
    rows = [
        {
            "op": op,
            "implementation": implementation,
            "problem": dict(sorted(problem)),
            "config": fields,
        }
        for (op, implementation, problem), fields in _tuned.items()
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
        rows = {}
        for row in content["tuned"]:
            op, implementation = row.get("op", _FIRST_OP), row["implementation"]
            rows[_key(str(op), str(implementation), dict(row["problem"]))] = dict(row["config"])
    except (AttributeError, ValueError, KeyError, TypeError) as error:
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
