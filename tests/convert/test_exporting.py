"""Export gives back what was converted, bit for bit, and what other programs expect."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import mlra_jax
from mlra_jax import checkpoints
from mlra_jax.config import GPT2_VOCABULARY, NEIGHBOURS, ConfigError, LatentConfig, preset
from mlra_jax.convert import CheckpointFileError, convert, exporting
from mlra_jax.convert.exporting import export
from mlra_jax.convert.lazy import LazyArray
from mlra_jax.convert.released import base_name, usual_tokenizer
from mlra_jax.convert.weights import Weights
from mlra_jax.export import main

from .files import FOLDERS, RELEASED


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


def test_every_flag_of_the_command_line_arrives(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "mlra_jax.export.export", lambda *paths, **rest: asked.append((paths, rest))
    )
    flags = ["--checkpoint=C", "--destination=D"]
    assert main(flags) == 0
    assert main([*flags, "--step=3", "--dtype=float16"]) == 0
    assert asked == [
        (("C", "D"), dict(step=None, dtype=None)),
        (("C", "D"), dict(step=3, dtype="float16")),
    ]


@pytest.mark.parametrize(
    "error, codes, said",
    [
        (ValueError("a fault"), (1, 2), "a fault"),
        (OSError("a fault"), (1, 2), "a fault"),
        (KeyboardInterrupt(), (130,), "interrupted"),
    ],
)
def test_the_command_ends_in_one_line(monkeypatch, capsys, error, codes, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("mlra_jax.export.export", fail)
    assert main(["--checkpoint=C", "--destination=D"]) in codes
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.strip().count("\n") == 0 and not printed.out


def test_command_line(tmp_path, capsys):
    convert(RELEASED / "mqa", tmp_path / "m", quiet=True)
    flags = [f"--checkpoint={tmp_path / 'm'}", f"--destination={tmp_path / 'out'}"]
    assert main(flags) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    capsys.readouterr()
    assert main(flags) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "exists already" in captured.err
    other = f"--destination={tmp_path / 'other'}"
    assert main([f"--checkpoint={tmp_path / 'absent'}", other]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    params = tmp_path / "m" / "checkpoints" / "0" / "params"
    largest = max(params.rglob("d/*"), key=lambda path: path.stat().st_size)
    for damaged in (largest, params / "_METADATA"):
        damaged.unlink()
        assert main([f"--checkpoint={tmp_path / 'm'}", other]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_bytes_of_the_files_are_exact(tmp_path):
    """Each shard: a header of sorted offsets, padded to 8 bytes, then the numbers and no more."""
    for limit, count in ((exporting.SHARD_BYTES, 1), (130_000, 2), (60_000, 4)):
        out = tmp_path / f"{count}"
        convert(RELEASED / "mqa", tmp_path / f"m{count}", quiet=True)
        export(tmp_path / f"m{count}", out, shard_bytes=limit, quiet=True)
        files = sorted(path.name for path in out.glob("*.safetensors"))
        of = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        assert files == (["model.safetensors"] if count == 1 else of)
        where = {}
        shapes = exporting.layout(checkpoints.open_checkpoint(tmp_path / f"m{count}").model).tensors
        with Weights(RELEASED / "mqa") as source:
            for file in files:
                data = (out / file).read_bytes()
                length = int.from_bytes(data[:8], "little")
                header = json.loads(data[8 : 8 + length])
                assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
                start, body = 0, b""
                for name, said in header.items():
                    values = source.read(name)
                    stop = start + values.nbytes
                    assert said == {
                        "dtype": "F32", "shape": list(values.shape), "data_offsets": [start, stop]
                    }  # fmt: skip
                    body, start = body + values.tobytes(), stop
                    where[name] = file
                assert data[8 + length :] == body and len(body) <= max(limit, values.nbytes)
        assert list(where) == list(shapes)
        index = out / "model.safetensors.index.json"
        if count == 1:
            assert not index.exists()
        else:
            total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
            assert json.loads(index.read_text()) == {
                "metadata": {"total_size": total},
                "weight_map": where,
            }


def test_the_disk_must_have_room_for_all_and_a_megabyte(tmp_path, monkeypatch):
    convert(RELEASED / "mqa", tmp_path / "m", quiet=True)
    model = checkpoints.open_checkpoint(tmp_path / "m").model
    total = sum(4 * int(np.prod(shape)) for shape in exporting.layout(model).tensors.values())
    usage = shutil.disk_usage(tmp_path)
    for free, ok in ((total + (1 << 20) - 1, False), (total + (1 << 20), True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, f=free: usage._replace(free=f))
        if ok:
            export(tmp_path / "m", tmp_path / "out", shard_bytes=60_000, quiet=True)
        else:
            with pytest.raises(CheckpointFileError, match="GB free"):
                export(tmp_path / "m", tmp_path / "out", shard_bytes=60_000, quiet=True)


def test_tensors_fill_a_file_up_to_its_limit():
    sizes = {"a": 3, "b": 3, "c": 4, "d": 9, "e": 1}
    cut = lambda limit: [list(shard) for shard in exporting._shards(sizes, limit)]
    assert cut(5) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert cut(6) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert cut(9) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert cut(10) == [["a", "b", "c"], ["d", "e"]]
    assert cut(20) == [["a", "b", "c", "d", "e"]]
    assert exporting._shards(sizes, 10)[1] == {"d": 9, "e": 1}


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_part_is_read_chunk_by_chunk(data):
    """The chunks cover a part once; each lies within one chunk of the array on disk."""
    block = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    shape = tuple(b * data.draw(st.integers(1, 3)) for b in block)
    values = np.arange(np.prod(shape)).reshape(shape)
    array = LazyArray(shape, values.dtype, tuple(block), values.__getitem__)
    where = []
    for length in shape[: data.draw(st.integers(0, len(shape)))]:
        start = data.draw(st.integers(0, length - 1))
        where.append(slice(start, data.draw(st.integers(start + 1, length))))
    part = values[tuple(where)]
    found, times = np.zeros_like(part), np.zeros_like(part)
    for chunk, inside in exporting._chunks(array, tuple(where)):
        found[inside] = array.read(chunk)
        times[inside] += 1
        for s, b in zip(chunk, block, strict=True):
            assert s.start // b == (s.stop - 1) // b
    np.testing.assert_array_equal(found, part)
    assert (times == 1).all()


def test_arrays_that_have_no_place_are_named(tmp_path):
    convert(RELEASED / "mqa", tmp_path / "m", quiet=True)
    opened = checkpoints.open_checkpoint(tmp_path / "m")
    arrays = exporting.lazy.open_arrays(opened.folder / "params")
    released = exporting.layout(opened.model)
    exporting._check_arrays(opened.folder, arrays, released)
    norm = arrays["final_norm.scale"]
    for changed, match in (
        ({"more.scale": norm}, "more.scale has no place in a released checkpoint"),
        ({"final_norm.scale": None}, r"final_norm.scale is missing, not of \[48\]"),
        (
            {"final_norm.scale": dataclasses.replace(norm, shape=(49,))},
            r"final_norm.scale is of shape \[49\], not of \[48\]",
        ),
    ):
        spoiled = {n: a for n, a in (arrays | changed).items() if a is not None}
        with pytest.raises(CheckpointFileError, match=match):
            exporting._check_arrays(opened.folder, spoiled, released)


def test_what_the_files_cannot_say_is_said():
    plain = preset("mlra_4")
    assert exporting._notes(plain, "mlra_4") == []
    unscaled = preset("mlra_2_no_scale")
    (note,) = exporting._notes(unscaled, "mlra_2")
    assert note.startswith("written as mlra_2;") and "_no_scale" in note
    assert isinstance(unscaled.attention, LatentConfig)
    other = dataclasses.replace(plain, norm_eps=1e-5, rope_base=5e5)
    assert exporting._notes(other, "mlra_4") == [
        "norm_eps=1e-05, and the released code has 1e-06",
        "rope_base=500000.0, and the released code has 10000.0",
    ]


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_have_no_released_format(name):
    with pytest.raises(ConfigError, match="no released model has such a part"):
        base_name(preset(name))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype(np.float16), np.float32, "float32"])
def test_dtypes_and_paths_as_people_pass_them(tmp_path, dtype):
    """By name, by class and by object; a path as text or as a Path."""
    name = str(np.dtype(dtype))
    convert(str(RELEASED / "mqa"), str(tmp_path / "made"), dtype=dtype, quiet=True)
    stored = checkpoints.open_checkpoint(tmp_path / "made").model
    export(str(tmp_path / "made"), str(tmp_path / "out"), dtype=dtype, quiet=True)
    with Weights(tmp_path / "out") as weights:
        assert {str(spec.dtype) for spec in weights.specs.values()} == {name}
        assert stored.param_dtype == weights.config["torch_dtype"] == name


def test_numbers_too_large_for_the_type_are_refused(tmp_path):
    """Not written as infinities."""
    convert(RELEASED / "mqa", tmp_path / "source", quiet=True)
    opened = checkpoints.open_checkpoint(tmp_path / "source")
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointer().restore(opened.folder / "params")
    params["final_norm"]["scale"][5] = 1e6
    with checkpoints.make_manager(tmp_path / "run") as manager:
        checkpoints.save(manager, 0, params=params, model=opened.read_json("model"))
        manager.wait_until_finished()
    with pytest.raises(CheckpointFileError, match="layernorm.weight has numbers too large for flo"):
        export(tmp_path / "run", tmp_path / "out", dtype="float16", quiet=True)
    assert not (tmp_path / "out").exists()
    export(tmp_path / "run", tmp_path / "out", dtype="bfloat16", quiet=True)
    with pytest.raises(ConfigError, match="dtype='int8' is none of"):
        export(tmp_path / "run", tmp_path / "none", dtype="int8", quiet=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_of_the_products_comes_back(dtype, tmp_path):
    """Whatever that of the tensors is; the released files have none, which is bfloat16."""
    source = tmp_path / "source"
    shutil.copytree(RELEASED / "gqa", source)
    described = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(described | {"compute_dtype": dtype}))
    convert(source, tmp_path / "run", quiet=True)
    assert checkpoints.open_checkpoint(tmp_path / "run").model.execution.dtype == dtype
    for stored in ("float32", "bfloat16"):
        out, again = tmp_path / f"out_{stored}", tmp_path / f"again_{stored}"
        export(tmp_path / "run", out, dtype=stored, quiet=True)
        exported = json.loads((out / "config.json").read_text())
        assert exported["torch_dtype"] == stored
        assert exported.get("compute_dtype") == (None if dtype == "bfloat16" else dtype)
        convert(out, again, quiet=True)
        config = checkpoints.open_checkpoint(again).model
        assert (config.execution.dtype, config.param_dtype) == (dtype, stored)


@pytest.mark.parametrize("tokenizer", [None, "bytes", "gpt2", "tiktoken:0123456789abcdef"])
def test_the_tokenizer_comes_back(tokenizer, tmp_path):
    convert(RELEASED / "gqa", tmp_path / "run", quiet=True)
    assert checkpoints.open_checkpoint(tmp_path / "run").tokenizer is None
    model = mlra_jax.load_trainable(tmp_path / "run")
    with checkpoints.make_manager(tmp_path / "named") as manager:
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        described = checkpoints.describe(model.config, tokenizer)
        checkpoints.save(manager, 0, params=params, model=described)
    export(tmp_path / "named", tmp_path / "out", quiet=True)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported.get("tokenizer", "absent") == (tokenizer or "absent")
    convert(tmp_path / "out", tmp_path / "again", quiet=True)
    assert checkpoints.open_checkpoint(tmp_path / "again").tokenizer == tokenizer


def test_the_published_vocabulary_is_gpt2s_and_not_written_down():
    large, small = (preset("gqa", vocab_size=size) for size in (GPT2_VOCABULARY, 264))
    assert (usual_tokenizer(large), usual_tokenizer(small)) == ("gpt2", None)


@pytest.mark.parametrize("value", ["byte", "tiktoken:x", 7, ["bytes"]])
def test_what_is_no_tokenizer_is_refused(value, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(RELEASED / "gqa", source)
    described = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(described | {"tokenizer": value}))
    with pytest.raises(CheckpointFileError, match="config.json: tokenizer=.* is no tokenizer's na"):
        convert(source, tmp_path / "never", quiet=True)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("value", ["int8", None, ["float32"]])
def test_an_unknown_dtype_of_the_products_is_refused(value, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(RELEASED / "gqa", source)
    described = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(described | {"compute_dtype": value}))
    with pytest.raises(
        CheckpointFileError, match="source: config.json: compute_dtype=.* is none"
    ) as caught:
        convert(source, tmp_path / "never", quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "never").exists()
