"""One launch between two products: its numbers, in JAX's interpreter of Mosaic GPU, beside XLA's.

What the interpreter does not model (registers, layouts) is checked by lowering for a GPU.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export

from mlra_jax import cache as kv
from mlra_jax.config import LatentConfig
from mlra_jax.decoder import Decoder, abstract_cache
from mlra_jax.kernels import between_products
from mlra_jax.layers import angles, rotate
from mlra_jax.sharding import make_mesh

between = pytest.importorskip(
    "mlra_jax.kernels.between_products.mosaic_gpu", reason="this jaxlib has no Mosaic GPU dialect"
)
EPS = 1e-6


def interpreted(function, *arrays, **how):
    if jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of JAX before 0.12 wants all barriers waited for")
    with between.plgpu.force_gpu_interpret_mode(between.plgpu.InterpretGPUParams()):
        return jax.jit(functools.partial(function, **how))(*arrays)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def norm(x, scale, factor):
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPS) * scale * factor


@pytest.mark.parametrize("dtype, near", [("float32", 1e-6), ("bfloat16", 8e-3)])
def test_sum_and_norm(dtype, near):
    summands, x, scale = normal(0, 3, 5, 384), normal(1, 5, 384, dtype=dtype), normal(2, 384)
    how = dict(factor=1.5, eps=EPS, dtype=dtype)
    total, normed = interpreted(between.sum_and_norm, summands, x, scale, **how)
    expected = (x.astype(jnp.float32) + summands.sum(0)).astype(dtype)
    assert total.dtype == normed.dtype == dtype
    np.testing.assert_allclose(total, expected, rtol=near, atol=near)
    np.testing.assert_allclose(normed, norm(expected, scale, 1.5), rtol=near, atol=4 * near)


def test_enter():
    # Rows with room for both tokens, for one, for none; and none that is another row's.
    T, L, C, lengths = 2, 2, 256, [0, 6, 14, 15, 16, 40]
    B, S, Q, R = len(lengths), 16, 128, 64
    rows, lengths = B + 2, jnp.asarray(lengths, jnp.int32)
    latents, k_rope = normal(0, B, S, L, C), normal(1, B, S, R)
    summands = normal(2, 2, rows, T, Q + L * C + R)
    # Of a model with twice as many latents, of which the cache has the last ones.
    scales, factors, first = (normal(3, Q), normal(4, 2 * L * C)), (0.5, 2.0), jnp.array([L])
    at = 2**20 + 7 * jnp.arange(rows, dtype=jnp.int32)[:, None] + jnp.arange(T)
    slots = kv.slots(lengths, T, S, 1, 0)
    found = interpreted(
        between.enter, summands, angles(at, R, 1e4), scales, slots, first, latents, k_rope,
        factors=factors, eps=EPS,
    )  # fmt: skip
    x = summands.sum(0)
    q, kept, rope = jnp.split(x, [Q, Q + L * C], -1)
    kept = norm(kept.reshape(rows, T, L, C), scales[1].reshape(-1, L, C)[1], factors[1])[:B]
    rope = rotate(rope[:, :, None], at, 1e4)[:B, :, 0]
    expected = (
        norm(q, scales[0], factors[0]),
        kv.write(latents, kept, lengths, 1, 0),
        kv.write(k_rope, rope, lengths, 1, 0),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(
    "lengths, groups, branches, mesh",
    [
        ([4], 1, 2, {}),
        ([5, 1, 3], 1, 1, {}),
        ([5, 1, 3], 2, 1, dict(tensor=4, context=2)),
    ],
)
def test_a_step_gives_what_it_gives_without(monkeypatch, lengths, groups, branches, mesh):
    L, mesh = groups * branches, make_mesh(**mesh)
    widths = dict(latent_dim=128 * L, q_latent_dim=128, nope_dim=128, rope_dim=64)
    attention = LatentConfig(num_heads=8, groups=groups, branches=branches, **widths)
    config = tiny.config(attention, embed_dim=128, mlp_dim=1024)
    decoder = Decoder.from_model(tiny.random_model(config, mesh))
    lengths = jnp.asarray(lengths, jnp.int32)
    tokens = np.random.default_rng(5).integers(0, tiny.VOCAB, (len(lengths), 1), np.int32)
    shapes = abstract_cache(config, mesh, len(lengths), kv.round_capacity(8, mesh)).layers
    cache = kv.Cache(jax.tree.map(lambda x: normal(6, *x.shape), shapes), lengths)
    # As on GPUs, there are rows beyond those of the cache.
    monkeypatch.setattr(Decoder, "_rows", lambda *_: 4)
    step = lambda tokens, cache: decoder.step(tokens, cache)
    expected = jax.jit(step)(tokens, cache)
    calls = []

    def two(*sizes):
        calls.append(sizes[1:])
        return 2

    monkeypatch.setattr(between_products, "summands", two)
    found = interpreted(lambda *arrays: step(*arrays), tokens, cache)
    # In and the queries, each device's own where it asks no latent of others; on one device out and
    # down.
    E = 128 + 64 + max(L // mesh.shape["tensor"], L % mesh.shape["tensor"]) * 128
    expected_calls = [
        (4, 128, E),
        (4, 128, 8 * 192 // mesh.shape["tensor"]),
        (4, 8 * 128, 128),
        (4, 1024, 128),
    ]
    assert calls == expected_calls[: 4 if mesh.size == 1 else 2]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found, expected)


def test_summands_keep_multiprocessors_busy_and_are_whole_tiles():
    def summands(*sizes, kind="NVIDIA H100 80GB HBM3"):
        device = types.SimpleNamespace(platform="gpu", device_kind=kind)
        return between.summands(device, *sizes)

    assert summands(8, 3072, 3072) == 8
    assert summands(128, 3072, 3072) == 4
    assert summands(8, 9984, 3072) == 6  # 78 tiles of 128
    assert summands(8, 2560, 3072) == 5  # 20 of 128
    assert summands(8, 4992, 3072) == 6  # 39 of 128, 78 of 64
    assert summands(8, 4736, 3072) == 8  # 37 of 128, 74 of 64, 296 of 16
    assert summands(8, 3072, 1216) == 8
    assert summands(8, 100, 3072) == 1
    assert summands(4096, 3072, 3072) == 1
    assert summands(8, 3072, 3072, kind="NVIDIA A100") == 1


def test_what_no_kernel_serves_is_left_to_xla():
    def enters(Q, C, R, extra=0, N=2):
        return between.enters(N, Q + C + R + extra, Q, (1, 8, 1, C), (1, 8, R))

    assert enters(1024, 512, 64) and enters(1024, 256, 64, extra=256)
    assert not enters(1024, 512, 64, extra=24)  # a gate
    assert not enters(1024, 512, 64, N=1)
    assert not enters(24, 512, 64) and not enters(1024, 48, 64) and not enters(1024, 512, 32)
    assert between.sums(3072) and not between.sums(40)
    assert between.turns(2, 128, 64) and not between.turns(1, 128, 64)
    assert not between.turns(2, 96, 64) and not between.turns(2, 128, 32)


def test_lowers_for_hopper_and_changes_the_cache_in_place():
    def step(summands, angles, scales, slots, first, latents, k_rope, x):
        how = dict(factors=(1.0, 1.0), eps=EPS)
        q, *cache = between.enter(summands, angles, scales, slots, first, latents, k_rope, **how)
        parts = summands[:, :, 0, :3072]
        return (
            q,
            cache,
            between.sum_and_norm(parts, x, scales[0], factor=1.0, eps=EPS, dtype="bfloat16"),
            between.turn(parts.reshape(8, 8, 1, 16, 192), angles, rope=64, dtype="bfloat16"),
        )

    of = jax.ShapeDtypeStruct
    B, S, f32, b16 = 2, 40, jnp.float32, jnp.bfloat16
    arrays = (
        of((8, 8, 1, 3072 + 512 + 64), f32),
        (of((8, 1, 32), f32), of((8, 1, 32), f32)),
        (of((3072,), f32), of((512,), f32)),
        of((B, 1), jnp.int32),
        of((1,), jnp.int32),
        of((B, S, 4, 128), b16),
        of((B, S, 64), b16),
        of((8, 3072), b16),
    )
    safe = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    function = jax.jit(step, donate_argnums=(5, 6))
    text = export.export(function, platforms=["cuda"], disabled_checks=safe)(*arrays).mlir_module()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu_v2" in line]
    assert len(calls) == 3
    assert sum(line.count("output_operand_alias<") for line in calls) == 2
