"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import fcntl
import io
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mlra_jax.storage import paths
from mlra_jax.storage.folders import EXISTS, is_there, whole_prefix
from mlra_jax.storage.lock import BucketLock
from mlra_jax.storage.paths import AnyPath, DestinationError, PathLike, in_bucket

# Seconds between two signs of life of a lock's owner; so long another host's is watched for one;
# so long the later of two hosts that lock at once has to write its name over the earlier's.
_BEAT, _PATIENCE, _SETTLE = 5.0, 20.0, 0.5
_LOCK_BYTES = 512
# Seconds between two times that lines are put up to a bucket, where objects only come whole.
_PUT_EVERY = 20.0

LOCK_FILE = ".lock"
"""The lock of a folder that is written in place."""


def reason(error: Exception) -> str:
    """One line of what went wrong; the array libraries append whole specifications."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "the disk is full"
    if system := re.search(r"os_error_code='(\d+)'", text):
        return f"not done ({os.strerror(int(system[1]))})"
    if isinstance(error, OSError) and error.strerror:
        return f"not done ({error.strerror})"
    return f"not done ({text.split(' [')[0][:300] or type(error).__name__})"


class Lock:
    """Keeps all others from writing a folder, until it is released or the process ends.

    The lock is a file that names its owner. Processes of one host see the kernel's lock on it,
    which ends with its process however that ends. Other hosts may not see that, so the owner writes
    a sign of life into the file every few seconds, and a lock of another host that gives none for
    20 seconds is taken over. No two clocks are compared.

    Args:
      path: of the lock; its folder must exist.
      folder: what messages say is locked.

    Raises:
      DestinationError: another process has the lock; the message names its host and number.
    """

    def __init__(self, path: Path, folder: Path):
        self._path, self._folder = path, folder
        self._name = {"host": socket.gethostname(), "process": os.getpid()}
        self._name |= {"kernel": _kernel(), "token": uuid.uuid4().hex}
        self._released = threading.Event()
        self._file, sure = self._take()
        try:
            self._sign(0)
            if not sure:
                time.sleep(_SETTLE)
                self.check()
        except BaseException:
            os.close(self._file)
            raise
        self._life = threading.Thread(target=self._live, daemon=True)
        self._life.start()

    def held(self) -> bool:
        """False if the folder was moved or removed, or another host took it over."""
        return self._owner().get("token") == self._name["token"]

    def check(self) -> None:
        """Raises DestinationError unless the lock is held."""
        if not self._path.exists():
            raise DestinationError(f"{self._folder}: moved or removed while it was being written")
        if not self.held():
            raise self._refusal()

    def release(self) -> None:
        """Lets the next one in."""
        self._released.set()
        # It must not write to a file that is closed, or to the next one of that number.
        self._life.join()
        with contextlib.suppress(OSError):
            if self.held():
                self._path.unlink()
        os.close(self._file)

    def _take(self) -> tuple[int, bool]:
        """The locked file, and whether no host can have locked it at the same time."""
        first, began = b"", time.monotonic()
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                sees_others = _flock(file)
                if not _is_at(file, self._path):  # removed by its owner just now
                    os.close(file)
                    continue
                found = self._read()
                kernel = self._owner().get("kernel")
                if not found or (sees_others and kernel == self._name["kernel"]):
                    # A file system of this host alone has a device of its own.
                    return file, sees_others and os.major(os.fstat(file).st_dev) != 0
                first = first or found
                if found != first:
                    raise self._refusal()
                if time.monotonic() - began > _PATIENCE:
                    return file, False
            except BlockingIOError:
                os.close(file)
                # Its owner may be about to write its name.
                time.sleep(_SETTLE)
                raise self._refusal() from None
            except BaseException:
                os.close(file)
                raise
            # Opened anew for each look: only then a network folder shows what others wrote.
            os.close(file)
            time.sleep(_PATIENCE / 20)

    def _sign(self, beat: int) -> None:
        text = json.dumps(self._name | {"beat": beat}).encode().ljust(_LOCK_BYTES - 1) + b"\n"
        with naming(self._path):
            os.pwrite(self._file, text, 0)
            os.fsync(self._file)

    def _live(self) -> None:
        beat = 0
        while not self._released.wait(_BEAT):
            beat += 1
            # A full disk or a network that is away for a moment is told by what is written there.
            with contextlib.suppress(OSError):
                if not self.held():
                    return
                self._sign(beat)

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""

    def _owner(self) -> dict[str, str]:
        try:
            owner = json.loads(self._read())
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _refusal(self) -> DestinationError:
        owner = self._owner()
        who = f"process {owner.get('process')} on {owner.get('host')}" if owner else "another run"
        return DestinationError(
            f"{self._folder}: {who} is writing it; let it end first, or choose another folder"
        )


AnyLock = Lock | BucketLock


@contextlib.contextmanager
def only_writer(path: AnyPath, folder: AnyPath) -> Iterator[AnyLock]:
    """Holds a `Lock`, in a bucket a `BucketLock`. Raises as they do."""
    lock = BucketLock(path, folder) if in_bucket(path) else Lock(path, folder)
    try:
        yield lock
    finally:
        lock.release()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Puts `path` into an OSError that names no file, as those of writing and syncing."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_file(path: PathLike, mode: str = "w") -> Iterator[IO]:
    """Gives a file beside `path` to write to, and renames it when all of it is on the disk.

    A file that is there is replaced. On an error it stays as it was and nothing else is left; a
    full disk is reported with this path. For a bucket it is in memory until it is put up.
    """
    path = paths.path(path)
    if in_bucket(path):
        content = io.BytesIO() if "b" in mode else io.StringIO()
        yield content
        data = content.getvalue()
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return
    new = path.with_name(f".{path.name}.new")
    try:
        with naming(path):
            with open(new, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


class Lines:
    """Lines at the end of a text file: each is on the disk when `add` returns.

    An object of a bucket can only be written as a whole: there they are put up every 20 seconds,
    by `sync` and by `close`.

    Args:
      path: of the file, which is replaced.
      lines: what it begins with, each with its newline.

    Raises:
      OSError: as writing does, with the file's name; also from the methods.
    """

    def __init__(self, path: AnyPath, lines: Iterable[str] = ()):
        self._path, self._lines = path, list(lines)
        self._file: IO[str] | None = None
        self.sync()
        if not in_bucket(path):
            self._lines, self._file = [], path.open("a")

    def add(self, line: str) -> None:
        if self._file is None:
            self._lines.append(line)
            if time.monotonic() - self._put > _PUT_EVERY:
                self.sync()
            return
        with naming(self._path):
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def sync(self) -> None:
        """All lines are where others read them when this returns."""
        if self._file is None:
            with whole_file(self._path) as file:
                file.writelines(self._lines)
            self._put = time.monotonic()

    def close(self) -> None:
        if self._file is None:
            self.sync()
        else:
            self._file.close()


def whole_figure(path: PathLike, figure: Any, dpi: int = 120) -> None:
    """Writes a Matplotlib figure as PNG, as `whole_file` does."""
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=dpi, format="png")


@contextlib.contextmanager
def whole_folder(destination: AnyPath, nbytes: int) -> Iterator[AnyPath]:
    """Gives a folder beside `destination` to write into, and renames it when all went well.

    What an interrupted run left is removed by the next one; two runs at a time are refused. On an
    error nothing is left. Everything is on disk before the rename. A bucket copies it, without a
    download, what makes it whole last.

    Args:
      destination: must not exist; its parents are made.
      nbytes: about how much will be written; refused if the disk has less.

    Raises:
      DestinationError: destination exists, cannot be made, another run writes it, or the disk has
        too little room.
    """
    check_absent(destination)
    if in_bucket(destination):
        with whole_prefix(destination) as partial:
            yield partial
        return
    parent = destination.absolute().parent
    absent = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    partial = parent / f".{destination.name}.partial"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(parent / f".{destination.name}.lock", destination)
    except OSError as error:
        raise DestinationError(f"{destination}: cannot be made ({error.strerror})") from None
    try:
        try:
            partial.mkdir(exist_ok=True)
            _empty(partial)
            free = shutil.disk_usage(partial).free
            if free < nbytes:
                raise DestinationError(
                    f"{destination}: needs {nbytes / 1e9:.2f} GB, and the disk has "
                    f"{free / 1e9:.2f} GB free"
                )
            yield partial
            _sync(partial)
            lock.check()
            check_absent(destination)
            os.rename(partial, destination)
            _sync_one(parent)
        except BaseException:
            if lock.held():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.release()
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in absent:
                folder.rmdir()
        raise


def check_absent(destination: AnyPath) -> None:
    """Raises DestinationError if something is there; a copy that was interrupted does not count."""
    if is_there(destination) if in_bucket(destination) else os.path.lexists(destination):
        raise DestinationError(EXISTS.format(destination))


def _kernel() -> str:
    """What the processes that see each other's locks have in common."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _flock(file: int) -> bool:
    """Locks a file; False where the file system has no such locks. BlockingIOError: another has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


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
