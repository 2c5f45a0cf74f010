"""Prompts in chunks: for every attention, mesh and way to attend, what a whole pass gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import ATTENTIONS, random_model, relative_error

from mlra_jax import cache as kv
from mlra_jax.attention import MODULES, base, blocks
from mlra_jax.config import GroupedConfig, preset
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.generation import programs
from mlra_jax.kernels import target
from mlra_jax.kernels.chunk_attention import api, chunk_attention
from mlra_jax.kernels.softmax import visible_softmax
from mlra_jax.sharding import make_mesh

LENGTHS, WIDTH, STEPS = np.array([29, 3, 17, 12], np.int32), 6, 3
TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (4, 29 + STEPS), np.int32)
MESHES = [
    {},
    dict(tensor=2, context=2),
    dict(data=2, fsdp=2, context=2),
    dict(tensor=4),
]
names = lambda sizes: "x".join(f"{n[0]}{s}" for n, s in sizes.items()) or "one"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of few positions; the library's part in plain JAX, as there is no GPU."""
    monkeypatch.setattr(blocks, "_positions", lambda queries: 8)
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


@pytest.mark.parametrize("name", ATTENTIONS)
def test_chunks_over_blocks_give_what_a_whole_pass_gives(name):
    assert chunked_error(name, "blocks", MESHES[1]) < 1e-5


@pytest.mark.parametrize("name", ["mlra_2", "gla_2", "gqa", "gta", "tpa"])
def test_chunks_over_the_library_give_what_a_whole_pass_gives(name):
    assert chunked_error(name, "cudnn", MESHES[1]) < 1e-5


@pytest.mark.parametrize("over", base.OVER)
@pytest.mark.parametrize("sizes", [MESHES[0], *MESHES[2:]], ids=names)
def test_chunks_on_every_mesh(sizes, over):
    assert chunked_error("mlra_4", over, sizes, STEPS) < 1e-5


def test_chunks_where_key_heads_do_not_divide_over_the_devices():
    uneven = GroupedConfig(24, 6, 8)
    assert chunked_error(uneven, "blocks", dict(tensor=4, context=2)) < 1e-5
    assert chunked_error(uneven, "cudnn", dict(tensor=4, context=2)) < 1e-5


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

    want, got = attend(q, cache, lengths), blocks.in_blocks(attend)(q, cache, lengths)
    assert relative_error(got[0], want[0]) < 1e-6
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    assert got[1][0, 0, 0] == -np.inf and not np.asarray(got[0][0, 0]).any()


def test_no_score_of_a_query_and_a_slot_is_kept():
    """Of 512 tokens and 4096 slots the scores would be 64 MB; a chunk's program has less."""
    config = tiny.config("mlra_4", vocab_size=8)
    decoder = abstract_decoder(config, make_mesh())
    cache = abstract_cache(config, make_mesh(), 1, 4096)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    logits = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    lower = lambda over: programs.extend.lower(
        decoder, logits, cache, ints(1, 512), ints(1), ints(), over=over
    )
    used = lambda over: lower(over).compile().memory_analysis().temp_size_in_bytes
    whole = 512 * 4096 * 32 * 4
    assert used("blocks") < whole / 8 < whole < used("kernel")


def test_what_serves_a_mesh(monkeypatch):
    over = lambda name, dtype="bfloat16": attention_of(preset(name, dtype=dtype)).extends_over()
    assert over("mlra_4") == over("gqa") == "blocks"
    monkeypatch.setattr(target, "is_gpu", lambda device: True)
    for name in ("mlra_4", "gqa", "gta", "mfa", "tpa"):
        assert over(name) == "cudnn" and over(name, "float32") == "blocks"
    # Latents wider than cuDNN takes.
    assert over("mla") == over("gla_2") == "blocks"
    monkeypatch.setattr(target, "is_hopper", lambda device: True)
    assert over("mla") == over("gla_2") == "kernel"
    assert over("mlra_4") == "cudnn" and over("mla", "float32") == "blocks"
    with pytest.raises(ValueError, match="attention over 'x', expected one of blocks, kernel, cud"):
        chunked_error("mha", "x", {})


def attention_of(config):
    cls = MODULES[type(config.attention)]
    return nnx.eval_shape(lambda: cls(config, mesh=make_mesh(), rngs=nnx.Rngs(0)))


def test_an_unknown_implementation_is_named():
    x = jnp.zeros((1, 2, 1, 1, 8))
    with pytest.raises(ValueError, match="implementation is 'flash', expected one of cudnn, ref"):
        chunk_attention(x, x[:, :, 0], x[:, :, 0], scale=1.0, implementation="flash")
