"""What a device holds and what moves between devices in a decoding step."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoding import lower_step
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax import cache as kv
from mlra_jax import sharding
from mlra_jax.attention.heads import held_copies
from mlra_jax.config import ConfigError, LatentConfig
from mlra_jax.decoder import abstract_cache
from mlra_jax.kernels.absorbed_decode.problem import Problem
from mlra_jax.kernels.softmax import merge

B, S, D_C, D_ROPE = 2, 512, 48, 6
CAPACITY = 12
LATENT = dict(num_heads=8, latent_dim=D_C, q_latent_dim=24, nope_dim=10, rope_dim=D_ROPE, groups=1)


def compiled_step(attention, **mesh_sizes):
    """(each device's cache values per layer, the sizes of all collectives' results)."""
    config, mesh = tiny.config(attention), sharding.make_mesh(**mesh_sizes)
    program = lower_step(config, mesh, B, S).compile()
    cache, (_, given, *_) = abstract_cache(config, mesh, B, S), program.input_shardings[0]
    held = sum(
        math.prod(given.layers[0][name].shard_shape(x.shape)) for name, x in cache.layers[0].items()
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
    """(shares, new tokens, slots that each row fills): the new ones fit, exactly too."""
    shares, T = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    length = st.one_of(st.just(CAPACITY - T), st.integers(0, CAPACITY - T))
    return shares, T, draw(st.lists(length, min_size=B, max_size=B))


@given(fills())
@settings(deadline=None, max_examples=60)
def test_exactly_the_new_slots_are_written(fill):
    shares, T, lengths = fill
    old = np.arange(B * CAPACITY * 2, dtype=np.float32).reshape(B, CAPACITY, 2)
    new = -1 - np.arange(B * T * 2, dtype=np.float32).reshape(B, T, 2)
    want = old.copy()
    for b, length in enumerate(lengths):
        want[b, length : length + T] = new[b]
    stored = dealt(old, shares).reshape(B, shares, -1, 2)
    for share in range(shares):
        part = jnp.asarray(stored[:, share])
        got = kv.write(part, jnp.asarray(new), jnp.asarray(lengths), shares, jnp.int32(share))
        np.testing.assert_array_equal(got, want[:, share::shares])


@pytest.mark.parametrize("shares", [1, 2])
def test_nothing_is_written_beyond_the_last_slot(shares):
    old, new = np.zeros((B, CAPACITY), np.float32), np.ones((B, 3), np.float32)
    stored = dealt(old, shares).reshape(B, shares, -1)
    lengths = jnp.array([CAPACITY - 1, CAPACITY + 5])
    for share in range(shares):
        got = kv.write(jnp.asarray(stored[:, share]), new, lengths, shares, share)
        want = np.zeros_like(old)
        want[0, -1] = 1
        np.testing.assert_array_equal(got, want[:, share::shares])


@given(fills())
@settings(deadline=None, max_examples=40)
def test_a_prompt_lies_in_its_slots_and_the_rest_is_zero(fill):
    shares, _, lengths = fill
    T = max(1, *lengths)
    entry = np.arange(1, 1 + B * T, dtype=np.float32).reshape(B, T)
    plain = np.zeros((B, CAPACITY), np.float32)
    plain[:, :T] = entry
    got = kv.from_prompt(jnp.asarray(entry), CAPACITY, shares)
    np.testing.assert_array_equal(got, dealt(plain, shares))


@given(fills())
@settings(deadline=None, max_examples=60)
def test_each_query_sees_its_rows_slots_up_to_its_own(fill):
    shares, T, lengths = fill
    for share in range(shares):
        mine = np.arange(CAPACITY)[share::shares]
        ends = kv.bounds(jnp.asarray(lengths), T, shares, share)
        assert ends.shape == (B, T) and ends.dtype == jnp.int32
        for b, t in itertools.product(range(B), range(T)):
            assert mine[: int(ends[b, t])].tolist() == [s for s in mine if s <= lengths[b] + t]


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
        lambda z, lse: merge(z[0], lse[0], sharding.CONTEXT, dim=0),
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
    assert held_copies(heads, tensor) == held


def test_latents_that_do_not_divide_say_what_would():
    with pytest.raises(ConfigError, match="4 latent heads and tensor=6 .* use tensor=2 and put"):
        held_copies(4, 6)


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
