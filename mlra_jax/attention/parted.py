"""The decoding form of latent attention over several devices: two exchanges a layer and no more.

Everything behind the branch outputs is linear, so each device multiplies what its own latents gave
by the output projection of the heads they serve, and the sums over devices become the one sum that
follows. A head that several devices serve has its rows of that projection on each of them; the
queries' projections, small beside the rest, are whole on every device. What is exchanged for
attention is then one vector of the width of the model a token, not queries and branch outputs.
"""

import jax.numpy as jnp
import numpy as np

from mlra_jax import sharding
from mlra_jax.attention.latent import LatentAttention
from mlra_jax.config import LatentConfig


def part_heads(a: LatentConfig, ways: int) -> np.ndarray:
    """`[ways, n]`: the query heads whose outputs each of `ways` devices makes a part of.

    Device `d` has the branch heads `d * p ... (d + 1) * p - 1`; where they are whole branches, it
    adds them up first, and has each head once.
    """
    branch_heads = np.arange(a.branches * a.num_heads).reshape(ways, -1)
    if branch_heads.shape[1] % a.num_heads == 0:
        branch_heads = branch_heads[:, : a.num_heads]
    return branch_heads % a.num_heads


class PartedLatentAttention(LatentAttention):
    """Its `out` and `gate` have the heads of `part_heads`, device by device."""

    def _add_parameters(self, config, project, rngs):
        super()._add_parameters(config, project, rngs)
        a: LatentConfig = config.attention
        D, Q = config.embed_dim, a.q_latent_dim
        self.q_down = project((D, Q), ("embed", None))
        self.q_up = project((Q, a.num_heads, a.query_dim), (None, None, "head_dim"))

    def _add_outputs(self, config, project):
        a: LatentConfig = config.attention
        parts = part_heads(a, sharding.size(self.mesh, sharding.MODEL)).size
        if a.gated:
            self.gate = project(
                (config.embed_dim, parts, a.value_dim), ("embed", "latent_heads", "head_dim")
            )
        self.out = project(
            (parts, a.value_dim, config.embed_dim),
            ("latent_heads", "head_dim", "embed"),
            num_in=2,
        )

    def _down(self, y):
        return y["q_down"]

    def _by_head(self, x_BTHK):
        return x_BTHK

    def _parts(self):
        ways = sharding.size(self.mesh, sharding.MODEL)
        return part_heads(self.config, ways).shape

    def _by_part(self, o_BTwHK):
        return self._by_branch_head(super()._by_part(o_BTwHK))


def part_columns(kernel: jnp.ndarray, a: LatentConfig, ways: int, axis: int) -> jnp.ndarray:
    """The training form's `out` or `gate` with its heads, along `axis`, as the parts have them."""
    return jnp.take(kernel, part_heads(a, ways).ravel(), axis=axis)
