"""Conversion: what it refuses, what it leaves behind, and what lies on disk afterwards."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import sys
import types
import zipfile

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import mlra_jax
from mlra_jax import checkpoints
from mlra_jax.checkpoints import CheckpointError
from mlra_jax.config import ConfigError
from mlra_jax.convert import CheckpointFileError, convert
from mlra_jax.convert import __main__ as command
from mlra_jax.convert.lazy import open_arrays
from mlra_jax.convert.released import EMBEDDING, HEAD
from mlra_jax.convert.torch_format.reader import TorchFile
from mlra_jax.convert.weights import read_json
from mlra_jax.extras import install_line
from mlra_jax.files import only_writer
from mlra_jax.sharding import mesh_sizes

from .files import RELEASED, archive, read_folder, training_pickle, write_folder

SHARDS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
INDEX = "pytorch_model.bin.index.json"
QUERY = "transformer.h.1.attn.c_q.weight"


@pytest.fixture(scope="module")
def mha():
    return read_folder(RELEASED / "mha"), read_json(RELEASED / "mha" / "config.json")


@pytest.fixture(scope="module")
def converted(released):
    return released("mlra_4")


def params_of(folder):
    arrays = open_arrays(checkpoints.open_checkpoint(folder).folder / "params")
    return {
        path: array.read(tuple(slice(0, n) for n in array.shape)) for path, array in arrays.items()
    }


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(arrays, name):
    return {n: a for n, a in arrays.items() if n != name}


# Each takes a copy of a released folder and spoils it.
def _remap(folder, name, shard):
    path = folder / INDEX
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=weight_map | {name: shard})


def _damage(folder):
    path = folder / SHARDS[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder):
    path = folder / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-1000])


SPOILED_FOLDERS = {
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]}: this shard is missing"),
    "damaged shard": (_damage, f"{SHARDS[1]}: .* is damaged"),
    "truncated shard": (_truncate, SHARDS[0]),
    "index leads out": (lambda f: _remap(f, QUERY, "../mha/x.bin"), "no file name"),
    "index is absolute": (lambda f: _remap(f, QUERY, "/etc/passwd"), "no file name"),
    "index names dots": (lambda f: _remap(f, QUERY, ".."), "no file name"),
    "index names a long file": (lambda f: _remap(f, QUERY, "x" * 300), "no file name"),
    "size is nested": (lambda f: edit_json(f / "config.json", n_head=[[[]]]), "n_head='list'"),
    "index of no text": (lambda f: _remap(f, QUERY, 7), "no file name"),
    "index in wrong shard": (lambda f: _remap(f, QUERY, SHARDS[1]), QUERY),
    "index of more": (lambda f: _remap(f, "more", SHARDS[0]), "'more' is in the index"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "index is no JSON": (lambda f: (f / INDEX).write_text('{"weight_map": {'), "JSON"),
    "index nested deeply": (lambda f: (f / INDEX).write_text("[" * 100_000), "JSON"),
    "index names twice": (lambda f: (f / INDEX).write_text('{"a": 1, "a": 2}'), "twice"),
    "index is huge": (
        lambda f: (f / INDEX).write_text('{"weight_map": [' + "{}," * 1_400_000 + "{}]}"),
        "too many for this file",
    ),
    "config unreadable": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json"),
    "config absent": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config lacks a size": (
        lambda f: (f / "config.json").write_text('{"n_head": 4, "head_dim": 16}'),
        "vocab_size is missing",
    ),
    "size is text": (lambda f: edit_json(f / "config.json", n_embd="48"), "n_embd='48'"),
    "size is absurd": (lambda f: edit_json(f / "config.json", n_layer=10**8), "n_layer=100000000"),
    "size is negative": (lambda f: edit_json(f / "config.json", vocab_size=-1), "vocab_size=-1"),
    "other size": (lambda f: edit_json(f / "config.json", n_embd=64), "shape .* instead of"),
    "more layers": (lambda f: edit_json(f / "config.json", n_layer=3), r"h\.2\..* is missing"),
    "fewer layers": (lambda f: edit_json(f / "config.json", n_layer=1), r"h\.1\..* is no tensor"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.bin*")], "none of pytorch_model"),
}


def refuse(match, source, tmp_path, out=None, **flags):
    """Conversion ends with one line, the result, and nothing is there that was not there before."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises((CheckpointFileError, ConfigError), match=match) as caught:
        convert(source, out or tmp_path / "out", quiet=True, note=lambda line: None, **flags)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("fault", SPOILED_FOLDERS)
