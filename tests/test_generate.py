"""`generate` and `Stream`: what they give, what they refuse, how little room they need."""

import jax
import numpy as np
import pytest
import tiny
from tiny import random_model

import mlra_jax
from mlra_jax import sharding
from mlra_jax.decoder import Decoder, Vocabulary, abstract_cache, abstract_decoder
from mlra_jax.generation import Sampling, Stream, loop, programs
from mlra_jax.generation.padding import pad
from mlra_jax.generation.sampling import draws
from mlra_jax.sharding import make_mesh

CONFIG = tiny.config("mlra_4", num_layers=2)


def decodable(mesh=None, num_tokens=80):
    # The last eight ids are padding.
    return Decoder.from_model(random_model(CONFIG, mesh or make_mesh()), Vocabulary(num_tokens))


@pytest.fixture(scope="module")
def model():
    return decodable(make_mesh(tensor=2))


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Prompts and caches are rounded up to few tokens here, so that few tokens cross a bound."""
    monkeypatch.setattr("mlra_jax.generation.padding._BUCKET", 4)
    monkeypatch.setattr(loop, "_CACHE_BUCKET", 16)


def prompts(*lengths):
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 80, n).tolist() for n in lengths]


def argmax_of_whole_passes(model, prompts, rows):
    """What greedy decoding should have given, were `rows` right up to each token."""
    for prompt, row in zip(prompts, rows, strict=True):
        # One length for all, so that one program is compiled: what follows changes nothing before.
        tokens = np.zeros((1, 40), np.int32)
        tokens[0, : len(prompt + row)] = prompt + row
        logits = np.asarray(model(tokens))[0, :, : model.vocabulary.num_tokens]
        yield logits[len(prompt) - 1 : len(prompt + row) - 1].argmax(-1).tolist()


def test_generate_is_the_argmax_of_whole_passes_and_stops(model):
    given = prompts(3, 6)
    rows = mlra_jax.generate(model, given, max_new_tokens=6)
    assert rows == list(argmax_of_whole_passes(model, given, rows))
    stop = rows[0][2]
    stopped = mlra_jax.generate(model, given, max_new_tokens=6, stop_token=stop)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in rows]


@pytest.mark.parametrize("each", [1, 3])
def test_a_row_that_has_stopped_stays_stopped(model, each):
    given, hot = prompts(3, 6), dict(max_new_tokens=40, sampling=Sampling(9.0, top_k=9), seed=2)
    rows = [list(row) for row in zip(*Stream(model, given, **hot), strict=True)]
    stop = next(token for token in rows[0] if token in rows[1])
    ends = [row.index(stop) for row in rows]
    assert ends[0] != ends[1]
    want = [(row[:end] + [stop] * 40)[: max(ends) + 1] for row, end in zip(rows, ends, strict=True)]
    stream = Stream(model, given, stop_token=stop, tokens_per_call=each, **hot)
    assert [list(row) for row in zip(*stream, strict=True)] == want
    # A prompt may end with the stop token.
    assert list(Stream(model, [[stop]], max_new_tokens=1, stop_token=stop))[0] != [stop]


def test_the_cache_of_a_row_that_has_stopped_does_not_grow(model):
    tokens, lengths = np.ones((2, 8), np.int32), np.array([5, 3], np.int32)
    _, cache = programs.prefill(model, tokens, lengths, capacity=16)
    settings = draws(Sampling(), 0, 2, stop_token=7)
    made, _, cache = programs.several(
        model, cache, np.array([7, 1], np.int32), settings, np.int32(1), count=3, num_tokens=80
    )
    assert np.asarray(made)[:, 0].tolist() == [7, 7, 7] and 7 not in np.asarray(made)[:, 1]
    assert np.asarray(cache.lengths).tolist() == [5, 6]


@pytest.mark.parametrize("lengths", [(3,), (4, 1), (5, 4), (8, 8), (1, 9)])
def test_prompts_at_the_edges_of_their_padding(model, lengths):
    given = prompts(*lengths)
    rows = mlra_jax.generate(model, given, max_new_tokens=2)
    assert rows == list(argmax_of_whole_passes(model, given, rows))


@pytest.mark.parametrize("length, new, slots", [(9, 8, 16), (16, 1, 16), (1, 24, 24), (24, 1, 24)])
def test_a_cache_that_fits_exactly_is_enough(model, length, new, slots):
    given = prompts(length, 1)
    settings = dict(max_new_tokens=new)
    rows = mlra_jax.generate(model, given, cache_length=slots, **settings)
    assert rows == mlra_jax.generate(model, given, cache_length=2 * slots, **settings)
    assert rows == list(argmax_of_whole_passes(model, given, rows))
    words = f"a prompt of {length} tokens and {new} new ones need {slots} cache slots and cache_l"
    with pytest.raises(ValueError, match=words):
        mlra_jax.generate(model, given, cache_length=slots - 1, **settings)


@pytest.mark.parametrize(
    "sizes, length, new, given, capacity",
    [
        # By default as many as are needed, rounded up to the bucket of 16.
        ({}, 9, 8, None, 16),
        ({}, 9, 9, None, 32),
        # Padding of the prompts may need more than that; what is given need not hold it.
        ({}, 5, 1, 5, 8),
        # 8 slots for each context share.
        (dict(context=2), 9, 8, None, 16),
        (dict(context=4), 9, 8, None, 32),
        (dict(context=2), 9, 9, 17, 32),
    ],
)
def test_slots_of_a_cache(sizes, length, new, given, capacity):
    model = decodable(make_mesh(**sizes))
    stream = Stream(model, prompts(length), max_new_tokens=new, cache_length=given)
    assert stream.capacity == capacity
    assert stream.tokens_BT.shape[1] <= capacity
    assert stream.tokens_BT[0, :length].tolist() == prompts(length)[0]


def test_a_batch_split_over_devices_gives_the_same(model):
    given = prompts(7, 2, 5, 3)
    rows = mlra_jax.generate(model, given, max_new_tokens=5)
    drawn = mlra_jax.generate(model, given, max_new_tokens=5, temperature=1.0, seed=4)
    for sizes in (dict(data=2, context=2), dict(data=2, fsdp=2, tensor=2)):
        split = decodable(make_mesh(**sizes))
        assert mlra_jax.generate(split, given, max_new_tokens=5) == rows
        settings = dict(max_new_tokens=5, temperature=1.0, seed=4)
        assert mlra_jax.generate(split, given, **settings) == drawn
    with pytest.raises(ValueError, match="3 prompts do not divide over the 8 devices that split"):
        mlra_jax.generate(decodable(make_mesh(data=2, fsdp=4)), given[:3], max_new_tokens=1)


def test_the_stream_gives_each_step_as_it_comes(model):
    given = prompts(7, 2)
    stream = Stream(model, given, max_new_tokens=5)
    steps = list(stream)
    assert len(steps) == 5
    rows = mlra_jax.generate(model, given, max_new_tokens=5)
    assert [list(row) for row in zip(*steps, strict=True)] == rows
    assert list(stream) == steps, "a stream can be read again"


@pytest.mark.parametrize("each", [2, 3, 9])
def test_several_tokens_a_call_are_those_of_single_steps(model, each):
    given = prompts(7, 2)
    for settings in (dict(), dict(temperature=1.0, top_p=0.9, seed=3)):
        settings |= dict(max_new_tokens=8)
        rows = mlra_jax.generate(model, given, **settings)
        assert mlra_jax.generate(model, given, tokens_per_call=each, **settings) == rows
    [one] = mlra_jax.generate(model, given[:1], max_new_tokens=1, tokens_per_call=each)
    assert len(one) == 1
    with pytest.raises(ValueError, match="tokens_per_call=0 must be at least 1"):
        Stream(model, given, max_new_tokens=1, tokens_per_call=0)


def test_several_gpus_make_several_tokens_a_call(monkeypatch):
    def by_default(mesh):
        decoder = abstract_decoder(tiny.config("gqa", 1), mesh)
        return Stream(decoder, [[1]], max_new_tokens=2).tokens_per_call

    one, two = make_mesh(), make_mesh(tensor=2)
    assert (by_default(one), by_default(two)) == (1, 1)
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    assert (by_default(one), by_default(two)) == (1, 8)


def test_a_call_of_several_tokens_copies_no_cache():
    mesh = make_mesh()
    decoder, cache = abstract_decoder(CONFIG, mesh), abstract_cache(CONFIG, mesh, 2, 4096)
    tokens, n = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((2,), ()))
    step = programs.step.lower(decoder, cache, tokens).compile().memory_analysis()
    several = programs.several.lower(
        decoder, cache, tokens, draws(Sampling(), 0, 2), n, count=4, num_tokens=80
    )
    several = several.compile().memory_analysis()
    layer = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers[0]))
    assert several.alias_size_in_bytes >= len(cache.layers) * layer
    assert several.temp_size_in_bytes < step.temp_size_in_bytes + layer / 4


def test_a_long_prompt_is_prefilled_in_chunks_by_one_program(model, monkeypatch):
    given, done = prompts(23, 6), []
    whole = mlra_jax.generate(model, given, max_new_tokens=4)
    monkeypatch.setattr(loop, "_CHUNK_WIDTH", 8)
    stream = Stream(model, given, max_new_tokens=4, on_chunk=done.append)
    assert [list(row) for row in zip(*stream, strict=True)] == whole
    assert done == [0, 8, 16]
    before = programs.extend._cache_size()
    longer = prompts(29, 1)
    rows = mlra_jax.generate(model, longer, max_new_tokens=2)
    assert rows == list(argmax_of_whole_passes(model, longer, rows))
    assert programs.extend._cache_size() == before
    # All rows of a device together have so many tokens in a chunk.
    monkeypatch.setattr(loop, "_CHUNK_TOKENS", 8)
    assert Stream(model, given, max_new_tokens=1).chunk == 4
    assert Stream(decodable(make_mesh(data=2)), given, max_new_tokens=1).chunk == 8


def test_every_step_draws_anew(model):
    """So hot that each of 80 ids is as likely: rows and steps hardly ever agree."""
    draw = lambda **settings: np.array(
        mlra_jax.generate(model, [[1, 2]] * 6, max_new_tokens=30, temperature=1e6, **settings)
    )
    drawn = draw(seed=5)
    assert (drawn[:, 1:] == drawn[:, :-1]).mean() < 0.1
    assert (drawn[1:] == drawn[:-1]).mean() < 0.1
    assert (draw(seed=6) == drawn).mean() < 0.1
    assert drawn.max() < 80 and len(np.unique(drawn)) > 60


def test_the_settings_reach_the_sampler(model):
    given = prompts(5)
    greedy = mlra_jax.generate(model, given, max_new_tokens=8)
    settings = dict(max_new_tokens=8, temperature=5.0, seed=1)
    assert mlra_jax.generate(model, given, top_k=1, **settings) == greedy
    assert mlra_jax.generate(model, given, top_p=1e-6, **settings) == greedy
    assert mlra_jax.generate(model, given, **settings) != greedy


def test_sampling_depends_on_the_seed_only(model):
    draw = lambda seed: mlra_jax.generate(
        model, [[1, 2], [3, 4, 5]], max_new_tokens=12, temperature=1.0, seed=seed
    )
    assert draw(1) == draw(1) != draw(2)


def test_prompts_are_filled_up_on_the_right():
    tokens, lengths = pad([[1, 2, 3], [4], [5, 6, 7, 8, 9]], 80)
    assert lengths.tolist() == [3, 1, 5] and tokens.shape == (3, 8)
    assert tokens[0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0] and tokens[2, :5].tolist() == [
        5,
        6,
        7,
        8,
        9,
    ]
    assert tokens.dtype == lengths.dtype == np.int32
    assert pad([[79] * 8], 80)[0].tolist() == [[79] * 8]


def test_a_stacked_model_says_what_to_do():
    model = random_model(CONFIG, make_mesh())
    with pytest.raises(ValueError, match=r"training form: decode with Decoder.from_model\(model\)"):
        mlra_jax.generate(model, [[1]], max_new_tokens=1)
