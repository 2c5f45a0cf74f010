"""Texts up to stop strings, windows and batches, without a model."""

import types

import numpy as np
import pytest

from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.evaluate import scoring
from mlra_jax.evaluate.scoring import generate_until, loglikelihood, rolling_windows
from mlra_jax.sharding import make_mesh

END = ByteTokenizer.end_of_text


class Model:
    class config:
        context_length, vocab_size = 20, 300

    mesh = None
    num_tokens = 257


@pytest.fixture
def streams(monkeypatch):
    """Generation that says what the table says after each prompt, and what it was asked."""
    asked, answers = [], {}

    class Stream:
        def __init__(self, model, prompts, **settings):
            asked.append((prompts, settings))
            self.prompts, self.steps = prompts, 0
            self.count = settings["max_new_tokens"]

        def __iter__(self):
            rows = [answers[bytes(prompt).decode()] for prompt in self.prompts]
            for i in range(self.count):
                self.steps += 1
                asked[-1][1]["steps"] = self.steps
                yield [row[i] if i < len(row) else ord(".") for row in rows]

    monkeypatch.setattr(scoring, "Stream", Stream)
    monkeypatch.setattr(scoring, "check_batch", lambda model, batch: None)

    def say(prompt, text):
        answers[prompt] = list(text.encode() if isinstance(text, str) else text)

    return asked, say


def text_of(streams, said, until=(), new=12):
    streams[1]("p", said)
    settings = dict(until=until, max_new_tokens=new, batch=1)
    return generate_until(Model(), ByteTokenizer(), [list(b"p")], **settings)[0]


@pytest.mark.parametrize(
    ("said", "until", "wanted"),
    [
        ("one two", (), "one two....."),
        ("one two", ("two",), "one "),
        ("one two", ("one",), ""),
        ("one two", ("three",), "one two....."),
        # The first in the text wins over the one that is named first, also where both end at once.
        ("one two", ("two", "ne"), "o"),
        ("one two", ("ne", "two"), "o"),
        ("abc", ("c", "abc"), ""),
        ("abc", ("bc", "abc"), ""),
        ("abc", ("abc", "c"), ""),
        ("abcabc", ("ca",), "ab"),
        # One that begins again within itself.
        ("aab", ("ab",), "a"),
        ("aaab", ("aab",), "a"),
        ("one two", ("",), "one two....."),
        ("one two", ("", "two"), "one "),
        ("grün", ("ün",), "gr"),
        ("grün", ("ü",), "gr"),
        ("one............", ("e.",), "on"),
        ("one two thre", ("three", "e"), "on"),
    ],
)
def test_text_ends_before_the_first_stop_string(streams, said, until, wanted):
    assert text_of(streams, said, until) == wanted


def test_a_stop_string_in_the_last_token_counts(streams):
    assert text_of(streams, "one two", ("wo",), new=7) == "one t"
    assert text_of(streams, "one two", ("two",), new=6) == "one tw"


def test_end_of_text_ends_a_text(streams):
    assert text_of(streams, [*b"ab", END, *b"cd"]) == "ab"
    assert text_of(streams, [END, *b"cd"]) == ""
    assert streams[0][-1][1]["steps"] == 1
    assert text_of(streams, [*b"ab", END, *b"cd"], ("b",)) == "a"
    assert text_of(streams, [*b"ab", END, *b"cd"], ("c",)) == "ab"


def test_half_a_character_at_the_end_is_shown_as_one(streams):
    assert text_of(streams, "aü", new=2) == "a\ufffd"
    # Not after a stop string or the end of the text.
    assert text_of(streams, "aü", ("a",), new=2) == ""


