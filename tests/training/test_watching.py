"""What else is seen of a run: chosen steps, numbers by host, a curve, Weights & Biases."""

import io
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.config import ConfigError
from mlra_jax.training import hosts, tracing, watchers
from mlra_jax.training.metrics import MetricsWriter
from mlra_jax.training.tracing import Span, traced
from mlra_jax.training.watchers import Watching, check_wandb, watchers_of


def test_steps_to_trace_are_two_numbers_or_one():
    assert Span.of("20-22") == (20, 22) and Span.of("7") == (7, 7) and Span.of(None) is None
    for wrong in ("22-20", "0-3", "0", "a-b", "3-", "", "1-2-3", "-3"):
        with pytest.raises(ConfigError, match=f"^--profile_steps={wrong}: give steps from 1 on"):
            Span.of(wrong)


@pytest.fixture
def profiler(monkeypatch):
    """What the profiler is told, and between which calls."""
    told = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: told.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


@pytest.mark.parametrize(
    ("done", "calls", "wanted"),
    [
        (0, 6, [1, 2, "FOLDER", 3, 4, "stop", 5, 6]),
        (2, 3, ["FOLDER", 3, 4, "stop", 5]),
        # It ended in between; it went on behind the first.
        (0, 3, [1, 2, "FOLDER", 3, "stop"]),
        (3, 2, [4, 5]),
        (0, 0, []),
    ],
)
def test_just_these_steps_are_traced(profiler, tmp_path, done, calls, wanted):
    lines, step = [], done

    def compute(add):
        nonlocal step
        step += add
        profiler.append(step)
        return jnp.int32(step)

    with traced(compute, done, Span(3, 4), tmp_path, lines.append) as run:
        assert [int(run(1)) for _ in range(calls)] == list(range(done + 1, done + calls + 1))
    assert profiler == [str(tmp_path / "profile") if x == "FOLDER" else x for x in wanted]
    if done == 3:
        assert lines == ["step 3 is done already: nothing is traced"]
    elif not calls:
        assert lines == ["step 3 was not reached: nothing is traced"]
    elif "stop" in wanted:
        assert len(lines) == 1 and lines[0].startswith(f"steps 3 to {min(4, calls + done)}: ")
    with traced(compute, 0, None, tmp_path, lines.append) as run:
        assert run is compute


def test_each_process_traces_into_a_folder_of_its_own(profiler, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with traced(lambda: 1, 0, Span(1, 1), tmp_path, print) as run:
        run()
    assert profiler == [str(tmp_path / "profile" / "process_3"), "stop"]


def test_a_trace_is_left_in_the_workdir(tmp_path):
    with traced(jax.jit(jnp.sin), 0, Span(2, 2), tmp_path, lambda line: None) as run:
        run(1.0)
        assert not (tmp_path / tracing.FOLDER).exists()
        run(2.0)
    (trace,) = tmp_path.rglob("profile/**/perfetto_trace.json.gz")
    assert trace.stat().st_size > 100


def test_numbers_of_all_hosts_are_told_apart(monkeypatch):
    assert hosts.by_host(0.5) == {"step_seconds": 0.5}
    devices = [
        SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak * 2**30})
        for peak in (3, 5)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert hosts.by_host(0.5) == {"step_seconds": 0.5, "memory_gib": 5.0}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        hosts.multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine + 1])
    )
    assert hosts.by_host(0.5) == {
        **{"step_seconds/0": 0.5, "memory_gib/0": 5.0},
        **{"step_seconds/1": 1.5, "memory_gib/1": 6.0},
    }


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_terminal_gets_a_curve_after_each_validation(tmp_path, monkeypatch):
    lines = []
    start = lambda: watchers_of(Watching(), tmp_path, {}, 0, lines.append)
    assert not start(), "no terminal, no curve"
    monkeypatch.setattr(sys, "stdout", Terminal())
    writer = MetricsWriter(tmp_path, 0)
    for watcher in start():
        writer.tell(watcher)
    writer.write(1, {"loss": 3.0})
    writer.write(2, {"validation_loss": 2.5})
    assert not lines, "a point is no curve"
    writer.write(3, {"loss": 2.0})
    writer.write(4, {"validation_loss": 1.5})
    (curve,) = lines
    assert "training" in curve and "validation" in curve and "3.0" in curve and "1.5" in curve
    writer.close()
    # A run that goes on draws what was before, too.
    (again,) = start()
    again.write(6, {"validation_loss": 1.25})
    assert "3.0" in lines[1] and "1.2" in lines[1]
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    assert not start(), "it has no characters for it"


def test_the_package_of_weights_and_biases_is_asked_for_first(monkeypatch):
    check_wandb("")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install 'wandb>=0.22,<1'$"):
        check_wandb("mine")


def test_weights_and_biases_are_told_all_numbers_and_go_on(tmp_path, monkeypatch):
    """With a stand-in for the package."""
    told, given = [], []

    class Run(SimpleNamespace):
        def log(self, values):
            told.append(values)

        def define_metric(self, *_, **__):
            pass

        def finish(self):
            told.append("finish")

    def init(**settings):
        given.append(settings)
        return Run(id=settings["id"] or "new")

    stand_in = SimpleNamespace(init=init, errors=SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for step in (0, 5):
        (watcher,) = watchers_of(Watching(wandb="mine"), tmp_path, {"seed": 1}, step, print)
        watcher.write(step + 1, {"loss": 2.0})
        watcher.close()
    assert told == [
        {"train_step": 1, "loss": 2.0},
        "finish",
        {"train_step": 6, "loss": 2.0},
        "finish",
    ]
    assert [(one["id"], one["resume"]) for one in given] == [(None, None), ("new", "allow")]
    assert given[0]["config"] == {"seed": 1} and given[0]["project"] == "mine"

    def refuse(**_):
        raise RuntimeError("no\nkey")

    monkeypatch.setattr(stand_in, "init", refuse)
    with pytest.raises(ConfigError, match="^--wandb=mine: no key; WANDB_MODE=offline needs no"):
        watchers_of(Watching(wandb="mine"), tmp_path, {}, 0, print)


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    watcher = watchers.WandB("mine", tmp_path, {"seed": 1}, 0)
    watcher.write(1, {"loss": 2.0})
    watcher.close()
    (run,) = tmp_path.glob("wandb/offline-run-*")
    (kept,) = run.glob("*.wandb")
    assert kept.stat().st_size > 0
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] in run.name
