"""Attention over devices: a whole sequence, and one decode step over a cache that never moves."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import cache as kv
from mlra_jax import remat, sharding
from mlra_jax.kernels import between_products
from mlra_jax.kernels.causal_attention import (
    causal_attention,
    implementation_for,
    latent_attention,
    latents_for,
)
from mlra_jax.kernels.softmax import join, merge
from mlra_jax.layers import RMSNorm, rotated, summands

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
        implementation = implementation_for(mesh.devices.flat[0], q_BTHK, k_BTJK, v_BTJV)
    how = dict(scale=scale, implementation=implementation, name=remat.ATTENTION)
    local = functools.partial(causal_attention, **how)
    return _by_head(local, mesh, q_BTHK, k_BTJK, v_BTJV)


def whole_sequence_of_latents(
    *arrays: jax.Array, heads: int, scale: float, mesh: Mesh, implementation: str = "auto"
) -> jax.Array:
    """As `whole_sequence`, `[B, T, P, C]`, of what `latent_attention` takes; P and L divide."""

    def local(*arrays):
        chosen = implementation
        if chosen == "auto":
            chosen = latents_for(mesh.devices.flat[0], *arrays, heads=heads)
        how = dict(scale=scale, implementation=chosen, name=remat.ATTENTION)
        return latent_attention(*arrays, heads=heads, **how)

    return _by_head(local, mesh, *arrays)


def _by_head(local: Callable[..., jax.Array], mesh: Mesh, *arrays: jax.Array) -> jax.Array:
    """On each device its rows and its heads; arrays without heads are whole."""
    if mesh.size == 1:
        return local(*arrays)
    axes = "batch", "length", "heads", "head_dim"
    of = lambda x: sharding.spec(*(axes if x.ndim == 4 else (*axes[:2], None)))
    split = tuple(map(of, arrays))
    return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split[0], check_vma=False)(
        *arrays
    )


def enter(
    summands_NBTE: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
    norms: tuple[RMSNorm, RMSNorm],
    cache: dict[str, jax.Array],
    lengths_B: jax.Array,
    *,
    cache_axes: dict[str, tuple[str | None, ...]],
    mesh: Mesh,
) -> tuple[jax.Array, dict[str, jax.Array]] | None:
    """Latents and rotary keys of new tokens into the cache by one kernel, on every device.

    Args:
      summands_NBTE: of each device, as `between_products.enter` takes them; None if there are none.
      angles: of the T tokens, each `[B, T, R / 2]`.
      norms: of the query's latent and of the latents.
      cache: `latents` `[B, S, L, C]`, each repeated on the devices that hold it, and `k_rope`.
      lengths_B: int32, the slots that each row fills.

    Returns:
      (the query's latent normed, `[B, T, Q]`; the cache), or None where no kernel serves.
    """
    if summands_NBTE is None:
        return None
    names, (q_norm, kv_norm) = ("latents", "k_rope"), norms
    kept, cached = [cache[n] for n in names], [sharding.spec(*cache_axes[n]) for n in names]
    shapes = [sharding.named(mesh, *cache_axes[n]).shard_shape(cache[n].shape) for n in names]
    N, *_, E = summands_NBTE.shape
    summands_each = N // sharding.size(mesh, sharding.MODEL)
    if not between_products.enters(summands_each, E, q_norm.width, *shapes):
        return None
    how = dict(factors=(q_norm.factor, kv_norm.factor), eps=q_norm.eps)

    def local(summands_NBTE, angles, scales, lengths_B, *kept):
        T, S = summands_NBTE.shape[2], kept[0].shape[1]
        slots_BT, first = _own_slots(lengths_B, T, S, kv_norm.blocks, mesh)
        return between_products.enter(summands_NBTE, angles, scales, slots_BT, first, *kept, **how)

    rows, whole = sharding.spec("batch", "length"), jax.sharding.PartitionSpec()
    q_BTQ, *kept = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            sharding.spec("latent", "batch", "length"),
            rows,
            whole,
            sharding.spec("batch"),
            *cached,
        ),
        out_specs=(rows, *cached),
        check_vma=False,
    )(summands_NBTE, angles, [norm.scale[...] for norm in norms], lengths_B, *kept)
    return q_BTQ, dict(zip(names, kept, strict=True))


def places(
    lengths_B: jax.Array,
    rows: int,
    T: int,
    num_latents: int,
    cache: dict[str, jax.Array],
    *,
    cache_axes: dict[str, tuple[str | None, ...]],
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Where T new tokens of each row are kept, on every device.

    Args:
      lengths_B: int32, the slots that each row of the cache fills.
      rows: at least B; those beyond B are kept nowhere.
      num_latents: of the model.

    Returns:
      (int32 `[N, rows * T]`, for each device the number of each token's slot among all of its
      cache, -1 where it keeps nothing; int32 `[N]`, the first latent of its cache).
    """
    where = sharding.named(mesh, *cache_axes["latents"])
    B, S, *_ = where.shard_shape(cache["latents"].shape)

    def local(lengths_B):
        slots_BT, first = _own_slots(lengths_B, T, S, num_latents, mesh)
        among_all_BT = jnp.arange(B, dtype=jnp.int32)[:, None] * S + slots_BT
        kept_BT = jnp.where(slots_BT < S, among_all_BT, -1)
        kept_BT = jnp.pad(kept_BT, ((0, rows - B), (0, 0)), constant_values=-1)
        return kept_BT.reshape(1, -1), first

    own = sharding.spec("latent")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=sharding.spec("batch"),
        out_specs=(own, own),
        check_vma=False,
    )(lengths_B)


