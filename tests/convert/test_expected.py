"""`convert --expected`: the logits of the weights, before the destination appears."""

import re

import numpy as np
import pytest

from mlra_jax.config import ConfigError
from mlra_jax.convert import convert
from mlra_jax.convert.__main__ import main
from mlra_jax.convert.errors import CheckpointFileError

from .files import RELEASED

SOURCE = RELEASED / "mlra_4"


def test_logits_that_agree_are_said(tmp_path, capsys):
    flags = [f"--source={SOURCE}", f"--destination={tmp_path / 'm'}"]
    assert main([*flags, f"--expected={SOURCE / 'expected.npz'}"]) == 0
    out = capsys.readouterr().out
    (error,) = re.findall(r"logits agree with \S+expected.npz: (\S+) of their norm in float32", out)
    assert float(error) < 1e-5
    assert (tmp_path / "m/checkpoints/0").is_dir()


def test_other_logits_leave_nothing(tmp_path):
    """The same weights without calibration factors are another model, and no shape shows it."""
    destination, wrong = tmp_path / "m", RELEASED / "mlra_2_no_scale"
    with pytest.raises(CheckpointFileError, match=r"the logits are \d.\de.\d\d away from those of"):
        convert(
            wrong,
            destination,
            variant="mlra_2",
            expected=wrong / "expected.npz",
            note=lambda line: None,
            quiet=True,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (None, "is no .npz file with arrays `tokens` and `logits`"),
        (dict(tokens=np.zeros((1, 2), int)), "is no .npz file with arrays"),
        (dict(tokens=np.array([{}]), logits=np.zeros(1)), "is no .npz file with arrays"),
        (dict(tokens=np.zeros((1, 2)), logits=np.zeros((1, 2, 96))), "takes whole numbers [B, T]"),
        (dict(tokens=np.zeros((1, 2), int), logits=np.zeros((1, 2, 95))), "gives [B, T, 96]"),
        (dict(tokens=np.full((1, 2), 96), logits=np.zeros((1, 2, 96))), "a token outside 0 to 95"),
    ],
)
def test_files_that_say_something_else_are_refused_first(tmp_path, arrays, words):
    file = tmp_path / "expected.npz"
    if arrays is not None:
        np.savez(file, **arrays)
    with pytest.raises(CheckpointFileError, match=re.escape(words)):
        convert(SOURCE, tmp_path / "m", expected=file, quiet=True)
    assert not (tmp_path / "m").exists()


def test_a_mesh_may_name_some_axes(tmp_path):
    convert(SOURCE, tmp_path / "some", mesh={"tensor": 2}, quiet=True)
    every = {"data": 1, "fsdp": 1, "tensor": 2, "context": 1}
    convert(SOURCE, tmp_path / "all", mesh=every, quiet=True)
    sizes = lambda folder: sorted(
        (str(f.relative_to(folder)), f.stat().st_size) for f in folder.rglob("*/d/*")
    )
    assert len(sizes(tmp_path / "some")) == len(sizes(tmp_path / "all"))
    with pytest.raises(ConfigError, match="mesh tensors=2 is not one of data, fsdp, tensor, cont"):
        convert(SOURCE, tmp_path / "none", mesh={"tensors": 2}, quiet=True)
    assert not (tmp_path / "none").exists()
