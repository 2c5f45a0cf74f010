"""The loop in this process: every line and number of a run, how it stops and how it goes on.

A clock that the test moves: 1 s a step, 2 s a batch, 50 s a validation, 7 s a save.
"""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax import checkpoints, checksums, costs, sharding
from mlra_jax import model as models
from mlra_jax.config import ConfigError
from mlra_jax.costs import flops_per_token
from mlra_jax.data import token_file, tokenizers
from mlra_jax.data.inputs import open_input
from mlra_jax.data.pipeline import make_train_iterator
from mlra_jax.data.prepare import prepare
from mlra_jax.data.sources import load_source
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.storage.paths import BucketError
from mlra_jax.training import feed, loop, progress, saver
from mlra_jax.training.metrics import read_metrics
from mlra_jax.training.saver import Best
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings
from mlra_jax.training.state import create_state
from mlra_jax.training.step import make_train_step, make_validation_step
from tests.tiny import write_ranks
from tests.training import tiny
from tests.training.states import fresh_state
from tests.training.test_optimizer import rate

LENGTH, WINDOWS, PEAK = 12, 10, 1e9
TOKENS = 8 * LENGTH


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(800)))
    return dataclasses.replace(
        tiny.experiment(),
        # Validation: 10 windows in batches of 4, the last half empty.
        data=DataSettings(
            source=str(text),
            tokenizer="bytes",
            global_batch=8,
            accumulate=2,
            validation_tokens=WINDOWS * LENGTH + 5,
        ),
        mesh=MeshSettings(data=2),
        optimizer=OptimizerSettings(peak_learning_rate=1e-2, warmup_steps=3),
        steps=10,
        seed=5,
        log_every=3,
        validate_every=4,
        save_every=5,
    )


class Steps:
    """The two compiled steps, made once for all runs of this file."""

    def __init__(self):
        self.made = {}

    def _once(self, kind, experiment, make):
        data, of = experiment.data, (experiment.model, experiment.optimizer, experiment.steps)
        key = (kind, data.global_batch, data.accumulate, *of)
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def train(self, experiment, mesh):
        step = self._once("train", experiment, lambda: make_train_step(experiment, mesh))

        def lower(*arguments):
            make = lambda: step.lower(*arguments).compile()
            compiled = self._once("compiled", experiment, make)
            return SimpleNamespace(compile=lambda compiler_options=None: compiled)

        return SimpleNamespace(lower=lower)

    def validation(self, experiment, mesh):
        return self._once("validation", experiment, lambda: make_validation_step(experiment, mesh))


@pytest.fixture(scope="module")
def steps():
    return Steps()


class Lab:
    """Runs `train` under the clock; `spoil(step, metrics)` may change what a step reports."""

    def __init__(self, monkeypatch, steps):
        self.now, self.lines, self.spoil, self.seen = 0.0, [], lambda step, values: values, []
        clock = SimpleNamespace(monotonic=lambda: self.now, time=lambda: 1e9 + self.now)
        for module in (loop, progress, saver):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setitem(costs.PEAK_FLOPS, "cpu", PEAK)
        batches, validation = feed.make_train_iterator, feed.make_validation_batches
        save = checkpoints.save

        def timed_step(experiment, mesh):
            made = steps.train(experiment, mesh)

            def lower(*arguments):
                compiled = made.lower(*arguments).compile()

                def compute(state, batch):
                    self.now += 1
                    state, values = compiled(state, batch)
                    return state, self.spoil(int(state.step), values)

                return SimpleNamespace(compile=lambda compiler_options=None: compute)

            return SimpleNamespace(lower=lower)

        class Batches:
            def __init__(inner, *arguments, **options):
                inner.iterator = batches(*arguments, **options)
                inner.get_state, inner.set_state, inner.close = (
                    inner.iterator.get_state,
                    inner.iterator.set_state,
                    inner.iterator.close,
                )

            def __next__(inner):
                self.now += 2
                return next(inner.iterator)

        class Validation:
            def __init__(inner, *arguments, **options):
                assert options["global_batch"] == 4, "validation takes as many rows as a part"
                inner.batches = validation(*arguments, **options)

            def __iter__(inner):
                self.now += 50
                return iter(inner.batches)

        def timed_save(*arguments, **options):
            save(*arguments, **options)
            self.now += 7

        monkeypatch.setattr(loop, "create_state", fresh_state)
        monkeypatch.setattr(loop, "make_train_step", timed_step)
        monkeypatch.setattr(loop, "make_validation_step", steps.validation)
        monkeypatch.setattr(feed, "make_train_iterator", Batches)
        monkeypatch.setattr(feed, "make_validation_batches", Validation)
        monkeypatch.setattr(checkpoints, "save", timed_save)

    def train(self, experiment, workdir, when=None, act=None):
        """The lines said; `act` is called when a line begins with `when`."""
        self.lines, self.now = [], 0.0

        def say(line):
            self.lines.append(line)
            if when and line.startswith(when):
                act()

        self.ended = loop.train(experiment, workdir, say)
        return self.lines