def test_spoiled_folder(fault, tmp_path):
    spoil, match = SPOILED_FOLDERS[fault]
    folder = shutil.copytree(RELEASED / "mha", tmp_path / "mha")
    spoil(folder)
    assert str(folder) in refuse(match, folder, tmp_path)


SPOILED_TENSORS = {
    "missing": (lambda a: without(a, QUERY), f"{QUERY} is missing"),
    "embedding missing": (
        lambda a: without(without(a, HEAD), EMBEDDING),
        f"{EMBEDDING} is missing",
    ),
    "extra": (lambda a: a | {"extra.weight": a[QUERY]}, "extra.weight is no tensor of this model"),
    "wrong shape": (lambda a: a | {QUERY: a[QUERY][:-1]}, rf"{QUERY} has shape \[63, 48\]"),
    "transposed": (lambda a: a | {QUERY: a[QUERY].T.copy()}, rf"{QUERY} has shape \[48, 64\]"),
    "int64": (lambda a: a | {QUERY: a[QUERY].astype(np.int64)}, f"{QUERY} has dtype int64"),
    "quantised": (
        lambda a: {n: x.astype(np.int8) for n, x in a.items()},
        "has dtype int8; .* are the weights quantised",
    ),
    "untied": (lambda a: a | {HEAD: a[HEAD] + 1}, f"{EMBEDDING} and {HEAD} differ"),
    "unknown": (
        lambda a: {n.replace("c_q", "zz"): v for n, v in a.items()},
        "no attention variant",
    ),
}


@pytest.mark.parametrize("fault", SPOILED_TENSORS)
def test_spoiled_tensors(fault, mha, tmp_path):
    arrays, config = mha
    spoil, match = SPOILED_TENSORS[fault]
    folder = write_folder(tmp_path / "mha", spoil(dict(arrays)), config)
    assert str(folder) in refuse(match, folder, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers_that_are_not_finite_are_refused(mha, tmp_path, dtype):
    """In any tensor, in any place of it; `allow_nonfinite` takes them as they are."""
    arrays, config = mha
    name = "transformer.h.1.mlp.c_fc1.weight"
    spoiled = arrays[name].copy()
    spoiled[-1, [0, 3, -1]] = np.nan, np.inf, -np.inf
    folder = write_folder(tmp_path / "mha", dict(arrays) | {name: spoiled}, config)
    line = f"tensor {name} has 3 of {spoiled.size} numbers that are not finite; give --allow_nonf"
    refuse(line, folder, tmp_path, dtype=dtype)
    convert(folder, tmp_path / "out", dtype=dtype, quiet=True, allow_nonfinite=True)
    values = np.concatenate([x.reshape(-1) for x in params_of(tmp_path / "out").values()])
    assert np.count_nonzero(~np.isfinite(values)) == 3
    with pytest.raises(CheckpointError, match="not finite"):
        mlra_jax.load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "variant", "match"),
    [
        ("mha", "mla", "disagree"),
        ("mlra_4", "mlra_2", "disagree: .* mlra_4's"),
        ("mlra_4", "mlra_4_gated", "disagree"),
        ("mha", "mha_no_scale", "no factors"),
        ("mha", "transformer", "no released variant"),
        ("mlra_2_no_scale", None, "--variant=mlra_2_no_scale or --variant=mlra_2"),
    ],
)
def test_variant_is_checked(name, variant, match, tmp_path):
    refuse(match, RELEASED / name, tmp_path, variant=variant)


