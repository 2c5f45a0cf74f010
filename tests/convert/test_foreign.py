"""Weights that others saved: converted with a note, or refused with what was found and why."""

import json
import pickle
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlra_jax import checkpoints
from mlra_jax.convert import CheckpointFileError, convert, foreign
from mlra_jax.convert.exporting import export
from mlra_jax.convert.released import EMBEDDING, HEAD
from mlra_jax.convert.weights import read_json

from .files import RELEASED, read_folder, write_folder
from .test_convert import params_of, without

BF16 = np.dtype(ml_dtypes.bfloat16)
NORM = "transformer.h.0.input_layernorm.weight"
MLP = "transformer.h.1.mlp.c_fc1.weight"


@pytest.fixture(scope="module")
def mha():
    return read_folder(RELEASED / "mha"), read_json(RELEASED / "mha" / "config.json")


def written(folder, arrays, config, suffix="bin"):
    write_folder(folder, arrays, config)
    if suffix == "safetensors":
        (folder / "pytorch_model.bin").unlink()
        save_file(dict(arrays), folder / "model.safetensors")
    return folder


def converted(source, destination, **options):
    notes = []
    config = convert(source, destination, quiet=True, note=notes.append, **options)
    return config, params_of(destination), notes


def refused(match, source, destination, **options):
    with pytest.raises(CheckpointFileError, match=match) as error:
        convert(source, destination, quiet=True, **options)
    assert "\n" not in str(error.value) and not destination.exists()


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize(("absent", "other"), [(HEAD, EMBEDDING), (EMBEDDING, HEAD)])
def test_one_name_of_the_tied_tensor_is_enough(absent, other, suffix, mha, tmp_path):
    arrays, config = mha
    source = written(tmp_path / "mha", without(arrays, absent), config, suffix)
    _, params, notes = converted(source, tmp_path / "out")
    assert notes == [f"{absent} is not there: {other} is both, as in all these models"]
    np.testing.assert_array_equal(params["embed.embedding"], arrays[EMBEDDING])


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_head_of_its_own_is_named_where_it_differs(suffix, mha, tmp_path):
    arrays, config = mha
    head = arrays[HEAD].copy()
    head[5, 3] = 2.5
    source = written(tmp_path / "mha", arrays | {HEAD: head}, config, suffix)
    there = re.escape(f"({arrays[HEAD][5, 3]} and 2.5)")
    refused(
        f"differ, first in row 5, column 3 {there}; a model has one .* a head of its own",
        source, tmp_path / "out",
    )  # fmt: skip


def cast(arrays, dtype, chosen=lambda name: True):
    return {n: x.astype(dtype) if chosen(n) else x for n, x in arrays.items()}


MIXED = {
    "bfloat16 with float32 norms": lambda a: cast(a, BF16, lambda n: "norm" not in n),
    "float32 with a float16 layer": lambda a: cast(a, np.float16, lambda n: ".h.1." in n),
    "float16 and bfloat16": lambda a: cast(cast(a, np.float16), BF16, lambda n: "mlp" in n),
    "one in float64": lambda a: cast(a, np.float64, lambda n: n == NORM),
    "all in float64": lambda a: cast(a, np.float64),
}


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_floats_are_stored_in_what_holds_them_all(kind, mha, tmp_path):
    arrays, config = MIXED[kind](mha[0]), mha[1]
    suffix = "safetensors" if kind.startswith("float") else "bin"
    source = written(tmp_path / "mha", arrays, config, suffix)
    model, params, notes = converted(source, tmp_path / "out")
    assert model.param_dtype == "float32" and len(notes) == 1
    for dtype in {array.dtype for array in arrays.values()}:
        assert f"{dtype} (as " in notes[0]
    assert "stored as float32 unless --dtype says another" in notes[0]
    plain = cast(arrays, np.float32)
    np.testing.assert_array_equal(params["layers.attention_norm.scale"][0], plain[NORM])
    np.testing.assert_array_equal(params["layers.mlp.gate.kernel"][1], plain[MLP].T)
    if suffix == "bin":
        return
    model, params, _ = converted(source, tmp_path / "narrow", dtype="bfloat16")
    assert model.param_dtype == "bfloat16"
    np.testing.assert_array_equal(params["layers.mlp.gate.kernel"][1], arrays[MLP].T.astype(BF16))


def test_a_number_that_float32_has_not_is_refused(mha, tmp_path):
    arrays, config = cast(mha[0], np.float64), mha[1]
    arrays[MLP][0, 0] = 1e300
    source = written(tmp_path / "mha", arrays, config)
    refused(f"tensor {MLP} has numbers too large for float32", source, tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [(MLP, np.nan), (NORM, np.inf), (EMBEDDING, -np.inf)])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_weights_that_are_not_finite_are_refused(name, value, dtype, mha, tmp_path):
    arrays, config = cast(without(mha[0], HEAD), dtype), mha[1]
    arrays[name].flat[-1] = value
    source = written(tmp_path / "mha", arrays, config)
    refused(
        f"{name} has 1 of .* numbers that are not finite; give --allow_nonf", source, tmp_path / "o"
    )


