"""A decode step of absorbed attention as users shard it: latents over devices, cache donated."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlra_jax.kernels.absorbed_decode import absorbed_decode


def sharded_step(mesh: Mesh, *, B, T, L, H, C, R, S, **options):
    """(a jitted step that donates its cache, the shapes of its arguments) over axis `tensor`.

    The step writes new entries into the cache and attends, both under shard_map.
    """
    split, whole = P(None, None, "tensor"), P()

    def shard(q, q_rope, latents, k_rope, new_latents, new_k_rope, length, starts):
        latents = jax.lax.dynamic_update_slice_in_dim(latents, new_latents, length, 1)
        k_rope = jax.lax.dynamic_update_slice_in_dim(k_rope, new_k_rope, length, 1)
        lengths = jnp.broadcast_to(length + T, [B])
        out, lse = absorbed_decode(q, q_rope, latents, k_rope, lengths, starts, **options)
        return out, lse, latents, k_rope

    step = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(split, whole, split, whole, split, whole, whole, whole),
        out_specs=(split, split, split, whole),
        check_vma=True,
    )

    def array(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arrays = (
        array(split, B, T, L, H, C),
        array(whole, B, T, H, R),
        array(split, B, S, L, C),
        array(whole, B, S, R),
        array(split, B, T, L, C),
        array(whole, B, T, R),
        array(whole, dtype=jnp.int32),
        array(whole, B, dtype=jnp.int32),
    )
    return jax.jit(step, donate_argnums=(2, 3)), arrays