@pytest.fixture
def lab(monkeypatch, steps):
    return Lab(monkeypatch, steps)


@pytest.fixture(scope="module")
def undisturbed(experiment, steps, tmp_path_factory):
    """(workdir, lines) of a run from the first to the last step."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return workdir, Lab(monkeypatch, steps).train(experiment, workdir)


@pytest.fixture(scope="module")
def by_hand(experiment, steps, undisturbed):
    """Each step's metrics and weights from a plain loop over the same batches."""
    mesh = sharding.make_mesh(data=2)
    source = load_source(experiment.data.source, tokenizer=get_tokenizer("bytes"), vocab_size=260)
    batches = make_train_iterator(
        source, tokenizer=None, vocab_size=260, context_length=LENGTH, global_batch=8, seed=5
    )
    where = sharding.named(mesh, "batch", "length")
    state, history = create_state(experiment, mesh), {}
    for step in range(1, experiment.steps + 1):
        batch = jax.device_put(next(batches), where)
        state, values = steps.train(experiment, mesh).lower(state, batch).compile()(state, batch)
        history[step] = jax.device_get((values, state.params))
    return history


def lines_of(workdir, name):
    return {line["step"]: line for line in read_metrics(workdir) if name in line}


def test_what_is_logged_is_what_happened(experiment, undisturbed, by_hand):
    workdir, _ = undisturbed
    logged = lines_of(workdir, "loss")
    assert list(logged) == [3, 6, 9, 10]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(by_hand[1][1]))
    flops = flops_per_token(experiment.model, parameters)
    # Steps since the last pause, over their seconds: neither validation nor saving is counted.
    rates = {3: 3 * TOKENS / 7, 6: TOKENS / 1, 9: TOKENS / 1, 10: TOKENS / 1}
    seconds = {3: 7, 6: 73, 9: 132, 10: 135}
    useful = {3: 7, 6: 10, 9: 15, 10: 16}
    waits = {3: (4, 0), 6: (6, 7), 9: (6, 0), 10: (2, 0)}
    for step, line in logged.items():
        expected = {name: float(value) for name, value in by_hand[step][0].items()}
        assert {name: line[name] for name in expected} == expected
        want = rate(experiment.optimizer, experiment.steps, step - 1)
        np.testing.assert_allclose(line["learning_rate"], want, rtol=1e-6)
        assert line["tokens"] == step * TOKENS
        assert line["tokens_per_second"] == pytest.approx(rates[step])
        assert line["model_flops_utilization"] == pytest.approx(rates[step] * flops / PEAK / 2)
        assert line["seconds"] == seconds[step]
        assert (line["input_seconds"], line["save_seconds"]) == waits[step]
        # The first batch was waited for before the first step.
        assert line["goodput"] == useful[step] / (seconds[step] + 2)
        assert line["skipped_steps"] == 0
        assert line["step_seconds"] == pytest.approx(TOKENS / rates[step], rel=1e-6)
    assert set(line) == expected.keys() | {
        "step",
        "tokens",
        "tokens_per_second",
        "model_flops_utilization",
        "input_seconds",
        "save_seconds",
        "seconds",
        "goodput",
        "skipped_steps",
        "step_seconds",
    }


