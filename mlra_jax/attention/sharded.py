"""Attention over devices: a whole sequence, and one decode step over a cache that never moves."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import cache as kv
from mlra_jax import remat, sharding
from mlra_jax.kernels.causal_attention import causal_attention, implementation_for
from mlra_jax.kernels.softmax import join, merge

Attend = Callable[..., tuple[jax.Array, jax.Array]]


def whole_sequence(
    q_BTHK: jax.Array,
    k_BTJK: jax.Array,
    v_BTJV: jax.Array,
    *,
    scale: float,
    mesh: Mesh,
    implementation: str = "auto",
) -> jax.Array:
    """Causal attention of a sequence to itself, `[B, T, H, V]`, named for `remat`.

    Batch and heads are split over `mesh` as the table in `sharding` says; H and J must divide.
    """
    if implementation == "auto":
        widths = q_BTHK.shape[-1], v_BTJV.shape[-1]
        implementation = implementation_for(mesh.devices.flat[0], q_BTHK.dtype, *widths)
    local = functools.partial(
        causal_attention, scale=scale, implementation=implementation, name=remat.ATTENTION
    )
    if mesh.size == 1:
        return local(q_BTHK, k_BTJK, v_BTJV)
    split = sharding.spec("batch", "length", "heads", "head_dim")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split), out_specs=split, check_vma=False
    )(q_BTHK, k_BTJK, v_BTJV)


def decode_step(
    attend: Attend,
    queries: Any,
    new: dict[str, jax.Array],
    cache: dict[str, jax.Array],
    lengths_B: jax.Array,
    *,
    cache_axes: dict[str, tuple[str | None, ...]],
    mesh: Mesh,
    within: Attend | None = None,
    weights: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Writes `new` into each row's next slots and attends to the cache, on every device.

    Args:
      attend: `(queries, cache, lengths_BT, *weights) -> (o_BThV, lse_BTh)` of one device: its share
        of the heads over its share of the positions, query `t` seeing those before `lengths[b, t]`;
        each of the two may be a tuple, for heads in latents of several widths.
      queries: of the T new tokens, a tree of `[B, T, H, ...]`.
      new: their cache entries, `[B, T, ...]`, as far as they are not in the cache by now; cache:
        `[B, S, ...]`, both by name.
      lengths_B: int32, the slots that each row fills.
      within: `(queries, new, *weights) -> (o_BThV, lse_BTh)` of one device's share of the heads,
        causal attention of the new tokens to themselves; `attend` is then asked for what came
        before them only. Without it `attend` sees them in the cache.
      weights: what attention needs besides, split by head in the first dimension.

    Returns:
      `[B, T, H, V]`, or a tuple of them, split by head over the mesh, and the cache.
    """
    # A device attends for all heads of its `tensor` share, whatever its `context` share.
    asked = sharding.spec("batch", "length", "cache_latent", None)
    cached = {name: sharding.spec(*axes) for name, axes in cache_axes.items()}
    added = {n: sharding.spec("batch", "length", *cache_axes[n][2:]) for n in new}
    shares = sharding.size(mesh, sharding.CONTEXT)

    def local(queries, new, cache, lengths_B, *weights):
        share = jax.lax.axis_index(sharding.CONTEXT)
        T = jax.tree.leaves(queries)[0].shape[1]
        written = {n: kv.write(cache[n], new[n], lengths_B, shares, share) for n in new}
        cache = cache | written
        if within is None:
            bounds_BT = kv.bounds(lengths_B, T, shares, share)
            o_BThV, lse_BTh = attend(queries, cache, bounds_BT, *weights)
        else:
            ends_B = kv.shares(lengths_B, shares, share)
            ends_BT = jnp.broadcast_to(ends_B[:, None], (len(ends_B), T))
            before = attend(queries, cache, ends_BT, *weights)
            o_BThV, lse_BTh = within(queries, new, *weights)
            # Every device of the context axis has the new tokens: each counts its part of them.
            lse_BTh = jax.tree.map(lambda x: x - math.log(shares), lse_BTh)
            o_BThV, lse_BTh = join(before, (o_BThV, lse_BTh))
        if shares > 1:
            over_shares = functools.partial(merge, axis_name=sharding.CONTEXT, dim=2)
            o_BThV = jax.tree.map(over_shares, o_BThV, lse_BTh)
        return o_BThV, cache

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            jax.tree.map(lambda _: asked, queries),
            added,
            cached,
            sharding.spec("batch"),
            *(sharding.spec("cache_latent", None, None) for _ in weights),
        ),
        out_specs=(sharding.spec("batch", "length", "heads", "head_dim"), cached),
        check_vma=False,
    )(queries, new, cache, lengths_B, *weights)