def test_variant_says_what_weights_cannot(tmp_path):
    notes = []
    made = [
        convert(RELEASED / "mlra_2", tmp_path / str(i), variant=v, quiet=True, note=notes.append)
        for i, v in enumerate([None, "mlra_2", "mlra_2_no_scale", "mlra_2_normal_initialization"])
    ]
    assert [config.attention.scaled for config in made] == [True, True, False, True]
    assert [config.zero_init for config in made] == [True, True, True, False]
    assert len(notes) == 1 and "--variant=mlra_2_no_scale" in notes[0]
    stored = [checkpoints.open_checkpoint(tmp_path / str(i)).model for i in range(4)]
    assert stored == made


def test_destination_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    refuse("exists already", RELEASED / "mha", tmp_path)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refuse("GB free", RELEASED / "mha", tmp_path)
        # Room for what is written beside the weights, and not for all of them.
        usage = usage._replace(free=(64 << 20) + 1000)
        refuse("GB free", RELEASED / "mha", tmp_path)
    # A disk that fills up meanwhile: no file may grow beyond some kilobytes.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        refuse(r"out: not done \(File too large\)", RELEASED / "mha", tmp_path)
        refuse(r"out: not done \(File", RELEASED / "mha", tmp_path, out=tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_interrupted_and_repeated(tmp_path, monkeypatch):
    """Ctrl-C leaves nothing, whenever; what a killed run left is swept by the next."""
    from mlra_jax.convert import conversion

    def interrupted_in(step, after, act):
        original, calls = getattr(conversion, step), []

        def stop(*arguments):
            calls.append(step)
            if len(calls) <= after:
                return original(*arguments)
            assert (tmp_path / ".out.partial" / "checkpoints").exists()
            act()
            return original(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(conversion, step, stop)
            convert(RELEASED / "mha", tmp_path / "out", quiet=True)
        assert not list(tmp_path.iterdir())

    def raising():
        raise KeyboardInterrupt

    interrupted_in("cast", 0, raising)
    interrupted_in("cast", 10, raising)
    interrupted_in("_verify", 0, raising)
    # Parallel test workers ignore the signal; a command does not.
    handler = signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    interrupted_in("cast", 10, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, before)

    partial = tmp_path / ".out.partial"
    (partial / "checkpoints" / "0" / "params").mkdir(parents=True)
    (partial / "checkpoints" / "0" / "params" / "junk").write_text("half")
    with only_writer(tmp_path / ".out.lock", tmp_path / "out"):
        refuse(f"process {os.getpid()} on .* is writing", RELEASED / "mha", tmp_path)
    convert(RELEASED / "mha", tmp_path / "out", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").rglob("junk"))


def test_a_write_that_lies_is_found(tmp_path, monkeypatch):
    from mlra_jax.convert import conversion

    write = conversion._write

    def lying(folder, arrays, described, progress):
        sums = write(folder, arrays, described, progress)
        data = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        changed = bytearray(data.read_bytes())
        changed[len(changed) // 2] ^= 1
        data.write_bytes(changed)
        return sums

    monkeypatch.setattr(conversion, "_write", lying)
    refuse("Digest mismatch", RELEASED / "mha", tmp_path)


def test_any_orbax_manager_restores_it(converted):
    """With arguments and without, as any Orbax checkpoint; the values are the released ones."""
    source = read_folder(RELEASED / "mlra_4")
    shape = jax.ShapeDtypeStruct(
        (96, 48), np.float32, sharding=mlra_jax.sharding.named(mlra_jax.make_mesh(fsdp=8), "vocab")
    )
    with ocp.CheckpointManager(converted / "checkpoints") as manager:
        assert manager.all_steps() == [0]
        restored = manager.restore(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(), model=ocp.args.JsonRestore()
            ),
        )
        tree = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), restored.params)
        tree["embed"]["embedding"] = shape
        again = manager.restore(0, args=ocp.args.Composite(params=ocp.args.StandardRestore(tree)))
    embedding = again.params["embed"]["embedding"]
    assert isinstance(embedding, jax.Array) and embedding.sharding == shape.sharding
    np.testing.assert_array_equal(embedding, source[EMBEDDING])
    up = source["transformer.h.1.attn.kv_b_proj"]  # [latent, width, heads * (key, value)]
    for p in range(16):
        latent, head = p // 4, p % 4
        both = up[latent].reshape(16, 4, 2, 16)[:, head]
        np.testing.assert_array_equal(
            restored.params["layers"]["attention"]["k_up"]["kernel"][1, p], both[:, 0]
        )
        np.testing.assert_array_equal(
            restored.params["layers"]["attention"]["v_up"]["kernel"][1, p], both[:, 1]
        )
    assert restored.model["format_version"] == 1 and restored.model["tokenizer"] is None


def test_tree_is_the_models(converted):
    """Not only the leaves that loading needs: the checkpoint's description and names are whole."""
    config = checkpoints.open_checkpoint(converted).model
    assert config == dataclasses.replace(
        mlra_jax.preset("mlra_4"),
        attention=dataclasses.replace(
            mlra_jax.preset("mlra_4").attention,
            num_heads=4, latent_dim=64, q_latent_dim=24, nope_dim=16, rope_dim=8,
        ),
        vocab_size=96, num_layers=2, embed_dim=48, mlp_dim=64, context_length=64,
    )  # fmt: skip


def frequencies(base):
    return (base ** -(np.arange(8) / 8)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(mha, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "out"
    convert(RELEASED / "mha", folder, quiet=True)
    return params_of(folder)


TRAINERS = {
    "compiled": (lambda a: {f"_orig_mod.{n}": x for n, x in a.items()}, "begins with _orig_mod.;"),
    "parallel": (lambda a: {f"module.{n}": x for n, x in a.items()}, "begins with module.;"),
    "both": (
        lambda a: {f"module._orig_mod.{n}": x for n, x in a.items()},
        "begins with module._orig_mod.;",
    ),
    "frequencies": (
        lambda a: a | {"transformer.h.0.attn.rotary.inv_freq": frequencies(1e4)},
        "left out: transformer.h.0.attn.rotary.inv_freq$",
    ),
    "tables": (
        lambda a: a | {f"transformer.rotary_emb.{n}": np.ones((9, 8)) for n in ("cos", "sin")},
        "left out: transformer.rotary_emb.cos and 1 more$",
    ),
    "masks": (
        lambda a: a | {"transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 9, 9), np.bool_))},
        "left out: transformer.h.0.attn.bias$",
    ),
}


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_what_trainers_leave_around_the_weights(kind, suffix, mha, plain, tmp_path):
    arrays, config = mha
    change, said = TRAINERS[kind]
    source = write_folder(tmp_path / "mha", change(dict(arrays)), config)
    if suffix == "safetensors":
        (source / "pytorch_model.bin").unlink()
        save_file(change(dict(arrays)), source / "model.safetensors")
    notes = []
    convert(source, tmp_path / "out", quiet=True, note=notes.append)
    assert len(notes) == 1 and re.search(said, notes[0])
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "out"), plain)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda a: a | {"rotary.inv_freq": frequencies(5e5)},
            "rotary.inv_freq: rotary frequencies",
        ),
        (lambda a: a | {"rotary.proj.weight": np.ones(3, np.float32)}, "weight is no tensor of"),
        # A prefix of one name is no wrapper's.
        (lambda a: without(a, QUERY) | {f"module.{QUERY}": a[QUERY]}, f"{QUERY} is missing"),
    ],
)
def test_what_may_do_harm_is_refused(change, match, mha, tmp_path):
    source = write_folder(tmp_path / "mha", change(dict(mha[0])), mha[1])
    refuse(match, source, tmp_path)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_model_inside_a_training_dictionary(key, mha, plain, tmp_path):
    """As a compiled model is saved while it is trained: with prefixes, too."""
    arrays, config = mha
    arrays = {f"_orig_mod.{name}": array for name, array in arrays.items()}
    source = write_folder(tmp_path / "mha", arrays, config)
    path = source / "pytorch_model.bin"
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with contextlib.closing(TorchFile(path)) as file:
        state = {"param_groups": [{"lr": 1e-4, "params": [0, 1]}], "state": {0: {"step": 3.0}}}
        pickled = training_pickle(file._tensors, key, optimizer=state, iter_num=7)
    path.write_bytes(archive(entries | {"pytorch_model/data.pkl": pickled}))
    notes = []
    convert(source, tmp_path / "out", quiet=True, note=notes.append)
    assert len(notes) == 2 and "begins with _orig_mod." in notes[1]
    assert notes[0] == (
        f"pytorch_model.bin is of a training run; its {key!r} is read and the rest left out"
    )
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "out"), plain)