def test_validation_is_a_mean_over_tokens_of_the_held_out_windows(experiment, undisturbed, by_hand):
    workdir, _ = undisturbed
    validated = lines_of(workdir, "validation_loss")
    assert list(validated) == [4, 8, 10]
    tokens = [256, *Path(experiment.data.source).read_bytes()]
    tail = np.array(tokens[-(len(tokens) // 20) :])
    windows = np.stack([tail[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(WINDOWS)])
    definition, _ = models.structure(experiment.model, sharding.make_mesh())
    for step, line in validated.items():
        logits = nnx.merge(definition, by_hand[step][1])(windows[:, :-1])
        chances = np.asarray(jax.nn.log_softmax(logits), np.float64)
        losses = -np.take_along_axis(chances, windows[:, 1:, None], -1)
        assert line["validation_loss"] == pytest.approx(losses.mean(), rel=1e-5)
        assert line["validation_tokens"] == WINDOWS * LENGTH


def test_the_lines_on_the_terminal(experiment, undisturbed, by_hand):
    workdir, lines = undisturbed
    parameters = sum(leaf.size for leaf in jax.tree.leaves(by_hand[1][1]))
    logged, validated = lines_of(workdir, "loss"), lines_of(workdir, "validation_loss")

    def log(step, speed, left):
        line = logged[step]
        share = f"{line['model_flops_utilization']:.1%}"
        return (
            f"step {step}/10  loss {line['loss']:.4f}  {speed} tokens/s  MFU {share}  {left} left"
        )

    def check(step):
        return f"step {step}/10  validation loss {validated[step]['validation_loss']:.4f}"

    file = experiment.data.source
    tokens = 1 + Path(file).stat().st_size
    held_out, most = tokens // 20, experiment.data.validation_tokens
    assert lines == [
        f"training on {tokens - held_out:,} tokens: {file}",
        f"validating on {most:,} of {held_out:,} tokens: "
        f"{file} from token {tokens - held_out:,} on",
        f"{parameters:,} parameters on data 2 (cpu), 96 tokens a step, compiled in 0 s",
        log(3, 41, "0:16"),
        check(4),
        log(6, 96, "0:49"),
        check(8),
        log(9, 96, "0:15"),
        log(10, 96, "0:00"),
        check(10),
        f"loss curve: {workdir}/loss_curve.png",
    ]


def test_what_is_saved(experiment, undisturbed, by_hand):
    workdir, _ = undisturbed
    assert checkpoints.finished_steps(workdir) == [5, 10]
    stored = json.loads((workdir / "experiment.json").read_text())
    assert Experiment.from_dict(stored) == experiment
    shapes = whole_params(experiment)
    for step, seconds in ((5, 63), (10, 185)):
        found = checkpoints.open_checkpoint(workdir, step)
        assert (found.model, found.tokenizer) == (experiment.model, "bytes")
        assert found.read_json("progress") == {
            "step": step,
            "seconds": seconds,
            "useful_seconds": {5: 9, 10: 16}[step],
            "skipped_steps": 0,
            "began": 1e9,
        }
        # The batches that were used, not those that were read ahead.
        assert found.read_json("iterator")["next_batch"] == step
        got = found.restore("params", shapes)
        jax.tree.map(np.testing.assert_array_equal, got, by_hand[step][1])


def whole_params(experiment):
    """The parameters' shapes, on one device."""
    mesh = sharding.make_mesh()
    _, shapes = models.structure(experiment.model, mesh)
    where = sharding.named(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)


def without_times(workdir):
    times = ("seconds", "input_seconds", "save_seconds", "tokens_per_second", "goodput")
    times += ("model_flops_utilization",)
    return [{k: v for k, v in line.items() if k not in times} for line in read_metrics(workdir)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    experiment, lab, undisturbed, tmp_path, number
):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stop = lambda: os.kill(os.getpid(), number)
    lines = lab.train(experiment, tmp_path, when="step 3/", act=stop)
    assert "stopped and saved at step 4; the same command resumes" in lines and not lab.ended
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert checkpoints.finished_steps(tmp_path) == [4]
    assert checkpoints.open_checkpoint(tmp_path).read_json("progress")["seconds"] == 60
    assert [line["step"] for line in read_metrics(tmp_path)] == [3, 4]
    lines = lab.train(experiment, tmp_path)
    assert lines[0] == f"resuming {tmp_path} from step 4" and lab.ended
    # The time left is judged by the steps of this start: two in 11 s, four to go.
    assert next(line for line in lines if line.startswith("step 6/")).endswith("  0:22 left")
    assert without_times(tmp_path) == without_times(undisturbed[0])
    assert lines_of(tmp_path, "loss")[6]["seconds"] == 60 + 11
    assert checkpoints.finished_steps(tmp_path) == [5, 10]
    assert checkpoints.open_checkpoint(tmp_path).read_json("progress")["seconds"] > 60 + 70


@pytest.mark.parametrize("damaged", [b"\0" * 7, b'{"step": 3, "lo', b"<html>"])
def test_a_run_goes_on_over_a_damaged_line_of_its_metrics(experiment, lab, tmp_path, damaged):
    short = dataclasses.replace(experiment, steps=4, log_every=1)
    lab.train(short, tmp_path)
    before, path = without_times(tmp_path), tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damaged, *lines[1:]]))
    said = lab.train(dataclasses.replace(short, steps=5), tmp_path)
    assert f"{path}, line 2: damaged; set aside in metrics.jsonl.damaged" in said
    after = without_times(tmp_path)
    assert after[: len(before)] == before and after[-1]["step"] == 5


def test_a_run_goes_on_with_and_without_a_loop_over_blocks(experiment, lab, tmp_path):
    def run(folder, unroll, **how):
        model = dataclasses.replace(experiment.model, num_layers=2, unroll=unroll)
        short = dataclasses.replace(experiment, model=model, steps=7, log_every=1, save_every=2)
        lab.train(short, tmp_path / folder, **how)

    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    run("changing", 1, when="step 1/", act=stop)
    run("changing", 2, when="step 5/", act=stop)
    run("changing", 1)
    run("loop", 1)
    got, want = (lines_of(tmp_path / folder, "loss") for folder in ("changing", "loop"))
    assert list(got) == list(want) == [1, 2, 3, 4, 5, 6, 7]
    losses = lambda lines: [line["loss"] for line in lines.values()]
    np.testing.assert_allclose(losses(got), losses(want), rtol=1e-5)


def test_the_best_weights_are_kept_and_the_first_are_validated_where_asked(
    experiment, lab, tmp_path, undisturbed, by_hand, monkeypatch
):
    asked = dataclasses.replace(
        experiment, validate_every=2, save_every=7, validate_first=True, keep_best=True
    )
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    losses, measured = iter([9.0, 5.0, 3.0, 4.0, 3.0, 3.5]), loop.mean_loss
    monkeypatch.setattr(loop, "mean_loss", lambda *given: (next(losses), measured(*given)[1]))
    lab.train(asked, tmp_path, when="step 6/10  loss", act=stop)
    assert list(lines_of(tmp_path, "validation_loss")) == [0, 2, 4, 6]
    lab.train(asked, tmp_path)
    assert list(lines_of(tmp_path, "validation_loss")) == [0, 2, 4, 6, 8, 10]
    assert checkpoints.finished_steps(tmp_path / "best") == [4]
    found = checkpoints.open_checkpoint(tmp_path / "best")
    assert found.model == experiment.model and not found.has("optimizer")
    assert found.read_json("progress") == {"step": 4, "validation_loss": 3.0}
    got = found.restore("params", whole_params(experiment))
    jax.tree.map(np.testing.assert_array_equal, got, by_hand[4][1])
    # Losses do not depend on it.
    pick = lambda folder: [line["loss"] for line in lines_of(folder, "loss").values()]
    assert pick(tmp_path) == pick(undisturbed[0])


def test_a_run_keeps_the_ranks_of_its_tokenizer(experiment, lab, tmp_path, monkeypatch):
    ranks, workdir = tmp_path / "ranks", tmp_path / "run"
    write_ranks(ranks)
    data = dataclasses.replace(experiment.data, tokenizer=str(ranks))
    asked = dict(steps=4, validate_every=2, keep_best=True)
    lab.train(dataclasses.replace(experiment, data=data, **asked), workdir)
    ranks.unlink()
    for folder in (workdir, workdir / "best"):
        monkeypatch.setattr(tokenizers, "_met", {})
        name = checkpoints.open_checkpoint(folder).tokenizer
        assert get_tokenizer(name).encode("word") == [255 - byte for byte in b"word"]


def test_better_weights_of_an_earlier_step_replace_those_of_a_killed_run(experiment, tmp_path):
    description = checkpoints.describe(experiment.model, "bytes")
    for step, loss in ((8, 3.0), (6, 2.0)):
        with Best(tmp_path, description) as best:
            assert best.beaten_by(loss) and not best.beaten_by(math.nan)
            best.save(step, {"w": np.full(3, loss)}, loss)
            assert not best.beaten_by(loss)
    assert checkpoints.finished_steps(tmp_path / "best") == [6]


def test_a_signal_at_the_last_step_is_no_stop(experiment, lab, tmp_path):
    short = dataclasses.replace(experiment, steps=4, log_every=1)
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    lines = lab.train(short, tmp_path, when="step 3/", act=stop)
    assert not any("stopped" in line for line in lines)
    assert checkpoints.finished_steps(tmp_path) == [4]


def test_a_second_signal_ends_the_run_at_once(experiment, lab, tmp_path, heeds_ctrl_c):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        lab.train(experiment, tmp_path, when="step 3/", act=twice)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints.finished_steps(tmp_path) == []


def test_a_finished_run_says_so_and_goes_on_when_it_is_given_more_steps(experiment, lab, tmp_path):
    short = dataclasses.replace(experiment, steps=4, keep=1)
    lab.train(short, tmp_path)
    before = read_metrics(tmp_path)
    lines = lab.train(short, tmp_path)
    assert lines == [
        f"resuming {tmp_path} from step 4",
        f"{tmp_path} is already at step 4 of 4",
        f"loss curve: {tmp_path}/loss_curve.png",
    ]
    assert read_metrics(tmp_path) == before
    lab.train(dataclasses.replace(short, steps=10), tmp_path)
    assert checkpoints.finished_steps(tmp_path) == [10]
    assert read_metrics(tmp_path)[: len(before)] == before
    assert json.loads((tmp_path / "experiment.json").read_text())["steps"] == 10


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "learning_rate"])
def test_what_is_not_finite_ends_the_run_before_it_is_written(experiment, lab, tmp_path, name):
    lab.spoil = lambda step, values: values | ({name: math.inf} if step == 3 else {})
    experiment = dataclasses.replace(experiment, skip_budget=0)
    words = name.replace("_", " ")
    with pytest.raises(progress.TrainingError) as error:
        lab.train(experiment, tmp_path)
    assert str(error.value) == (
        f"{words} is inf at step 3; last good checkpoint: none was saved before"
    )
    assert read_metrics(tmp_path) == [] and checkpoints.finished_steps(tmp_path) == []


