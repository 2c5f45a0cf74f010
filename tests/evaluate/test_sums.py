"""Sums by window, without a model: which are counted, kept, taken up again, and refused."""

import dataclasses
import inspect
import json
import math
import re
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mlra_jax import checkpoints, checksums, sharding
from mlra_jax.config import GroupedConfig, ModelConfig
from mlra_jax.data import token_file
from mlra_jax.data.inputs import open_input
from mlra_jax.data.prepare import prepare
from mlra_jax.data.sources import Segment, Windows
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.evaluate import perplexity
from mlra_jax.evaluate.perplexity import Tally, evaluate, table
from mlra_jax.loading import load_model
from mlra_jax.sharding import make_mesh

CONFIG = ModelConfig(GroupedConfig(2, 2, 4), 50, 1, 8, 8)
WINDOW = 4


class Model:
    """Its score of a target is a function of input and target alone."""

    config = CONFIG
    mesh = None


loaded: list[tuple] = []
"""The arguments of each `load_model`."""


def scores(model, inputs_BT, targets_BT):
    return -(inputs_BT * 0.01 + targets_BT * 0.5).astype(np.float32), None


@pytest.fixture
def calls(monkeypatch):
    """Batches that were scored; no model is loaded or run."""
    seen = []
    loaded.clear()

    def noted(model, inputs_BT, targets_BT):
        seen.append((inputs_BT, targets_BT))
        return scores(model, inputs_BT, targets_BT)

    monkeypatch.setattr(perplexity, "token_scores", noted)
    monkeypatch.setattr(perplexity, "load_model", lambda *asked: loaded.append(asked) or Model())
    monkeypatch.setattr(perplexity, "check_batch", lambda model, batch: None)
    return seen


@pytest.fixture
def place(tmp_path):
    """A folder with a training run of two steps and two token files."""
    with checkpoints.make_manager(tmp_path / "run") as manager:
        for step in (1, 2):
            params = {"a": np.full(3, step, np.float32)}
            model = checkpoints.describe(CONFIG, None)
            checkpoints.save(manager, step, params=params, model=model)
        manager.wait_until_finished()
    rng = np.random.default_rng(0)
    for name, count in (("a", 31), ("b", 22)):
        token_file.write(tmp_path / f"{name}.bin", rng.integers(0, 50, count))
    return tmp_path


def run(place, *files, **changes):
    files = [place / name for name in files or ("a.bin", "b.bin")]
    settings = dict(window=WINDOW, output=place / "out.json", batch=3, quiet=True)
    settings |= changes
    return evaluate(settings.pop("checkpoint", place / "run"), files, **settings)


def by_hand(path, windows):
    tokens = token_file.read(path)[: windows * WINDOW + 1].astype(np.float64)
    return float(np.mean(tokens[:-1] * 0.01 + tokens[1:] * 0.5))


def test_the_window_is_the_models_own_and_a_longer_one_is_said_once(place, calls, capsys):
    own = CONFIG.context_length
    for name in ("long.bin", "longer.bin"):
        token_file.write(place / name, np.arange(4 * own) % 50)
    for window, warned in ((None, 0), (own - 1, 0), (own + 1, 1)):
        settings = dict(window=window, output=None, quiet=False)
        found = run(place, "long.bin", "longer.bin", **settings)
        assert found["settings"]["window"] == (window or own)
        said = f"{own + 1} tokens are beyond the {own} that the model was trained with"
        assert capsys.readouterr().err.count(said) == warned


def test_files_of_another_tokenizer_are_refused(place, calls):
    text = place / "text.txt"
    text.write_text("Enough for a window.")
    made = prepare(open_input(str(text)), place, tokenizer=get_tokenizer("bytes"), name="made")
    for tokenizer in ("bytes", None, "gpt2"):
        folder = place / f"run_{tokenizer}"
        with checkpoints.make_manager(folder) as manager:
            model = checkpoints.describe(dataclasses.replace(CONFIG, vocab_size=260), tokenizer)
            checkpoints.save(manager, 1, params={"a": np.ones(3, np.float32)}, model=model)
        settings = dict(checkpoint=folder, output=place / f"{tokenizer}.json")
        if tokenizer == "gpt2":
            refused = f"{made[0]} was prepared with tokenizer bytes, and the checkpoint's is gpt2"
            with pytest.raises(ValueError, match=f"^{re.escape(refused)}: "):
                run(place, "a.bin", made[0].name, **settings)
            assert not settings["output"].exists()
        else:
            assert run(place, "a.bin", made[0].name, **settings)["sets"][str(made[0])]["tokens"]


