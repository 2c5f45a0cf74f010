import json

import numpy as np
import pytest

from mlra_jax.data import token_file
from mlra_jax.data.pipeline import make_train_iterator, make_validation_batches
from mlra_jax.data.sources import load_source

LENGTH = 8
TOKENS = np.random.default_rng(1).permutation(5000).astype(np.uint16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two shards and a validation shard of distinct tokens: a window is known by its first."""
    folder = tmp_path_factory.mktemp("shards")
    cuts = {"x_train_000001": (0, 200), "x_train_000002": (200, 331), "x_val_000000": (331, 416)}
    for name, (start, stop) in cuts.items():
        token_file.write(folder / f"{name}.bin", TOKENS[start:stop])
    return load_source(str(folder), tokenizer=None, vocab_size=5000)


def train(source, batch=6, seed=3, **options):
    return make_train_iterator(
        source,
        tokenizer=None,
        vocab_size=5000,
        context_length=LENGTH,
        global_batch=batch,
        seed=seed,
        **options,
    )


def validation(source, batch=4, **options):
    return make_validation_batches(
        source,
        tokenizer=None,
        vocab_size=5000,
        context_length=LENGTH,
        global_batch=batch,
        **options,
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(left, right):
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(left, right, strict=True)
    )


def expected_windows():
    starts = [*range(0, 200 - LENGTH, LENGTH), *range(200, 331 - LENGTH, LENGTH)]
    return {tuple(TOKENS[start : start + LENGTH + 1].tolist()) for start in starts}


def test_each_epoch_has_every_window_once_in_another_order(source):
    windows = expected_windows()
    assert len(windows) == 24 + 16
    iterator = train(source, batch=8)
    epochs = []
    for _ in range(3):
        batches = take(iterator, 5)
        assert all(batch["inputs"].dtype == np.int32 for batch in batches)
        assert all(np.array_equal(b["inputs"][:, 1:], b["targets"][:, :-1]) for b in batches)
        rows = [
            (*inputs.tolist(), int(targets[-1]))
            for batch in batches
            for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True)
        ]
        assert set(rows) == windows and len(rows) == len(windows)
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(epochs[0]) != epochs[0]


def test_the_stream_is_a_function_of_the_seed(source):
    assert same(take(train(source), 9), take(train(source), 9))
    assert not same(take(train(source), 9), take(train(source, seed=4), 9))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_share_the_rows_of_the_same_batches(source, count):
    whole = take(train(source), 10)
    parts = [
        take(train(source, process_index=index, process_count=count), 10) for index in range(count)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        for step in range(10)
    ]
    assert same(whole, joined)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 6, 7, 23])
def test_resuming_goes_on_exactly(source, stop, prefetch):
    iterator = train(source, prefetch=prefetch)
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = take(iterator, 8)
    resumed = train(source, prefetch=prefetch)
    take(resumed, 2)
    resumed.set_state(state)
    assert same(take(resumed, 8), rest)
    # Another number of processes goes on at the same place.
    half = train(source, process_index=1, process_count=2)
    half.set_state(state)
    assert np.array_equal(next(half)["inputs"], rest[0]["inputs"][3:])
    iterator.close()
    resumed.close()


def test_a_state_of_other_data_is_refused(source, tmp_path):
    state = train(source).get_state()
    for change in ({"seed": 4}, {"batch": 3}):
        with pytest.raises(ValueError, match="cannot resume the data: .* was .* and is .* now"):
            train(source, **change).set_state(state)
    path = tmp_path / "other.bin"
    token_file.write(path, np.arange(331))
    other = load_source(str(path), tokenizer=None, vocab_size=5000)
    with pytest.raises(ValueError, match="cannot resume the data"):
        train(other).set_state(state)


def test_validation_is_every_window_in_order_with_padding_of_no_weight(source):
    batches = validation(source)
    assert len(batches) == 3
    seen = list(batches)
    expected = TOKENS[331:411].reshape(10, LENGTH)
    inputs = np.concatenate([batch["inputs"] for batch in seen])
    targets = np.concatenate([batch["targets"] for batch in seen])
    weights = np.concatenate([batch["weights"] for batch in seen])
    assert inputs.shape == targets.shape == weights.shape == (12, LENGTH)
    assert np.array_equal(inputs[:10], expected)
    assert np.array_equal(targets[:10].ravel(), TOKENS[332:412])
    assert np.array_equal(weights, np.repeat([1.0] * 10 + [0.0] * 2, LENGTH).reshape(12, LENGTH))
    assert same(seen, list(batches))
    parts = [list(validation(source, process_index=i, process_count=2)) for i in range(2)]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in seen[step]}
        for step in range(3)
    ]
    assert same(seen, joined)
    assert sum(b["weights"].sum() for b in validation(source, max_tokens=50)) == 6 * LENGTH


def test_training_never_sees_a_held_out_token(tmp_path):
    path = tmp_path / "a.bin"
    token_file.write(path, TOKENS[:1000])
    source = load_source(str(path), tokenizer=None, vocab_size=5000)
    seen = np.concatenate([batch["targets"].ravel() for batch in take(train(source), 40)])
    held_out = np.concatenate([batch["targets"].ravel() for batch in validation(source)])
    assert not set(seen.tolist()) & set(TOKENS[950:1000].tolist())
    assert set(held_out.tolist()) == set(TOKENS[951:1000].tolist()[: 6 * LENGTH])


def test_sizes_that_do_not_fit_are_refused_in_one_line(source, tmp_path):
    with pytest.raises(ValueError, match="batch of 6 sequences does not divide among 4 processes"):
        train(source, process_count=4)
    with pytest.raises(ValueError, match="batch of 0"):
        train(source, batch=0)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed must be 0 to"):
            train(source, seed=seed)
    path = tmp_path / "short.bin"
    token_file.write(path, TOKENS[:100])
    short = load_source(str(path), tokenizer=None, vocab_size=5000)
    with pytest.raises(ValueError, match="too little validation data in .*: 5 tokens are less"):
        validation(short)


def test_a_bad_id_beyond_the_first_check_stops_the_run_where_it_is_read(tmp_path, monkeypatch):
    from mlra_jax.data import sources

    monkeypatch.setattr(sources, "_TOKENS_CHECKED_FIRST", 100)
    path = tmp_path / "a.bin"
    tokens = TOKENS[:1000] % 4000
    tokens[500] = 4321
    token_file.write(path, tokens)
    iterator = make_train_iterator(
        str(path),
        tokenizer=None,
        vocab_size=4000,
        context_length=LENGTH,
        global_batch=4,
        seed=0,
        prefetch=2,
    )
    with pytest.raises(ValueError, match="token id 4321 at position 500"):
        take(iterator, 60)
    iterator.close()