def _own_slots(lengths_B, T, S, num_latents, mesh):
    """(slots of T new tokens in the S of the present device's cache, its first latent `[1]`)."""
    shares, tensor = (sharding.size(mesh, axes) for axes in (sharding.CONTEXT, sharding.TENSOR))
    slots_BT = kv.slots(lengths_B, T, S, shares, jax.lax.axis_index(sharding.CONTEXT))
    first = jax.lax.axis_index(sharding.TENSOR) * num_latents // tensor
    return slots_BT, first.astype(jnp.int32)[None]


def queries(
    q_BTQ: jax.Array,
    kernel_QHK: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    *,
    axes: Sequence[str | None],
    rope: int,
    mesh: Mesh,
) -> jax.Array:
    """Queries `[B, T, H, K]`, the last `rope` of K turned, of the heads whose kernel a device has.

    `axes` are the kernel's; the first is on every device.
    """

    def local(q_BTQ, kernel_QHK, angles):
        made_NBTHK = summands(q_BTQ, kernel_QHK, 1)
        N, *_, K = made_NBTHK.shape
        if between_products.turns(N, K - rope, rope):
            made = between_products.turn(made_NBTHK, angles, rope=rope, dtype=q_BTQ.dtype.name)
        else:
            nope_BTHK, rope_BTHR = jnp.split(made_NBTHK.sum(0).astype(q_BTQ.dtype), [K - rope], -1)
            made = nope_BTHK, rotated(rope_BTHR, *angles)
        return jnp.concatenate(made, axis=-1)

    rows = sharding.spec("batch", "length")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, sharding.spec(*axes), rows),
        out_specs=sharding.spec("batch", "length", *axes[1:]),
        check_vma=False,
    )(q_BTQ, kernel_QHK, angles)


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
    in_parts: bool = False,
) -> tuple[Any, dict[str, jax.Array]]:
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
      in_parts: whether `attend` gives, instead of o, a tree of what each device has for itself.

    Returns:
      `[B, T, H, V]`, or a tuple of them, split by head over the mesh, and the cache. Of what each
      device has for itself the first dimension counts the devices.
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
        if in_parts:
            o_BThV = jax.tree.map(lambda x: x[None], o_BThV)
        return o_BThV, cache

    by_head = sharding.spec("batch", "length", "heads", "head_dim")
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
        out_specs=(sharding.spec("latent") if in_parts else by_head, cached),
        check_vma=False,
    )(queries, new, cache, lengths_B, *weights)