def test_sets_windows_and_the_mean(place, calls):
    """31 tokens are 7 windows of 4 and a target (two left), 22 are 5 (one left)."""
    found = run(place)
    rows = {}
    for name, windows in (("a.bin", 7), ("b.bin", 5)):
        loss = by_hand(place / name, windows)
        rows[str(place / name)] = dict(
            perplexity=pytest.approx(math.exp(loss), rel=1e-6),
            loss=pytest.approx(loss, rel=1e-6),
            tokens=windows * WINDOW,
        )
    assert found["sets"] == rows and list(found["sets"]) == list(rows)
    values = [row["perplexity"] for row in found["sets"].values()]
    assert found["mean_perplexity"] == pytest.approx((values[0] + values[1]) / 2, rel=1e-12)
    assert found["checkpoint"] == str(place / "run") and found["step"] == 2
    assert json.loads((place / "out.json").read_text()) == found
    assert [len(inputs) for inputs, _ in calls] == [3, 3, 3, 3, 3]
    for inputs, targets in calls:
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


def test_what_is_loaded_is_what_was_asked_for(place, calls, monkeypatch):
    """The step (the latest unless named, as the result says), the mesh and the dtype."""
    asked, parameters = [], inspect.signature(load_model)

    def load(*arguments, **more):
        asked.append(parameters.bind(*arguments, **more).arguments)
        return Model()

    monkeypatch.setattr(perplexity, "load_model", load)
    mesh = sharding.make_mesh(fsdp=2)
    assert run(place, output=None)["step"] == 2
    assert run(place, output=None, step=1, mesh=mesh, dtype="float16")["step"] == 1
    latest, named = asked
    assert (latest["step"], latest["mesh"].size, latest["dtype"]) == (2, 1, None)
    assert named == dict(
        path=place / "run", step=1, mesh=mesh, dtype="float16", allow_nonfinite=False
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, ml_dtypes.bfloat16, np.dtype("bfloat16")])
def test_a_dtype_is_the_same_however_it_is_written(place, calls, dtype):
    """A result by name is read again with any other spelling of the same dtype."""
    found = run(place, dtype="bfloat16")
    del calls[:]
    assert run(place, dtype=dtype) == found and not calls
    assert run(place, checkpoint=str(place / "run"), dtype=dtype, output=None)["step"] == 2


@pytest.mark.parametrize(("limit", "windows"), [(4, 1), (7, 1), (8, 2), (20, 5), (27, 6), (999, 7)])
def test_the_limit_is_in_whole_windows(place, calls, limit, windows):
    found = run(place, "a.bin", max_tokens=limit)["sets"][str(place / "a.bin")]
    assert found["tokens"] == windows * WINDOW
    assert found["loss"] == pytest.approx(by_hand(place / "a.bin", windows), rel=1e-6)


def test_the_mean_is_over_sets_not_tokens(place, calls):
    both = run(place)["mean_perplexity"]
    alone = [run(place, name, output=None)["mean_perplexity"] for name in ("a.bin", "b.bin")]
    assert both == pytest.approx(np.mean(alone), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8])
def test_a_batch_changes_no_bit(place, calls, batch):
    assert run(place, batch=batch, output=None)["sets"] == run(place, output=None)["sets"]


def test_the_model_is_the_one_that_was_asked_for(place, calls):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    run(place, step=1, dtype="float16", mesh=mesh, batch=None)
    assert loaded == [(place / "run", mesh, "float16", 1, False)]
    # Four windows for each device that splits the batch.
    assert [len(inputs) for inputs, _ in calls] == [16, 16]
    run(place, output=None, batch=None)
    assert loaded[1][2:] == (None, 2, False) and loaded[1][1].size == 1
    assert len(calls[2][0]) == 4


