"""Answers that are kept on the way: by batch, of one model, and never another's."""

import json
import shutil
import sqlite3
import types

import numpy as np
import pytest
from flax import nnx

from mlra_jax import checkpoints
from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.decoder import Decoder
from mlra_jax.evaluate import scoring, tasks
from mlra_jax.evaluate.stored import Answers, checkpoint_identity
from mlra_jax.generation import Sampling
from mlra_jax.sharding import make_mesh
from tests import tiny
from tests.evaluate.test_tasks import asked  # noqa: F401

CONFIG = tiny.config("mlra_2", vocab_size=264, context_length=48)
REQUESTS = [([256, *b"abc"[: 1 + n % 3]], [*b"xyz"[n % 3 :], n]) for n in range(14)]
ME = {"checkpoint": "0f", "step": 3, "dtype": "float32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny model of bytes."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, seed=0)
    return folder


def save(folder, seed):
    model = tiny.random_model(CONFIG, make_mesh(), seed)
    params = nnx.to_pure_dict(nnx.state(model))
    with checkpoints.make_manager(folder) as manager:
        described = checkpoints.describe(CONFIG, "bytes")
        checkpoints.save(manager, 3, params=params, model=described)
        manager.wait_until_finished()


@pytest.fixture(scope="module")
def model():
    return Decoder.from_model(tiny.random_model(CONFIG, make_mesh()))


@pytest.fixture
def calls(monkeypatch):
    """The shapes that the model was asked to score; `stop_after` interrupts."""
    made, scores = types.SimpleNamespace(shapes=[], stop_after=None), scoring.token_scores

    def counted(model, inputs_BT, targets_BT):
        if made.stop_after is not None and len(made.shapes) >= made.stop_after:
            raise KeyboardInterrupt
        made.shapes.append(inputs_BT.shape)
        return scores(model, inputs_BT, targets_BT)

    monkeypatch.setattr(scoring, "token_scores", counted)
    return made


def test_scores_of_half_a_run_are_kept_and_not_computed_again(tmp_path, model, calls):
    go = lambda kept: scoring.loglikelihood(model, REQUESTS, batch=2, kept=kept)
    whole = go(None)
    assert len(calls.shapes) == 7
    calls.shapes.clear()
    calls.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        go(Answers(tmp_path / "a", ME))
    # The batch on its way when it was interrupted is lost, no other.
    assert count(tmp_path / "a_rank0.db") == 6
    calls.shapes.clear()
    calls.stop_after = None
    done = []
    found = scoring.loglikelihood(
        model, REQUESTS, batch=2, kept=Answers(tmp_path / "a", ME), progress=done.append
    )
    assert found == whole and len(calls.shapes) == 4 and sum(done) == len(REQUESTS)
    assert count(tmp_path / "a_rank0.db") == 14
    calls.shapes.clear()
    # Also one by one, in another order, and a request that is new.
    more = [*reversed(REQUESTS), ([256], [5])]
    kept = Answers(tmp_path / "a", ME)
    found = scoring.loglikelihood(model, more, batch=4, kept=kept)
    assert found[:-1] == whole[::-1] and len(calls.shapes) == 1


def count(path):
    with sqlite3.connect(path) as database:
        return database.execute("SELECT count(*) FROM unnamed").fetchone()[0]


def test_a_score_that_is_not_finite_is_no_answer(tmp_path, model, monkeypatch):
    scores = scoring.token_scores
    broken = lambda *a: (scores(*a)[0] * np.nan, scores(*a)[1])
    monkeypatch.setattr(scoring, "token_scores", broken)
    with pytest.raises(ValueError, match="score of request .* is not finite: the weights"):
        scoring.loglikelihood(model, REQUESTS[:2], kept=Answers(tmp_path / "a", ME))
    assert count(tmp_path / "a_rank0.db") == 0