def test_steps_end_when_every_row_has(streams):
    asked, say = streams
    say("a", "xx!")
    say("b", "x!")
    say("c", "xxxx!")
    prompts = [list(b"a"), list(b"b"), list(b"c")]
    settings = dict(until=["!"], max_new_tokens=9)
    assert generate_until(Model(), ByteTokenizer(), prompts, batch=3, **settings) == [
        "xx",
        "x",
        "xxxx",
    ]
    assert [settings["steps"] for _, settings in asked] == [5]
    asked.clear()
    generate_until(Model(), ByteTokenizer(), prompts, batch=2, **settings)
    # Full batches: a row is repeated, and its text is not waited for twice.
    assert [len(prompts) for prompts, _ in asked] == [2, 2]
    assert [settings["steps"] for _, settings in asked] == [3, 5]


def test_answers_keep_their_places_and_settings_are_passed_on(streams):
    asked, say = streams
    prompts = ["a", "bbb", "cc", "dddd", "e"]
    for prompt in prompts:
        say(prompt, prompt.upper())
    seen, sampling = [], object()
    found = generate_until(
        Model(), ByteTokenizer(), [list(p.encode()) for p in prompts], until=["."],
        max_new_tokens=5, batch=2, sampling=sampling, seed=7, progress=seen.append,
    )  # fmt: skip
    assert found == [p.upper() for p in prompts] and seen == [2, 2, 1]
    assert ["".join(map(chr, rows[0])) for rows, _ in asked] == ["dddd", "cc", "e"]
    for _, settings in asked:
        del settings["steps"]
        assert settings == dict(max_new_tokens=5, sampling=sampling, seed=7)


@pytest.mark.parametrize(("new", "limit", "kept"), [(4, 10, 6), (9, 10, 1), (4, None, 16)])
def test_prompts_lose_what_leaves_no_room(streams, new, limit, kept):
    asked, say = streams
    prompt = "abcdefghijklmnopqrstuvwxyz"
    say(prompt[-kept:], "x")
    generate_until(
        Model(), ByteTokenizer(), [list(prompt.encode())], max_new_tokens=new, max_length=limit,
        batch=1,
    )  # fmt: skip
    assert bytes(asked[0][0][0]).decode() == prompt[-kept:]
    with pytest.raises(ValueError, match="max_new_tokens=10 leaves no room for a prompt in the 10"):
        generate_until(Model(), ByteTokenizer(), [[1]], max_new_tokens=10, max_length=10, batch=1)


@pytest.fixture
def scored(monkeypatch):
    """Scores of -token/16 for each target, all of them greedy but 13s; and the shapes seen."""
    shapes = []

    def token_scores(model, inputs_BT, targets_BT):
        assert (inputs_BT[:, 1:] == targets_BT[:, :-1]).all()
        shapes.append(inputs_BT.shape)
        return -targets_BT.astype(np.float32) / 16, targets_BT != 13

    monkeypatch.setattr(scoring, "token_scores", token_scores)
    monkeypatch.setattr(scoring, "check_batch", lambda model, batch: None)
    return shapes


def test_only_the_continuation_counts_and_all_of_it(scored):
    """Its first token to its last; the context's and the padding's scores are left out."""
    pairs = [([13, 13], [1, 2, 4]), ([1], [8]), ([2] * 9, [13]), ([3], [16, 13]), ([13], [16] * 11)]
    found = loglikelihood(Model(), pairs, batch=2)
    assert found == [
        (-7 / 16, True),
        (-0.5, True),
        (-13 / 16, False),
        (-29 / 16, False),
        (-11, True),
    ]
    assert scored == [(2, 20)] * 3


@pytest.mark.parametrize(("context", "continuation"), [(17, 3), (18, 3), (40, 3), (5, 20), (1, 20)])
def test_contexts_lose_their_beginning_at_the_limit(scored, monkeypatch, context, continuation):
    seen = []
    real = scoring.token_scores
    monkeypatch.setattr(
        scoring,
        "token_scores",
        lambda model, i, t: (seen.append((i[0].tolist(), t[0].tolist())), real(model, i, t))[1],
    )
    tokens = list(range(14, 14 + context + continuation))
    pair = tokens[:context], tokens[context:]
    ((score, greedy),) = loglikelihood(Model(), [pair], batch=1)
    assert score == -sum(pair[1]) / 16 and greedy
    ((inputs, targets),) = seen
    kept = tokens[-21:]
    assert inputs[: len(kept) - 1] == kept[:-1] and targets[: len(kept) - 1] == kept[1:]


