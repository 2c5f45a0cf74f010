"""A checkpoint as a model: dtype, step, places; ids that mean something; its tokenizer."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import relative_error

from mlra_jax import checkpoints, loading
from mlra_jax.config import ConfigError
from mlra_jax.data import tokenizers
from mlra_jax.decoder import Vocabulary
from mlra_jax.execution import DTYPES
from mlra_jax.sharding import make_mesh

CONFIG = tiny.config("mlra_2", num_layers=3, vocab_size=264)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with two steps, and the models that were saved."""
    folder, made = tmp_path_factory.mktemp("run"), {}
    manager = checkpoints.make_manager(folder)
    for step in (2, 5):
        made[step] = tiny.random_model(CONFIG, make_mesh(), seed=step)
        params = nnx.to_pure_dict(nnx.state(made[step]))
        described = checkpoints.describe(CONFIG, "bytes")
        checkpoints.save(manager, step, params=params, model=described)
    manager.close()
    return folder, made


@pytest.mark.parametrize("step, loaded", [(None, 5), (2, 2), (5, 5)])
def test_the_latest_step_or_the_one_asked_for(saved, step, loaded):
    folder, made = saved
    model = loading.load_model(folder, step=step)
    assert relative_error(model(TOKENS), made[loaded](TOKENS)) < 1e-6
    assert (model.vocabulary, model.config) == (Vocabulary(257, "bytes"), CONFIG)
    assert model.mesh.size == 1


def test_a_model_is_loaded_in_its_places_and_dtype(saved):
    folder, made = saved
    mesh = make_mesh(fsdp=2, tensor=2)
    model = loading.load_model(folder, mesh=mesh, dtype="bfloat16")
    leaves = jax.tree.leaves_with_path(model.weights)
    assert all(x.dtype == jnp.bfloat16 for _, x in leaves)
    # Norms and the queries' second projection are whole; what is joined has every device's columns.
    parts = {"norm": 1, "q_up": 1}
    for path, x in leaves:
        name = "norm" if path[-1].key == "scale" else path[-2].key
        held = x.addressable_shards[0].data.nbytes
        assert held * parts.get(name, 4) == x.nbytes, path
    assert 1e-4 < relative_error(model(TOKENS), made[5](TOKENS)) < 5e-2
    assert model.config.execution.dtype == model.config.param_dtype == "bfloat16"


@pytest.fixture(scope="module")
def kept_in(tmp_path_factory):
    """Folders of one model, stored in each dtype; and its weights in float32."""
    params = nnx.to_pure_dict(nnx.state(tiny.random_model(CONFIG, make_mesh(), seed=3)))
    folders = {}
    for dtype in DTYPES:
        config = dataclasses.replace(CONFIG, param_dtype=dtype)
        stored = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        folders[dtype] = tmp_path_factory.mktemp(dtype)
        with checkpoints.make_manager(folders[dtype]) as manager:
            described = checkpoints.describe(config, "bytes")
            checkpoints.save(manager, 1, params=stored, model=described)
    return folders, params


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_every_stored_dtype_loads_in_every_other(kept_in, stored, asked):
    folders, params = kept_in
    model = loading.load_model(folders[stored], dtype=asked)
    assert {str(x.dtype) for x in jax.tree.leaves(model.weights)} == {asked}
    expected = np.asarray(params["embed"]["embedding"].astype(stored).astype(asked))
    np.testing.assert_array_equal(model.weights["embed"]["embedding"], expected)


@pytest.mark.parametrize(
    "dtype", [jnp.float16, np.float16, np.dtype("float16"), jnp.zeros(1, "float16").dtype]
)
def test_a_dtype_as_numpy_and_jax_write_it(kept_in, dtype):
    model = loading.load_model(str(kept_in[0]["float32"]), dtype=dtype)
    assert {str(x.dtype) for x in jax.tree.leaves(model.weights)} == {"float16"}
    assert model.config.execution.dtype == model.config.param_dtype == "float16"


