"""What a device holds and what moves between devices in a decoding step."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax import cache as kv
from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.attention import MODULES
from mlra_jax.config import ConfigError, LatentConfig
from mlra_jax.generation.loop import compiled
from mlra_jax.generation.sampling import Sampling
from mlra_jax.kernels.absorbed_decode.problem import Problem

B, S, D_C, D_ROPE = 2, 512, 48, 6
LATENT = dict(num_heads=8, latent_dim=D_C, q_latent_dim=24, nope_dim=10, rope_dim=D_ROPE, groups=1)


def compiled_step(attention, **mesh_sizes):
    """(each device's cache values per layer, the sizes of all collectives' results)."""
    config, mesh = tiny.config(attention), sharding.make_mesh(**mesh_sizes)
    module = MODULES[type(attention)]
    shapes = module.cache_shapes(attention, B, S, mesh.shape["tensor"])
    layer = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=sharding.named(mesh, *module.cache_axes[name])
        )
        for name, shape in shapes.items()
    }
    everywhere = sharding.named(mesh)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32, sharding=everywhere)
    cache = kv.Cache((layer,), shape(), shape(B))
    _, parameters = models.abstract_state(config, mesh, unstacked=True)
    _, step = compiled(config, mesh, Sampling(), config.vocab_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = step.lower(parameters, cache, shape(B), key, shape()).compile()
    (_, given, *_), _ = program.input_shardings
    held = sum(
        math.prod(where.shard_shape(shapes[name])) for name, where in given.layers[0].items()
    )
    assert program.memory_analysis().alias_size_in_bytes >= 4 * held, "not changed in place"
    moved = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (?:all-\w+|reduce-scatter|collective-permute)(?:-start)?\(",
        program.as_text(),
    )
    return held, [math.prod(map(int, filter(None, dims.split(",")))) for dims in moved]


def test_mlra_4_holds_a_quarter_of_the_latents_on_each_of_four_devices():
    held, moved = compiled_step(LatentConfig(branches=4, **LATENT), tensor=4)
    assert held == B * S * (D_C // 4 + D_ROPE)
    assert moved and max(moved) < B * S


def test_mla_holds_everything_on_each_of_four_devices():
    held, moved = compiled_step(LatentConfig(branches=1, **LATENT), tensor=4)
    assert held == B * S * (D_C + D_ROPE)
    assert moved and max(moved) < B * S


@pytest.mark.parametrize("branches", [1, 4])
def test_the_context_axis_splits_positions(branches):
    held, moved = compiled_step(LatentConfig(branches=branches, **LATENT), tensor=2, context=2)
    assert held == B * S // 2 * (D_C // min(branches, 2) + D_ROPE)
    assert moved and max(moved) < B * S


def dealt(plain_BS, shares):
    """Slots in order, as they lie: slot `s` on share `s % shares`, a share's slots together."""
    return np.concatenate([plain_BS[:, share::shares] for share in range(shares)], axis=1)


@st.composite
def fills(draw):
    """(shares, capacity, new tokens, slots filled, first slots): the new ones fit, exactly too."""
    shares, T = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    capacity = 12
    length = draw(st.one_of(st.just(capacity - T), st.integers(0, capacity - T)))
    starts = draw(st.lists(st.integers(0, length), min_size=B, max_size=B))
    return shares, capacity, T, length, starts


@given(fills())
@settings(deadline=None, max_examples=60)
def test_exactly_the_new_slots_are_written(fill):
    shares, capacity, T, length, _ = fill
    old = np.arange(B * capacity * 2, dtype=np.float32).reshape(B, capacity, 2)
    new = -1 - np.arange(B * T * 2, dtype=np.float32).reshape(B, T, 2)
    want = old.copy()
    want[:, length : length + T] = new
    stored = dealt(old, shares).reshape(B, shares, -1, 2)
    for share in range(shares):
        part = jnp.asarray(stored[:, share])
        got = kv.write(part, jnp.asarray(new), jnp.int32(length), shares, jnp.int32(share))
        np.testing.assert_array_equal(got, want[:, share::shares])


@given(fills())
@settings(deadline=None, max_examples=60)
def test_a_prompt_lies_in_its_slots_and_the_rest_is_zero(fill):
    shares, capacity, _, length, starts = fill
    length = max(length, 1)
    entry = np.arange(1, 1 + B * length, dtype=np.float32).reshape(B, length)
    got = kv.from_prompt(jnp.asarray(entry), jnp.asarray(starts), capacity, shares)
    plain = np.zeros((B, capacity), np.float32)
    for b, start in enumerate(starts):
        # Before its first slot a row has what no query sees.
        plain[b, :length] = np.roll(entry[b], start)
        np.testing.assert_array_equal(plain[b, start:length], entry[b, : length - start])
    np.testing.assert_array_equal(got, dealt(plain, shares))


