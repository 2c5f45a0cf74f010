"""Folders that appear whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from mlra_jax.convert.errors import CheckpointFileError, reason


@contextlib.contextmanager
def whole_folder(destination: Path, nbytes: int) -> Iterator[Path]:
    """Gives a folder beside `destination` to write into, and renames it when all went well.

    What an interrupted run left is removed by the next one; two runs at a time are refused. On an
    error nothing is left. Everything is on disk before the rename.

    Args:
      destination: must not exist; its parents are made.
      nbytes: about how much will be written; refused if the disk has less.

    Raises:
      CheckpointFileError: destination exists, another run writes it, the disk is full, or whatever
        else went wrong inside, in one line.
    """
    check_absent(destination)
    parent = destination.absolute().parent
    absent = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    partial = parent / f".{destination.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointFileError(f"{destination}: cannot be made ({error.strerror})") from None
    try:
        _lock(lock, partial, destination)
        try:
            _empty(partial)
            free = shutil.disk_usage(partial).free
            if free < nbytes:
                raise CheckpointFileError(
                    f"{destination}: needs {nbytes / 1e9:.2f} GB, and the disk has "
                    f"{free / 1e9:.2f} GB free"
                )
            yield partial
            _sync(partial)
            check_absent(destination)
            os.rename(partial, destination)
            _sync_one(parent)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in absent:
                    folder.rmdir()
            if isinstance(error, Exception) and not isinstance(error, CheckpointFileError):
                raise CheckpointFileError(f"{destination}: {reason(error)}") from error
            raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def progress_bar(text: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr; gives the function to tell it how many more are done.

    While it is there, Ctrl-C (and SIGTERM, where a handler is set) takes effect when that function
    is called: not in the middle of the array libraries, which would go on writing in the
    background. A second Ctrl-C takes effect at once.
    """
    asked: list[int] = []
    handlers = {}

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, handlers[number])

    def update(done: int) -> None:
        bar.update(done)
        if asked:
            raise RuntimeError("interrupted")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, ask)
    # Cleared at its end, so that an error is the only line left.
    bar = tqdm(
        desc=text,
        total=total,
        unit="B",
        unit_scale=True,
        disable=quiet,
        mininterval=0.5,
        leave=False,
    )
    try:
        with bar:
            yield update
    except Exception:
        if not asked:
            raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


def check_absent(destination: Path) -> None:
    """Raises CheckpointFileError if something is there."""
    if os.path.lexists(destination):
        raise CheckpointFileError(f"{destination}: exists already; delete it or choose another")


def _lock(lock: int, partial: Path, destination: Path) -> None:
    """The folder's own lock, held until the process ends; it moves along with a rename."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = partial.exists() and os.path.samestat(os.fstat(lock), os.stat(partial))
    except BlockingIOError:
        same = False
    if not same:
        raise CheckpointFileError(f"{destination}: another run is writing it")


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
