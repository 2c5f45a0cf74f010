"""Zip archives whose entries are stored as they are, read by memory map.

``torch.save`` writes such archives: nothing is compressed, so an entry is a range of the file.
Everything in the directory is checked against the file before it is used, and the work is bounded
by the file's size: no decompression, no extraction, no entry outside the file, no overlap to
multiply bytes with.
"""

import mmap
import os
import stat
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.data import file_kinds
from mlra_jax.storage import paths
from mlra_jax.storage.blocks import LARGE_BLOCK_BYTES, Cache, RemoteBytes
from mlra_jax.storage.paths import AnyPath, PathLike, in_bucket

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_DIRECTORY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

MAX_ENTRIES = 100_000
MAX_DIRECTORY_BYTES = 32 << 20
_BYTES_AT_ONCE = 8 << 20
_CACHE_BYTES = 256 << 20
Mapped = mmap.mmap | RemoteBytes
# What downloads leave in the place of a file: how it begins (in lower case), and what to say.
_SUBSTITUTES = (
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself; run `git lfs pull`"),
    (b"<!doctype html", "an HTML page, not the file itself; log in or check the address"),
    (b"<html", "an HTML page, not the file itself; log in or check the address"),
)


class Entry(NamedTuple):
    """One stored entry: bytes ``start`` to ``start + size`` of the file, and their CRC-32."""

    start: int
    size: int
    crc: int


