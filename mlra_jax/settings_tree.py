"""Settings as frozen dataclasses and as nested dictionaries: building, checks, nearest names."""

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# So many names are listed when none is near the one that was given; more would hide the message.
_LISTED = 8


class ConfigError(ValueError):
    """A size or name that cannot be; the message is one line and names the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def at_least(least: int, settings: Any, prefix: str, *names: str) -> None:
    """Raises ConfigError unless these fields of a dataclass are finite numbers from `least` on.

    A field that is declared as int must hold a whole number below 2**63. `prefix`, as in `mesh.`,
    is put before the names in messages.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(settings)}
    for name in names:
        value, whole = getattr(settings, name), kinds[name] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{prefix}{name}={value!r} is not a {kind}")
        # Python's whole numbers have no largest, and its floats may be infinite.
        too_large = whole and value >= 2**63
        require(not too_large, f"{prefix}{name} must be below 2**63")
        require(
            least <= value <= sys.float_info.max,
            f"{prefix}{name}={value} must be at least {least}",
        )


def within(settings: Any, prefix: str, **ranges: str) -> None:
    """Raises ConfigError unless each of these fields of a dataclass lies in its range.

    `[0, 1)` has the 0 and not the 1. What counts is what float32 on a device makes of the number:
    a decay of 1 - 1e-9 is 1 there, and an eps of 1e-40 is 0.
    """
    at_least(0, settings, prefix, *ranges)
    for name, written in ranges.items():
        value = getattr(settings, name)
        lower, upper = map(float, written[1:-1].split(","))
        with np.errstate(over="ignore"):
            number = float(np.float32(value))
        if abs(number) < np.finfo(np.float32).tiny:
            number = 0.0
        above = number > lower or (written[0] == "[" and number == lower)
        below = number < upper or (written[-1] == "]" and number == upper)
        changed = number in (0, 1, math.inf) and number != value
        rounded = f" (float32 makes it {number:g})" if changed else ""
        require(above and below, f"{prefix}{name}={value} must lie in {written}{rounded}")


def check_kinds(settings: Any, prefix: str) -> None:
    """Raises ConfigError unless the fields of a dataclass for text and switches hold such."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for kind, called in ((str, "text"), (bool, "True or False")):
            require(
                field.type is not kind or isinstance(value, kind),
                f"{prefix}{field.name}={value!r} is not {called}",
            )


def among(known: Sequence[str], settings: Any, name: str, prefix: str = "") -> None:
    """Raises ConfigError unless a field of a dataclass holds one of these words."""
    value = getattr(settings, name)
    require(value in known, f"{prefix}{name}={value!r} is none of {', '.join(known)}")


def build(cls: type, values: Mapping[str, Any], prefix: str = "", what: str = "setting") -> Any:
    """`cls(**values)` of a dataclass, with the unknown and the missing named.

    Args:
      cls: the dataclass.
      values: its fields by name; those with a default may be absent.
      prefix: put before names in messages, as in `mesh.`.
      what: what messages call a field.

    Raises:
      ConfigError: an unknown name, with the nearest that exists, or a missing one.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            near = _nearest(name, fields) or len(fields) <= _LISTED
            hint = f"; {closest(name, fields, prefix)}" if near else ""
            raise ConfigError(f"unknown {what} {prefix}{name}{hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{what} {prefix}{', '.join(missing)} is missing")
    return cls(**values)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def closest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean X?`, or which names there are."""
    known = list(known)
    near = _nearest(name, known)
    if near:
        return f"did you mean {prefix}{near}?"
    return f"there are {', '.join(prefix + k for k in known)}"


_ALSO_CALLED = {
    "batch_size": "global_batch",
    "epochs": "steps",
    "hidden_size": "embed_dim",
    "n_layers": "num_layers",
    "seq_len": "context_length",
}


def meant(name: str, paths: Iterable[str]) -> str | None:
    """The dotted path that someone means who writes `name` in the wrong place or by another word:
    `lr` and `learning_rate` mean `optimizer.peak_learning_rate`."""
    lasts = {path.rpartition(".")[2]: path for path in reversed(list(paths))}
    name = _ALSO_CALLED.get(name, name)
    if name in lasts:
        return lasts[name]
    for last, path in lasts.items():
        initials = "".join(word[0] for word in last.split("_"))
        if len(name) > 1 and (initials.endswith(name) or last.endswith(f"_{name}")):
            return path
    return None


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, 1, cutoff=0.5)), None)
