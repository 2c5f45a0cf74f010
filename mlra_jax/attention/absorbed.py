"""The decoding form of latent attention without up-projections, where that costs no byte.

A query is multiplied by its own up-projection and then by a key's, and what comes of a latent by a
value's and then by the output projection. Each two are one matrix here. It is no larger where a
device asks its latents each head once at most and they are no wider than a key, as MLRA-4's on four
devices. A layer of a step is two launches shorter.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention.from_latents import branch_factor
from mlra_jax.attention.latent import LatentAttention, absorbs, per_head
from mlra_jax.attention.parted import part_columns, parted
from mlra_jax.config import LatentConfig
from mlra_jax.kernels.absorbed_decode import Problem, leaves_parts
from mlra_jax.layers import einsum


def is_absorbed(a: LatentConfig, mesh: Mesh) -> bool:
    """Whether the decoding form of a model that is `parted` is this one."""
    # Gates of single values stand between the two matrices, and a base is on every device.
    between = a.gated or a.base_dim > 0
    return absorbs(a) and not between and a.branches <= sharding.size(mesh, sharding.TENSOR)


@functools.cache
def absorbed(mechanism: type[LatentAttention]) -> type[LatentAttention]:
    """The mechanism as `parted`, with queries and outputs of latents by branch head."""

    class Absorbed(parted(mechanism)):
        def _add_parameters(self, config, project, rngs):
            super()._add_parameters(config, project, rngs)
            del self.k_up, self.v_up
            a: LatentConfig = config.attention
            shape = a.q_latent_dim, a.branches * a.num_heads, a.latent_head_dim + a.rope_dim
            self.q_up = project(shape, (None, "cache_latent", "head_dim"))

        def _output_width(self):
            return self.config.latent_head_dim

        def _fixed_width(self):
            return self.config.latent_head_dim

        def leaves_parts(self, cache):
            a, mesh, latents = self.config, self.mesh, cache["latents"]
            where = sharding.named(mesh, *self.cache_axes["latents"])
            B, S, L, C = where.shard_shape(latents.shape)
            problem = Problem(
                device_kind=mesh.devices.flat[0].device_kind,
                batch=B,
                queries=1,
                latents=L,
                heads=a.branches * a.num_heads // latents.shape[2],
                groups=min(a.groups, L),
                width=C,
                rope=a.rope_dim,
                cache=S,
                dtype=latents.dtype.name,
            )
            whole = sharding.size(mesh, sharding.CONTEXT) == 1
            return whole and leaves_parts(mesh.devices.flat[0], problem)

        def _ask_latents(self, q_BTPX):
            return tuple(jnp.split(q_BTPX, [self._fixed_width()], axis=-1))

        def _whole_absorbed(self, y, q_BTPX, c_BTLC, k_rope_BTR):
            queries = self._ask_latents(q_BTPX)
            return self._from_latents(y, self._to_latents(*queries, c_BTLC, k_rope_BTR))

        def _from_latents(self, y, z_BTPC):
            return self._by_branch_head(self._chosen(y, z_BTPC))

    return Absorbed


def query_recipe(a: LatentConfig, q_up_QHX: jax.Array, k_up_JCK: jax.Array) -> jax.Array:
    """`q_up` `[Q, P, C + R]` of the training form's `q_up` and `k_up`, float32."""
    nope_QHK, rope_QHR = jnp.split(q_up_QHX, [a.nope_dim], axis=-1)
    k_up_bHCK = per_head(a, k_up_JCK).reshape(a.branches, a.num_heads, -1, a.nope_dim)
    q_QbHC = _product("qhk,bhck->qbhc", nope_QHK, k_up_bHCK)
    rope_QbHR = jnp.broadcast_to(rope_QHR[:, None], (*q_QbHC.shape[:-1], a.rope_dim))
    both_QbHX = jnp.concatenate([q_QbHC, rope_QbHR], axis=-1)
    return both_QbHX.reshape(len(q_up_QHX), -1, both_QbHX.shape[-1])


def output_recipe(a: LatentConfig, ways: int, out_HKD: jax.Array, v_up_JCK: jax.Array) -> jax.Array:
    """`out` `[P, C, D]` of the training form's `out` and `v_up`, float32."""
    out_PKD = part_columns(out_HKD, a, ways, axis=0)
    return branch_factor(a) * _product("pck,pkd->pcd", per_head(a, v_up_JCK), out_PKD)


def _product(subscripts, x, y):
    return einsum(subscripts, x.astype(jnp.float32), y.astype(jnp.float32))