def test_greedy_texts_are_kept_and_sampled_ones_are_not(tmp_path, model, monkeypatch):
    prompts, made, stream = [[*b"ab"], [*b"cde"], [*b"f"]], [], scoring.Stream

    def counted(model, prompts, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(prompts)
        return stream(model, prompts, **options)

    monkeypatch.setattr(scoring, "Stream", counted)
    text = ByteTokenizer()
    go = lambda kept, **options: scoring.generate_until(
        model, text, prompts, max_new_tokens=3, batch=1, kept=kept, **options
    )
    with pytest.raises(KeyboardInterrupt):
        go(Answers(tmp_path / "a", ME))
    assert made == [[[*b"cde"]], [[*b"ab"]]]
    made.clear()
    found = go(Answers(tmp_path / "a", ME))
    assert made == [[[*b"f"]]] and len(found) == 3
    made.clear()
    assert go(Answers(tmp_path / "a", ME)) == found and not made
    with pytest.raises(KeyboardInterrupt):
        go(Answers(tmp_path / "a", ME), until=("x",))
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        go(Answers(tmp_path / "a", ME), sampling=Sampling(1.0))
    assert count(tmp_path / "a_rank0.db") == 5


@pytest.mark.parametrize("name", ME)
def test_answers_of_anything_else_are_refused(tmp_path, name):
    kept = Answers(tmp_path / "a", ME)
    kept.update({((1,), (2,)): (-0.1, True)})
    before = (tmp_path / "a_rank0.db").read_bytes()
    message = f"a_rank0.db is of another model: {name} is {ME[name]} there and other here; delete"
    for other in (ME | {name: "other"}, {name: "other"}):
        with pytest.raises(ValueError, match=message) as error:
            Answers(tmp_path / "a", other)
        assert "--cache" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "a_rank0.db").read_bytes() == before
    assert Answers(tmp_path / "a", ME).get(((1,), (2,))) == [-0.1, True]


def test_what_is_no_database_of_answers_is_left_alone(tmp_path):
    path = tmp_path / "a_rank0.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        database.execute("INSERT INTO unnamed VALUES ('k', x'8004')")
    cut = path.read_bytes()[:5000]
    for content, message in (
        (path.read_bytes(), "does not say whose answers it has .*; delete it or give another"),
        (b"text " * 300, "no database of answers, or damaged .*; delete it or give another"),
        (cut, "delete it or give another"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            Answers(tmp_path / "a", ME)
        assert path.read_bytes() == content and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--cache=.*its folder does not exist"):
        Answers(tmp_path / "absent" / "a", ME)
    path.unlink()
    path.touch()
    assert Answers(tmp_path / "a", ME).get("x") is None


def test_a_checkpoint_is_known_by_its_bytes(run, tmp_path):
    first = checkpoint_identity(run / "checkpoints" / "3")
    shutil.copytree(run, tmp_path / "copy")
    folder = tmp_path / "copy" / "checkpoints" / "3"
    assert checkpoint_identity(folder) == first
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert checkpoint_identity(folder) != first
        path.write_bytes(data)
    assert checkpoint_identity(folder) == first


@pytest.fixture
def harness(asked):  # noqa: F811
    from mlra_jax.evaluate import harness

    return harness


def test_rolling_scores_are_kept_by_window(run, harness, calls, tmp_path):
    texts = ["ab" * 60, "c", "def" * 30]
    requests = [types.SimpleNamespace(args=(text,)) for text in texts]
    make = lambda **options: harness.HarnessModel(run, batch_size=1, **options)
    whole = make().loglikelihood_rolling(requests, disable_tqdm=True)
    windows = len(calls.shapes)
    assert windows == 3 + 1 + 2
    calls.shapes.clear()
    calls.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        make(cache=tmp_path / "a").loglikelihood_rolling(requests, disable_tqdm=True)
    assert count(tmp_path / "a_rank0.db") == 2
    calls.shapes.clear()
    calls.stop_after = None
    found = make(cache=tmp_path / "a").loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == whole and len(calls.shapes) == windows - 2


def test_each_thing_that_decides_about_an_answer_is_compared(run, harness, tmp_path):
    make = lambda folder=run, **options: harness.HarnessModel(
        folder, cache=tmp_path / "a", **options
    )
    make()
    save(tmp_path / "other", seed=1)
    model = run / "checkpoints" / "3" / "model" / "metadata"
    shutil.copytree(run, tmp_path / "moved")
    make(tmp_path / "moved")
    for options, name in (
        (dict(folder=tmp_path / "other"), "checkpoint"),
        (dict(dtype="bfloat16"), "param_dtype"),
        (dict(max_length=24), "max_length"),
    ):
        with pytest.raises(ValueError, match=f"is of another model: {name} is .* there and .* her"):
            make(**options)
    assert json.loads(model.read_text())["tokenizer"] == "bytes"


def test_the_command_keeps_answers_where_it_is_told(run, harness, tmp_path, monkeypatch, capsys):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "all_tasks", ["piqa"])
    flags = [f"--checkpoint={run}", "--tasks=piqa", f"--cache={tmp_path / 'c'}"]
    assert tasks.main(flags) == 0
    assert (tmp_path / "c_rank0.db").is_file()
    assert tasks.main([*flags, "--dtype=bfloat16"]) == 1
    error = capsys.readouterr().err
    assert "another model: param_dtype is float32 there and bfloat16 here" in error
    assert error.count("\n") == 1