@pytest.mark.parametrize(
    ("said", "base"),
    [
        ({"rope_theta": 500000, "rope_scaling": None}, 5e5),
        ({"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}, 2e4),
    ],
)
def test_the_rotary_base_of_the_config_is_used_and_comes_back(said, base, mha, tmp_path):
    arrays, config = mha
    frequencies = (base ** -(np.arange(8) / 8)).astype(np.float32)
    arrays = arrays | {"transformer.rotary.inv_freq": frequencies}
    source = written(tmp_path / "mha", arrays, config | said)
    model, _, _ = converted(source, tmp_path / "out")
    assert model.rope_base == checkpoints.open_checkpoint(tmp_path / "out").model.rope_base == base
    export(tmp_path / "out", tmp_path / "back", quiet=True, note=lambda line: None)
    assert converted(tmp_path / "back", tmp_path / "again")[0] == model
    # Frequencies and config must agree.
    other = written(tmp_path / "other", arrays, config | {"rope_theta": base * 1.5})
    refused(
        "rotary frequencies of another base than .*; say theirs with rope_theta",
        other,
        tmp_path / "o",
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope_theta": "1e4"}, "config.json: rope_theta='1e4' is no positive number"),
        ({"rope_theta": 0}, "rope_theta=0 is no positive number"),
        ({"rope_theta": True}, "rope_theta=True is no positive"),
        ({"rope_theta": 0.5}, r"rope_base=0.5 must lie in \[1, inf\)"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "frequencies are scaled .'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "frequencies are scaled .'yarn'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1 is no positive number"),
    ],
)
def test_what_the_config_cannot_mean_is_refused(said, message, mha, tmp_path):
    refused(message, written(tmp_path / "mha", mha[0], mha[1] | said), tmp_path / "out")


def test_the_eps_of_the_config_is_used(mha, tmp_path):
    source = written(tmp_path / "mha", mha[0], mha[1] | {"rms_norm_eps": 1e-5})
    assert converted(source, tmp_path / "out")[0].norm_eps == 1e-5


class Trap:
    def __reduce__(self):
        return (open, ("TRAP", "w"))


def legacy(protocol=2):
    """As torch.save wrote before 1.6: three pickles, then more."""
    magic = 0x1950A86A20F9469CFC6C
    return b"".join(
        pickle.dumps(x, protocol) for x in (magic, 1001, {"little_endian": True}, Trap())
    )


NO_ARCHIVE = {
    "legacy": (legacy(), "is weights as PyTorch saved them before 1.6, .* torch.save(torch.load("),
    "pickle": (
        pickle.dumps({"w": Trap()}, 4),
        "is a Python pickle, a program that is not run; sav",
    ),
    "safetensors": (
        struct.pack("<Q", 2) + b"{}",
        "is probably a .safetensors file; call it model.s",
    ),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF model, no weights as torch.save"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file, no weights"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "is gzip data, no weights"),
    "numpy": (b"\x93NUMPY\x01\0" + bytes(99), "is a NumPy array, no weights"),
    "unknown": (
        b"\x01\x02\x03\x04abcdefgh" + bytes(99),
        "begins with b'\\x01\\x02\\x03\\x04abcdefgh'",
    ),
}


@pytest.mark.parametrize("kind", NO_ARCHIVE)
def test_what_is_no_weight_file_is_named_and_not_run(kind, mha, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = NO_ARCHIVE[kind]
    source = written(tmp_path / "mha", mha[0], mha[1])
    (source / "pytorch_model.bin").write_bytes(content)
    refused(re.escape(message).replace("\\ \\.\\*\\ ", " .* "), source, tmp_path / "out")
    if kind != "safetensors":
        (source / "pytorch_model.bin").unlink()
        (source / "model.safetensors").write_bytes(content)
        refused(
            "model.safetensors: no safetensors file|no whole safetensors", source, tmp_path / "o"
        )
    assert not (tmp_path / "TRAP").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"],
         "there are lm_head.weight, model.embed_tokens.weight, .* as of a model of the Llama kind"),
        (["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"],
         "has the tensors in transformer.h.0.attn.: c_attn.weight, as of GPT-2 or nanoGPT"),
        (["gpt_neox.layers.0.attention.dense.weight"], "as of GPT-NeoX"),
        (["base.h.0.attn.c_q.lora_A.weight"], "as of an adapter .LoRA., which must be merged"),
        (["a", "b", "c", "d", "e"], "there are a, b, c and 2 more, as of another model"),
    ],
)  # fmt: skip
def test_another_models_names_are_named(names, message, mha, tmp_path):
    arrays = {name: np.ones((2, 2), np.float32) for name in names}
    refused(message, written(tmp_path / "mha", arrays, mha[1]), tmp_path / "out")
    assert json.loads((tmp_path / "mha" / "config.json").read_text()) == mha[1]


@pytest.mark.parametrize(
    "prefix", ["model.", "_forward_module.", "_forward_module.model._orig_mod."]
)
def test_prefixes_of_trainers_are_taken_off(prefix, mha, tmp_path):
    names, notes = foreign.plain_names([prefix + name for name in mha[0]])
    assert set(names) == set(mha[0]) and prefix in notes[0]


def test_a_float8_file_is_refused_as_quantised(mha, tmp_path):
    source = written(tmp_path / "mha", mha[0], mha[1])
    (source / "pytorch_model.bin").unlink()
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (source / "model.safetensors").write_bytes(content)
    refused("'w' has the dtype F8_E4M3; are the weights quantised", source, tmp_path / "out")


def test_what_nothing_is_said_of_has_the_released_value():
    for values in ({}, {"rope_theta": None, "rope_scaling": None, "rms_norm_eps": None}):
        assert (foreign.rope_base(values), foreign.norm_eps(values)) == (1e4, 1e-6)
