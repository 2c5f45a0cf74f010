"""Every number of every leaf lies where it belongs, however it is cut, cast and spread."""

import contextlib
import itertools
import json
import shutil
import zlib

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mlra_jax import checkpoints
from mlra_jax.config import preset
from mlra_jax.convert import CheckpointFileError, chunks, conversion, convert, lazy, released
from mlra_jax.convert.exporting import export
from mlra_jax.convert.released import EMBEDDING, HEAD, LAYER, layout
from mlra_jax.settings_tree import flatten

from .files import FOLDERS, RELEASED, read_folder, write_folder

TYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]


def leaves_of(folder):
    """All leaves by dotted path, read by Orbax alone."""
    tree = ocp.StandardCheckpointer().restore(checkpoints.open_checkpoint(folder).folder / "params")
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def by_hand(released, config):
    """The same leaves from the released tensors, index by index."""
    a, leaves = config.attention, {}
    layer = lambda i: {
        name.removeprefix(LAYER.format(i)): array
        for name, array in released.items()
        if name.startswith(LAYER.format(i))
    }
    layers = [layer(i) for i in range(config.num_layers)]
    linear = {"mlp.gate": "mlp.c_fc1", "mlp.up": "mlp.c_fc2", "mlp.down": "mlp.c_proj"}
    vectors = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    # (inputs, heads, width) where an output has heads.
    heads = {}
    kind = a.kind
    if kind == "latent":
        linear["attention.q_down"] = "attn.q_a_proj"
        heads["attention.q_up"] = "attn.q_b_proj", a.num_heads
        vectors["attention.q_norm"] = "attn.q_a_layernorm"
        if a.gated:
            heads["attention.gate"] = "attn.gated_proj", a.num_heads
    elif kind == "tensor_product":
        for x, y in itertools.product("qkv", "ab"):
            name = f"attn.c_qkv.W_{y.upper()}_{x}"
            rank = a.q_rank if x == "q" else a.rank
            heads[f"attention.{x}_{y}"] = name, a.num_heads if y == "a" else rank
    elif kind == "multi_matrix":
        linear |= {"attention.q_down": "attn.c_q"}
        linear |= {"attention.k": "attn.c_k", "attention.v": "attn.c_v"}
        heads["attention.q_up"] = "attn.w_q", a.num_heads
        vectors["attention.q_norm"] = "attn.q_layernorm"
    else:
        heads["attention.q"] = "attn.c_q", a.num_heads
        if kind == "tied":
            heads["attention.kv"] = "attn.kv_proj", a.num_kv_heads
            linear["attention.k_rope"] = "attn.W_rope_k"
        else:
            heads["attention.k"] = "attn.c_k", a.num_kv_heads
            heads["attention.v"] = "attn.c_v", a.num_kv_heads
            if a.gated:
                heads["attention.gate"] = "attn.c_gated", a.num_heads

    def stack(path, of_layer):
        leaves[f"layers.{path}"] = np.stack([of_layer(tensors) for tensors in layers])

    for path, name in vectors.items():
        stack(f"{path}.scale", lambda t, name=name: t[f"{name}.weight"])
    for path, name in linear.items():
        stack(f"{path}.kernel", lambda t, name=name: t[f"{name}.weight"].T)
    for path, (name, count) in heads.items():
        stack(
            f"{path}.kernel",
            lambda t, name=name, count=count: np.stack(
                np.split(t[f"{name}.weight"].T, count, 1), 1
            ),
        )
    stack(
        "attention.out.kernel",
        lambda t: np.stack(np.split(t["attn.c_proj.weight"].T, a.num_heads)),
    )
    if kind == "latent":
        _latents_by_hand(stack, a)
    leaves["embed.embedding"] = released[EMBEDDING]
    leaves["final_norm.scale"] = released["layernorm.weight"]
    return leaves


