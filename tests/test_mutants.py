"""The set of planted faults is current, and the runner tells caught from survived."""

import dataclasses

import pytest

from tests.mutants.__main__ import copy_tree, outcome
from tests.mutants.faults import Fault, FaultError, load


def test_every_fault_fits_the_tree():
    faults = load()
    assert len(faults) >= 80
    assert sum(fault.gate for fault in faults) == 20


def test_the_runner_tells_caught_from_survived_and_restores_the_tree(tmp_path):
    (tmp_path / "sizes.py").write_text("WIDTH = 3\n")
    (tmp_path / "test_sizes.py").write_text(
        "from sizes import WIDTH\n\ndef test_odd():\n    assert WIDTH % 2 == 1\n"
    )
    wrong = Fault("room", "even", "sizes.py", "3", "4", "the width is even", ("test_sizes.py",))
    assert outcome(wrong, tmp_path) == "caught"
    assert outcome(dataclasses.replace(wrong, new="5"), tmp_path).startswith("survived")
    assert outcome(dataclasses.replace(wrong, new="("), tmp_path).startswith("error")
    assert outcome(dataclasses.replace(wrong, tests=("gone.py",)), tmp_path).startswith("error")
    assert (tmp_path / "sizes.py").read_text() == "WIDTH = 3\n"
    with pytest.raises(FaultError, match="stands 0 times in sizes.py"):
        outcome(dataclasses.replace(wrong, old="7"), tmp_path)


def test_a_copy_has_what_the_tests_need(tmp_path):
    copy = copy_tree(tmp_path)
    assert (copy / "tests" / "conftest.py").is_file()
    assert not (copy / ".git").exists()