def windows_of(count):
    tokens = np.arange(count * WINDOW + 1) % 50
    return Windows([Segment("t", tokens)], WINDOW, 50, "evaluation")


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("done", [0, 1, 3, 4, 5])
def test_tallies_go_on_from_any_window(calls, batch, done):
    """Every window once, whatever was counted before; the filling of the last batch never."""
    windows, total = windows_of(5), 5
    sums = [float((w[:-1] * 0.01 + w[1:] * 0.5).sum()) for w in windows]
    before = Tally(WINDOW, done, sum(sums[:done]))
    found = list(perplexity.tallies(Model(), windows, total, batch, before))
    ends = [min(end, total) for end in range(done + batch, total + batch, batch)]
    assert [tally.windows for tally in found] == ends
    for tally in found:
        assert tally.loss_sum == pytest.approx(sum(sums[: tally.windows]), rel=1e-6)
        assert tally.tokens == tally.windows * WINDOW


def test_a_loss_that_is_not_finite_is_named(calls, monkeypatch):
    def broken(model, inputs_BT, targets_BT):
        found = scores(model, inputs_BT, targets_BT)[0]
        found[-1, 2] = np.nan if len(calls) else found[-1, 2]
        calls.append(1)
        return found, None

    monkeypatch.setattr(perplexity, "token_scores", broken)
    with pytest.raises(ValueError, match="loss of windows 2 to 3 is not finite"):
        list(perplexity.tallies(Model(), windows_of(5), 5, 2, Tally(WINDOW)))
    # Only the rows that count: the last batch is filled up with a window again.
    calls.clear()
    (tally,) = perplexity.tallies(Model(), windows_of(5), 5, 2, Tally(WINDOW, 4, 1.0))
    assert tally.windows == 5


def test_perplexities_beyond_all_numbers_are_infinite():
    assert Tally(2, 1, 2 * 699.0).perplexity == pytest.approx(math.exp(699))
    assert Tally(2, 1, 2 * 700.0).perplexity == math.inf
    assert Tally(2, 3, 12.0).result() == dict(perplexity=math.exp(2), loss=2.0, tokens=6)


def interrupt(monkeypatch, after):
    """The evaluation ends, as if killed, when so many batches were scored."""
    count = []

    def stopping(*arguments):
        count.append(1)
        if len(count) > after:
            raise KeyboardInterrupt
        return scores(*arguments)

    monkeypatch.setattr(perplexity, "token_scores", stopping)


@pytest.mark.parametrize(("after", "again"), [(1, 5), (2, 4), (3, 2), (4, 2)])
def test_interrupted_after_any_batch_gives_the_same_bits(place, calls, monkeypatch, after, again):
    whole = run(place, output=None)
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            run(place)
    partial = place / ".out.json.partial"
    assert partial.exists() == (after > 1) and not (place / "out.json").exists()
    calls.clear()
    found = run(place)
    assert found == whole and not partial.exists()
    # Of five batches, the one on its way is scored again; a file's last one is not.
    assert len(calls) == again


def test_sums_are_saved_on_the_way(place, calls, monkeypatch):
    """By the clock, not only at the end: a killed process keeps them."""
    partial, seen = place / ".out.json.partial", []

    def looking(*arguments):
        seen.append(json.loads(partial.read_text())["tallies"] if partial.exists() else None)
        return scores(*arguments)

    monkeypatch.setattr(perplexity, "token_scores", looking)
    monkeypatch.setattr(perplexity, "_SECONDS_BETWEEN_SAVES", -1.0)
    run(place, "a.bin")
    counts = [None if sums is None else sums[str(place / "a.bin")]["windows"] for sums in seen]
    assert counts == [None, None, 3]
    seen.clear()
    monkeypatch.setattr(perplexity, "_SECONDS_BETWEEN_SAVES", 1e9)
    run(place, "a.bin", output=place / "other.json")
    assert seen == [None] * 3


