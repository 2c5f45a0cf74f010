"""Settings as frozen dataclasses and as nested dictionaries: building, checks, nearest names."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

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

    A field that is declared as int must hold a whole number. `prefix`, as in `mesh.`, is put before
    the names in messages.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(settings)}
    for name in names:
        value, whole = getattr(settings, name), kinds[name] is int
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{prefix}{name}={value!r} is not a {kind}")
        require(
            math.isfinite(value) and value >= least,
            f"{prefix}{name}={value} must be at least {least}",
        )


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