@pytest.mark.parametrize(
    ("sizes", "batch", "length", "chunks"),
    [
        # Logits of one device: rows x length x its part of the vocabulary, a thousand at a time.
        (dict(), 2, 10, 6),
        (dict(data=2), 2, 10, 3),
        (dict(fsdp=2), 2, 10, 3),
        (dict(data=2, fsdp=2), 4, 10, 3),
        (dict(tensor=2), 2, 10, 3),
        (dict(tensor=2, context=2), 2, 10, 2),
        (dict(tensor=4), 1, 13, 1),
        (dict(tensor=4), 1, 14, 2),
    ],
)
def test_logits_are_held_in_parts(monkeypatch, sizes, batch, length, chunks):
    asked = []
    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 1000)
    monkeypatch.setattr(scoring, "_token_scores", lambda *_, chunks: asked.append(chunks))
    model = types.SimpleNamespace(config=Model.config, mesh=make_mesh(**sizes))
    tokens = np.zeros((batch, length), np.int32)
    scoring.token_scores(model, tokens, tokens)
    assert asked == [chunks]


def test_batches_divide_over_the_devices():
    for sizes, good, bad in (
        (dict(), (1, 2, 3), (0, -1)),
        (dict(data=2, tensor=2), (2, 4), (0, 1, 3, -2)),
        (dict(data=2, fsdp=2), (4, 8), (2, 6)),
    ):
        model = types.SimpleNamespace(mesh=make_mesh(**sizes))
        for batch in good:
            scoring.check_batch(model, batch)
        for batch in bad:
            with pytest.raises(ValueError, match=f"a batch of {batch} does not divide over the"):
                scoring.check_batch(model, batch)


def test_batches_begin_with_the_longest():
    assert list(scoring._batches([3, 9, 1, 9, 5], 2)) == [[1, 3], [4, 0], [2]]
    assert list(scoring._batches([], 2)) == []
    assert list(scoring._batches([1, 1], 5)) == [[0, 1]]


def test_lengths_are_rounded_up_to_two_or_three_times_a_power_of_two():
    sizes = [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for low, high in zip(sizes, sizes[1:], strict=False):
        assert [scoring._bucket(n) for n in (low, low + 1, high - 1, high)] == [
            low,
            high,
            high,
            high,
        ]
    assert scoring._bucket(1) == scoring._bucket(31) == 32


def test_one_item_is_always_on_its_way():
    made = []
    items = (made.append(i) or i for i in range(4))
    seen = [(item, len(made)) for item in scoring._ahead(items)]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(scoring._ahead(iter([]))) == [] and list(scoring._ahead(iter([5]))) == [5]


@pytest.mark.parametrize(
    ("length", "windows"),
    [
        (0, []),
        (1, [([9], [0])]),
        (3, [([9], [0, 1, 2])]),
        (4, [([9], [0, 1, 2, 3])]),
        (5, [([9], [0, 1, 2, 3]), ([0, 1, 2, 3], [4])]),
        (7, [([9], [0, 1, 2, 3]), ([2, 3], [4, 5, 6])]),
        (8, [([9], [0, 1, 2, 3]), ([3], [4, 5, 6, 7])]),
        (9, [([9], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([4, 5, 6, 7], [8])]),
    ],
)
def test_rolling_windows(length, windows):
    """The last window, if shorter, sees as much of what came before as fits."""
    assert list(rolling_windows(list(range(length)), 9, 4)) == windows