def test_a_step_without_finite_gradients_is_skipped_counted_and_logged(experiment, lab, tmp_path):
    """Up to the budget, also over a restart; the checkpoint of such a step waits for the next."""
    bad = {2: {"gradient_norm": math.inf}, 5: {"loss": math.nan}, 9: {"loss": math.nan}}
    lab.spoil = lambda step, values: values | bad.get(step, {})
    budget = dataclasses.replace(experiment, skip_budget=2, keep=9, log_every=1)
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    lines = lab.train(budget, tmp_path, when="step 6/", act=stop)
    assert "step 2/10  skipped: gradient norm is inf (batch 1), 1 of at most 2" in lines
    assert "step 5/10  skipped: loss is nan (batch 4), 2 of at most 2" in lines
    assert any(line.startswith("step 5/10  loss nan") for line in lines)
    assert checkpoints.finished_steps(tmp_path) == [6, 7]
    counts = [line["skipped_steps"] for line in lines_of(tmp_path, "learning_rate").values()]
    assert counts == [0, 1, 1, 1, 2, 2, 2]
    assert {step: x["batch"] for step, x in lines_of(tmp_path, "batch").items()} == {2: 1, 5: 4}
    assert all(math.isfinite(value) for line in read_metrics(tmp_path) for value in line.values())
    with pytest.raises(progress.TrainingError) as error:
        lab.train(budget, tmp_path)
    assert str(error.value) == (
        "loss is nan at step 9, the last of 3 such steps (skip_budget=2); "
        f"last good checkpoint: {tmp_path}/checkpoints/7"
    )


