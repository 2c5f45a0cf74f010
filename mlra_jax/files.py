"""Files and folders that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class DestinationError(ValueError):
    """A folder that cannot be written as asked; one line with the remedy."""


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Gives a file beside `path` to write to, and renames it when all of it is on the disk.

    A file that is there is replaced. On an error it stays as it was and nothing else is left; a
    full disk is reported with this path.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_folder(destination: Path, nbytes: int) -> Iterator[Path]:
    """Gives a folder beside `destination` to write into, and renames it when all went well.

    What an interrupted run left is removed by the next one; two runs at a time are refused. On an
    error nothing is left. Everything is on disk before the rename.

    Args:
      destination: must not exist; its parents are made.
      nbytes: about how much will be written; refused if the disk has less.

    Raises:
      DestinationError: destination exists, cannot be made, another run writes it, or the disk has
        too little room.
    """
    check_absent(destination)
    parent = destination.absolute().parent
    absent = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    partial = parent / f".{destination.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DestinationError(f"{destination}: cannot be made ({error.strerror})") from None
    try:
        _lock(lock, partial, destination)
        try:
            _empty(partial)
            free = shutil.disk_usage(partial).free
            if free < nbytes:
                raise DestinationError(
                    f"{destination}: needs {nbytes / 1e9:.2f} GB, and the disk has "
                    f"{free / 1e9:.2f} GB free"
                )
            yield partial
            _sync(partial)
            check_absent(destination)
            os.rename(partial, destination)
            _sync_one(parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in absent:
                    folder.rmdir()
            raise
    finally:
        os.close(lock)


def check_absent(destination: Path) -> None:
    """Raises DestinationError if something is there."""
    if os.path.lexists(destination):
        raise DestinationError(f"{destination}: exists already; delete it or choose another")


def _lock(lock: int, partial: Path, destination: Path) -> None:
    """The folder's own lock, held until the process ends; it moves along with a rename."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = partial.exists() and os.path.samestat(os.fstat(lock), os.stat(partial))
    except BlockingIOError:
        same = False
    if not same:
        raise DestinationError(f"{destination}: another run is writing it")


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _sync(folder: Path) -> None:
    for path, _, names in os.walk(folder, topdown=False):
        for name in (*names, "."):
            _sync_one(Path(path) / name)


def _sync_one(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
