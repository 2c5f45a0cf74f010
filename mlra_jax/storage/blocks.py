"""Objects of a bucket read by ranges, through a cache of bounded size."""

import functools
import itertools
from collections.abc import Iterable

import numpy as np
import tensorstore as ts

from mlra_jax.storage.paths import BucketPath, kvstore, telling

BLOCK_BYTES = 32 << 10
"""Of a cache for windows of tokens, 4 KiB of 2048; smaller answers would come no sooner."""
LARGE_BLOCK_BYTES = 4 << 20
"""Of a cache for what is read from one end to the other."""
CACHE_BYTES = 1 << 30
"""What a cache keeps, where nothing else is said."""


class Cache:
    """Blocks of all objects that are read through it, in memory: those that were used last.

    Reading a block begins when it is first asked for; only who wants its bytes waits. Threads may
    share a cache.

    Args:
      nbytes: about how much is kept; one block at least.
      block_bytes: what is read at once.
    """

    def __init__(self, nbytes: int = CACHE_BYTES, block_bytes: int = BLOCK_BYTES):
        self.block_bytes = block_bytes
        self.room = max(1, nbytes // block_bytes)
        keep = functools.lru_cache(self.room)
        self.block = keep(lambda source, number: source.begin(number))

    def forget(self) -> None:
        """What could not be read is to be read again."""
        self.block.cache_clear()


class RemoteBytes:
    """The bytes of an object: it has a length, and slices are read when they are taken.

    Args:
      path: of the object.
      cache: what its blocks are kept in.

    Raises:
      OSError: the object is missing or the bucket does not answer; also at each read, and if the
        object was written anew since it was opened.
    """

    def __init__(self, path: BucketPath, cache: Cache):
        self.path, self._cache = path, cache
        with telling(path):
            self._store = ts.KvStore.open(kvstore(path.parent)).result()
        self._size, self._generation = path.stat().st_size, b""
        if self._size:
            self._generation = self._read(range(1))[0].stamp.generation

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        numbers = self._blocks(start, stop)
        found = self._read(numbers)
        if any(block.stamp.generation != self._generation for block in found):
            raise OSError(f"{self.path}: written anew since it was opened; start again")
        joined = b"".join(block.value for block in found)
        first = numbers.start * self._cache.block_bytes
        return joined[start - first : max(start, stop) - first]

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Begins to read these ranges (start, stop), as far as the cache has room."""
        numbers = itertools.chain.from_iterable(itertools.starmap(self._blocks, ranges))
        for number in itertools.islice(numbers, self._cache.room):
            self._cache.block(self, number)

    def begin(self, number: int) -> ts.Future:
        """Begins to read a block; for the cache."""
        start = number * self._cache.block_bytes
        part = slice(start, min(start + self._cache.block_bytes, self._size))
        return self._store.read(self.path.name, byte_range=part)

    def close(self) -> None:
        """Frees what is kept, also of others that share the cache."""
        self._cache.forget()

    def _blocks(self, start: int, stop: int) -> range:
        width = self._cache.block_bytes
        return range(start // width, -(-max(start, stop) // width))

    def _read(self, numbers: range) -> list[ts.KvStore.ReadResult]:
        try:
            with telling(self.path):
                # Held here, as the cache may have less room.
                begun = [self._cache.block(self, number) for number in numbers]
                return [block.result() for block in begun]
        except OSError:
            self._cache.forget()
            raise


class RemoteArray:
    """Numbers in an object, one after the other: slices are views, `np.asarray` reads.

    Args:
      source: the object's bytes.
      dtype: of the numbers.
      offset: byte of the first.
      count: how many.
    """

    def __init__(self, source: RemoteBytes, dtype: np.dtype, offset: int, count: int):
        self._source, self.dtype = source, np.dtype(dtype)
        self._offset, self._count = offset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> "RemoteArray":
        start, stop, _ = part.indices(self._count)
        offset = self._offset + start * self.dtype.itemsize
        return RemoteArray(self._source, self.dtype, offset, max(0, stop - start))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        data = self._source[self._offset : self._offset + self._count * self.dtype.itemsize]
        return np.frombuffer(data, self.dtype).astype(dtype or self.dtype, copy=False)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Begins to read what lies in these ranges (start, stop) of the array."""
        width, first = self.dtype.itemsize, self._offset
        self._source.expect((first + a * width, first + b * width) for a, b in ranges)
