"""A run's progress, with a clock that the test moves: speed, time left, lines and numbers."""

import math
from types import SimpleNamespace

import pytest

from mlra_jax.training import progress
from mlra_jax.training.progress import (
    Done,
    Progress,
    TrainingError,
    check_finite,
    format_duration,
)


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + 1e9


class Written(list):
    def write(self, step, values):
        self.append({"step": step, **values})


@pytest.fixture
def start(monkeypatch):
    """A function that begins a run after `step` steps; gives it, its clock, lines and numbers."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)

    def begin(**changes):
        lines, written = [], Written()
        settings = dict(steps=20, done=Done(began=1e9 + 100), tokens_per_step=30, full_rate=None)
        run = Progress(**dict(settings, say=lines.append, writer=written) | changes)
        return SimpleNamespace(run=run, clock=clock, lines=lines, written=written)

    return begin


def advance(at, steps, seconds):
    for _ in range(steps):
        at.clock.now += seconds
        at.run.count()


def test_speed_is_of_the_steps_since_the_last_pause(start):
    at = start()
    advance(at, 4, 0.5)
    at.run.log({"loss": 2.0})
    at.clock.now += 50
    at.run.restart_interval()
    advance(at, 2, 3)
    at.run.log({"loss": 1.5})
    # 4 steps in 2 s, 2 in 6 s; the pause counts only for what is left: 14 steps at 58 s for 6.
    assert at.lines == [
        "step 4/20  loss 2.0000  60 tokens/s  0:08 left",
        "step 6/20  loss 1.5000  10 tokens/s  2:15 left",
    ]
    waits = {"input_seconds": 0.0, "save_seconds": 0.0, "goodput": 0.0, "skipped_steps": 0}
    assert at.written == [
        {"step": 4, "loss": 2.0, "tokens": 120, "tokens_per_second": 60.0, "seconds": 2.0} | waits,
        {"step": 6, "loss": 1.5, "tokens": 180, "tokens_per_second": 10.0, "seconds": 58.0} | waits,
    ]


def test_a_resumed_run_adds_its_seconds_and_judges_by_its_own_steps(start):
    done = Done(step=10, seconds=1000.0, useful_seconds=500.0, skipped_steps=1, began=1e9 - 1896)
    at = start(done=done, full_rate=120.0)
    advance(at, 2, 2)
    at.run.settle(1)
    want = Done(step=12, seconds=1004.0, useful_seconds=502.0, skipped_steps=1, began=1e9 - 1896)
    assert at.run.done == want
    at.run.log({"loss": 1.0, "gradient_norm": 0.25})
    assert at.lines == ["step 12/20  loss 1.0000  15 tokens/s  MFU 12.5%  0:16 left"]
    (values,) = at.written
    assert values["seconds"] == 1004.0 and values["tokens"] == 360
    assert values["model_flops_utilization"] == 0.125 and values["gradient_norm"] == 0.25
    # The time between the starts is no time in steps: 502 of the 2000 since the first.
    assert values["goodput"] == 0.251 and values["skipped_steps"] == 1


def test_goodput_is_of_steps_that_count_over_all_the_time(start):
    at = start()
    for skipped, pause in ((0, 10), (3, 0)):
        advance(at, 4, 2)
        at.run.settle(skipped)
        at.run.log({"loss": 2.0})
        at.clock.now += pause
        at.run.restart_interval()
    assert [line["goodput"] for line in at.written] == [1.0, 10 / 26]
    # A checkpoint of an earlier version says only how long its steps took.
    assert Done.of({"step": 7, "seconds": 40.0}) == Done(
        step=7, seconds=40.0, useful_seconds=40.0, began=at.clock.time() - 40
    )


def test_what_is_not_finite_is_shown_and_left_out_of_the_file(start):
    at = start()
    advance(at, 1, 1)
    at.run.log({"loss": math.nan, "gradient_norm": math.inf, "learning_rate": 0.5})
    assert at.lines == ["step 1/20  loss nan  30 tokens/s  0:19 left"]
    (values,) = at.written
    assert values["learning_rate"] == 0.5 and not {"loss", "gradient_norm"} & values.keys()


def test_validation_has_a_line_of_its_own(start):
    at = start(done=Done(step=3))
    at.run.validated(1.23456, 77)
    assert at.lines == ["step 3/20  validation loss 1.2346"]
    assert at.written == [{"step": 3, "validation_loss": 1.23456, "validation_tokens": 77}]


def test_a_process_that_does_not_write_still_counts(start):
    at = start(writer=None)
    advance(at, 1, 1)
    at.run.log({"loss": 1.0})
    assert at.run.step == 1 and not at.written


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_each_metric_must_be_finite(value):
    check_finite(3, {"loss": 1.0, "gradient_norm": 0.0})
    for name, words in (("loss", "loss"), ("learning_rate", "learning rate")):
        with pytest.raises(TrainingError, match=f"^{words} is {value} at step 3$"):
            check_finite(3, {"gradient_norm": 1.0, name: value})


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (123, "2:03"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (90061, "25:01:01"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
