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
    monkeypatch.setattr(watch, "FIRST_SECONDS", 0.5)


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


def test_a_pause_is_no_part_of_a_step_and_compared_with_its_like():
    lines = []
    with Watch(lines.append) as seen:
        for step in range(1, 5):
            seen.begin(step)
            time.sleep(STEP)
            seen.pauses("saving")
            time.sleep(0.25)
        assert lines == [], "neither a step of more than 0.2 s nor an unusual pause"
        seen.pauses("validating")
        time.sleep(STEP)
        seen.pauses("validating")
        time.sleep(STEP)
        seen.pauses("validating")
        hang_here(lambda: len(lines) == 2)
        seen.goes_on("waiting for input")
    first, place, end = lines
    assert first.startswith("validating after step 4 takes 0 s so far; the median is 0.01")
    assert place.startswith("  process 0: step 4, validating, test_watch.py:")
    assert end == "validating after step 4 has ended after 0 s"


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_hangs_in_its_first_steps_says_so(step):
    """Later than others: there is nothing to compare them with."""
    lines = []
    with Watch(lines.append) as seen:
        for i in range(1, step + 1):
            seen.begin(i)
            time.sleep(0.3)
        assert lines == []
        hang_here(lambda: len(lines) == 2)
    assert lines[0] == f"step {step} takes 1 s so far; too early to say what is usual"


def test_steps_that_are_only_begun_shorten_no_others():
    """On an accelerator every second one may end when it is begun, and the next end both."""
    lines = []
    with Watch(lines.append) as seen:
        for step in range(1, 7):
            seen.begin(step)
            time.sleep(0.3 * (step % 2 == 0))
    assert lines == []


def test_a_step_is_no_longer_than_ten_others(monkeypatch):
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.05)
    lines = []
    with Watch(lines.append) as seen:
        for step in range(1, 8):
            seen.begin(step)
            time.sleep(0.06 if step < 7 else 0.3)
    assert lines == []


def peers_of(stands, **others):
    return SimpleNamespace(stands=lambda seconds: stands, stand_at=lambda here: None, **others)


def test_all_processes_are_asked_and_alike_ones_share_a_line():
    stands, lines = {1: "step 7, computing", 2: "step 7, computing", 3: "", 4: "", 6: ""}, []
    with Watch(lines.append, peers_of(stands, first=True)) as seen:
        steps(seen)
        seen.begin(7)
        hang_here(lambda: len(lines) == 4)
    assert lines[1].startswith("  process 0: step 7, computing, test_watch.py:")
    assert lines[2:] == [
        "  processes 1-2: step 7, computing",
        "  processes 3-4, 6: no answer; it is stopped or its host hangs",
    ]


def test_what_ends_while_others_are_asked_is_not_told():
    lines, peers = [], peers_of({}, first=True)
    with Watch(lines.append, peers) as seen:
        peers.stands = lambda seconds: seen.begin(8) or {}
        steps(seen)
        seen.begin(7)
        hang_here(lambda: seen._step == 8)
        time.sleep(0.1)
    assert lines == []


def test_the_others_answer_only():
    answers, lines, peers = [], [], peers_of({}, first=False)
    peers.stand_at = answers.append
    with Watch(lines.append, peers) as seen:
        (here,) = answers
        assert here().startswith("before its first step, ")
        steps(seen)
        seen.begin(7)
        time.sleep(0.3)
        assert here().startswith("step 7, computing, ")
    assert lines == []
