"""One kind of path for disks and buckets.

`path` gives `pathlib.Path` for what is on a disk and `BucketPath`, which has the same methods, for
`gs://`. Small files of a bucket go through `etils.epath` and fsspec, arrays and ranges through
TensorStore, as in the checkpoint library. A bucket has no folders: a name with a slash stands for
itself, and a folder is there as long as something is in it.
"""

import contextlib
import errno
import functools
import glob
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import tensorstore as ts
from etils.epath import backend, gpath

from mlra_jax.extras import install_line

SCHEME = "gs://"
# How TensorStore's errors begin where it is not the object that is at fault.
_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "RESOURCE_EXHAUSTED")
_REFUSALS += ("DEADLINE_EXCEEDED", "ABORTED", "the bucket: ")
_LIBRARIES = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.")
# Seconds in which nothing comes of an answer before the request is repeated.
_SILENCE = 60
_OTHER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")


class BucketError(ValueError):
    """An address that is not served; one line with the remedy."""


class DestinationError(ValueError):
    """A folder that cannot be written as asked; one line with the remedy."""


@contextlib.contextmanager
def telling(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the libraries of buckets raise into an OSError of one line that names `path`."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(errno.EIO, one_line(error), str(path)) from None


def is_refusal(error: Exception) -> bool:
    """Whether a bucket would or could not answer, which says nothing of what is in it."""
    text = error.strerror if isinstance(error, OSError) else str(error)
    theirs = type(error).__module__.startswith(_LIBRARIES)
    return theirs or (text or "").startswith(_REFUSALS)


class BucketPath(gpath.PosixGPath):
    """The path of an object, or of all objects below it, with the methods of `pathlib.Path`.

    What the bucket refuses, also after the libraries have tried again for half a minute, is an
    OSError of one line.
    """

    # Also where TensorFlow is installed, which would be asked instead.
    _backend = backend.fsspec_backend

    def absolute(self) -> "BucketPath":
        return self

    def exists(self) -> bool:
        with telling(self):
            return super().exists()

    def is_dir(self) -> bool:
        with telling(self):
            return super().is_dir()

    def is_file(self) -> bool:
        with telling(self):
            return self.exists() and not super().is_dir()

    def iterdir(self) -> Iterator["BucketPath"]:
        with telling(self):
            yield from list(super().iterdir())

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        with telling(self):
            found = self._backend.glob(f"{self}/{pattern}")
        return map(type(self), found)

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing to make."""

    def rmdir(self) -> None:
        """Nothing to remove."""

    def stat(self) -> SimpleNamespace:
        """What `pathlib` tells of size and time beside what `etils.epath` tells."""
        with telling(self):
            found = super().stat()
        times = dict(st_size=found.length, st_mtime_ns=found.mtime * 10**9)
        return SimpleNamespace(**vars(found), **times)

    @contextlib.contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """To read (`rb`), or to write (`wb`) a new object, which appears when the block ends and
        not at all after an error."""
        with telling(self):
            file = super().open(mode)
        try:
            yield file
            with telling(self):
                file.close()
        finally:
            if mode == "wb" and not file.closed:
                # Closing would keep what there is, also when the file is collected.
                file.closed = True
                with contextlib.suppress(Exception):
                    file.discard()
            file.close()

    def read_bytes(self) -> bytes:
        with telling(self):
            return self._backend.fs(self).cat_file(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        with telling(self):
            self._backend.fs(self).pipe_file(str(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(data.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        with telling(self):
            super().unlink(missing_ok)

    def rmtree(self, missing_ok: bool = False) -> None:
        with telling(self):
            super().rmtree(missing_ok)

    def copy_tree(self, target: "BucketPath", last: tuple[str, ...]) -> None:
        """Copies all objects below to below `target`, inside the bucket's service.

        Files of a name in `last` follow when all others are there, in that order.
        """
        fs = self._backend.fs(self)
        names = [str(file.relative_to(self)) for file in files_below(self)]
        order = lambda name: last.index(n) if (n := Path(name).name) in last else -1
        for number in range(-1, len(last)):
            part = [name for name in names if order(name) == number]
            if part:
                with telling(target):
                    fs.copy([f"{self}/{n}" for n in part], [f"{target}/{n}" for n in part])


AnyPath = Path | BucketPath
PathLike = str | AnyPath


def path(name: str | os.PathLike) -> AnyPath:
    """A path of the disk, or of a bucket for an address that begins with `gs://`.

    Raises:
      BucketError: another address, no bucket in it, or the `gcs` extra is missing.
    """
    text = os.fspath(name)
    if not _OTHER_SCHEME.match(text):
        return Path(name)
    if not text.startswith(SCHEME):
        raise BucketError(
            f"{text} is an address that is not served ({SCHEME} is); to read it, mount it and give "
            "its path"
        )
    if not text.removeprefix(SCHEME).strip("/"):
        raise BucketError(f"{text} names no bucket: give {SCHEME}BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise BucketError(f"{text}: buckets need gcsfs: {install_line('gcs')}")
    _prepare_library()
    return BucketPath(text)


def in_bucket(name: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(name).startswith(SCHEME)


def on_disk(name: str | os.PathLike, what: str) -> Path:
    """A path that cannot be in a bucket; BucketError says so of `what`, where it is."""
    if _OTHER_SCHEME.match(text := os.fspath(name)):
        raise BucketError(f"{what}={text} must be on a disk: name a local path")
    return Path(name)


def matching(pattern: str) -> list[AnyPath]:
    """What matches a pattern with `*`, `?`, `[…]` and `**`, in order of its name."""
    if not in_bucket(pattern):
        return [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]
    bucket, _, rest = pattern.removeprefix(SCHEME).partition("/")
    return sorted(path(SCHEME + bucket).glob(rest)) if rest else []


def can_hold_files(folder: AnyPath) -> bool:
    """Whether it is a folder. In a bucket each name may be one."""
    return in_bucket(folder) or folder.is_dir()


def files_below(folder: AnyPath) -> list[AnyPath]:
    """All files of a folder and of those in it, in order of their paths."""
    if not isinstance(folder, BucketPath):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    with telling(folder):
        names = folder._backend.fs(folder).find(str(folder))
    return sorted(BucketPath(SCHEME + name) for name in names)


def kvstore(folder: str | os.PathLike) -> ts.KvStore.Spec:
    """TensorStore's store of what is below a folder."""
    if in_bucket(folder):
        bucket, _, name = os.fspath(folder).removeprefix(SCHEME).partition("/")
        return ts.KvStore.Spec(
            {"driver": "gcs", "bucket": bucket, "path": f"{name}/" if name else ""}
        )
    return ts.KvStore.Spec({"driver": "file", "path": f"{folder}/"})


@functools.cache
def _prepare_library() -> None:
    """Before the library of buckets is first used."""
    import aiohttp
    import fsspec
    import gcsfs

    class FileSystem(gcsfs.GCSFileSystem):
        """Takes no refusal for an absence, which would make a checkpoint look unfinished."""

        async def _isdir(self, path: str) -> bool:
            try:
                return (await self._info(path))["type"] == "directory"
            except FileNotFoundError:
                return False

    # Of the checkpoint library as well.
    fsspec.register_implementation("gcs", FileSystem, clobber=True)
    # It prints traces of what is told here in a line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    settings = fsspec.config.conf.setdefault("gcs", {})
    # Lists that are kept would not show what TensorStore and other processes write.
    settings["use_listings_cache"] = False
    # Both would wait for ever for an answer that is lost; after this they ask again.
    settings["requests_timeout"] = aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_SILENCE))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


def one_line(error: Exception) -> str:
    """What a bucket's library says, without its specifications and traces."""
    text = " ".join(str(error).split()).split(" [")[0].split(" See full")[0]
    return f"the bucket: {text[:200] or type(error).__name__}"
