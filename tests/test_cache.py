"""What a device holds and what moves between devices in a decoding step."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import small_config

from mlra_jax import cache as kv
from mlra_jax import memory, sharding
from mlra_jax import model as models
from mlra_jax.attention import MODULES
from mlra_jax.config import VARIANTS, LatentConfig, preset
from mlra_jax.generation.loop import compiled
from mlra_jax.generation.sampling import Sampling
from mlra_jax.kernels.absorbed_decode.problem import Problem

B, S, D_C, D_ROPE = 2, 512, 48, 6
LATENT = dict(num_heads=8, latent_dim=D_C, q_latent_dim=24, nope_dim=10, rope_dim=D_ROPE, groups=1)


def compiled_step(attention, **mesh_sizes):
    """(each device's cache values per layer, the sizes of all collectives' results)."""
    config, mesh = small_config(attention), sharding.make_mesh(**mesh_sizes)
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


# Values a token, layer and device in units of d_h at 1, 2, 4 and 8 ways by tensor: the paper's
# table 1 for the latent family, the definitions for the others.
PUBLISHED = {
    "mla": (4.5, 4.5, 4.5, 4.5),
    "gla_2": (4.5, 2.5, 2.5, 2.5),
    "gla_4": (4.5, 2.5, 1.5, 1.5),
    "mlra_2": (4.5, 2.5, 1.5, 1.5),
    "mlra_4": (4.5, 2.5, 1.5, 1.5),
    "mha": (48, 24, 12, 6),
    "mqa": (2, 2, 2, 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_per_device_are_the_papers(name):
    config = preset(name)
    for tensor, widths in zip((1, 2, 4, 8), PUBLISHED[name], strict=True):
        values = memory.cache_values_per_device(config, batch=1, capacity=8, tensor=tensor)
        assert values == 8 * 128 * widths


def test_context_shares_of_the_published_models():
    for name, tensor, context, widths in [
        ("mlra_4", 4, 2, 0.75),
        ("mla", 1, 4, 1.125),
        ("mla", 4, 2, 2.25),
        ("tpa", 1, 2, 4.75 / 2),
    ]:
        size = dict(batch=3, capacity=64, tensor=tensor, context=context)
        values = memory.cache_values_per_device(preset(name), **size)
        assert values == 3 * 64 * 128 * widths


def test_the_table_has_every_variant_and_split():
    text = memory.table(VARIANTS, tokens=131072, batch=1)
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert set(VARIANTS) <= set(rows)
    assert "1.12 (1.5)" in rows["mlra_4"] and "3.38 (4.5)" in rows["mla"]


@pytest.mark.parametrize("shares", [1, 3, 4])
def test_dealt_slots_cover_every_position_once(shares):
    rng = np.random.default_rng(shares)
    starts, length, T = rng.integers(0, 9, B), 13, 3
    capacity = 24
    entry = rng.normal(size=(B, length, 2)).astype(np.float32)
    stored = np.asarray(kv.from_prompt(jnp.asarray(entry), jnp.asarray(starts), capacity, shares))
    per_share = capacity // shares
    new = rng.normal(size=(B, T, 2)).astype(np.float32)
    for b in range(B):
        # Queries 0 ... T-1 of row b see the prompt and the new tokens up to their own.
        for t in range(T):
            seen = []
            for share in range(shares):
                mine = jnp.asarray(stored[:, share * per_share : (share + 1) * per_share])
                mine = kv.write(mine, jnp.asarray(new), jnp.int32(length), shares, share)
                ends, begins = kv.bounds(jnp.int32(length), jnp.asarray(starts), T, shares, share)
                seen += list(np.asarray(mine[b, int(begins[b]) : int(ends[b, t])]))
            prompt = entry[b, : length - starts[b]]
            want = np.concatenate([prompt, new[b, : t + 1]])
            np.testing.assert_array_equal(np.sort(seen, axis=0), np.sort(want, axis=0))


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