@given(fills())
@settings(deadline=None, max_examples=60)
def test_each_query_sees_its_rows_slots_up_to_its_own(fill):
    shares, capacity, T, length, starts = fill
    slots = np.broadcast_to(np.arange(capacity), (B, capacity))
    for share in range(shares):
        mine = slots[:, share::shares]
        ends, begins = kv.bounds(jnp.int32(length), jnp.asarray(starts), T, shares, share)
        assert ends.shape == (B, T) and begins.shape == (B,) and ends.dtype == jnp.int32
        for b, t in itertools.product(range(B), range(T)):
            seen = mine[b, int(begins[b]) : int(ends[b, t])]
            want = [s for s in mine[b] if starts[b] <= s <= length + t]
            assert seen.tolist() == want


@given(st.integers(0, 100), st.integers(1, 8))
def test_slots_are_dealt_in_turn(slots, shares):
    got = [int(kv.shares(slots, shares, share)) for share in range(shares)]
    assert got == [len(range(share, slots, shares)) for share in range(shares)]


@pytest.mark.parametrize(
    "lse_SH",
    [
        [[0.0, 1.0, -2.0, 0.5]] * 4,
        [[200.0, -200.0, 200.0, 0.0], [199.0, -201.0, -200.0, 1.0], [0.0, 0, 0, 0], [-5.0] * 4],
        [[-np.inf] * 4, [3.0, -np.inf, 200.0, -200.0], [-np.inf] * 4, [4.0, -np.inf, -np.inf, 0]],
    ],
    ids=["near", "far", "nothing_seen"],
)
def test_partial_results_are_merged_by_their_log_sum_exp(lse_SH):
    shares, lse_SH = 4, np.asarray(lse_SH, np.float32)
    mesh = sharding.make_mesh(context=shares)
    z_SHC = np.random.default_rng(0).normal(size=(shares, 4, 3)).astype(np.float32)
    z_SHC[np.isneginf(lse_SH)] = 0
    seen = ~np.isneginf(lse_SH).all(0)
    top = np.where(seen, lse_SH.max(0), 0)
    weight_SH = np.exp(lse_SH.astype(np.float64) - top)
    want_HC = (
        np.einsum("sh,shc->hc", weight_SH, z_SHC) / np.where(seen, weight_SH.sum(0), 1)[:, None]
    )
    by_share = sharding.spec("cache_length")
    merged = jax.shard_map(
        lambda z, lse: kv.merge(z[0], lse[0], sharding.CONTEXT, dim=0),
        mesh=mesh,
        in_specs=(by_share, by_share),
        out_specs=by_share,
        check_vma=False,
    )(z_SHC, lse_SH)
    np.testing.assert_allclose(merged, want_HC, rtol=1e-5, atol=1e-6)
    assert (np.asarray(merged)[~seen] == 0).all()


@pytest.mark.parametrize(
    "heads, tensor, held", [(4, 1, 4), (4, 2, 4), (4, 4, 4), (1, 8, 8), (2, 4, 4)]
)
def test_latents_are_held_once_or_by_whole_teams(heads, tensor, held):
    assert kv.held_copies(heads, tensor) == held


def test_latents_that_do_not_divide_say_what_would():
    with pytest.raises(ConfigError, match="4 latent heads and tensor=6 .* use tensor=2 and put"):
        kv.held_copies(4, 6)


@pytest.mark.parametrize("context", [1, 2, 8])
def test_no_capacity_keeps_a_kernel_from_serving(context):
    mosaic_gpu = pytest.importorskip(
        "mlra_jax.kernels.absorbed_decode.mosaic_gpu",
        reason="this jaxlib has no Mosaic GPU dialect",
    )
    mesh = sharding.make_mesh(context=context)
    for slots in (1, 40, 1001):
        capacity = kv.round_capacity(slots, mesh)
        assert slots <= capacity < slots + 8 * context and capacity % context == 0
        share = capacity // context
        problem = Problem("NVIDIA H200", 1, 1, 1, 24, 1, 128, 64, share, "bfloat16")
        assert mosaic_gpu.supports(problem) is None
