"""What the latent family's members share: latents, and keys and values made of them.

Latent `r * G + g` serves the query heads of group `g` in branch `r`; each branch has its own
softmax and the branch outputs are summed. Up-projections are stored by branch head `p = r * H + h`,
so that head `h` of branch `r` reads latent `p // (H / G)` and any even split of `p` over devices
follows the latents. With `num_kv_heads` each serves neighbouring query heads.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mlra_jax import sharding
from mlra_jax.attention import heads
from mlra_jax.attention.base import Attention
from mlra_jax.config import LatentConfig
from mlra_jax.kernels.causal_attention import with_shared
from mlra_jax.layers import RMSNorm, Spread, rotate, weigh


def branch_factor(a: LatentConfig) -> float:
    """By which the sum of the branches is multiplied."""
    return 1 / math.sqrt(a.num_branches) if a.scaled else 1.0


class FromLatents(Attention):
    """Whole sequences by keys and values; what is kept between decoding steps is the members'."""

    reads = ("q_down", "kv_down", "k_rope")

    def _add_parameters(self, config, project, rngs):
        a: LatentConfig = config.attention
        D, H, C = config.embed_dim, a.num_heads, a.latent_head_dim
        factor = lambda width: math.sqrt(D / width) if a.scaled else 1.0
        self.branch_factor = branch_factor(a)
        norm = functools.partial(RMSNorm, config=config, rngs=rngs)
        self.q_down = project((D, a.q_latent_dim), ("embed", "q_latent"))
        self.q_norm = norm(a.q_latent_dim, factor=factor(a.q_latent_dim))
        self.q_up = project((a.q_latent_dim, H, a.query_dim), ("q_latent", "heads", "head_dim"))
        self.kv_down = project((D, a.latent_dim), ("embed", "latent"))
        self.kv_norm = norm(C, blocks=a.num_latents, factor=factor(C))
        self.k_rope = project((D, a.rope_dim), ("embed", "rope"))
        up = self._up_shape(a.branches * a.kv_heads, C)
        self.k_up, self.v_up = project(*up), project(*up)
        if a.branch_gated:
            self.branch_gate = project((D, a.num_branches, H), ("embed", None, None))

    def _up_shape(self, kv_heads, width):
        """(shape, axes) of an up-projection; heads that do not divide are on every device."""
        divides = kv_heads % sharding.size(self.mesh, sharding.MODEL) == 0
        axes = ("latent_heads" if divides else None, "latent_dim", "head_dim")
        return (kv_heads, width, self.config.nope_dim), axes

    @classmethod
    def input_names(cls, a):
        gate = ("branch_gate",) if a.branch_gated else ()
        return (*super().input_names(a), *gate)

    def _queries(self, y, positions_BT):
        """`[nope | rotary]` in the last dimension."""
        if self.exchanges.copied:
            axes = ("batch", "length", "q_latent")
            q_WBTQ = self.q_norm(self.exchanges.gathered(y["q_down"], *axes, hidden=False))
            q_BTHK = self.exchanges.columns(self.q_up, Spread(None, q_WBTQ))
        else:
            q_BTHK = self.q_up(self.q_norm(self._down(y["q_down"], "q_latent")))
        return self._turned(self._by_head(q_BTHK), positions_BT)

    def _turned(self, q_BTHK, positions_BT):
        q_nope, q_rope = jnp.split(q_BTHK, [self._fixed_width()], axis=-1)
        return jnp.concatenate([q_nope, rotate(q_rope, positions_BT, self.rope_base)], axis=-1)

    def _fixed_width(self):
        """Of what of a query does not turn."""
        return self.config.nope_dim

    def _down(self, x_BTQ, axis):
        return heads.gathered(x_BTQ, axis, self.mesh)

    def _all_heads(self, q_BTHK):
        """Queries, each made on the device that has its head, of all heads on every device."""
        axes = ("batch", "length", "heads", "head_dim")
        return sharding.gathered(q_BTHK, self.mesh, axes, sharding.MODEL)

    def _kept(self, y, positions_BT):
        a, (B, T) = self.config, y["kv_down"].shape[:2]
        down_BTE = self._as_projected(y["kv_down"])
        down_BTLC = down_BTE.reshape(B, T, a.num_latents, a.latent_head_dim)
        fewer = a.num_latents % sharding.size(self.mesh, sharding.TENSOR)
        axes = ("batch", "length", None if fewer else "cache_latent", None)
        down_BTLC = sharding.constrain(down_BTLC, self.mesh, *axes)
        c_BTLC = self.kv_norm(down_BTLC.reshape(B, T, -1)).reshape(down_BTLC.shape)
        k_rope_BTR = rotate(y["k_rope"][:, :, None], positions_BT, self.rope_base)[:, :, 0]
        return {"latents": sharding.constrain(c_BTLC, self.mesh, *axes), "k_rope": k_rope_BTR}

    def _as_projected(self, down_BTE):
        return sharding.constrain(down_BTE, self.mesh, "batch", "length", "latent")

    def _operands(self, q_BTHK, kept):
        q_BTPK = self._by_branch_head(jnp.tile(q_BTHK, (1, 1, self.config.branches, 1)))
        made = keys_and_values(kept["latents"], kept["k_rope"], self.k_up, self.v_up)
        return q_BTPK, *(heads.repeat_for_mesh(x, self.mesh) for x in made)

    def _by_branch_head(self, x_BTPK):
        return sharding.constrain(x_BTPK, self.mesh, "batch", "length", "latent_heads", "head_dim")

    def _sum(self, y, o_BTPK):
        """Of the branches, with the factor that keeps its variance."""
        (B, T, _, K), (ways, heads) = o_BTPK.shape, self._parts()
        o_BTwbHK = self._chosen(y, o_BTPK).reshape(B, T, ways, -1, heads, K)
        return self._by_part(o_BTwbHK.sum(3) * self.branch_factor)

    def _chosen(self, y, x_BTPX):
        """The branches' outputs by the token's own weights, of mean 1, if it has any."""
        if "branch_gate" not in y:
            return x_BTPX
        weights_BTbH = self._choice(y, slice(self.config.branches))
        weights_BTP = weights_BTbH.reshape(*x_BTPX.shape[:3], 1)
        return x_BTPX * self._by_branch_head(weights_BTP)

    def _choice(self, y, which):
        """`[B, T, branches, H]` of these branches; the base is the last."""
        # Whole on every device, as its projection is: else the choice would be exchanged.
        whole = lambda x: sharding.constrain(x, self.mesh, "batch", "length", None, None)
        chosen_BTbH = jax.nn.softmax(whole(y["branch_gate"]).astype(jnp.float32), axis=2)
        return whole((chosen_BTbH[:, :, which] * self.config.num_branches).astype(self.dtype))

    def _parts(self):
        """The branch heads are so many parts, of which each adds up branches of so many heads."""
        return 1, self.config.num_heads

    def _by_part(self, o_BTwHK):
        B, T, ways, heads, K = o_BTwHK.shape
        return o_BTwHK.reshape(B, T, ways * heads, K)


def keys_and_values(c_BTLC, k_rope_BTR, k_up, v_up):
    """`[B, T, J, ...]` of each branch's heads, the rotary key behind each key."""
    k_BTJK = up_projected(c_BTLC, k_up.kernel[...])
    return with_shared(k_BTJK, k_rope_BTR), up_projected(c_BTLC, v_up.kernel[...])


def up_projected(c_BTLC, kernel_JCK):
    """Keys or values of each branch's heads from their latent."""
    B, T, L, C = c_BTLC.shape
    kernel_LHCK = kernel_JCK.reshape(L, -1, C, kernel_JCK.shape[-1])
    return weigh(c_BTLC, kernel_LHCK, "btlc,lhck->btlhk").reshape(B, T, len(kernel_JCK), -1)