def test_a_checkpoint_is_due_by_minutes_too(experiment, lab, tmp_path):
    """With the first line of metrics a quarter of a minute after the last save, by the clock."""
    changes = dict(save_minutes=0.25, save_every=7, validate_every=100, log_every=2, keep=9)
    lab.train(dataclasses.replace(experiment, **changes), tmp_path)
    # A step takes 3 s and a save 7: 17 s at step 6, then the save of step 7, then the last.
    assert checkpoints.finished_steps(tmp_path) == [6, 7, 10]


def test_multiples_stay(experiment, lab, tmp_path):
    """Whether or not a checkpoint was due there anyway."""
    lab.train(dataclasses.replace(experiment, save_every=3, keep_every=4, keep=1), tmp_path)
    assert checkpoints.finished_steps(tmp_path) == [4, 8, 10]


def test_the_last_good_checkpoint_is_named_also_after_resuming(experiment, lab, tmp_path):
    lab.spoil = lambda step, values: values | ({"loss": math.nan} if step == 8 else {})
    experiment = dataclasses.replace(experiment, skip_budget=0)
    for _ in range(2):
        with pytest.raises(progress.TrainingError) as error:
            lab.train(experiment, tmp_path)
        # Step 8 is not logged, but validated.
        assert str(error.value) == (
            f"loss is nan at step 8; last good checkpoint: {tmp_path}/checkpoints/5"
        )
        assert checkpoints.finished_steps(tmp_path) == [5]
        assert [line["step"] for line in read_metrics(tmp_path)] == [3, 4, 6]


