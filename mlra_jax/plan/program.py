"""What a compiled program exchanges between its devices, read off the compiler's text.

Bytes are those that one device sends in one run of the program. An operation in the body of a loop
counts as often as the loop runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s4": 0.5, "u4": 0.5}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?([^{}()\s]+)")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All exchanges of one kind along the same axes in one run."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices that exchange lie; "slices" where it is the slow network
    that connects them."""
    links: int
    """Over so many a device sends at once; 0: over the slow network."""
    count: int
    bytes: int
    """That one device sends."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""


Module = dict[str, dict[str, _Instruction]]


def collectives(text: str, devices: np.ndarray, axes: Sequence[str]) -> list[Collective]:
    """Those of a program's optimised text, the most bytes first.

    Args:
      text: of the compiled program.
      devices: of the mesh, an array with a dimension for each axis.
      axes: their names.
    """
    module, entry = _parse(text)
    places = _Places(devices, tuple(axes))
    counts: collections.Counter[tuple] = collections.Counter()
    sums: collections.Counter[tuple] = collections.Counter()
    for instruction, times, scattered in _executed(module, entry):
        if crossing := _BETWEEN_SLICES.search(instruction.rest):
            kind, among = crossing[1].lower().replace("_", "-"), places.slices
            key = (kind, ("slices",), 0)
        else:
            kind, group = instruction.opcode.removesuffix("-start"), places.group(instruction.rest)
            kind = "reduce-scatter" if scattered else kind
            among, key = len(group), (kind, places.axes_of(group), places.links(group))
        if among > 1:
            counts[key] += times
            sums[key] += times * _sent(kind, _size(instruction), among, scattered)
    found = [Collective(*key, counts[key], round(sums[key])) for key in counts]
    return sorted(found, key=lambda c: -c.bytes)


def _sent(kind: str, size: float, among: int, scattered: bool = False) -> float:
    """Bytes that each of a ring of devices sends; `size` is that of the result."""
    share = (among - 1) / among
    match kind:
        case "all-reduce":
            return 2 * share * size
        case "reduce-scatter":
            return share * size if scattered else (among - 1) * size
        case "all-gather" | "all-to-all":
            return share * size
    return size


def _size(instruction: _Instruction) -> float:
    """Bytes of the result; what is begun gives operands, or a handle, beside it."""
    parts = [
        _BYTES.get(kind, int(bits or 0) / 8) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, bits, dims in re.findall(r"([a-z]+\d*?(\d*))\[([\d,]*)\]", instruction.type)
    ]
    match instruction.opcode:
        case "all-gather-start":
            return sum(parts[len(parts) // 2 :])
        case "collective-permute-start" | "send":
            return max(parts, default=0)
    return sum(parts)


class _Places:
    """Where the program's partitions lie: in the mesh, and in the torus of a slice."""

    def __init__(self, devices: np.ndarray, axes: tuple[str, ...]):
        self._axes, flat = axes, devices.ravel()
        slice_of = np.array([getattr(d, "slice_index", None) or 0 for d in flat])
        self.slices = len(set(slice_of.tolist()))
        # The program of several slices is that of one of them; it numbers its own devices.
        numbers = np.flatnonzero(slice_of == slice_of[0])
        self._places = np.stack(np.unravel_index(numbers, devices.shape), axis=1)
        coordinates = [getattr(flat[i], "coords", None) for i in numbers]
        self._torus = None if coordinates[0] is None else np.array(coordinates)

    def group(self, attributes: str) -> np.ndarray:
        """The partitions that exchange with the first."""
        if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
            return _chain([tuple(map(int, p)) for p in re.findall(r"(\d+),(\d+)", pairs[1])])
        if named := re.search(r"replica_groups=(mesh\[.*?\][^{]*\{.*?\})", attributes):
            return _of_named_axes(named[1])
        if iota := re.search(
            r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
        ):
            shape = [int(n) for n in iota[3].split(",")]
            ids = np.arange(math.prod(shape)).reshape(shape)
            if iota[4]:
                ids = ids.transpose([int(n) for n in iota[4].split(",")])
            return ids.reshape(int(iota[1]), int(iota[2]))[0]
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return np.array([int(n) for n in listed[1].split(",")])
        return np.arange(len(self._places))

    def axes_of(self, group: np.ndarray) -> tuple[str, ...]:
        """Along which the partitions of a group differ."""
        differ = np.ptp(self._places[group], axis=0) > 0
        return tuple(axis for axis, varies in zip(self._axes, differ, strict=True) if varies)

    def links(self, group: np.ndarray) -> int:
        """Two for each direction of the torus along which they go around, one where they do not.

        Directions of 16 chips go around on v5e and v6e, of a multiple of 4 in three dimensions.
        """
        if self._torus is None:
            return 1
        spread, extent = np.ptp(self._torus[group], axis=0), np.ptp(self._torus, axis=0) + 1
        three = (extent > 1).sum() == 3
        around = (extent % 4 == 0) if three else (extent == 16)
        whole = spread + 1 == extent
        return max(1, int(((spread > 0) * (1 + (around & whole))).sum()))


