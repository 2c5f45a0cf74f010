"""What is kept of an evaluation on the way, with the identity of what gave it."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any

from mlra_jax.data.content import files_identity
from mlra_jax.storage.paths import AnyPath, PathLike, files_below, on_disk


def checkpoint_identity(folder: AnyPath) -> str:
    """Changes when another checkpoint is put in this place, not when this one is moved.

    Args:
      folder: of one step.
    """
    files = files_below(folder)
    names = [str(path.relative_to(folder)) for path in files]
    text = json.dumps([names, files_identity(files)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same(
    path: AnyPath, stored: Mapping[str, Any], wanted: Mapping[str, Any], what: str, remedy: str
) -> None:
    """Raises ValueError naming the first setting in which `path` is of another `what`."""
    for name, value in wanted.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{path} is of another {what}: {name} is {stored.get(name)} there and {value} "
                f"here; delete it or give another {remedy}"
            )


class Answers:
    """Answers by request in an SQLite database; each `update` is on the disk when it returns.

    Requests are kept as a digest and answers as JSON: nothing in the file is run. It has the name
    and the table of the harness's own cache, so that one of an earlier version is found in its
    place; that cannot say whose answers it holds, and is refused.

    Args:
      cache: the file's name is this and `_rank0.db`.
      identity: what gives the answers, JSON values by name.

    Raises:
      ValueError: the file is of another identity, or no such database.
    """

    def __init__(self, cache: PathLike, identity: Mapping[str, Any]):
        # A database is written in places, an object only as a whole.
        self.path = on_disk(f"{cache}_rank0.db", "--cache")
        if not self.path.absolute().parent.is_dir():
            raise ValueError(f"--cache={cache}: its folder does not exist")
        with self._one_line():
            self._database = sqlite3.connect(self.path, timeout=60)
            query = "SELECT name FROM sqlite_master WHERE type = 'table'"
            tables = {name for (name,) in self._database.execute(query)}
            if not tables:
                self._create(identity)
                return
            if not {"identity", "unnamed"} <= tables:
                raise ValueError(
                    f"{self.path} does not say whose answers it has (an earlier version's?); "
                    "delete it or give another --cache"
                )
            rows = self._database.execute("SELECT key, value FROM identity").fetchall()
            stored = {name: json.loads(value) for name, value in rows}
        check_same(self.path, stored, identity, "model", "--cache")

    def get(self, request: Any) -> Any:
        """The answer to a request, both as JSON says them; None if there is none."""
        with self._one_line():
            query = "SELECT value FROM unnamed WHERE key = ?"
            row = self._database.execute(query, (_digest(request),)).fetchone()
            return None if row is None else json.loads(row[0])

    def update(self, answers: Mapping[Any, Any]) -> None:
        """Keeps all of these or, where that fails, none."""
        rows = [(_digest(request), json.dumps(answer)) for request, answer in answers.items()]
        with self._one_line(), self._database as transaction:
            transaction.executemany("INSERT OR REPLACE INTO unnamed VALUES (?, ?)", rows)

    def _create(self, identity: Mapping[str, Any]) -> None:
        rows = [(name, json.dumps(value)) for name, value in identity.items()]
        with self._database as transaction:
            transaction.execute("BEGIN")
            for table in ("identity", "unnamed"):
                transaction.execute(f"CREATE TABLE {table} (key TEXT PRIMARY KEY, value TEXT)")
            transaction.executemany("INSERT INTO identity VALUES (?, ?)", rows)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path}: no database of answers, or damaged ({error}); delete it or give "
                "another --cache"
            ) from None


def _digest(request: Any) -> str:
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()
