"""Prompts in chunks: for every attention, mesh and way to attend, what a whole pass gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import random_model, relative_error

from mlra_jax import cache as kv
from mlra_jax.attention import base, blocks, mechanism
from mlra_jax.config import GroupedConfig, preset
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.generation import programs
from mlra_jax.kernels import target
from mlra_jax.kernels.chunk_attention import api, chunk_attention
from mlra_jax.kernels.softmax import visible_softmax
from mlra_jax.sharding import make_mesh

LENGTHS, WIDTH, STEPS = np.array([29, 3, 17, 12], np.int32), 6, 3
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (4, 29 + STEPS), np.int32)
# Latents no wider than a head's key, which chunks attend to as they are.
NARROW = {
    name: dataclasses.replace(tiny.LATENT[name], latent_dim=40) for name in ("mlra_2", "mlra_4")
}
UNEVEN = GroupedConfig(24, 6, 8)


@pytest.fixture
def small(monkeypatch):
    """Blocks of few positions; the library's part in plain JAX, as there is no GPU."""
    monkeypatch.setattr(base, "of_scores", lambda queries: 8)
    monkeypatch.setattr(base, "of_keys", lambda queries: 8)
    monkeypatch.setitem(api._ATTEND, "cudnn", api._reference)


@functools.cache
def whole_pass(attention) -> np.ndarray:
    return np.asarray(Decoder.from_model(random_model(tiny.config(attention), make_mesh()))(TOKENS))


def chunked_error(attention, over: str, sizes: dict[str, int], steps: int = 0) -> float:
    """Relative error of the logits after each prompt, and after `steps` tokens that follow."""
    mesh = make_mesh(**sizes)
    decoder = Decoder.from_model(random_model(tiny.config(attention), mesh))
    # The longest row fills the cache; padding of the last chunk is beyond it.
    capacity = kv.round_capacity(len(TOKENS[0]), mesh)
    logits, cache = programs.empty(decoder, batch=4, capacity=capacity)
    for start in range(0, LENGTHS.max(), WIDTH):
        tokens = np.full((4, WIDTH), 7, np.int32)
        part = TOKENS[:, start : min(start + WIDTH, LENGTHS.max())]
        tokens[:, : part.shape[1]] = part
        logits, cache = programs.extend(
            decoder, logits, cache, tokens, LENGTHS, np.int32(start), over=over
        )
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    got = [np.asarray(logits)]
    for i in range(steps):
        logits, cache = programs.step(decoder, cache, TOKENS[np.arange(4), LENGTHS + i])
        got.append(np.asarray(logits))
    want = [whole_pass(attention)[row, n - 1 : n + steps] for row, n in enumerate(LENGTHS)]
    return relative_error(np.stack(got, 1), np.stack(want))


@pytest.mark.parametrize(
    "attention, over, sizes, steps",
    [
        ("mla", "cudnn", dict(tensor=2, context=2), 0),
        ("mla", "blocks", dict(data=2, fsdp=2, context=2), 0),
        ("gla_2", "cudnn", dict(tensor=4), 0),
        (NARROW["mlra_2"], "cudnn", dict(tensor=2, context=2), STEPS),
        (NARROW["mlra_4"], "blocks", {}, STEPS),
        ("gta", "blocks", dict(tensor=2, context=2), 0),
        ("mfa", "cudnn", dict(data=2, fsdp=2), 0),
        ("tpa", "cudnn", dict(tensor=2, context=2), 0),
        (UNEVEN, "cudnn", dict(tensor=4, context=2), 0),
        ("mlra_4_base_gated", "cudnn", dict(tensor=2, context=2), STEPS),
        ("mlra_2_base", "blocks", {}, 0),
    ],
)
def test_chunks_give_what_a_whole_pass_gives(attention, over, sizes, steps, small):
    assert chunked_error(attention, over, sizes, steps) < 1e-5


@pytest.mark.parametrize("slots", [3, 8, 21, 24])
def test_blocks_are_the_whole(slots):
    """Rows that see nothing, all, and more than there is; what is left over is no whole block."""
    rng = np.random.default_rng(slots)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    q, cache = draw(4, 2, 3, 5), dict(k=draw(4, slots, 5), v=draw(4, slots, 5))
    lengths = jnp.array([[0, 1], [slots - 1, slots], [2, 3], [slots + 5, slots + 6]])

    def attend(q_BThK, cache, lengths_BT):
        scores = jnp.einsum("bthk,bsk->bths", q_BThK, cache["k"])
        weights, total, lse = visible_softmax(scores, lengths_BT, jnp.zeros(4, jnp.int32))
        return jnp.einsum("bths,bsk->bthk", weights, cache["v"]) / total[..., None], lse

    want = attend(q, cache, lengths)
    got = blocks.in_blocks(attend, lambda queries: 8)(q, cache, lengths)
    assert relative_error(got[0], want[0]) < 1e-6
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=2e-7)  # one is nearly 0
    assert got[1][0, 0, 0] == -np.inf and not np.asarray(got[0][0, 0]).any()


def test_no_score_of_a_query_and_a_slot_is_kept(small):
    """Of 512 tokens and 4096 slots the scores would be 256 MB; a chunk's program has less."""
    config = tiny.config("mlra_4", vocab_size=8)
    decoder = abstract_decoder(config, make_mesh())
    cache = abstract_cache(config, make_mesh(), 1, 4096)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    logits = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    lowered = programs.extend.lower(
        decoder, logits, cache, ints(1, 512), ints(1), ints(), over="blocks"
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 512 * 4096 * 32 * 4 / 8


def test_blocks_are_as_long_as_memory_allows():
    of = lambda positions, *shape: positions(jax.ShapeDtypeStruct(shape, jnp.float32))
    assert [of(blocks.of_scores, 1, T, 24, 8) for T in (1, 8192, 1 << 20)] == [512, 320, 64]
    assert [of(blocks.of_keys, B, 8, 24, 8) for B in (1, 4, 1024)] == [16384, 4096, 256]


def test_what_serves_a_mesh(monkeypatch):
    over = lambda name, dtype="bfloat16": attention_of(preset(name, dtype=dtype)).extends_over()
    assert over("mlra_4") == over("gqa") == "blocks"
    monkeypatch.setattr(target, "is_gpu", lambda device: True)
    # MLA's and GLA-2's latents are wider than cuDNN takes, keys made of them are not.
    for name in ("mlra_4", "gqa", "gta", "mfa", "tpa", "mla", "gla_2"):
        assert over(name) == "cudnn" and over(name, "float32") == "blocks"
    mla = preset("mla", dtype="bfloat16")
    wide = dataclasses.replace(mla, attention=dataclasses.replace(mla.attention, nope_dim=256))
    assert attention_of(wide).extends_over() == "blocks"
    with pytest.raises(ValueError, match="attention over 'x', expected one of blocks, cudnn"):
        chunked_error("mha", "x", {})


def attention_of(config):
    cls = mechanism(config.attention)
    return nnx.eval_shape(lambda: cls(config, mesh=make_mesh(), rngs=nnx.Rngs(0)))


def test_an_unknown_implementation_is_named():
    x = jnp.zeros((1, 2, 1, 1, 8))
    with pytest.raises(ValueError, match="implementation is 'flash', expected one of cudnn, ref"):
        chunk_attention(x, x[:, :, 0], x[:, :, 0], scale=1.0, implementation="flash")