@pytest.mark.parametrize("name", ["conv[1]", "a[b]/conv", "conv\\1", "conv*"])
def test_a_destination_that_is_a_pattern_is_refused(tmp_path, name):
    """At once: the source is not even looked for."""
    with pytest.raises(CheckpointError, match="cannot be written to .*; choose one without"):
        convert(tmp_path / "absent", tmp_path / name, quiet=True)
    assert not list(tmp_path.iterdir())


def test_dtypes(mha, tmp_path):
    arrays, config = mha
    convert(RELEASED / "mha", tmp_path / "b", dtype="bfloat16", quiet=True)
    assert checkpoints.open_checkpoint(tmp_path / "b").model.param_dtype == "bfloat16"
    embedding = params_of(tmp_path / "b")["embed.embedding"]
    np.testing.assert_array_equal(embedding, arrays[EMBEDDING].astype(ml_dtypes.bfloat16))
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        narrow = {name: array.astype(dtype) for name, array in arrays.items()}
        source = write_folder(tmp_path / f"{dtype}_source", narrow, config)
        made = convert(source, tmp_path / f"{dtype}", quiet=True)
        kept = params_of(tmp_path / f"{dtype}")["layers.attention.q.kernel"]
        assert made.param_dtype == dtype.name and kept.dtype == dtype
        wanted = narrow[QUERY].reshape(4, 16, 48).transpose(2, 0, 1)
        assert kept[1].tobytes() == wanted.tobytes()
    large = write_folder(tmp_path / "large", arrays | {QUERY: arrays[QUERY] + 1e6}, config)
    refuse(f"{QUERY} has numbers too large for float16", large, tmp_path, dtype="float16")
    refuse("dtype='int8' is none of float32, ", large, tmp_path, dtype="int8")