@pytest.mark.parametrize("platform, waits", [("cpu", "1 1 2 2 3 3"), ("gpu", "1 2 1 3 2")])
def test_devices_have_the_next_step_before_one_is_waited_for(
    experiment, monkeypatch, platform, waits
):
    """But on CPUs, whose devices share their threads."""
    order, mesh = [], sharding.make_mesh(data=2)

    def compute(state, batch):
        order.append(batch)
        return state, {"loss": batch}

    def wait(found):
        order.extend([found["loss"]] if isinstance(found, dict) and found else [])
        order.extend([found[1]["loss"]] if isinstance(found, tuple) else [])
        return found

    monkeypatch.setattr(loop, "compile_step", lambda *_: compute)
    monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    begin = loop._compiled(experiment, mesh, SimpleNamespace(params={}), None, lambda line: None)
    for batch in (1, 2, 3):
        begin(None, batch)
    assert " ".join(map(str, order)) == waits


@pytest.mark.parametrize("folder, save_every", [("checkpoints", 3), ("best/checkpoints", 4)])
def test_a_failed_save_ends_the_run_at_its_next_step(
    folder, save_every, experiment, lab, tmp_path, monkeypatch
):
    """Not when the next save is due; and the one before it stays, though only one is kept."""
    seal, failed, steps = checksums.seal, threading.Event(), []

    def full(step):
        if step.name.startswith("6"):
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(step)

    def spoil(step, values):
        steps.append(step)
        if step == 7:
            assert failed.wait(60)
            time.sleep(0.2)
        return values

    monkeypatch.setattr(checksums, "seal", full)
    lab.spoil = spoil
    every = dict(save_every=save_every, validate_every=6, log_every=100)
    short = dataclasses.replace(experiment, keep=1, keep_best=save_every == 4, **every)
    with pytest.raises(progress.TrainingError) as error:
        lab.train(short, tmp_path)
    assert steps[-1] == 7
    good = f"last good checkpoint: {tmp_path}/checkpoints/{save_every}"
    assert str(error.value) == f"checkpoint {tmp_path}/{folder}/6: the disk is full; {good}"
    assert checkpoints.finished_steps(tmp_path) == [save_every]
    assert checkpoints.finished_steps(tmp_path / "best") == []


