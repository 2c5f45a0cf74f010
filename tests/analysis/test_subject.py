"""Flags that would not be heeded, and folders that cannot be written, are said first."""

import pytest

from mlra_jax.analysis import branches, equivariance, variance


@pytest.mark.parametrize("command", [equivariance, variance])
def test_flags_that_would_not_be_heeded_are_refused(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--preset=mla", "--step=3"])
    assert stop.value.code == 2 and "--step is of a checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command.main(["--preset=mla", "--checkpoint=x"])
    assert stop.value.code == 2


def test_layers_of_a_fresh_attention_and_too_few_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        variance.main(["--preset=mla", "--layers=2"])
    assert "--layers is of a checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        equivariance.main(["--preset=mla", "--rows=2"])
    assert "--rows must be at least 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        equivariance.main(["--preset=mla", "--length=0"])
    assert "--length: invalid positive value: '0'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [equivariance, variance, branches])
def test_an_output_that_is_a_file_is_said_before_anything_is_read(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "in"):
        assert command.main(["--checkpoint=/nowhere", f"--output={path}"]) == 1
        assert f"--output={path} is a file or lies in one" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_presets_are_named(capsys):
    assert variance.main(["--preset=mla,mrla_4"]) == 1
    assert "unknown preset 'mrla_4'; did you mean mlra_4" in capsys.readouterr().err
    assert equivariance.main(["--preset="]) == 1
    assert "name a preset, as in --preset=mlra_4" in capsys.readouterr().err
