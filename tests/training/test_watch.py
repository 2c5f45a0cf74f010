"""Steps that last too long, with a clock of small numbers: who notices, and what is said."""

import time
from types import SimpleNamespace

import pytest

from mlra_jax.training import watch
from mlra_jax.training.watch import Watch

STEP = 0.01


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(watch, "_ANSWER_SECONDS", 0.1)


def steps(seen, count=6):
    for step in range(1, count + 1):
        seen.begin(step)
        time.sleep(STEP)
        seen.goes_on("waiting for input")


def hang_here(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_step_that_hangs_is_told_once_with_its_place_and_its_end():
    lines = []
    with Watch(lines.append) as seen:
        steps(seen)
        seen.begin(7)
        hang_here(lambda: len(lines) == 2)
        time.sleep(0.3)
        seen.begin(8)
    first, place, end = lines
    assert first.startswith("step 7 takes 0 s so far; the median is 0.0")
    assert place.startswith("  process 0: step 7, computing, test_watch.py:")
    assert place.endswith("hang_here")
    assert end.startswith("step 7 has ended after ")


def test_neither_a_pause_nor_the_first_steps_are_judged():
    lines = []
    with Watch(lines.append) as seen:
        seen.begin(1)
        time.sleep(0.4)  # It has nothing to be compared with.
        steps(seen)
        seen.begin(7)
        seen.rests()
        time.sleep(0.4)
        seen.goes_on("waiting for input")
        time.sleep(STEP)
        seen.begin(8)
    assert lines == []


def test_a_step_is_no_longer_than_ten_others(monkeypatch):
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.05)
    lines = []
    with Watch(lines.append) as seen:
        for step in range(1, 8):
            seen.begin(step)
            time.sleep(0.06 if step < 7 else 0.3)
    assert lines == []


def test_all_processes_are_asked_and_alike_ones_share_a_line():
    stands = {0: "mine", 1: "step 7, computing", 2: "step 7, computing", 3: "", 4: "", 6: ""}
    said, lines = [], []

    with Watch(lines.append, SimpleNamespace(stand=said.append, stands=lambda: stands)) as seen:
        steps(seen)
        seen.begin(7)
        hang_here(lambda: len(lines) == 4)
    assert said[0].startswith("step 7, computing, ")
    assert lines[1:] == [
        "  process 0: mine",
        "  processes 1-2: step 7, computing",
        "  processes 3-4, 6: no answer; it is stopped or its host hangs",
    ]
