"""What is trained on after a conversion, from what and how; training itself is stood in for."""

import json

import chex
import numpy as np
import pytest

from mlra_jax.config import LatentConfig
from studies import recovery
from studies.training import Fitted

FLAGS = [
    "--config=studies/configs/quick.py",
    "--config.steps=40",
    "--config.optimizer.warmup_steps=5",
]


@pytest.fixture
def calls(monkeypatch):
    """(name, experiment, first states, seeds of the order) of each training; nothing is trained."""
    calls = []

    def fit(experiment, states, seeds, source, name, validate_every, say):
        calls.append((name, experiment, states, list(seeds)))
        curve = [(experiment.steps, [float(len(calls)), float(len(calls)) + 1])]
        return Fitted(states.params, {"validation_loss": curve}, 1.0, 1.0)

    moments = lambda subject, tokens_BT: np.eye(subject.config.embed_dim)[None]
    monkeypatch.setattr(recovery, "fit", fit)
    monkeypatch.setattr(recovery, "input_moments", moments)
    monkeypatch.setattr(recovery, "validation", lambda *_: lambda params: np.array([50.0, 60.0]))
    return calls


def test_a_gqa_is_converted_and_trained_on_beside_what_it_was(calls, tmp_path, capsys):
    flags = [*FLAGS, f"--workdir={tmp_path}/out", "--starts=gqa", "--percents=50,10"]
    assert recovery.main(flags) == 0
    names, experiments, states, orders = zip(*calls, strict=True)
    assert names == ("gqa", "gqa as MLRA", "gqa as MLRA", "gqa", "mlra_4")
    assert [e.steps for e in experiments] == [40, 4, 20, 20, 60]
    assert orders == ([0, 1], [1000, 1001], [1000, 1001], [1000, 1001], [0, 1])
    peaks = [e.optimizer.peak_learning_rate for e in experiments]
    assert peaks == pytest.approx([3e-3, 1e-3, 1e-3, 1e-3, 3e-3])
    assert [e.optimizer.warmup_steps for e in experiments] == [5, 1, 2, 2, 5]
    made = experiments[1].model
    assert isinstance(made.attention, LatentConfig) and made.attention.branches == 4
    first, converted, again, control = (s.params for s in states[:4])
    chex.assert_trees_all_equal(again, converted)
    chex.assert_trees_all_equal(control, first)
    chex.assert_trees_all_equal(converted["embed"], first["embed"])
    o, o_before = (p["layers"]["attention"]["out"]["kernel"] for p in (converted, first))
    assert o.shape == o_before.shape and (states[1].step == 0).all()
    rows = json.loads((tmp_path / "out" / "recovery.json").read_text())["rows"]
    assert [(row["model"], row["steps"], row["losses"][0]) for row in rows] == [
        ("gqa", 0, 1.0),
        ("as MLA", 0, 50.0),
        ("as MLRA", 0, 50.0),
        ("as MLRA", 4, 2.0),
        ("as MLRA", 20, 3.0),
        ("gqa", 20, 4.0),
        ("mlra_4", 20, 5.0),
    ]
    assert "| gqa | as MLRA | 0 | 55.0000 ± 5.0000 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "recovery.png").read_bytes().startswith(b"\x89PNG")


def test_what_becomes_no_mlra_is_refused_before_anything_is_trained(calls, tmp_path, capsys):
    flags = [*FLAGS, f"--workdir={tmp_path}/out", "--starts=mla,gta"]
    assert recovery.main(flags) == 1
    assert "--starts=gta becomes no MLRA" in capsys.readouterr().err
    assert not calls and not (tmp_path / "out").exists()
