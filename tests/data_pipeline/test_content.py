"""The identity of data: every byte of small data, samples of large, and nothing else."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mlra_jax.data import content, token_file
from mlra_jax.data.inputs import open_input
from mlra_jax.data.pipeline import make_train_iterator
from mlra_jax.data.prepare import prepare
from mlra_jax.data.tokenizers import get_tokenizer


def test_every_byte_of_small_files_counts_and_nothing_else_does(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, size in zip(paths, (5000, 0, 70_000), strict=True):
        path.write_bytes(bytes(i % 251 for i in range(size)))
    first = content.files_identity(paths)
    for path in paths:
        os.utime(path, ns=(1, 1))
    assert content.files_identity([path.rename(f"{path}_moved") for path in paths]) == first
    moved = [tmp_path / f"{name}_moved" for name in ("a", "b", "c")]
    seen = {first, content.files_identity(moved[::-1]), content.files_identity(moved[:2])}
    for path, place in ((moved[0], 0), (moved[0], 4999), (moved[2], 65_536), (moved[2], 35_000)):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        seen.add(content.files_identity(moved))
        data[place] ^= 1
        path.write_bytes(data)
    assert len(seen) == 7 and content.files_identity(moved) == first


def test_large_data_is_sampled_from_the_first_to_the_last_block(monkeypatch):
    monkeypatch.setattr(content, "BUDGET_BYTES", 4 * 400)
    monkeypatch.setattr(content, "BLOCK_BYTES", 4 * 10)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 50, size).astype(np.uint16) for size in (10_000, 3000, 15)]
    first = content.arrays_identity(arrays)
    assert content.arrays_identity([array.astype(np.uint32) for array in arrays]) == first
    noticed = []
    for array in arrays:
        for place in range(len(array)):
            array[place] += 1
            noticed.append(content.arrays_identity(arrays) != first)
            array[place] -= 1
        # The ends of each are among the samples.
        assert noticed[-len(array)] and noticed[-1]
    assert 350 < sum(noticed) < 480
    # Another set of the same sizes differs at once, and no gap is longer than a few percent.
    gaps = np.diff(np.flatnonzero(noticed[:10_000]))
    assert gaps.max() < 400


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 3000])
def test_rows_are_all_read_where_they_are_few(monkeypatch, count):
    rows = [f"row {i}" for i in range(count)]
    read = lambda start, stop: rows[start:stop]
    first = content.rows_identity(read, count)
    for place in {0, count // 2, count - 1} & set(range(count)):
        rows[place] += "x"
        assert content.rows_identity(read, count) != first
        rows[place] = rows[place][:-1]
    # Of many, some from everywhere.
    monkeypatch.setattr(content, "BUDGET_BYTES", 7000)
    asked = []
    content.rows_identity(lambda a, b: asked.append(a) or rows[a:b], count)
    assert len(set(asked)) == len(asked) and (count < 3000 or max(asked) > 1500)


@pytest.mark.parametrize("place", [0, 150, 299])
def test_a_data_set_whose_rows_changed_is_not_called_done(tmp_path, monkeypatch, place):
    class Columns(dict):
        column_names = property(list)
        __len__ = lambda self: len(self["text"])
        __getitem__ = lambda self, rows: (
            dict.__getitem__(self, rows)
            if isinstance(rows, str)
            else {name: self[name][rows] for name in self}
        )

    texts = [f"document {i}" for i in range(300)]
    library = SimpleNamespace(load_dataset=lambda *a, **b: Columns(text=list(texts)))
    monkeypatch.setitem(sys.modules, "datasets", library)
    go = lambda: prepare(
        open_input("hf:org/name"), tmp_path, tokenizer=get_tokenizer("bytes"), name="x"
    )
    shards = go()
    assert go() == shards
    texts[place] = texts[place].upper()
    with pytest.raises(ValueError, match="begun with another input .*; take another destination"):
        go()


@pytest.mark.parametrize("place", [10, 70_000, 139_990])
def test_a_run_does_not_go_on_with_tokens_changed_in_the_middle(tmp_path, place):
    path = tmp_path / "a.bin"
    tokens = np.arange(150_000) % 250
    sizes = dict(tokenizer=None, vocab_size=256, context_length=64, global_batch=8, seed=1)
    open_it = lambda: make_train_iterator(str(path), **sizes)
    token_file.write(path, tokens)
    state = open_it().get_state()
    open_it().set_state(state)
    tokens[place] += 1
    token_file.write(path, tokens)
    with pytest.raises(ValueError, match="cannot resume the data: .* was .* in the saved run and"):
        open_it().set_state(state)
    if place == 70_000:  # The ends, which earlier versions looked at, are the same.
        del state["data"]["content"]
        open_it().set_state(state)