def test_nothing_is_written_before_the_settings_are_found_good(experiment, tmp_path, monkeypatch):
    def refused(match, error=ConfigError, workdir=tmp_path / "run", **changes):
        with pytest.raises(error, match=match):
            loop.train(dataclasses.replace(experiment, **changes), workdir)
        assert not (tmp_path / "run").exists()

    (tmp_path / "file").write_text("")
    refused("^hdfs://node/run is an address", BucketError, workdir="hdfs://node/run")
    refused("file is a file; name a folder", workdir=tmp_path / "file")
    refused("needs 9 devices and there are 8", mesh=MeshSettings(tensor=9))
    source = dataclasses.replace(experiment.data, source="/no/such")
    refused("/no/such is neither a file", FileNotFoundError, data=source)
    source = dataclasses.replace(experiment.data, validation="/no/such")
    refused("/no/such is neither a file", FileNotFoundError, data=source)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    refused("the mesh has 2 devices and the 2 processes have 8; .* must use all")


def test_token_files_need_no_tokenizer_and_text_does(experiment, tmp_path, monkeypatch):
    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", fail)
    gpt2 = dataclasses.replace(experiment.data, tokenizer="gpt2")
    with pytest.raises(ConnectionError, match="tokenizer gpt2 is not on this host"):
        feed.load_data(gpt2, 260)
    token_file.write(tmp_path / "a.bin", np.arange(200))
    shard = dataclasses.replace(
        gpt2, source=str(tmp_path / "a.bin"), validation_fraction=0.25, validation=""
    )
    name, source = feed.load_data(shard, 260)
    assert name == "gpt2"
    assert source.train[0].tokens.tolist() == list(range(150))
    assert source.validation[0].tokens.tolist() == list(range(150, 200))
    # Another fault of the file is told as itself.
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="a.bin is no token file"):
        feed.load_data(shard, 260)
    named = dataclasses.replace(experiment.data, validation=experiment.data.source)
    name, source = feed.load_data(named, 260)
    assert name == "bytes" and len(source.train[0].tokens) == len(source.validation[0].tokens)


