"""Export gives back what was converted, bit for bit, and what other programs expect."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from mlra_jax import checkpoints
from mlra_jax.convert import CheckpointFileError, convert
from mlra_jax.convert.weights import Weights
from mlra_jax.export import export, main

RELEASED = Path(__file__).parent / "data" / "released"
FOLDERS = sorted(path.name for path in RELEASED.iterdir() if path.is_dir())


def round_trip(name, folder, **flags):
    convert(RELEASED / name, folder / name, variant=name, quiet=True)
    export(folder / name, folder / "out", quiet=True, note=lambda line: None, **flags)
    return folder / "out"


@pytest.mark.parametrize("name", FOLDERS)
def test_convert_then_export_gives_every_tensor_back(name, tmp_path):
    out = round_trip(name, tmp_path, shard_bytes=60_000)
    config = json.loads((RELEASED / name / "config.json").read_text())
    config.pop("transformers_version")
    assert json.loads((out / "config.json").read_text()) == config
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with Weights(RELEASED / name) as source:
        assert set(index["weight_map"]) == set(source.specs)
        found = {}
        for file in set(index["weight_map"].values()):
            tensors = load_file(out / file)
            assert all(index["weight_map"][tensor] == file for tensor in tensors)
            found |= tensors
        for tensor, spec in source.specs.items():
            assert found[tensor].dtype == spec.dtype and found[tensor].shape == spec.shape
            assert found[tensor].tobytes() == source.read(tensor).tobytes()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in found.values())


def test_exported_files_convert_again(tmp_path):
    """.safetensors are a source too, with the tied tensor under one name or both, whole or not."""
    out = round_trip("gla_2", tmp_path)
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    convert(out, tmp_path / "again", quiet=True, note=lambda line: None)
    export(tmp_path / "again", tmp_path / "out2", quiet=True)
    data = (out / "model.safetensors").read_bytes()
    assert (tmp_path / "out2" / "model.safetensors").read_bytes() == data

    tensors = load_file(out / "model.safetensors")
    for gone in ("lm_head.weight", "transformer.wte.weight"):
        rest = {name: array for name, array in tensors.items() if name != gone}
        safetensors.numpy.save_file(rest, out / "model.safetensors")
        convert(out, tmp_path / gone, quiet=True, note=lambda line: None)
        export(tmp_path / gone, tmp_path / f"{gone}_out", quiet=True)
        assert (tmp_path / f"{gone}_out" / "model.safetensors").read_bytes() == data

    rng = np.random.default_rng(0)
    for size in (0, 1, 8, 100, len(data) // 2, len(data) - 1):
        (out / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(CheckpointFileError, match="safetensors"):
            convert(out, tmp_path / "never", quiet=True)
    # One that the library would read.
    empty = ",".join(
        f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(90_000)
    )
    huge = f"{{{empty}}}".encode()
    (out / "model.safetensors").write_bytes(len(huge).to_bytes(8, "little") + huge)
    with pytest.raises(CheckpointFileError, match=f"a header of {len(huge)} bytes"):
        convert(out, tmp_path / "never", quiet=True)
    header = int.from_bytes(data[:8], "little")
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.integers(0, header + 8)] ^= 1 << rng.integers(0, 8)
        (out / "model.safetensors").write_bytes(changed)
        try:
            with Weights(out) as weights:
                for name in weights.specs:
                    weights.read(name)
        except CheckpointFileError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "never").exists()


def test_a_training_runs_checkpoint_is_exported(tmp_path):
    """Arrays as the trainer saves them, of the latest step or a given one, in another dtype."""
    convert(RELEASED / "gqa", tmp_path / "source", quiet=True)
    opened = checkpoints.open_checkpoint(tmp_path / "source")
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointer().restore(opened.folder / "params")
    described = opened.read_json("model")
    manager = checkpoints.make_manager(tmp_path / "run")
    for step, factor in ((3, 1), (7, 2)):
        scaled = {k: v for k, v in params.items() if k != "embed"}
        scaled["embed"] = {"embedding": jnp.asarray(params["embed"]["embedding"] * factor)}
        checkpoints.save(manager, step, params=scaled, model=described)
    manager.wait_until_finished()
    manager.close()
    wanted = params["embed"]["embedding"]
    for flags, factor in (({}, 2), ({"step": 3}, 1)):
        out = tmp_path / f"out{factor}"
        export(tmp_path / "run", out, quiet=True, dtype="bfloat16", **flags)
        with Weights(out) as weights:
            found = weights.read("lm_head.weight")
            assert found.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found, (wanted * factor).astype(ml_dtypes.bfloat16))
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_no_scale_is_said(tmp_path, capsys):
    convert(RELEASED / "mlra_2_no_scale", tmp_path / "m", variant="mlra_2_no_scale", quiet=True)
    export(tmp_path / "m", tmp_path / "out", quiet=True)
    assert "_no_scale" in capsys.readouterr().out


def test_command_line(tmp_path, capsys):
    convert(RELEASED / "mqa", tmp_path / "m", quiet=True)
    flags = [f"--checkpoint={tmp_path / 'm'}", f"--destination={tmp_path / 'out'}"]
    assert main(flags) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    capsys.readouterr()
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "exists already" in captured.err
    other = f"--destination={tmp_path / 'other'}"
    assert main([f"--checkpoint={tmp_path / 'absent'}", other]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    params = tmp_path / "m" / "checkpoints" / "0" / "params"
    largest = max(params.rglob("d/*"), key=lambda path: path.stat().st_size)
    for damaged in (largest, params / "_METADATA"):
        damaged.unlink()
        assert main([f"--checkpoint={tmp_path / 'm'}", other]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]