def _latents_by_hand(stack, a):
    down = "attn.kv_a_proj_with_mqa.weight"
    stack("attention.kv_down.kernel", lambda t: t[down].T[:, : a.latent_dim])
    stack("attention.k_rope.kernel", lambda t: t[down].T[:, a.latent_dim :])

    def norm(t):
        several = [n for n in t if n.startswith("attn.kv_a_layernorm")]
        assert len(several) == a.num_latents
        return np.concatenate([t[name] for name in sorted(several)])

    def up(t, value):
        rows = []
        for latent in range(a.num_latents):
            if "attn.kv_b_proj" in t:
                columns = t["attn.kv_b_proj"][latent]
            else:
                name = "kv_b_proj" if a.num_latents == 1 else f"kv_b_proj_{latent + 1}"
                columns = t[f"attn.{name}.weight"].T
            for head in range(a.num_heads // a.groups):
                start = (2 * head + value) * a.nope_dim
                rows.append(columns[:, start : start + a.nope_dim])
        return np.stack(rows)

    stack("attention.kv_norm.scale", norm)
    stack("attention.k_up.kernel", lambda t: up(t, 0))
    stack("attention.v_up.kernel", lambda t: up(t, 1))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype and found[path].shape == array.shape, path
        assert found[path].tobytes() == np.ascontiguousarray(array).tobytes(), path


@pytest.mark.parametrize("name", FOLDERS)
def test_every_leaf_is_exact(released, name):
    folder = released(name)
    config = checkpoints.open_checkpoint(folder).model
    assert_same(leaves_of(folder), by_hand(read_folder(RELEASED / name), config))


@pytest.mark.parametrize("name", FOLDERS)
def test_names_and_shapes_are_the_released_ones(released, name):
    described = layout(checkpoints.open_checkpoint(released(name)).model).tensors
    arrays = read_folder(RELEASED / name)
    assert described == {tensor: array.shape for tensor, array in arrays.items()}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("mlra_4_gated", None),
        ("gla_2", None),
        ("tpa", None),
        ("mlra_2", dict(data=1, fsdp=2, tensor=2, context=2)),
        ("mla", dict(data=1, fsdp=1, tensor=2, context=1)),
        ("gta", dict(data=1, fsdp=4, tensor=1, context=1)),
    ],
)
def test_many_chunks_hold_the_same_and_go_back(released, name, mesh, tmp_path, monkeypatch):
    """Leaves are cut as those of a large model are, and come back from there bit for bit."""
    monkeypatch.setattr(chunks, "MIN_CHUNK", 1)
    out = tmp_path / "cut"
    convert(RELEASED / name, out, mesh=mesh, variant=name, quiet=True)
    arrays = lazy.open_arrays(checkpoints.open_checkpoint(out).folder / "params")
    assert max(len(array.chunks()) for array in arrays.values()) >= 4
    assert_same(leaves_of(out), leaves_of(released(name)))
    export(out, tmp_path / "back", shard_bytes=40_000, quiet=True, note=lambda line: None)
    assert_same(read_folder(tmp_path / "back"), read_folder(RELEASED / name))


@pytest.mark.parametrize(("old", "new"), [*itertools.product(TYPES, TYPES)], ids=str)
def test_every_type_to_every_other(released, old, new, tmp_path):
    """Also back into files; each number is rounded once, from what the files hold."""
    config = json.loads((RELEASED / "mha" / "config.json").read_text())
    arrays = {n: x.astype(old) for n, x in read_folder(RELEASED / "mha").items()}
    source = write_folder(tmp_path / "source", arrays, config)
    made = convert(source, tmp_path / "m", dtype=new.name, quiet=True)
    assert made.param_dtype == new.name
    wanted = {p: x.astype(old).astype(new) for p, x in leaves_of(released("mha")).items()}
    assert_same(leaves_of(tmp_path / "m"), wanted)
    export(tmp_path / "m", tmp_path / "out", dtype=old.name, quiet=True)
    back = {n: x.astype(new).astype(old) for n, x in arrays.items()}
    assert_same(read_folder(tmp_path / "out"), back)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == old.name
    # As stored, where no type is given.
    if old != new:
        export(tmp_path / "m", tmp_path / "same", quiet=True)
        assert_same(read_folder(tmp_path / "same"), {n: x.astype(new) for n, x in arrays.items()})


def test_casts_keep_what_was_infinite_and_nothing_else_becomes_so():
    f32, bf16, f16 = TYPES
    odd = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40], f32)
    for dtype in TYPES:
        assert lazy.cast(odd, dtype, "w").tobytes() == odd.astype(dtype).tobytes()
    largest = np.array([65504.0, -65504.0], f32)
    np.testing.assert_array_equal(lazy.cast(largest, f16, "w"), largest)
    for value, old, new in (
        (65520.0, f32, f16),
        (-65520.0, f32, f16),
        (np.finfo(np.float32).max, f32, bf16),
        (1e30, bf16, f16),
    ):
        for at in (0, 7):
            values = np.zeros((2, 4), old)
            values.flat[at] = value
            with pytest.raises(CheckpointFileError, match=f"tensor w has .* too large for {new}"):
                lazy.cast(values, new, "w")
    turned = np.arange(6, dtype=f32).reshape(2, 3).T
    assert lazy.cast(turned, f32, "w").flags.c_contiguous


@pytest.mark.parametrize("rows", [1, 7, 95, 96, 200])
def test_tied_tensors_are_compared_to_the_last_row(rows, tmp_path, monkeypatch):
    arrays = read_folder(RELEASED / "mha")
    config = json.loads((RELEASED / "mha" / "config.json").read_text())
    monkeypatch.setattr(conversion, "_ROWS_AT_ONCE", rows * 48)
    source = write_folder(tmp_path / "same", arrays, config)  # two storages, equal bytes
    convert(source, tmp_path / "m", quiet=True)
    for row, column in ((0, 0), (6, 47), (7, 0), (95, 47)):
        head = arrays[HEAD].copy()
        head[row, column] = np.nextafter(head[row, column], np.float32(9))
        shutil.rmtree(source)
        write_folder(source, arrays | {HEAD: head}, config)
        with pytest.raises(CheckpointFileError, match=f"{EMBEDDING} and {HEAD} differ"):
            convert(source, tmp_path / "never", quiet=True)