def test_the_tokenizer_is_that_of_prepared_token_files_or_refused(tmp_path, monkeypatch):
    text, ranks = tmp_path / "text.txt", tmp_path / "ranks"
    text.write_text("so many words " * 20)
    write_ranks(ranks)
    made = {}
    for name in ("bytes", str(ranks)):
        tokenizer, folder = get_tokenizer(name), tmp_path / Path(name).name[:3]
        source = open_input(str(text))
        made[name] = str(prepare(source, folder, tokenizer=tokenizer, name="x")[0])
    of_bytes, of_ranks = made.values()
    load = lambda source, tokenizer="", **more: feed.load_data(
        DataSettings(source=source, tokenizer=tokenizer, **more), 264
    )
    name, source = load(of_bytes)
    assert name == "bytes" and source.notes[0].startswith("tokenizer bytes, with which the token f")
    assert load(of_bytes, "bytes")[1].notes == ()
    # Text beside them is read as they were.
    name, source = load(of_bytes, validation=str(text))
    assert name == "bytes" and source.validation[0].tokens[:3].tolist() == [256, ord("s"), ord("o")]
    # Ranks are not needed for what is tokens already, neither by name nor without.
    hashed = get_tokenizer(ranks).name
    assert load(of_ranks)[0] == load(of_ranks, hashed)[0] == load(of_ranks, str(ranks))[0] == hashed
    for tokenizer in (str(ranks), ""):
        named = load(of_ranks, tokenizer, validation=str(text))[1].validation[0].tokens
        assert named[1] == 255 - ord("s")
    # What `prepare` kept of them is enough, and without it there is no way to the text.
    monkeypatch.setattr(tokenizers, "_met", {})
    assert load(of_ranks, validation=str(text))[1].validation[0].tokens[1] == 255 - ord("s")
    Path(of_ranks).with_name("x_tokenizer.tiktoken").unlink()
    with pytest.raises(FileNotFoundError, match="in training --config.data.tokenizer=FILE"):
        load(of_ranks, validation=str(text))
    remedy = "--config.data.tokenizer= takes the files' own"
    for refused, tokenizer, message in (
        (of_bytes, str(ranks), f"{of_bytes} was prepared with tokenizer bytes, and data.tokenizer"),
        (of_ranks, "bytes", f"{of_ranks} was prepared with tokenizer {hashed}, and data.tokenizer"),
        (f"{of_bytes},{of_ranks}", "", f"{hashed}, and that of {of_bytes} is bytes"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load(refused, tokenizer)
        assert not tokenizer or str(caught.value).endswith(remedy)

    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(ValueError, match="prepared with tokenizer bytes, and data.tokenizer is gp"):
        load(of_bytes, "gpt2")


def share(parts, rows, process):
    """`batch_share` where `parts` has for each device its process and the rows it holds."""
    named = SimpleNamespace(
        devices_indices_map=lambda shape: {
            _Device(i, owner): (slice(start, stop),) for i, (owner, start, stop) in enumerate(parts)
        }
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sharding, "named", lambda mesh, *axes: named)
        return feed.batch_share(None, rows, process)


@dataclasses.dataclass(frozen=True)
class _Device:
    id: int
    process_index: int


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.randoms())
@settings(max_examples=40, deadline=None)
def test_processes_together_feed_each_row_once(groups, twins, devices, size, random):
    """`groups` of processes hold different rows, the `twins` of a group the same."""
    owners = list(range(groups * twins))
    random.shuffle(owners)
    rows, parts = groups * devices * size, []
    for place, owner in enumerate(owners):
        for device in range(devices):
            start = ((place % groups) * devices + device) * size
            parts.append((owner, start, start + size))
    random.shuffle(parts)
    for place, owner in enumerate(owners):
        assert share(parts, rows, owner) == (place % groups, groups)


def test_processes_whose_rows_overlap_in_part_feed_everything():
    parts = [(0, 0, 2), (0, 2, 4), (1, 2, 4), (1, 4, 6)]
    assert share(parts, 6, 0) == share(parts, 6, 1) == (0, 1)
    uneven = [(0, 0, 4), (1, 4, 6)]
    assert share(uneven, 6, 1) == (0, 1)
