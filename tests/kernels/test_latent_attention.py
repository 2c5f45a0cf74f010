"""Attention to latents: what its kernels are given and give, by stand-ins in plain JAX."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest

from mlra_jax import remat, sharding
from mlra_jax.attention import sharded
from mlra_jax.kernels.causal_attention import api, latent, latent_attention

SCALE = 0.3
NO_DIALECT = "this jaxlib has no Mosaic GPU dialect"


def by_statistics(q, q_rope, c, k_rope, dz, lse_BPT, delta_BPT, *, scale):
    """The gradients, if the statistics are right."""
    (z, lse), pull = jax.vjp(functools.partial(latents.attended, scale=scale), q, q_rope, c, k_rope)
    delta = (z * dz).sum(-1).transpose(1, 3, 0, 2).reshape(lse.shape)
    wrong = jnp.abs(lse - lse_BPT).max() + jnp.abs(delta - delta_BPT).max() > 1e-4
    return [jnp.where(wrong, jnp.nan, x) for x in pull((dz, jnp.zeros_like(lse)))]


@pytest.fixture
def kernels(monkeypatch):
    serves = lambda *_: True
    forward = types.SimpleNamespace(forward=latents.attended, serves=serves)
    backward = types.SimpleNamespace(backward=by_statistics, serves=serves)
    monkeypatch.setattr(latent, "_kernels", lambda: (forward, backward))


def arguments(B, T, H, branches, L, C=8, R=4):
    random = np.random.default_rng(H + L)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32))
    rope = jnp.tile(draw(B, T, H, R), (1, 1, branches, 1))
    return draw(B, T, H * branches, C), rope, draw(B, T, L, C), draw(B, T, R)


def attend(implementation, mesh, heads, q, q_rope, c, k_rope):
    ways = sharding.size(mesh, sharding.MODEL)
    c = jnp.repeat(c, np.lcm(c.shape[2], ways) // c.shape[2], axis=2)
    how = dict(heads=heads, scale=SCALE, mesh=mesh, implementation=implementation)
    return sharded.whole_sequence_of_latents(q, q_rope, c, k_rope, **how)


@pytest.mark.parametrize(
    "H, branches, L, sizes",
    [
        (6, 4, 4, dict()),
        (6, 2, 4, dict(data=2, tensor=2)),  # two latents of a branch
        (6, 2, 4, dict(tensor=2, context=2)),  # half of a branch's heads on each
        (4, 4, 4, dict(tensor=8)),  # more devices than latents
        (6, 4, 4, dict(tensor=3)),  # a branch and a third on each
        (6, 1, 3, dict(fsdp=2)),  # GLA: one branch, its heads in groups
    ],
)
def test_heads_branches_and_latents_over_a_mesh(kernels, H, branches, L, sizes):
    devices = jax.devices()[: np.prod(list(sizes.values()), dtype=int)]
    mesh = sharding.make_mesh(**sizes, devices=devices)
    arrays = arguments(2, 9, H, branches, L)

    def with_gradients(implementation):
        call = lambda *x: (jnp.sin(attend(implementation, mesh, H, *x)) ** 2).sum()
        return jax.jit(jax.value_and_grad(call, (0, 1, 2, 3)))(*arrays)

    got, want = with_gradients("mosaic_gpu"), with_gradients("reference")
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.shape == b.shape
        # Rotary queries are the same for all branches: their sum is what counts.
        if a.ndim == 4 and a.shape[2:] == (H * branches, 4):
            a, b = (x.reshape(2, 9, branches, H, 4).sum(2) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


HOPPER, AMPERE = (types.SimpleNamespace(platform="gpu", device_kind=x) for x in ("H100", "A100"))


@pytest.mark.parametrize(
    "sizes, device, chosen",
    [
        (dict(), HOPPER, "mosaic_gpu"),
        (dict(H=5), HOPPER, "cudnn"),
        (dict(T=100), HOPPER, "cudnn"),
        (dict(C=64), HOPPER, "cudnn"),
        (dict(dtype=jnp.float16), HOPPER, "cudnn"),
        (dict(), AMPERE, "cudnn_padded"),
    ],
)
def test_kernels_of_our_own_on_hopper(monkeypatch, sizes, device, chosen):
    pytest.importorskip("mlra_jax.kernels.causal_attention.latent_backward", reason=NO_DIALECT)
    monkeypatch.setattr(api, "_unequal_widths", lambda device: device is HOPPER)
    shapes = abstract(**sizes)
    heads = shapes[0].shape[2] // 2
    assert latent.implementation_for(device, *shapes, heads=heads) == chosen
    if device is HOPPER and chosen != "mosaic_gpu":
        with pytest.raises(ValueError, match="mosaic_gpu takes bfloat16, .* got") as raised:
            how = dict(heads=heads, scale=SCALE, implementation="mosaic_gpu")
            jax.eval_shape(functools.partial(latent_attention, **how), *shapes)
        assert "\n" not in str(raised.value)


def test_keys_and_values_that_are_no_latents_are_refused_in_one_line():
    q, _, c, _ = abstract()
    with pytest.raises(ValueError, match="mosaic_gpu attends to latents .* auto takes others"):
        api.causal_attention(q, c, c, scale=SCALE, implementation="mosaic_gpu")


def abstract(H=4, T=128, C=128, dtype=jnp.bfloat16):
    sizes = (1, T, 2 * H, C), (1, T, 2 * H, 64), (1, T, 2, C), (1, T, 64)
    return [jax.ShapeDtypeStruct(x, dtype) for x in sizes]


@pytest.mark.parametrize("policy, forward", [("none", 1), ("attention", 1), ("block", 2)])
def test_the_forward_pass_runs_again_only_where_its_results_are_not_kept(policy, forward):
    """By the names that `remat` knows."""
    pytest.importorskip("mlra_jax.kernels.causal_attention.latent_backward", reason=NO_DIALECT)
    how = dict(heads=4, scale=SCALE, implementation="mosaic_gpu", name=remat.ATTENTION)
    again = remat.checkpointed(functools.partial(latent_attention, **how), policy, in_loop=False)
    total = lambda *x: (again(*x).astype(jnp.float32) ** 2).sum()
    traced = jax.jit(jax.grad(total, (0, 1, 2, 3))).trace(*abstract())
    # Whatever calls a kernel is a function of its own, which layers share.
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"call @(forward|backward)\w*\(", text)
    assert calls == ["forward"] * forward + ["backward"]