def test_the_disk_must_have_room_for_all_and_64_mb(tmp_path, monkeypatch):
    total = sum(x.nbytes for n, x in read_folder(RELEASED / "mha").items() if n != HEAD)
    usage = shutil.disk_usage(tmp_path)
    for free, ok in ((total + (64 << 20) - 1, False), (total + (64 << 20), True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, f=free: usage._replace(free=f))
        if ok:
            convert(RELEASED / "mha", tmp_path / "m", quiet=True)
        else:
            with pytest.raises(CheckpointFileError, match="GB free"):
                convert(RELEASED / "mha", tmp_path / "m", quiet=True)


def test_bars_count_every_byte(tmp_path, monkeypatch):
    seen, real = {}, conversion.progress_bar

    @contextlib.contextmanager
    def counting(text, total, quiet):
        seen[text] = total, (done := [])
        with real(text, total, quiet) as update:
            yield lambda n: (done.append(n), update(n))

    monkeypatch.setattr(conversion, "progress_bar", counting)
    convert(RELEASED / "mha", tmp_path / "m", quiet=True)
    arrays = read_folder(RELEASED / "mha")
    total = sum(array.nbytes for name, array in arrays.items() if name != HEAD)
    assert list(seen) == ["checking", "writing", "reading back"]
    assert seen["writing"][0] == seen["reading back"][0] == total
    for text, (whole, done) in seen.items():
        assert sum(done) == whole, text


def test_pages_are_given_back_after_every_chunk(tmp_path, monkeypatch):
    """Or a conversion would hold all of the file that it has read."""
    released, real = [], conversion.Weights.release
    monkeypatch.setattr(conversion.Weights, "release", lambda w: (released.append(1), real(w)))
    convert(RELEASED / "mha", tmp_path / "m", quiet=True)
    arrays = lazy.open_arrays(checkpoints.open_checkpoint(tmp_path / "m").folder / "params")
    assert len(released) >= sum(len(array.chunks()) for array in arrays.values()) > 10


def test_a_vocabulary_of_gpt2s_size_is_gpt2s(tmp_path, monkeypatch):
    """Nothing in the released files names the tokenizer."""
    assert released.GPT2_VOCABULARY == preset("mha").vocab_size == 50304
    for size, name in ((96, "gpt2"), (97, None)):
        monkeypatch.setattr(released, "GPT2_VOCABULARY", size)
        convert(RELEASED / "mha", tmp_path / f"{size}", quiet=True)
        assert checkpoints.open_checkpoint(tmp_path / f"{size}").tokenizer == name


def test_chunks_follow_one_another_row_by_row():
    values = np.arange(4 * 6 * 2, dtype=np.int16).reshape(4, 6, 2)
    array = lazy.LazyArray(values.shape, values.dtype, (2, 3, 2), values.__getitem__)
    assert array.nbytes == values.nbytes
    firsts = [array.read(chunk).reshape(-1)[0] for chunk in array.chunks()]
    assert firsts == [values[0, 0, 0], values[0, 3, 0], values[2, 0, 0], values[2, 3, 0]]
    assert sum(array.read(chunk).sum() for chunk in array.chunks()) == values.sum()


def test_checksums_are_those_of_each_chunk(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    array = lazy.LazyArray(values.shape, values.dtype, (2, 3), values.__getitem__)
    one = np.arange(3, dtype=np.float32)
    other = lazy.LazyArray((3,), one.dtype, (3,), one.__getitem__)
    seen = []
    described = checkpoints.describe(preset("mha"), None)
    sums = conversion._write(tmp_path, {"a.b": array, "c": other}, described, seen.append)
    parts = [values[i : i + 2, j : j + 3] for i in (0, 2) for j in (0, 3)]
    assert sums == {
        "a.b": [zlib.crc32(part.tobytes()) for part in parts],
        "c": [zlib.crc32(one.tobytes())],
    }
    assert sorted(seen) == [12, 24, 24, 24, 24]
    conversion._verify(tmp_path, sums, seen.append)
    assert sum(seen) == 2 * (values.nbytes + one.nbytes)
    read = lazy.open_arrays(tmp_path / "checkpoints" / "0" / "params")
    assert read["a.b"].chunk == (2, 3) and read["a.b"].dtype == np.float32
    np.testing.assert_array_equal(read["a.b"].read((slice(1, 3), slice(2, 6))), values[1:3, 2:6])
    # Each sum is compared, of each leaf.
    for path, index in (("a.b", 0), ("a.b", 3), ("c", 0)):
        wrong = {name: list(found) for name, found in sums.items()}
        wrong[path][index] ^= 1
        with pytest.raises(CheckpointFileError, match=f"{path} reads back differently"):
            conversion._verify(tmp_path, wrong, lambda n: None)
