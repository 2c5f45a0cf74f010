"""The planted faults of `tests/mutants/*.toml`, read and checked against the tree."""

import dataclasses
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class FaultError(ValueError):
    """A planted fault that no longer fits the tree; one line."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong change: `old` stands exactly once in `file` and becomes `new`."""

    room: str
    name: str
    file: str
    old: str
    new: str
    breaks: str
    """What is wrong then, in words."""
    tests: tuple[str, ...]
    """pytest node ids or files; each must fail."""
    gate: bool = False
    """Among the quick ones that every submission runs."""

    def planted(self, text: str) -> str:
        """`text` of the file with the fault in it. Raises FaultError if `old` is not there once."""
        if (count := text.count(self.old)) != 1:
            raise FaultError(
                f"{self.room}/{self.name}: its old text stands {count} times in {self.file}; "
                "bring the fault up to date"
            )
        return text.replace(self.old, self.new)


def load(root: Path = ROOT) -> list[Fault]:
    """All faults, each checked against the tree under `root`.

    Raises FaultError for an unknown or missing field, a name given twice in a room, a file that is
    gone, or old text that does not stand exactly once in its file.
    """
    faults: dict[tuple[str, str], Fault] = {}
    for path in sorted((root / "tests" / "mutants").glob("*.toml")):
        for values in tomllib.loads(path.read_text())["fault"]:
            try:
                fault = Fault(room=path.stem, **values | {"tests": tuple(values.get("tests", ()))})
            except TypeError as error:
                raise FaultError(f"{path.name}: {values.get('name')}: {error}") from None
            if (fault.room, fault.name) in faults:
                raise FaultError(f"{path.name}: {fault.name} is there twice")
            if not fault.tests:
                raise FaultError(f"{path.name}: {fault.name} names no tests")
            for file in (fault.file, *(test.partition("::")[0] for test in fault.tests)):
                if not (root / file).exists():
                    raise FaultError(f"{path.name}: {fault.name}: {file} is not there")
            fault.planted((root / fault.file).read_text())
            faults[fault.room, fault.name] = fault
    return list(faults.values())