def test_mesh_layout(tmp_path):
    mesh = mesh_sizes("tensor=4,fsdp=2")
    convert(RELEASED / "mlra_4", tmp_path / "m", mesh=mesh, quiet=True, note=lambda line: None)
    arrays = open_arrays(checkpoints.open_checkpoint(tmp_path / "m").folder / "params")
    assert arrays["layers.attention.k_up.kernel"].shape == (2, 16, 16, 16)
    assert arrays["layers.attention.k_up.kernel"].chunk == (1, 4, 8, 16)
    assert arrays["layers.mlp.down.kernel"].chunk == (1, 16, 24)
    assert arrays["embed.embedding"].chunk == (24, 24)
    plain = tmp_path / "plain"
    convert(RELEASED / "mlra_4", plain, quiet=True, note=lambda line: None)
    laid_out = params_of(tmp_path / "m")
    for path, array in params_of(plain).items():
        np.testing.assert_array_equal(array, laid_out[path])
    refuse("does not divide", RELEASED / "mlra_4", tmp_path, mesh=mesh_sizes("tensor=3"))
    for text in ("tensor", "tensor=0", "tensor=x", "tensors=4", "tensor=4,,", ","):
        with pytest.raises(ConfigError, match="--mesh="):
            mesh_sizes(text)


