"""Attention over a mesh: ops on local arrays, each device with its share of batch and heads."""

import functools

import jax
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.kernels.causal_attention import causal_attention, implementation_for


def causal(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJV: jax.Array, *, scale: float, mesh: Mesh
) -> jax.Array:
    """`causal_attention` of arrays split over `mesh`; returns `[B, T, H, V]`, split alike.

    The batch and the heads are split as the table in `sharding` says; H and J must divide.
    """
    name = implementation_for(mesh.devices.flat[0], q_BTHK.dtype)
    local = functools.partial(causal_attention, scale=scale, implementation=name)
    if mesh.size == 1:
        return local(q_BTHK, k_BTJK, v_BTJV)
    split = sharding.spec("batch", "length", "heads", "head_dim")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split), out_specs=split, check_vma=False
    )(q_BTHK, k_BTJK, v_BTJV)
