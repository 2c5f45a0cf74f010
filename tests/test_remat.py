"""What the backward pass finds kept of a block, and that it changes no number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as library

from mlra_jax import model as models
from mlra_jax.config import ConfigError, Execution, preset
from mlra_jax.sharding import make_mesh


def gradients(config, mesh):
    definition, params = nnx.split(tiny.random_model(config, mesh))
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, (2, 9), np.int32)
    total = lambda p: (nnx.merge(definition, p).hidden(tokens) ** 3).sum()
    return jax.device_get(jax.jit(jax.grad(total))(params))


@pytest.fixture(scope="module")
def plain():
    return gradients(tiny.config("mlra_2", 2, remat="none"), make_mesh())


@pytest.mark.parametrize(
    "remat, sizes, unroll",
    [("products", {}, 1), ("attention", dict(data=2, tensor=2), 1), ("auto", {}, 2)],
)
def test_gradients_are_those_of_keeping_everything(plain, remat, sizes, unroll):
    config = tiny.config("mlra_2", 2, remat=remat, unroll=unroll)
    for got, want in zip(
        *map(jax.tree.leaves, (gradients(config, make_mesh(**sizes)), plain)), strict=True
    ):
        assert tiny.relative_error(got, want) < 1e-5


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)


def test_what_is_computed_again(cudnn):
    """Of a published block on a GPU: calls of attention's forward pass, products beyond `none`."""
    count = lambda text, what: len(re.findall(what, text))

    def lowered(remat):
        config = preset("mlra_4", remat=remat, attention_kernel="cudnn", num_layers=2)
        definition, shapes = models.structure(config, make_mesh())
        tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        total = lambda p, t: nnx.merge(definition, p).hidden(t).astype(jnp.float32).sum()
        return jax.jit(jax.grad(total)).trace(shapes, tokens).lower(lowering_platforms=("cuda",))

    texts = {
        name: lowered(name).as_text()
        for name in ("none", "products", "attention", "block", "offload")
    }
    products = {name: count(text, "stablehlo.dot_general") for name, text in texts.items()}
    again = dict(none=0, products=2, attention=9, block=9, offload=9)
    assert {name: n - products["none"] for name, n in products.items()} == again
    attention = {name: count(text, r"@__cudnn\$fmhaSoftmax\(") for name, text in texts.items()}
    assert attention == dict(none=1, products=1, attention=1, block=2, offload=1)
    for text in texts.values():
        assert count(text, r"@__cudnn\$fmhaSoftmaxBackward\(") == 1


@pytest.mark.parametrize("given, name", [(True, "block"), (False, "none"), ("False", "none")])
def test_booleans_of_old_files_mean_block_and_none(given, name):
    assert Execution(remat=given).remat == name


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="remat='blocks' is none of auto, none, block, attention"):
        Execution(remat="blocks")