def test_a_mesh_reads_each_byte_once(mha, converted, tmp_path):
    """Four devices read together hardly more than the arrays have bytes."""
    rng = np.random.default_rng(0)
    sizes = dict(
        vocab_size=8192, n_embd=256, n_layer=2, n_head=8, head_dim=64, intermediate_size=2048
    )
    shapes = {
        "attn.c_q": (512, 256), "attn.c_k": (512, 256), "attn.c_v": (512, 256),
        "attn.c_proj": (256, 512), "mlp.c_fc1": (2048, 256), "mlp.c_fc2": (2048, 256),
        "mlp.c_proj": (256, 2048), "input_layernorm": (256,), "post_attention_layernorm": (256,),
    }  # fmt: skip
    arrays = {"layernorm.weight": np.ones(256, np.float32)}
    for i in range(2):
        for name, shape in shapes.items():
            arrays[f"transformer.h.{i}.{name}.weight"] = rng.standard_normal(shape, np.float32)
    arrays[EMBEDDING] = arrays[HEAD] = rng.standard_normal((8192, 256), np.float32)
    source = write_folder(tmp_path / "source", arrays, mha[1] | sizes)
    convert(source, tmp_path / "out", mesh=mesh_sizes("tensor=4"), quiet=True)

    def read_so_far():
        with open("/proc/self/io") as file:
            return int(file.readline().removeprefix("rchar: "))

    total = sum(array.nbytes for name, array in arrays.items() if name != HEAD)
    # The first load also reads the modules that it imports.
    mlra_jax.load_model(converted, mesh=mlra_jax.make_mesh(tensor=4))
    before = read_so_far()
    mlra_jax.load_model(tmp_path / "out", mesh=mlra_jax.make_mesh(tensor=4))
    read = read_so_far() - before
    assert total < read < 1.05 * total


def test_command_line(tmp_path, capsys):
    source = f"--source={RELEASED / 'mlra_4'}"
    assert command.main([source, f"--destination={tmp_path / 'm'}", "--mesh=tensor=2"]) == 0
    assert "mlra_4_no_scale" in capsys.readouterr().out
    assert command.main([source, f"--destination={tmp_path / 'm'}"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "exists already" in captured.err
    assert command.main(["--source=/absent", f"--destination={tmp_path / 'n'}"]) == 1
    assert capsys.readouterr().err.endswith("--source=/absent: no such folder\n")
    with pytest.raises(SystemExit) as caught:
        command.main([source])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_flag_of_the_command_line_arrives(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "convert", lambda *paths, **rest: asked.append((paths, rest)))
    flags = ["--source=S", "--destination=D"]
    assert command.main(flags) == 0
    sizes = ["--variant=mla_no_scale", "--dtype=float16", "--mesh=tensor=4,fsdp=2"]
    sizes += ["--expected=E", "--allow_nonfinite"]
    assert command.main([*flags, *sizes]) == 0
    mesh = dict(data=1, fsdp=2, tensor=4, context=1)
    assert asked == [
        (
            ("S", "D"),
            dict(variant=None, dtype=None, mesh=None, expected=None, allow_nonfinite=False),
        ),
        (
            ("S", "D"),
            dict(
                variant="mla_no_scale",
                dtype="float16",
                mesh=mesh,
                expected="E",
                allow_nonfinite=True,
            ),
        ),
    ]


def test_hub(tmp_path, monkeypatch):
    """Downloads go through huggingface_hub; without it, or without network, there is one line."""
    asked = {}

    def snapshot_download(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        return str(RELEASED)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    convert("someone/models/mha", tmp_path / "m", quiet=True)
    assert asked["repo"] == "someone/models"
    assert "mha/config.json" in asked["patterns"] and "mha/pytorch_model-*.bin" in asked["patterns"]
    assert checkpoints.finished_steps(tmp_path / "m") == [0]
    refuse("no folder 'absent'", "someone/models/absent", tmp_path)
    refuse("no such folder", "someone/models/../mha", tmp_path)

    def offline(*_, **__):
        raise ConnectionError("no route to host\nand more")

    hub.snapshot_download = offline
    refuse(
        "not fetched .*no route to host and more.; check the name and the network",
        "someone/models/mha",
        tmp_path,
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse(f"hub: {re.escape(install_line('hub'))}$", "someone/models/mha", tmp_path)
