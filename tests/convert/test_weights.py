"""A folder of weights: which files are read, what each holds, the limits of names and sizes."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlra_jax.convert import weights as rooms
from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.torch_format.reader import TensorSpec
from mlra_jax.convert.weights import SafetensorsFile, Weights, read_json

from .files import small_arrays, write_arrays

ONE, TWO = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


def shards(folder, first, second, index=None, suffix="bin"):
    """Two shards with an index; returns the folder."""
    folder.mkdir(exist_ok=True)
    names = [f"{n}-of-2.{suffix}" for n in (1, 2)]
    for name, arrays in zip(names, (first, second), strict=True):
        (write_arrays if suffix == "bin" else lambda p, a: save_file(a, p))(folder / name, arrays)
    where = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    stem = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    (folder / f"{stem}.index.json").write_text(
        json.dumps({"weight_map": where if index is None else index})
    )
    (folder / "config.json").write_text('{"n_head": 3}')
    return folder


def refused(folder, match):
    with pytest.raises(CheckpointFileError, match=match) as caught:
        Weights(folder)
    assert "\n" not in str(caught.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 5877305344\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (POINTER, "is a pointer of git-lfs, not the file itself; run `git lfs pull`"),
        ("<!DOCTYPE html>\n<html><body>Log in", "is an HTML page, not the file itself"),
        ("\ufeff\n  <html lang='en'>404", "is an HTML page, not the file itself"),
    ],
)
def test_what_a_download_left_instead_is_named(tmp_path, name, text, said):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    refused(tmp_path, f"{name}: {said}")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_two_shards_are_one_set_of_tensors(tmp_path, suffix):
    first, second = small_arrays(), {"z": np.arange(5, dtype=np.float32)}
    with Weights(shards(tmp_path / "m", first, second, suffix=suffix)) as found:
        assert found.config == {"n_head": 3}
        assert found.specs == {
            name: TensorSpec(array.shape, array.dtype) for name, array in (first | second).items()
        }
        # To and fro, as layers of several shards are read.
        for name in (*first, "z", *reversed(first), "z", "a.weight", "a.weight"):
            assert found.read(name).tobytes() == (first | second)[name].tobytes()
            found.release()
        seen = []
        found.verify(seen.append)
        assert sum(seen) == found.size
        assert not found.same_bytes("a.weight", "z")
        assert found.same_bytes("a.weight", "a.weight") == (suffix == "bin")


def test_the_first_layout_that_is_there_is_read(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    refused(folder, r"no weights there \(none of pytorch_model.bin.index.json, pytorch_model.bin, ")
    value = lambda x: {"w": np.full(2, x, np.float32)}
    found = []

    def read():
        with Weights(folder) as opened:
            found.append(opened.read("w")[0])

    save_file(value(4), folder / "model.safetensors")
    read()
    save_file(value(3), folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "other.safetensors"}}'
    )
    read()
    write_arrays(folder / "pytorch_model.bin", value(2))
    read()
    write_arrays(folder / "other.bin", value(1))
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "other.bin"}}')
    read()
    assert found == [4, 3, 2, 1]


def test_each_tensor_is_in_one_shard(tmp_path):
    a = {"w": np.ones(2, np.float32)}
    both = {"w": a["w"], "v": a["w"]}
    folder = shards(tmp_path / "1", a, both, {"w": "1-of-2.bin", "v": "2-of-2.bin"})
    refused(folder, "'w' is in two shards")
    folder = shards(tmp_path / "2", a, both, {"w": "2-of-2.bin", "v": "2-of-2.bin"})
    with Weights(folder) as found:  # the other shard is not named, so it is not read
        assert set(found.specs) == {"w", "v"}
    folder = shards(tmp_path / "4", a, both, {"w": "2-of-2.bin"})
    refused(folder, "2-of-2.bin: 'v' is there and not in the index")
    refused(shards(tmp_path / "3", a, {"v": a["w"]}, {"w": "1-of-2.bin", "v": "1-of-2.bin"}), "'v'")


def test_names_at_their_limit(tmp_path):
    for length, ok in ((255, True), (256, False)):
        folder = shards(tmp_path / f"{length}", {"n" * length: np.ones(1, np.float32)}, {})
        if ok:
            assert list(Weights(folder).specs) == ["n" * length]
        else:
            refused(folder, "is no tensor's name")
    refused(shards(tmp_path / "x", {"a\nb": np.ones(1, np.float32)}, {}), "is no tensor's name")
    # File names count in bytes, as file systems do.
    for name, ok in (("ä" * 127, True), ("ä" * 128, False), ("a/b", False), ("a\\b", False)):
        folder = shards(tmp_path / "files", {}, {}, {"w": name})
        refused(folder, "this shard is missing" if ok else "which is no file name")


def test_descriptions_at_their_limit(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    monkeypatch.setattr(rooms, "MAX_JSON_BYTES", 8)
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr(rooms, "MAX_JSON_BYTES", 7)
    with pytest.raises(CheckpointFileError, match="8 bytes are too many"):
        read_json(path)
    path.write_text('{"b": {"a": 1, "a": 1}}')
    monkeypatch.undo()
    with pytest.raises(CheckpointFileError, match="twice in one object"):
        read_json(path)


def test_safetensors_headers_at_their_limit(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"w": np.arange(3, dtype=np.float32)}, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(rooms, "MAX_JSON_BYTES", header)
    assert SafetensorsFile(path).read("w").tolist() == [0, 1, 2]
    monkeypatch.setattr(rooms, "MAX_JSON_BYTES", header - 1)
    with pytest.raises(CheckpointFileError, match=f"a header of {header} bytes"):
        SafetensorsFile(path)


def test_every_safetensors_type(tmp_path):
    """Numbers of each type come back, or the type is named."""
    types = {
        "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
        "BOOL": np.bool_,
    }  # fmt: skip
    assert {code: np.dtype(t) for code, t in types.items()} == rooms.SAFETENSORS_DTYPES
    path = tmp_path / "m.safetensors"
    for code, dtype in types.items():
        values = np.array([0, 1, 1, 0]).astype(dtype)
        header = json.dumps(
            {"w": {"dtype": code, "shape": [2, 2], "data_offsets": [0, values.nbytes]}}
        ).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
        file = SafetensorsFile(path)
        assert file.specs["w"] == ((2, 2), np.dtype(dtype))
        if code != "BF16":
            np.testing.assert_array_equal(file.read("w"), values.reshape(2, 2))
    path.write_bytes(path.read_bytes().replace(b"BOOL", b"U16 ").replace(b'"U16 "', b'"U16" '))
    with pytest.raises(CheckpointFileError, match="safetensors|has the dtype U16"):
        SafetensorsFile(path)
