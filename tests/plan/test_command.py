"""The command by formula, which needs no compiler, and what it refuses."""

import contextlib
import io
import re

import jax
import pytest

from mlra_jax.plan.__main__ import main

PAPER = "--config=configs/paper.py:mlra_4"
SMALL = "--config.data.global_batch=48", "--config.data.accumulate=1"


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """A command sets up JAX for itself; the tests' devices stay."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)


def ended(*arguments):
    """(exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*arguments, "--cache=off"])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def test_training_on_gpus():
    code, out, _ = ended(PAPER, "--topology=h100:8", "--slices=2", "--mesh=fsdp=16")
    assert code == 0
    assert "16 devices: training step of 480 x 2,048 tokens" in out
    for words in ("(by formula)", "of 74.5: fits", "reduce-scatter", "slices", "chip-hours"):
        assert words in out
    # 983,040 tokens, 22.3 GFLOP a token, 16 x 989 TFLOP/s: 1.4 s, and no less.
    assert "bound by matrix units" in out and "85% of the peak" in out


def test_decoding_on_gpus():
    arguments = PAPER, "--topology=h100:8", "--decode=8x131072", "--mesh=data=2,tensor=4"
    code, out, _ = ended(*arguments)
    assert code == 0 and "decoding step of 8 x 131,072 positions" in out
    # 4 rows of 131,072 tokens: 192 values of two bytes, in 24 layers.
    assert re.search(r"cache +4\.50\n", out) and "chip-hours" not in out


def test_a_search_on_gpus_draws_what_it_found(tmp_path):
    figure = tmp_path / "plan.png"
    code, out, err = ended(PAPER, "--topology=h100:8", "--search", f"--output={figure}", "--keep=2")
    assert code == 0 and "0 of 2 found; trying" in err and "1 of 2 found" in err
    ranked = [line.split() for line in out.split("bound by, as\n")[1].splitlines()[:2]]
    assert float(ranked[0][2]) <= float(ranked[1][2])
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--topology=v9:2x2"], 1, "'v9', which is none of v5e, v5p, v6e, a100"),
        (["--topology=v5e"], 1, "give a chip and a shape, as in v5e:4x4"),
        (["--topology=h100:2x4"], 1, "give the GPUs of a host, as in h100:8"),
        (["--topology=h100:8", "--slices=0"], 1, "slices from 1 on"),
        (["--topology=h100:8"], 1, "the mesh fsdp=4,tensor=4 has 16 devices and 1 x h100:8 8"),
        (["--topology=h100:8", "--mesh=tensor=8", "--decode=8"], 2, "'8' is not ROWSxPOSITIONS"),
        (["--topology=h100:8", "--mesh=data=8", "--decode=4x64"], 1, "4 rows do not divide over"),
        (["--topology=h100:8", "--search", "--mesh=fsdp=8"], 2, "leave --mesh out"),
        (["--topology=h100:1", "--search", "--config.model.embed_dim=30720"], 1, "nothing fits"),
        ([*SMALL, "--topology=h100:12", "--mesh=fsdp=12"], 1, "does not divide over fsdp=12"),
        (["--topology=h100:7", "--search"], 1, "no mesh of 7 devices divides the model and its"),
        (["--topology=h100:8", "--mesh=fsdp=8", "--output=/no/f.png"], 1, "folder does not exist"),
    ],
)
def test_what_is_refused(arguments, code, words):
    got, out, err = ended(PAPER, *arguments)
    assert got == code and out == "" and words in err
    assert err.splitlines()[-1].startswith("python -m mlra_jax.plan: ")


def test_a_missing_tpu_compiler_is_named(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology. See ...")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    code, _, err = ended(PAPER, "--topology=v5e:2x2", "--mesh=fsdp=4")
    assert code == 1 and err.endswith("is not installed; pip install 'libtpu<0.1'\n")
