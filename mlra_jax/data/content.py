"""What tells data apart: every byte of small data, evenly spread samples of large.

A hundred gigabytes are not to be read before a run starts. Up to `BUDGET_BYTES` everything counts;
of more, its size and so many bytes of it: another data set differs nearly everywhere, while a
change within a few kilobytes may lie between two samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlra_jax.storage.blocks import Cache, RemoteArray, RemoteBytes
from mlra_jax.storage.paths import AnyPath, in_bucket

BUDGET_BYTES = 128 << 20
BLOCK_BYTES = 64 << 10
_ROWS_AT_ONCE = 256


def arrays_identity(arrays: Sequence[np.ndarray | RemoteArray]) -> str:
    """Of integers [count] each, in memory, mapped or remote; their dtype does not count."""
    digest = hashlib.sha256()
    total = sum(len(array) for array in arrays)
    for array in arrays:
        digest.update(b"%d\n" % len(array))
        ranges = list(_spread(len(array), total, BUDGET_BYTES // 4, BLOCK_BYTES // 4))
        if isinstance(array, RemoteArray):
            array.expect(ranges)
        for start, stop in ranges:
            digest.update(np.asarray(array[start:stop], "<u4").tobytes())
    return digest.hexdigest()[:32]


def files_identity(paths: Sequence[AnyPath]) -> str:
    """Of what is in the files, in this order; neither names nor times count."""
    digest = hashlib.sha256()
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        digest.update(b"%d\n" % size)
        for part in _parts(path, list(_spread(size, sum(sizes), BUDGET_BYTES, BLOCK_BYTES))):
            digest.update(part)
    return digest.hexdigest()[:32]


def rows_identity(read: Callable[[int, int], Sequence], count: int) -> str:
    """Of `count` rows of which `read(start, stop)` gives a run, as text or what else they hold."""
    digest, left = hashlib.sha256(b"%d\n" % count), BUDGET_BYTES
    blocks = -(-count // _ROWS_AT_ONCE)
    # Steps of about 0.618 of the whole reach every block, and spread wherever they end.
    step = next((s for s in range(round(0.618 * blocks), blocks) if math.gcd(s, blocks) == 1), 1)
    for number in range(blocks):
        start = number * step % blocks * _ROWS_AT_ONCE
        for row in read(start, min(start + _ROWS_AT_ONCE, count)):
            value = str(row).encode("utf-8", "replace")
            digest.update(b"%d\n" % len(value) + value)
            left -= len(value)
        if left < 0:
            break
    return digest.hexdigest()[:32]


def _parts(path: AnyPath, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    if in_bucket(path):
        source = RemoteBytes(path, Cache(BUDGET_BYTES))
        source.expect(ranges)
        yield from (source[start:stop] for start, stop in ranges)
        return
    with open(path, "rb", buffering=0) as file:
        for start, stop in ranges:
            file.seek(start)
            yield file.read(stop - start)


def _spread(size: int, total: int, budget: int, block: int) -> Iterator[tuple[int, int]]:
    """Where to read of `size`, a part of `total`: all, or blocks from the first to the last."""
    if total <= budget or size <= 2 * block:
        yield from ((start, min(start + block, size)) for start in range(0, size, block))
        return
    count = max(2, budget * size // (total * block))
    for number in range(count):
        start = number * (size - block) // (count - 1)
        yield start, start + block
