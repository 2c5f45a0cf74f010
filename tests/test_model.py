"""A model is the same however it is made, split or taken apart."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import relative_error

from mlra_jax import model as models
from mlra_jax.sharding import make_mesh, named

TOKENS = np.random.default_rng(0).integers(0, 88, (4, 10), np.int32)


def test_sharded_creation_makes_the_same_weights_in_their_places():
    config = tiny.config("mlra_2_gated", num_layers=2)
    whole = models.create(config, make_mesh(), seed=5)
    split = models.create(config, make_mesh(data=2, fsdp=2, tensor=2), seed=5)
    weights = lambda model: jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    chex.assert_trees_all_close(weights(whole), weights(split), rtol=1e-6)
    drawn = lambda model: weights(model)["embed"]["embedding"]
    other = drawn(models.create(config, make_mesh(), seed=6))
    assert abs(np.corrcoef(drawn(whole).ravel(), other.ravel())[0, 1]) < 0.1
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(nnx.state(split)))
    total = sum(x.nbytes for x in jax.tree.leaves(nnx.state(split)))
    assert held < 0.35 * total  # fsdp x tensor is a quarter; norms and small matrices are whole
    assert relative_error(split(TOKENS), whole(TOKENS)) < 1e-6


@pytest.mark.parametrize("member", ["mla", "mlra_4"])
def test_a_token_does_not_see_later_ones(member):
    model = models.create(tiny.config(member), make_mesh(), seed=2)
    changed = TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 88
    before, after = np.asarray(model(TOKENS)), np.asarray(model(changed))
    assert relative_error(after[:, :6], before[:, :6]) < 1e-6
    assert relative_error(after[:, 6:], before[:, 6:]) > 1e-2


def equations(jaxpr, name):
    """All equations of this primitive, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield from equations(inner, name)


def forward_jaxpr(config):
    definition, shapes = models.structure(config, make_mesh())
    forward = lambda params, tokens: nnx.merge(definition, params)(tokens)
    return jax.make_jaxpr(forward)(shapes, TOKENS).jaxpr


@pytest.mark.parametrize("name", ["mlra_2_gated", "gqa_gated", "gta", "mfa", "tpa"])
def test_float32_products_are_float32_on_every_machine(name):
    """TPUs and GPUs round the operands of a float32 product unless told not to."""
    products = list(equations(forward_jaxpr(tiny.config(name)), "dot_general"))
    assert len(products) > 8
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(p.params["precision"] == highest for p in products)
    narrow = list(equations(forward_jaxpr(tiny.config(name, dtype="bfloat16")), "dot_general"))
    assert len(narrow) == len(products)
    assert not any(
        p.params["precision"] == highest for p in narrow if p.invars[0].aval.dtype == "bfloat16"
    )
    # The parameters are float32: none of them reaches a product unconverted.
    width = tiny.config(name).embed_dim
    assert not any(
        p.invars[1].aval.dtype == "float32" and width in p.invars[1].aval.shape for p in narrow
    )


@pytest.mark.parametrize("remat", [True, False])
def test_blocks_are_computed_again_in_the_backward_pass_where_asked(remat):
    config = tiny.config("mla", num_layers=2, remat=remat)
    again = equations(forward_jaxpr(config), "remat2")
    blocks = [e for e in again if e.outvars[0].aval.shape == (*TOKENS.shape, config.embed_dim)]
    assert len(blocks) == remat


@pytest.mark.parametrize("name", ["mlra_4", "gqa"])
def test_bfloat16_activations_give_float32_logits_close_to_float32s(name):
    exact = tiny.random_model(tiny.config(name, 2), make_mesh())
    narrow = tiny.random_model(tiny.config(name, 2, dtype="bfloat16"), make_mesh())
    assert narrow.hidden(TOKENS).dtype == jnp.bfloat16
    logits = narrow(TOKENS)
    assert logits.dtype == jnp.float32
    assert 1e-4 < relative_error(logits, exact(TOKENS)) < 3e-2
    # More digits than bfloat16 has: the head adds up in float32.
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize("wide", [False, True])
def test_the_stream_between_blocks_may_be_wider_than_their_products(wide):
    config = tiny.config("mlra_4", 3, dtype="bfloat16", float32_stream=wide)
    (loop,) = equations(forward_jaxpr(config), "scan")
    assert loop.outvars[0].aval.dtype == (jnp.float32 if wide else jnp.bfloat16)
    # What blocks multiply is of the narrow dtype all the same.
    products = list(equations(loop.params["jaxpr"].jaxpr, "dot_general"))
    assert sum(p.invars[0].aval.dtype == jnp.bfloat16 for p in products) >= 10
    exact = tiny.random_model(tiny.config("mlra_4", 3), make_mesh())
    model = tiny.random_model(config, make_mesh())
    assert model.hidden(TOKENS).dtype == jnp.bfloat16
    assert 1e-4 < relative_error(model(TOKENS), exact(TOKENS)) < 3e-2


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_gpus_that_have_parts_of_the_table_exchange_token_vectors(shape, monkeypatch):
    """So that no device waits for the table before the first block; gradients go the same way."""
    monkeypatch.setattr(models, "on_gpus", lambda mesh: True)
    mesh, config = make_mesh(*shape), tiny.config("mlra_4")
    rng = np.random.default_rng(6)
    table = rng.normal(size=(config.vocab_size, config.embed_dim)).astype(np.float32)
    slope = rng.normal(size=(8, 5, config.embed_dim)).astype(np.float32)
    tokens = rng.integers(0, config.vocab_size, (8, 5))

    def look_up(table, tokens):
        embedding = models.Embedding(config, mesh=mesh, rngs=nnx.Rngs(0))
        embedding.embedding[...] = table
        return embedding(tokens)

    @jax.jit
    def both(table, tokens, slope):
        vectors, back = jax.vjp(lambda table: look_up(table, tokens), table)
        return vectors, back(slope)[0]

    place = lambda x, *axes: jax.device_put(x, named(mesh, *axes))
    arrays = place(table, *models.TABLE), place(tokens, "batch"), place(slope, "batch")
    program = both.lower(*arrays).compile()
    exchanges = re.findall(r"= \(?(\w+)\[\S*.* (all-gather|all-to-all)\(", program.as_text())
    assert sorted(exchanges) == [("f32", "all-to-all")] * 2 + [("s32", "all-gather")]
    vectors, of_table = program(*arrays)
    np.testing.assert_array_equal(vectors, table[tokens])
    want = np.zeros_like(table)
    np.add.at(want, tokens, slope)
    np.testing.assert_allclose(of_table, want, rtol=1e-5, atol=1e-6)