def _chain(pairs: list[tuple[int, int]]) -> np.ndarray:
    """The partitions that the first pair's value reaches, were it sent on and on."""
    to, at = dict(pairs), next((a for a, b in pairs if a != b), 0)
    seen = [at]
    while (at := to.get(at, seen[0])) not in seen:
        seen.append(at)
    return np.array(sorted(seen))


def _of_named_axes(text: str) -> np.ndarray:
    """Of `mesh['a'=4,'b'=4] {'b'}`; `'a':(2)2` is a part of an axis, 2 of them before it."""
    within, _, over = text.rpartition("{")
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", within)}
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    if order := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", within):
        flat = np.arange(ids.size).reshape([int(n) for n in order[1].split(",")])
        turned = flat.transpose([int(n) for n in order[2].split(",")]) if order[2] else flat
        ids = turned.reshape(ids.shape)
    index: list[slice | int] = [0] * len(sizes)
    names = list(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        step = sizes[name] // (int(before) * int(part)) if part else 1
        index[names.index(name)] = slice(0, step * int(part) if part else None, step)
    return ids[tuple(index)].ravel()


def _parse(text: str) -> tuple[Module, str]:
    """The computations of a module by name, and the name of the entry."""
    module: Module = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0]
            current = module.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            kind, rest = _type_first(found[2])
            opcode, _, rest = rest.partition("(")
            current[found[1]] = _Instruction(kind, opcode.strip(), rest)
    return module, entry


def _type_first(text: str) -> tuple[str, str]:
    """The type of an instruction, which may be a tuple of them, and what comes behind it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _executed(module: Module, entry: str) -> Iterator[tuple[_Instruction, int, bool]]:
    """Each exchange with how often it runs, and whether only a part of its result is kept.

    What the compiler cut into a beginning, a middle and an end is in the computations of all three,
    with one number: it is given once.
    """
    pending, seen = [(entry, 1, "")], set()
    while pending:
        name, times, within = pending.pop()
        for label, instruction in module.get(name, {}).items():
            if instruction.opcode == "while":
                body = _attribute(instruction.rest, "body")
                trips = _trips(module, module[name], instruction)
                pending.append((body, times * trips, f"{within}/{label}"))
                continue
            for called in _CALLED.findall(instruction.rest):
                pending += [(c.strip("%,"), times, within) for c in called.split(",%")]
            crossing = instruction.opcode == "send" and _BETWEEN_SLICES.search(instruction.rest)
            if instruction.opcode.removesuffix("-start") not in _KINDS and not crossing:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (within, channel and channel[1], instruction.opcode, _size(instruction))
            if key in seen and channel:
                continue
            seen.add(key)
            yield instruction, times, name.startswith("all-reduce-scatter")


def _attribute(rest: str, name: str) -> str:
    return re.search(rf"{name}=%?([\w.\-]+)", rest)[1]


def _trips(module: Module, around: dict[str, _Instruction], loop: _Instruction) -> int:
    """How often a loop runs that counts up to a constant; 1 where that cannot be seen."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.rest):
        return int(known[1])
    condition = module[_attribute(loop.rest, "condition")]
    limits = [i for i in condition.values() if i.opcode == "constant" and i.type.startswith("s32")]
    tested = [re.search(r"index=(\d+)", i.rest) for i in condition.values()
              if i.opcode == "get-tuple-element" and i.type.startswith("s32")]  # fmt: skip
    if len(limits) != 1 or len(tested) != 1 or tested[0] is None:
        return 1
    begin = _constant(around, loop.rest.split(")")[0].split(",")[0], int(tested[0][1]))
    return max(1, int(limits[0].rest.split(")")[0]) - begin)


def _constant(around: dict[str, _Instruction], tuple_name: str, index: int) -> int:
    """The constant that an element of a tuple is, 0 where it is none."""
    made = around.get(tuple_name.strip().split(" ")[-1].lstrip("%"))
    if made is None or made.opcode != "tuple":
        return 0
    names = re.sub(r"/\*.*?\*/", "", made.rest.split(")")[0]).split(",")
    value = around.get(names[index].strip().split(" ")[-1].lstrip("%"))
    while value is not None and value.opcode == "copy":
        value = around.get(value.rest.split(")")[0].strip().split(" ")[-1].lstrip("%"))
    is_number = value is not None and value.opcode == "constant"
    return int(value.rest.split(")")[0]) if is_number else 0
