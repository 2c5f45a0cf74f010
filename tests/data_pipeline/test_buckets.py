"""Token files and texts of a bucket give the batches of those on a disk."""

import numpy as np
import pytest

from mlra_jax.data import content, token_file
from mlra_jax.data.pipeline import make_train_iterator, make_validation_batches
from mlra_jax.data.sources import describe, load_source
from mlra_jax.storage import blocks
from mlra_jax.storage.blocks import RemoteArray

SIZES = dict(tokenizer=None, vocab_size=50257)
LENGTH = 100


@pytest.fixture
def shards(tmp_path, bucket):
    """The same shards in a folder and in the bucket; the folder."""
    rng = np.random.default_rng(1)
    for name, count in (("a_train_0", 20_000), ("a_train_1", 7_001), ("a_val_0", 3_000)):
        token_file.write(tmp_path / f"{name}.bin", rng.integers(0, 50257, count))
        bucket.put(f"shards/{name}.bin", (tmp_path / f"{name}.bin").read_bytes())
    return tmp_path


def iterator(source, process=0, processes=1, **options):
    how = dict(context_length=LENGTH, global_batch=8, seed=3, prefetch=2)
    loaded = load_source(str(source), **SIZES, cache_bytes=64 << 10)
    how |= dict(process_index=process, process_count=processes)
    return make_train_iterator(loaded, **SIZES, **how | options)


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("names", ["gs://bucket/shards", "gs://bucket/shards/*.bin"])
def test_batches_are_those_of_the_disk_and_go_on_from_there(names, order, shards):
    here, there = iterator(shards, order=order), iterator(names, order=order)
    for _ in range(40):  # more than an epoch
        one, other = next(here), next(there)
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert here.get_state() == there.get_state()
    again = iterator(names, order=order)
    again.set_state(here.get_state())
    assert np.array_equal(next(again)["inputs"], next(here)["inputs"])
    for each in (here, there, again):
        each.close()


def test_validation_is_that_of_the_disk(shards):
    for validation in (None, f"{shards}/a_val_0.bin"):
        spec = f"{shards}/a_train_1.bin"
        here = load_source(spec, **SIZES, validation=validation)
        remote = validation and "gs://bucket/shards/a_val_0.bin"
        there = load_source("gs://bucket/shards/a_train_1.bin", **SIZES, validation=remote)
        one, other = (
            list(make_validation_batches(s, **SIZES, context_length=LENGTH, global_batch=4))
            for s in (here, there)
        )
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert all(np.array_equal(a[key], b[key]) for key in a)
        lines = [line.replace(str(shards), "gs://bucket/shards") for line in describe(here)]
        assert lines == describe(there)


def test_a_process_reads_what_its_rows_need(shards, bucket, monkeypatch):
    monkeypatch.setattr(content, "BUDGET_BYTES", 1)
    monkeypatch.setattr(content, "BLOCK_BYTES", 64)
    monkeypatch.setattr("mlra_jax.data.pipeline.fingerprint", lambda segments: "")
    monkeypatch.setattr(blocks.Cache.__init__, "__defaults__", (1 << 20, 256))
    loaded = load_source("gs://bucket/shards", **SIZES)
    assert all(isinstance(segment.tokens, RemoteArray) for segment in loaded.train)
    how = dict(context_length=LENGTH, global_batch=8, seed=3, process_index=2, process_count=4)
    batches = make_train_iterator(loaded, **SIZES, **how)
    bucket.requests.clear()
    next(batches)
    read = sum(size for _, request, size in bucket.requests if "alt=media" in request)
    # Two rows of 101 tokens, each in two or three blocks.
    assert 2 * 2 * LENGTH < read <= 2 * 3 * 256


def test_faults_of_token_files_are_told_as_on_a_disk(shards, bucket):
    data = bucket.objects["shards/a_val_0.bin"].data
    for damaged in (data[:-1], data + b"12", b"\x1f\x8b" + data[2:], data[:100], b""):
        bucket.put("shards/a_val_0.bin", damaged)
        (shards / "a_val_0.bin").write_bytes(damaged)
        told = []
        for folder in (str(shards), "gs://bucket/shards"):
            with pytest.raises(ValueError) as error:
                load_source(folder, **SIZES)
            told.append(str(error.value).replace(folder, "DIR"))
        assert told[0] == told[1] and "\n" not in told[0]
    with pytest.raises(FileNotFoundError, match="no data: gs://bucket/none"):
        load_source("gs://bucket/none/*.bin", **SIZES)


def test_an_id_outside_the_vocabulary_is_named_when_it_is_read(shards):
    source = load_source("gs://bucket/shards", tokenizer=None, vocab_size=1000)
    batches = make_train_iterator(
        source, tokenizer=None, vocab_size=1000, context_length=LENGTH, global_batch=2, seed=0
    )
    with pytest.raises(ValueError, match="gs://bucket/shards/a_train_0.bin: token id .* at posi"):
        next(batches)


def test_texts_are_read_from_a_bucket(tmp_path, bucket):
    from mlra_jax.data.tokenizers import get_tokenizer

    for name, text in (("a.txt", "Wörter\n" * 500), (".hidden", "no"), ("b/c.txt", "Ende")):
        bucket.put(f"text/{name}", text.encode())
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    how = dict(tokenizer=get_tokenizer("bytes"), vocab_size=260)
    here, there = (load_source(f, **how) for f in (str(tmp_path), "gs://bucket/text"))
    assert np.array_equal(here.train[0].tokens, there.train[0].tokens)