def another_checkpoint(place):
    other = place / "other"
    with checkpoints.make_manager(other) as manager:
        model = checkpoints.describe(CONFIG, None)
        checkpoints.save(manager, 2, params={"a": np.full(3, 9, np.float32)}, model=model)
        manager.wait_until_finished()
    return dict(checkpoint=other)


def other_model(place):
    """In files of the same sizes, and so the sum of the changed one has as many digits."""
    step = place / "run" / "checkpoints" / "2"
    item, sums = step / "model" / "metadata", step / checksums.CHECKSUMS_FILE
    text, size = item.read_text(), sums.stat().st_size
    for first in "23456789":
        item.write_text(text.replace("10000.0", f"{first}0000.0"))
        checksums.seal(step)
        if sums.stat().st_size == size:
            return {}
    raise AssertionError("no sum has as many digits")


def other_tokens(place):
    tokens = np.array(token_file.read(place / "a.bin"))
    tokens[17] = (tokens[17] + 1) % 50
    token_file.write(place / "a.bin", tokens)
    return {}


def more_tokens(place):
    tokens = np.array(token_file.read(place / "a.bin"))
    token_file.write(place / "a.bin", np.append(tokens, tokens[-1]))
    return {}


OTHERS = {
    "checkpoint": (another_checkpoint, "checkpoint is "),
    "step": (lambda place: dict(step=1), "checkpoint is "),
    "model": (other_model, "checkpoint is "),
    "window": (lambda place: dict(window=5), "window is 4 there and 5 here"),
    "limit": (lambda place: dict(max_tokens=16), "max_tokens is 100000000 there and 16 here"),
    "dtype": (lambda place: dict(dtype="float16"), "param_dtype is float32 there and float16"),
    "products": (lambda place: dict(dtype="float32"), "dtype is bfloat16 there and float32"),
    "tokens": (other_tokens, "tokens is "),
    "length": (more_tokens, "tokens is "),
    "files": (lambda place: dict(files=("a.bin",)), "tokens is "),
}


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize("finished", [False, True])
def test_sums_of_anything_else_are_refused(place, calls, monkeypatch, change, finished):
    """Partial ones and the result: each field of what decides about them, and nothing is lost."""
    with monkeypatch.context() as patch:
        if not finished:
            interrupt(patch, 2)
        try:
            run(place)
        except KeyboardInterrupt:
            assert not finished
    kept = place / ("out.json" if finished else ".out.json.partial")
    before = kept.read_bytes()
    make, message = OTHERS[change]
    settings = make(place)
    calls.clear()
    with pytest.raises(ValueError, match="is of another evaluation: " + message) as caught:
        run(place, *settings.pop("files", ()), **settings)
    assert str(kept) in str(caught.value) and "give another --output" in str(caught.value)
    assert kept.read_bytes() == before and not calls
    # The same as at first goes on.
    if change in ("checkpoint", "step", "window", "limit", "dtype", "products", "files"):
        run(place)
        assert len(calls) == (0 if finished else 4)


def test_a_checkpoint_or_file_that_moved_is_the_same(place, calls, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(place)
    calls.clear()
    shutil.copytree(place / "run", place / "moved")
    shutil.rmtree(place / "run")
    run(place, checkpoint=place / "moved", batch=2)
    assert len(calls) == 2 + 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3}', "no JSON"])
def test_what_is_no_result_is_left_alone(place, calls, text):
    for name in ("out.json", ".out.json.partial"):
        (place / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is no result of an evaluation; delete it"):
            run(place)
        assert (place / name).read_text() == text and not calls
        (place / name).unlink()


def test_the_table_has_a_line_for_each_set_and_the_mean():
    row = dict(perplexity=12.34567, loss=2.513, tokens=1234567)
    text = table({"sets": {"long/name.bin": row, "b": row | {"tokens": 5}}, "mean_perplexity": 3.5})
    assert text.splitlines() == [
        "set              perplexity       loss         tokens",
        "long/name.bin       12.3457    2.51300      1,234,567",
        "b                   12.3457    2.51300              5",
        "mean                 3.5000",
    ]