class StoredArchive:
    """A memory-mapped zip archive of stored entries.

    Attributes:
      path: the file.
      map: its memory map, read-only, or its bytes in a bucket.
      entries: name to `Entry`.

    Raises:
      CheckpointFileError: not a regular file, not a zip archive, or a directory that lies.
    """

    def __init__(self, path: PathLike):
        self.path = paths.path(path)
        self.map = map_file(self.path)
        self._last = "", memoryview(b"")
        try:
            self._check_beginning()
            self.entries = self._read_directory()
        except BaseException:
            self.map.close()
            raise

    def data(self, name: str) -> memoryview:
        """The bytes of an entry, on a disk not copied; the last one of a bucket is kept."""
        if self._last[0] != name:
            entry = self.entries[name]
            view = self._view(entry.start, entry.size)
            if isinstance(self.map, mmap.mmap):
                return view
            self._last = name, view
        return self._last[1]

    def verify(self, progress: Callable[[int], object] = lambda n: None) -> None:
        """Compares every entry with its CRC-32; ``progress`` is told the bytes read."""
        for name, entry in self.entries.items():
            crc = 0
            for start in range(entry.start, entry.start + entry.size, _BYTES_AT_ONCE):
                size = min(_BYTES_AT_ONCE, entry.start + entry.size - start)
                with self._view(start, size) as piece:
                    crc = zlib.crc32(piece, crc)
                self.release(start, size)
                progress(size)
            if crc != entry.crc:
                raise self._error(
                    f"{name!r} is damaged (its CRC-32 does not match); fetch it again"
                )

    def release(self, start: int, size: int) -> None:
        """Gives the pages of a range back to the system; they are read again when touched."""
        release_pages(self.map, start, size)

    def close(self) -> None:
        self.map.close()

    def _view(self, start: int, size: int) -> memoryview:
        if isinstance(self.map, mmap.mmap):
            with memoryview(self.map) as whole:
                return whole[start : start + size]
        return memoryview(self.map[start : start + size])

    def _error(self, text: str) -> CheckpointFileError:
        return CheckpointFileError(f"{self.path}: {text}")

    def _unpack(self, layout: struct.Struct, signature: bytes, offset: int) -> tuple:
        if not 0 <= offset <= len(self.map) - layout.size:
            raise self._error("a zip record lies outside the file; fetch it again, whole")
        fields = layout.unpack(self.map[offset : offset + layout.size])
        if fields[0] != signature:
            raise self._error("no whole zip archive as torch.save writes it; fetch it again")
        return fields

    def _check_beginning(self) -> None:
        """Names what is no zip archive at all."""
        head = self.map[: file_kinds.HEAD_BYTES]
        if head.startswith(b"PK"):
            return
        kind = file_kinds.kind(head)
        if kind in (file_kinds.OLD_TORCH, file_kinds.PICKLE):
            raise self._error(
                f"is {kind.what}, a program that is not run; save it anew where it is trusted: "
                "torch.save(torch.load(FILE, weights_only=True), NEW)"
            )
        if kind:
            raise self._error(f"is {kind.what}, no weights as torch.save writes them")
        if head[8:9] == b"{":
            raise self._error("is probably a .safetensors file; call it model.safetensors")
        raise self._error(
            f"begins with {head[:12]}, not as torch.save writes weights; fetch it again"
        )

    def _read_directory(self) -> dict[str, Entry]:
        end = len(self.map) - _END.size
        _, disk, first_disk, _, count, size, offset, comment = self._unpack(
            _END, b"PK\x05\x06", end
        )
        locator = end - _END64_LOCATOR.size
        if locator >= 0 and self.map[locator : locator + 4] == b"PK\x06\x07":
            _, _, where, _ = self._unpack(_END64_LOCATOR, b"PK\x06\x07", locator)
            end = where
            fields = self._unpack(_END64, b"PK\x06\x06", end)
            disk, first_disk, _, count, size, offset = fields[4:]
        if disk or first_disk or comment:
            raise self._error("a zip archive in parts or with a comment is not a checkpoint")
        if offset + size != end:
            raise self._error("the zip directory is not where the end record says; fetch it again")
        if count > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
            raise self._error(f"{count} entries in {size} bytes of zip directory are too many")

        entries: dict[str, Entry] = {}
        position, total = offset, 0
        for _ in range(count):
            name, entry, position = self._read_entry(position, end, offset)
            if name in entries:
                raise self._error(f"two entries are called {name!r}")
            entries[name] = entry
            total += entry.size
        if position != end:
            raise self._error("the zip directory and its entry count disagree")
        if total > len(self.map):
            raise self._error("its zip entries overlap")
        return entries

    def _read_entry(self, position: int, end: int, limit: int) -> tuple[str, Entry, int]:
        fields = self._unpack(_DIRECTORY, b"PK\x01\x02", position)
        flags, method = fields[3:5]
        crc, packed, size, name_length, extra_length, comment_length, disk = fields[7:14]
        local = fields[16]
        tail = position + _DIRECTORY.size
        after = tail + name_length + extra_length + comment_length
        if after > end:
            raise self._error("a zip directory entry runs past the directory")
        raw_name = self.map[tail : tail + name_length]
        try:
            name = raw_name.decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"a zip entry has an unreadable name {raw_name[:40]!r}") from None
        extra = self.map[tail + name_length : tail + name_length + extra_length]
        size, packed, local = self._widen(extra, size, packed, local)
        if method != 0 or packed != size:
            raise self._error(f"{name!r} is compressed; torch.save stores entries as they are")
        if flags & 1 or disk:
            raise self._error(f"{name!r} is encrypted or in another part")
        header = self._unpack(_LOCAL, b"PK\x03\x04", local)
        local_name_length, local_extra_length = header[9:11]
        start = local + _LOCAL.size + local_name_length + local_extra_length
        if self.map[local + _LOCAL.size : local + _LOCAL.size + local_name_length] != raw_name:
            raise self._error(f"{name!r} has another name in its local zip header")
        if start + size > limit:
            raise self._error(f"{name!r} runs past the data of the archive")
        return name, Entry(start, size, crc), after

    def _widen(self, extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
        """Replaces fields of 0xFFFFFFFF by their 64-bit values from the zip64 extra field."""
        values = [size, packed, local]
        wide = [i for i, value in enumerate(values) if value == 0xFFFFFFFF]
        while wide and len(extra) >= 4:
            kind, length = struct.unpack_from("<2H", extra)
            body, extra = extra[4 : 4 + length], extra[4 + length :]
            if kind == 1 and len(body) >= 8 * len(wide):
                for i, value in zip(wide, struct.unpack_from(f"<{len(wide)}Q", body), strict=True):
                    values[i] = value
                return tuple(values)
        if wide:
            raise self._error("a zip64 entry lacks its 64-bit sizes")
        return tuple(values)


def release_pages(mapped: Mapped, start: int = 0, size: int | None = None) -> None:
    """Drops the resident pages of a read-only map, so that a long read does not fill memory.

    Whole pages around the range go; the next access reads them from the file again.
    """
    if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    size = len(mapped) - start if size is None else size
    first = start - start % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, first, min(start + size, len(mapped)) - first)


def map_file(path: AnyPath) -> Mapped:
    """Maps a regular file read-only; one in a bucket is read by ranges.

    Raises:
      CheckpointFileError: missing, not a regular file, empty, unreadable, or what a failed download
        leaves in its place.
    """
    try:
        if in_bucket(path):
            mapped = RemoteBytes(path, Cache(_CACHE_BYTES, LARGE_BLOCK_BYTES))
            if not len(mapped):
                raise ValueError("it is empty")
            return _checked(path, mapped)
        # A pipe or device would block or never end; asking first costs nothing.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointFileError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except CheckpointFileError:
        raise
    except FileNotFoundError:
        raise CheckpointFileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointFileError(f"{path}: cannot be read ({error})") from None
    return _checked(path, mapped)


def _checked(path: AnyPath, mapped: Mapped) -> Mapped:
    head = mapped[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, what in _SUBSTITUTES:
        if head.startswith(start):
            mapped.close()
            raise CheckpointFileError(f"{path}: is {what}")
    return mapped