@pytest.mark.parametrize("mesh", [dict(), dict(fsdp=2, tensor=2)])
def test_weights_that_are_not_finite_are_refused(tmp_path, mesh):
    """By name and number; the numbers that float16 has no room for as well."""
    params = nnx.to_pure_dict(nnx.state(tiny.random_model(CONFIG, make_mesh(), seed=3)))
    kernel = np.array(params["layers"]["mlp"]["down"]["kernel"])
    params["layers"]["mlp"]["down"]["kernel"] = kernel
    for step, values in ((1, [1e6]), (2, [np.nan, np.inf])):
        kernel[-1, -1, : len(values)] = values
        with checkpoints.make_manager(tmp_path) as manager:
            described = checkpoints.describe(CONFIG, "bytes")
            checkpoints.save(manager, step, params=params, model=described)
    mesh = make_mesh(**mesh)
    for step, dtype, count in ((1, "float16", 1), (2, "float32", 2)):
        line = f"layers.mlp.down.kernel has {count} of {kernel.size} numbers that are not finite in"
        with pytest.raises(checkpoints.CheckpointError, match=f"{line} {dtype}; give --allow"):
            loading.load_model(tmp_path, mesh, dtype, step)
        model = loading.load_model(tmp_path, mesh, dtype, step, allow_nonfinite=True)
        leaves = jax.tree.leaves(model.weights)
        assert sum(np.count_nonzero(~np.isfinite(np.asarray(x))) for x in leaves) == count
    assert loading.load_model(tmp_path, mesh, "float32", 1)


@pytest.mark.parametrize("dtype", ["fp32", "int8", np.float64, jnp.int32, float, 7])
def test_other_dtypes_are_refused(kept_in, dtype):
    with pytest.raises(ConfigError, match="^dtype=.* is none of float32, bfloat16, float16$"):
        loading.load_model(kept_in[0]["float32"], dtype=dtype)


@pytest.mark.parametrize(
    "tokenizer, vocab_size, meant",
    [
        ("gpt2", 50304, 50257),
        ("gpt2", 50257, 50257),
        ("gpt2", 40000, 40000),
        # Converted checkpoints do not name theirs: the published size says it.
        (None, 50304, 50257),
        (None, 50303, 50303),
        (None, 88, 88),
        ("bytes", 264, 257),
        ("bytes", 100, 100),
        ("of another machine", 300, 300),
    ],
)
def test_ids_that_mean_something(tokenizer, vocab_size, meant):
    assert loading._num_tokens(tokenizer, vocab_size) == meant


def test_the_dtype_that_computes_is_said_with_its_reason():
    mixed = tiny.config("mla", dtype="bfloat16", param_dtype="float32")
    assert loading.compute_line(mixed) == (
        "computes in bfloat16, as the checkpoint says; its weights are stored in float32 "
        "(--dtype=float32 computes in that)"
    )
    assert loading.compute_line(CONFIG) == "computes in float32, as its weights are stored"
    assert loading.compute_line(mixed, "as asked") == "computes in bfloat16, as asked"


def named(tokenizer, vocab_size=264):
    return types.SimpleNamespace(
        vocabulary=Vocabulary(vocab_size, tokenizer),
        config=tiny.config("mla", vocab_size=vocab_size),
    )


def test_the_tokenizer_is_the_checkpoints():
    assert loading.tokenizer_of(named("bytes")).name == "bytes"
    assert loading.tokenizer_of(named("bytes"), "bytes").name == "bytes"
    assert loading.tokenizer_of(named(None), "bytes").name == "bytes"


def test_another_tokenizer_than_the_checkpoints_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="tokenizer bytes is bytes, and the checkpoint's is gpt2"):
        loading.tokenizer_of(named("gpt2"), "bytes")
    words = "tokenizer bytes has 257 ids, and the model knows 256: give the model's with --tok"
    with pytest.raises(ValueError, match=words):
        loading.tokenizer_of(named("bytes", 256))
    assert loading.tokenizer_of(named("bytes", 257)).vocab_size == 257
    # A checkpoint that names none was trained on GPT-2's byte pairs.
    asked = []
    monkeypatch.setattr(tokenizers, "get_tokenizer", lambda name: asked.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loading.tokenizer_of(named(None))
    assert asked == ["gpt2"]
