"""Paths of a bucket do what those of a disk do, also where the bucket fails for a while."""

import asyncio
import gc
import importlib.util
import os
import random
import types

import aiohttp
import gcsfs.retry
import pytest

from mlra_jax.storage import paths
from mlra_jax.storage.paths import BucketError, BucketPath, files_below, matching, path


@pytest.fixture
def no_pauses(monkeypatch):
    """Requests are repeated at once."""
    waits = lambda seconds: asyncio.sleep(0)
    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=waits))


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_a_path_of_a_bucket_answers_as_one_of_a_disk(kind, tmp_path, bucket):
    root = tmp_path if kind == "disk" else path("gs://bucket")
    folder, file = root / "a", root / "a" / "b" / "c.txt"
    assert not folder.exists() and not folder.is_dir() and not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    assert file.write_text("vier\n") == 5 and file.read_bytes() == b"vier\n"
    (folder / "d.bin").write_bytes(bytes(range(200)))
    assert folder.is_dir() and folder.exists() and not folder.is_file()
    assert file.is_file() and file.exists() and not file.is_dir()
    assert file.absolute() == file and file.parent.parent == folder
    assert (folder / "d.bin").stat().st_size == 200
    assert sorted(folder.iterdir()) == [folder / "b", folder / "d.bin"]
    assert files_below(folder) == [file, folder / "d.bin"]
    assert list(folder.glob("*.bin")) == [folder / "d.bin"]
    assert matching(f"{root}/**/*.txt") == [file] and matching(f"{root}/a/?.bin")
    with (folder / "d.bin").open("rb") as opened:
        assert opened.seek(100) == 100 and opened.read(3) == bytes([100, 101, 102])
    with pytest.raises(FileNotFoundError) as error:
        (folder / "none").read_bytes()
    assert error.value.filename == str(folder / "none")
    file.unlink()
    file.unlink(missing_ok=True)
    assert not file.exists()


def test_what_others_write_is_seen_at_once(bucket):
    folder = path("gs://bucket/x")
    assert not folder.exists() and files_below(folder) == []
    bucket.put("x/y", b"1")
    assert folder.is_dir() and [p.name for p in folder.iterdir()] == ["y"]
    del bucket.objects["x/y"]
    assert not folder.exists() and not (folder / "y").exists()


def test_lists_have_more_than_one_page(bucket):
    for number in range(1234):
        bucket.put(f"many/{number:04}", b"")
    assert [p.name for p in files_below(path("gs://bucket/many"))] == [
        f"{number:04}" for number in range(1234)
    ]


def test_only_buckets_that_are_served_are_taken(monkeypatch):
    for address in ("s3://bucket/run", "https://host/run", "hdfs://node/run"):
        with pytest.raises(BucketError, match=f"^{address} is an address that is not served"):
            path(address)
    with pytest.raises(BucketError, match="names no bucket: give gs://BUCKET/FOLDER$"):
        path("gs://")
    with pytest.raises(BucketError, match="^--output=gs://b/x must be on a disk"):
        paths.on_disk("gs://b/x", "--output")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BucketError, match="need gcsfs: .* -m pip install 'gcsfs"):
        path("gs://bucket/run")
    assert not isinstance(path("run"), BucketPath)


def test_an_object_appears_whole_or_not_at_all(bucket):
    file = path("gs://bucket/whole.bin")
    data = random.Random(0).randbytes(6 << 20)
    with pytest.raises(ZeroDivisionError), file.open("wb") as opened:
        opened.write(data)
        raise ZeroDivisionError
    assert bucket.names() == []
    with file.open("wb") as opened:
        opened.write(data[:5])
        opened.write(data[5:])
        assert bucket.names() == []
    assert bucket.objects["whole.bin"].data == data
    bucket.fault = lambda method, request: 403 if method == "POST" else None
    with pytest.raises(OSError, match="the bucket"), file.open("wb") as opened:
        opened.write(b"other")
    bucket.fault = lambda method, request: None
    del opened
    gc.collect()
    assert bucket.objects["whole.bin"].data == data


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "lost", "silent", 0.2])
def test_a_bucket_that_fails_for_a_while_is_asked_again(fault, bucket, no_pauses, monkeypatch):
    file = path("gs://bucket/small.txt")
    files = file._backend.fs(file)
    assert 10 < files.requests_timeout.sock_read < 120

    def sometimes(method, request):
        seen[method] = seen.get(method, 0) + 1
        return fault if seen[method] <= 2 else None

    def limits():
        """Only for what is never answered: on a busy machine an answer may come late."""
        seconds = iter([0.5, 0.5])
        limit = lambda files: aiohttp.ClientTimeout(sock_read=next(seconds, 60.0))
        if fault == "silent":
            monkeypatch.setattr(type(files), "requests_timeout", property(limit), raising=False)

    seen, bucket.fault = {}, sometimes
    limits()
    file.write_text("one" * 1000)
    assert bucket.objects["small.txt"].data == b"one" * 1000
    limits()
    assert file.read_text() == "one" * 1000
    assert seen["POST"] == 3 or isinstance(fault, float)


def test_what_a_bucket_refuses_is_one_line(bucket, no_pauses):
    file = path("gs://bucket/small.txt")
    for status in (403, 500):
        bucket.fault = lambda method, request, status=status: status
        for work in (file.read_bytes, lambda: file.write_bytes(b"1"), file.exists, file.stat):
            with pytest.raises(OSError, match="the bucket: .*injected") as error:
                work()
            assert error.value.filename == str(file) and "\n" not in str(error.value)


def test_tensorstore_waits_no_longer_than_a_minute_for_an_answer(monkeypatch):
    names = [f"TENSORSTORE_CURL_LOW_SPEED_{name}" for name in ("TIME_SECONDS", "LIMIT_BYTES")]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    paths._prepare_library.__wrapped__()
    assert [os.environ[name] for name in names] == ["60", "1"]
