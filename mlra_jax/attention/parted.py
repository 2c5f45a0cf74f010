"""The decoding form of latent attention over several devices: two exchanges a layer and no more.

Everything behind the branch outputs is linear, so each device multiplies what its own latents gave
by the output projection of the heads they serve, and the sums over devices become the one sum that
follows. A head that several devices serve has its rows of that projection on each of them; the
queries' projections, small beside the rest, are whole on every device, and what makes latents and
their queries is so on all devices that share the positions of the same latents. What is exchanged
for attention is then one vector of the width of the model a token, not queries and branch outputs,
and what joins shares of the positions.
"""

import functools

import jax.numpy as jnp
import numpy as np

from mlra_jax import sharding
from mlra_jax.attention.base import gate_width
from mlra_jax.attention.latent import LatentAttention
from mlra_jax.config import LatentConfig


def part_heads(a: LatentConfig, ways: int) -> np.ndarray:
    """`[ways, n]`: the query heads whose outputs each of `ways` devices makes a part of.

    Device `d` has the branch heads `d * p ... (d + 1) * p - 1`; where they are whole branches, it
    adds them up first, and has each head once. Its heads of the base, where there is one, are last.
    """
    summed = _summed_heads(a, ways)
    if not a.base_dim:
        return summed
    return np.concatenate([summed, np.arange(a.num_heads).reshape(ways, -1)], axis=1)


def _summed_heads(a: LatentConfig, ways: int) -> np.ndarray:
    branch_heads = np.arange(a.branches * a.num_heads).reshape(ways, -1)
    if branch_heads.shape[1] % a.num_heads == 0:
        branch_heads = branch_heads[:, : a.num_heads]
    return branch_heads % a.num_heads


@functools.cache
def parted(mechanism: type[LatentAttention]) -> type[LatentAttention]:
    """The mechanism with `out` and `gate` of the heads of `part_heads`, device by device."""

    class Parted(mechanism):
        def _add_parameters(self, config, project, rngs):
            super()._add_parameters(config, project, rngs)
            a: LatentConfig = config.attention
            D, Q = config.embed_dim, a.q_latent_dim
            self.q_down = project((D, Q), ("embed", None))
            self.q_up = project((Q, a.num_heads, a.query_dim), (None, None, "head_dim"))
            whole = a.num_latents % sharding.size(self.mesh, sharding.TENSOR)
            latents = None if whole else "cache_latent"
            self.kv_down = project((D, a.latent_dim), ("embed", latents))
            shape, (heads, *axes) = self._up_shape(a.branches * a.kv_heads, a.latent_head_dim)
            self.k_up = project(shape, ("cache_latent" if heads else None, *axes))
            if a.base_dim:
                self.base_down = project((D, a.base_dim), ("embed", None))

        def _add_outputs(self, config, project):
            a: LatentConfig = config.attention
            parts = part_heads(a, sharding.size(self.mesh, sharding.MODEL)).size
            if width := gate_width(a):
                self.gate = project(
                    (config.embed_dim, parts, width), ("embed", "latent_heads", "head_dim")
                )
            self.out = project(
                (parts, self._output_width(), config.embed_dim),
                ("latent_heads", "head_dim", "embed"),
                num_in=2,
            )

        def _output_width(self):
            """Of what `out` takes of a head."""
            return self.config.value_dim

        def _down(self, x_BTQ, axis):
            return x_BTQ

        def _all_heads(self, q_BTHK):
            return sharding.constrain(q_BTHK, self.mesh, "batch", "length", None, "head_dim")

        def _as_asked(self, q_BTPX):
            return sharding.constrain(q_BTPX, self.mesh, "batch", "length", "cache_latent", None)

        def _as_projected(self, down_BTE):
            return down_BTE

        def _by_head(self, x_BTHK):
            return x_BTHK

        def _parts(self):
            ways = sharding.size(self.mesh, sharding.MODEL)
            return _summed_heads(self.config, ways).shape

        def _by_part(self, o_BTwHK):
            return self._by_branch_head(super()._by_part(o_BTwHK))

        def _beside(self, o_BTHK, base_BTHK):
            by_device = lambda x: x.reshape(*x.shape[:2], self._parts()[0], -1, x.shape[-1])
            both_BTwHK = jnp.concatenate([by_device(o_BTHK), by_device(base_BTHK)], axis=3)
            return self._by_part(both_BTwHK)

    return Parted


def part_columns(kernel: jnp.ndarray, a: LatentConfig, ways: int, axis: int) -> jnp.ndarray:
    """The training form's `out` or `gate` with its heads, along `axis`, as the parts have them."""
    return jnp.take(kernel, part_heads(a, ways).ravel(), axis=axis)
