import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data import token_file
from mlra_jax.data.pipeline import make_train_iterator, make_validation_batches
from mlra_jax.data.sources import Segment, Source, load_source

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


def test_windows_may_come_as_they_stand_in_the_files(source):
    iterator = train(source, batch=8, order="sequential")
    for _ in range(2):
        rows = [row for batch in take(iterator, 5) for row in batch["inputs"].tolist()]
        starts = [*range(0, 200 - LENGTH, LENGTH), *range(200, 331 - LENGTH, LENGTH)]
        assert rows == [TOKENS[start : start + LENGTH].tolist() for start in starts]
    state = iterator.get_state()
    with pytest.raises(ValueError, match="order was sequential in the saved run and is shuffled"):
        train(source, batch=8).set_state(state)
    # Runs of before there was a choice were shuffled.
    shuffled = train(source).get_state()
    del shuffled["data"]["order"]
    train(source).set_state(shuffled)
    with pytest.raises(ValueError, match="'backward', expected one of shuffled, sequential"):
        train(source, order="backward")


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


@pytest.mark.parametrize(
    "key, value",
    [
        ("windows", 41),
        ("fingerprint", "00000000"),
        ("context_length", 9),
        ("global_batch", 7),
        ("seed", 4),
    ],
)
def test_each_field_of_a_state_is_compared(source, key, value):
    iterator = train(source)
    state = take(iterator, 3) and iterator.get_state()
    assert state["next_batch"] == 3 and state["data"].keys() >= {key}
    was = state["data"][key]
    message = f"cannot resume the data: {key} was {value} in the saved run and is {was} now"
    for saved in (
        state["data"] | {key: value},
        {k: v for k, v in state["data"].items() if k != key},
    ):
        missing = message.replace(f"was {value}", "was None") if key not in saved else message
        with pytest.raises(ValueError, match=missing):
            train(source).set_state({"next_batch": 3, "data": saved})


def test_other_tokens_of_the_same_number_are_other_data(source):
    state = train(source).get_state()
    first, second = source.train
    for place in (0, -1):
        tokens = np.array(second.tokens)
        tokens[place] ^= 1
        other = Source((first, Segment("x", tokens)), source.validation)
        with pytest.raises(ValueError, match="fingerprint was .* in the saved run and is .* now"):
            train(other).set_state(state)
    # The same tokens elsewhere are the same data.
    copies = tuple(Segment("y", np.array(part.tokens, np.int64)) for part in source.train)
    train(Source(copies, ())).set_state(state)


@st.composite
def shapes(draw):
    """(lengths of the segments, T, B, processes, seed), with a window at least."""
    length = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    sizes.append(length + 1 + draw(st.integers(0, 20)))
    processes = draw(st.integers(1, 5))
    return sizes, length, processes * draw(st.integers(1, 4)), processes, draw(st.integers(0, 99))


@given(shapes())
@settings(max_examples=25, deadline=None)
def test_any_sizes_and_processes_see_every_window_once_an_epoch(shape):
    sizes, length, batch, processes, seed = shape
    ids = np.arange(sum(sizes), dtype=np.uint16)
    cuts = np.cumsum([0, *sizes])
    segments = tuple(
        Segment("x", ids[start:stop]) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)
    )
    windows = [
        list(range(start + i * length, start + (i + 1) * length + 1))
        for start, size in zip(cuts[:-1], sizes, strict=True)
        for i in range((size - 1) // length if size else 0)
    ]
    source = Source(segments, segments)
    options = dict(
        tokenizer=None,
        vocab_size=65536,
        context_length=length,
        global_batch=batch,
        process_count=processes,
    )
    joined = lambda parts: {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    rows = lambda b: np.concatenate([b["inputs"], b["targets"][:, -1:]], 1).tolist()
    each = [
        make_train_iterator(source, seed=seed, process_index=p, **options) for p in range(processes)
    ]
    stream = []
    while len(stream) < 2 * len(windows):
        parts = [next(iterator) for iterator in each]
        assert {len(part["inputs"]) for part in parts} == {batch // processes}
        stream += rows(joined(parts))
    assert sorted(stream[: len(windows)]) == sorted(stream[len(windows) :][: len(windows)])
    assert sorted(stream[: len(windows)]) == windows
    checks = [
        list(make_validation_batches(source, process_index=p, **options)) for p in range(processes)
    ]
    assert {len(part) for part in checks} == {-(-len(windows) // batch)}
    whole = [joined(parts) for parts in zip(*checks, strict=True)]
    seen = [row for b in whole for row in rows(b)]
    weights = np.concatenate([b["weights"] for b in whole])
    assert seen[: len(windows)] == windows
    assert np.array_equal(weights[:, 0], np.arange(len(seen)) < len(windows))
    assert np.array_equal(weights, np.repeat(weights[:, :1], length, 1))


@pytest.mark.parametrize(
    "tokens, windows", [(1, 1), (7, 1), (8, 1), (15, 1), (16, 2), (79, 9), (80, 10), (1000, 10)]
)
def test_validation_stops_at_its_number_of_tokens(source, tokens, windows):
    batches = validation(source, max_tokens=tokens)
    assert len(batches) == len(list(batches)) == -(-windows // 4)
    assert sum(batch["weights"].sum() for batch in batches) == windows * LENGTH


def test_a_source_by_name_is_opened_with_its_options(tmp_path):
    token_file.write(tmp_path / "a.bin", TOKENS[:100])
    token_file.write(tmp_path / "b.bin", TOKENS[100:150])
    spec = str(tmp_path / "a.bin")
    assert sum(b["weights"].sum() for b in validation(spec, validation_fraction=0.5)) == 6 * LENGTH
    named = validation(spec, validation=str(tmp_path / "b.bin"))
    assert np.array_equal(next(iter(named))["inputs"][0], TOKENS[100:108])
    assert train(spec, validation_fraction=0.5).get_state()["data"]["windows"] == 6
    with pytest.raises(ValueError, match="too little training data"):
        train(spec, validation_fraction=0.95)


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
