"""Objects read by ranges give the bytes of a file, through little memory and few requests."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.storage import blocks
from mlra_jax.storage.blocks import Cache, RemoteArray, RemoteBytes
from mlra_jax.storage.paths import path

DATA = np.random.default_rng(0).integers(0, 1 << 16, 5000, np.uint16)
FILE = path("gs://bucket/x/data.bin")


def array(cache, offset=0):
    return RemoteArray(RemoteBytes(FILE, cache), np.dtype("<u2"), offset, len(DATA))


def reads(bucket):
    return [size for method, request, size in bucket.requests if "alt=media" in request]


@pytest.fixture
def stored(bucket):
    bucket.put("x/data.bin", DATA.tobytes())
    bucket.requests.clear()
    return bucket


def test_slices_of_slices_are_those_of_the_array(stored):
    remote = array(Cache(4096, 512))

    @settings(max_examples=30)
    @given(st.lists(st.tuples(st.integers(-6000, 6000), st.integers(-6000, 6000)), max_size=3))
    def check(cuts):
        here, there = DATA, remote
        for start, stop in cuts:
            here, there = here[start:stop], there[start:stop]
        assert len(here) == len(there)
        assert np.array_equal(here, np.asarray(there))
        assert np.asarray(there, "<u4").dtype == np.uint32

    check()


def test_a_cache_that_has_room_reads_each_block_once(stored):
    remote = array(Cache(1 << 20, 512))
    for start in (300, 0, 700, 300):
        assert np.array_equal(np.asarray(remote[start : start + 400]), DATA[start : start + 400])
    # Blocks of 512 bytes: the first, and those that 0 to 1100 numbers reach.
    assert len(reads(stored)) == 5 and max(reads(stored)) == 512


def test_a_cache_without_room_forgets_what_was_used_longest_ago(stored):
    remote = array(Cache(1024, 512))
    for start in (0, 256, 0, 512, 0, 256):
        np.asarray(remote[start : start + 256])
    assert len(reads(stored)) == 4
    kept = remote._source._cache.block.cache_info()
    assert kept.maxsize == kept.currsize == 2


def test_a_slice_larger_than_the_cache_reads_each_block_once(stored):
    cache = Cache(1024, 512)
    remote = array(cache)
    assert np.array_equal(np.asarray(remote), DATA)
    # Counting the first, which is read when the object is opened.
    assert len(reads(stored)) == 20 and cache.block.cache_info().currsize == 2


def test_no_more_is_begun_than_the_cache_has_room_for(stored):
    cache = Cache(1024, 512)
    remote = array(cache)
    cache.forget()
    remote.expect([(0, 10), (600, 5000)])
    assert cache.block.cache_info().misses == 2
    for part in slice(10), slice(600, 700):
        assert np.array_equal(np.asarray(remote[part]), DATA[part])
    # When it is opened, one.
    assert len(reads(stored)) == 1 + 2


def test_expected_ranges_are_asked_for_together(stored):
    remote = array(Cache(1 << 20, 512))
    ranges = [(0, 10), (1000, 1300), (4990, 5000)]
    remote.expect(ranges)
    deadline = time.monotonic() + 60
    while len(reads(stored)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for start, stop in ranges:
        assert np.array_equal(np.asarray(remote[start:stop]), DATA[start:stop])
    assert len(reads(stored)) == 5


def test_reads_that_fail_are_repeated(stored):
    remote, faults = array(Cache(1 << 20, 512)), [429, 500, 503, "cut", "lost", "silent"]
    stored.fault = lambda method, request: faults.pop() if faults else None
    assert np.array_equal(np.asarray(remote), DATA) and not faults


def test_an_object_that_is_written_anew_is_not_mixed_with_what_was_read(stored):
    remote = array(Cache(1 << 20, 512))
    np.asarray(remote[:10])
    stored.put("x/data.bin", DATA[::-1].tobytes())
    assert np.array_equal(np.asarray(remote[:10]), DATA[:10])
    with pytest.raises(OSError, match="data.bin: written anew since it was opened"):
        np.asarray(remote[2000:2010])


def test_what_is_refused_is_one_line_and_can_be_asked_for_again(stored):
    remote = array(Cache(1 << 20, 512))
    stored.fault = lambda method, request: 403
    with pytest.raises(OSError, match="the bucket: .*gs://bucket/x/data.bin") as error:
        np.asarray(remote[2000:2010])
    assert "\n" not in str(error.value)
    stored.fault = lambda method, request: None
    assert np.array_equal(np.asarray(remote[2000:2010]), DATA[2000:2010])


def test_missing_and_empty_objects(bucket):
    with pytest.raises(FileNotFoundError):
        RemoteBytes(FILE, Cache())
    bucket.put("x/data.bin", b"")
    assert RemoteBytes(FILE, Cache())[:10] == b"" and blocks.BLOCK_BYTES < blocks.CACHE_BYTES
