"""The latent family: MLA, GLA-2, GLA-4, MLRA-2 and MLRA-4 (paper, section 3).

The keys and values of a token are up-projections of a few latent heads. Latent `r * G + g` serves
the query heads of group `g` in branch `r`; each branch has its own softmax and the branch outputs
are summed. Up-projections are stored by branch head `p = r * H + h`, so that head `h` of branch `r`
reads latent `p // (H / G)` and any even split of `p` over devices follows the latents.

A decode step makes no keys and values. The up-projections are absorbed into the query and the
output (paper, section 3.3), so that each latent head is a multi-query attention whose value is the
first part of its key.
"""

import functools
import math

import jax.numpy as jnp

from mlra_jax import sharding
from mlra_jax.attention import heads
from mlra_jax.attention.base import Attention
from mlra_jax.config import LatentConfig
from mlra_jax.kernels.absorbed_decode import absorbed_decode
from mlra_jax.layers import RMSNorm, rotate, weigh


class LatentAttention(Attention):
    reads = ("q_down", "kv_down", "k_rope")
    cache_axes = {
        "latents": ("batch", "cache_length", "cache_latent", None),
        "k_rope": ("batch", "cache_length", None),
    }

    def __init__(self, config, *, mesh, rngs):
        heads.held_copies(config.attention.num_latents, sharding.size(mesh, sharding.TENSOR))
        super().__init__(config, mesh=mesh, rngs=rngs)

    def _add_parameters(self, config, project, rngs):
        a: LatentConfig = config.attention
        D, H, C, P = config.embed_dim, a.num_heads, a.latent_head_dim, a.branches * a.num_heads
        factor = lambda width: math.sqrt(D / width) if a.scaled else 1.0
        self.branch_factor = 1 / math.sqrt(a.branches) if a.scaled else 1.0
        norm = functools.partial(RMSNorm, config=config, rngs=rngs)
        self.q_down = project((D, a.q_latent_dim), ("embed", "q_latent"))
        self.q_norm = norm(a.q_latent_dim, factor=factor(a.q_latent_dim))
        self.q_up = project((a.q_latent_dim, H, a.query_dim), ("q_latent", "heads", "head_dim"))
        self.kv_down = project((D, a.latent_dim), ("embed", "latent"))
        self.kv_norm = norm(C, blocks=a.num_latents, factor=factor(C))
        self.k_rope = project((D, a.rope_dim), ("embed", "rope"))
        up = ((P, C, a.nope_dim), ("latent_heads", "latent_dim", "head_dim"))
        self.k_up, self.v_up = project(*up), project(*up)

    @classmethod
    def cache_shapes(cls, a, batch, capacity, tensor):
        held = heads.held_copies(a.num_latents, tensor)
        return {
            "latents": (batch, capacity, held, a.latent_head_dim),
            "k_rope": (batch, capacity, a.rope_dim),
        }

    def _queries(self, y, positions_BT):
        """`[nope | rotary]` in the last dimension."""
        q_BTHK = self._by_head(self.q_up(self.q_norm(self._down(y))))
        q_nope, q_rope = jnp.split(q_BTHK, [self.config.nope_dim], axis=-1)
        return jnp.concatenate([q_nope, rotate(q_rope, positions_BT, self.rope_base)], axis=-1)

    def _down(self, y):
        return heads.gathered(y["q_down"], "q_latent", self.mesh)

    def _kept(self, y, positions_BT):
        a, (B, T) = self.config, y["kv_down"].shape[:2]
        down_BTE = sharding.constrain(y["kv_down"], self.mesh, "batch", "length", "latent")
        down_BTLC = down_BTE.reshape(B, T, a.num_latents, a.latent_head_dim)
        fewer = a.num_latents % sharding.size(self.mesh, sharding.TENSOR)
        axes = ("batch", "length", None if fewer else "cache_latent", None)
        down_BTLC = sharding.constrain(down_BTLC, self.mesh, *axes)
        c_BTLC = self.kv_norm(down_BTLC.reshape(B, T, -1)).reshape(down_BTLC.shape)
        k_rope_BTR = rotate(y["k_rope"][:, :, None], positions_BT, self.rope_base)[:, :, 0]
        return sharding.constrain(c_BTLC, self.mesh, *axes), k_rope_BTR

    def _whole(self, q_BTHK, kept):
        absorbed = absorbs(self.config)
        return self._whole_absorbed(q_BTHK, *kept) if absorbed else super()._whole(q_BTHK, kept)

    def _operands(self, q_BTHK, kept):
        a, (c_BTLC, k_rope_BTR) = self.config, kept
        B, T = c_BTLC.shape[:2]
        q_BTPK = self._by_branch_head(jnp.tile(q_BTHK, (1, 1, a.branches, 1)))
        rope_BTPR = jnp.broadcast_to(
            k_rope_BTR[:, :, None], (B, T, a.branches * a.num_heads, a.rope_dim)
        )
        k_BTPK = self._by_branch_head(
            jnp.concatenate([self._up(c_BTLC, self.k_up.kernel[...]), rope_BTPR], axis=-1)
        )
        return q_BTPK, k_BTPK, self._by_branch_head(self._up(c_BTLC, self.v_up.kernel[...]))

    def _whole_absorbed(self, q_BTHK, c_BTLC, k_rope_BTR):
        """The same without a key or value of any branch head: each latent is a key/value head."""
        a, (B, T, H, _) = self.config, q_BTHK.shape
        # As in `_ask`; the branches of a head are columns of one product.
        q_BTHK = sharding.constrain(q_BTHK, self.mesh, "batch", "length", None, "head_dim")
        q_nope_BTHK, q_rope_BTHR = jnp.split(q_BTHK, [a.nope_dim], axis=-1)
        k_up_bHCK = self.k_up.kernel[...].reshape(a.branches, H, -1, a.nope_dim)
        q_BTbHC = weigh(q_nope_BTHK, k_up_bHCK, "bthk,rhck->btrhc")
        rope_BTbHR = jnp.broadcast_to(q_rope_BTHR[:, :, None], (B, T, a.branches, H, a.rope_dim))
        q_BTbHX = jnp.concatenate([q_BTbHC, rope_BTbHR], axis=-1)
        k_BTJX = heads.repeat_for_mesh(heads.with_shared(c_BTLC, k_rope_BTR), self.mesh)
        z_BTPC = self._to_itself(
            self._by_branch_head(q_BTbHX.reshape(B, T, a.branches * H, -1)),
            k_BTJX,
            heads.repeat_for_mesh(c_BTLC, self.mesh),
        )
        return self._joined(z_BTPC)

    def _entries(self, kept):
        c_BTLC, k_rope_BTR = kept
        tensor = sharding.size(self.mesh, sharding.TENSOR)
        copies = heads.held_copies(self.config.num_latents, tensor) // self.config.num_latents
        return {"latents": jnp.repeat(c_BTLC, copies, axis=2), "k_rope": k_rope_BTR}

    def _ask(self, q_BTHK):
        """Queries of the latents themselves, by branch head, and the rotary queries."""
        # Every device needs all heads' queries for its latents: gathered once, before the split.
        q_BTHK = sharding.constrain(q_BTHK, self.mesh, "batch", "length", None, "head_dim")
        q_BTPK = jnp.tile(q_BTHK, (1, 1, self.config.branches, 1))
        q_nope_BTPK, q_rope_BTPR = jnp.split(q_BTPK, [self.config.nope_dim], axis=-1)
        q_nope_BTPK = self._by_branch_head(q_nope_BTPK)
        q_BTPC = weigh(q_nope_BTPK, self.k_up.kernel[...], "btpk,pck->btpc")
        return self._by_branch_head(q_BTPC), q_rope_BTPR

    def _attend(self, queries, cache, lengths_BT):
        """One device: its latents, its share of the positions, all branch heads of its latents."""
        (B, T), num_latents = queries[0].shape[:2], cache["latents"].shape[2]
        by_latent = lambda x: x.reshape(B, T, num_latents, -1, x.shape[-1])
        q_BTLHC, q_rope_BTLHR = map(by_latent, queries)
        # Latents of the same group share their heads' rotary queries.
        groups = min(self.config.groups, num_latents)
        z_BTLHC, lse_BTLH = absorbed_decode(
            q_BTLHC,
            q_rope_BTLHR[:, :, :groups],
            cache["latents"],
            cache["k_rope"],
            lengths_BT,
            scale=self.scale,
        )
        return z_BTLHC.reshape(queries[0].shape), lse_BTLH.reshape(B, T, -1)

    def _ask_chunk(self, q_BTHK):
        """Where latents are wider than keys, a chunk attends to keys and values made of them."""
        if absorbs(self.config):
            return self._ask(q_BTHK), ()
        q_BTHK = sharding.constrain(q_BTHK, self.mesh, "batch", "length", None, "head_dim")
        up = (self.k_up.kernel[...], self.v_up.kernel[...])
        return jnp.tile(q_BTHK, (1, 1, self.config.branches, 1)), up

    def _answer_chunk(self, o_BTPX):
        if absorbs(self.config):
            return self._answer(o_BTPX)
        return self._sum(self._by_branch_head(o_BTPX))

    def _grouped(self, queries, entries, *up):
        latents_BSLC, k_rope_BSR = entries["latents"], entries["k_rope"]
        if up:
            k_BSPK, v_BSPK = (self._up(latents_BSLC, kernel_PCK) for kernel_PCK in up)
            return queries[:, :, :, None], heads.with_shared(k_BSPK, k_rope_BSR), v_BSPK
        (B, T), q_BTPX = queries[0].shape[:2], jnp.concatenate(queries, axis=-1)
        q_BTLHX = q_BTPX.reshape(B, T, latents_BSLC.shape[2], -1, q_BTPX.shape[-1])
        return q_BTLHX, heads.with_shared(latents_BSLC, k_rope_BSR), latents_BSLC

    def _key_width(self):
        a = self.config
        return a.latent_head_dim + a.rope_dim if absorbs(a) else a.query_dim

    def _answer(self, z_BTPC):
        o_BTPK = weigh(z_BTPC, self.v_up.kernel[...], "btpc,pck->btpk")
        return self._sum(self._by_branch_head(o_BTPK))

    def _up(self, c_BTLC, kernel_PCK):
        """Keys or values of every branch head from its latent head."""
        B, T, L, C = c_BTLC.shape
        kernel_LHCK = kernel_PCK.reshape(L, -1, C, kernel_PCK.shape[-1])
        return weigh(c_BTLC, kernel_LHCK, "btlc,lhck->btlhk").reshape(B, T, len(kernel_PCK), -1)

    def _by_branch_head(self, x_BTPK):
        return sharding.constrain(x_BTPK, self.mesh, "batch", "length", "latent_heads", "head_dim")

    def _sum(self, o_BTPK):
        """Of the branches, with the factor that keeps its variance."""
        (B, T, _, K), (ways, heads) = o_BTPK.shape, self._parts()
        o_BTwbHK = o_BTPK.reshape(B, T, ways, -1, heads, K)
        return self._by_part(o_BTwbHK.sum(3) * self.branch_factor)

    def _joined(self, z_BTPC):
        """As `_answer`, the sum over branches being that of one product."""
        (B, T, _, C), (ways, heads) = z_BTPC.shape, self._parts()
        v_up_wbHCK = self.v_up.kernel[...].reshape(ways, -1, heads, C, self.config.value_dim)
        z_BTwbHC = z_BTPC.reshape(B, T, ways, -1, heads, C)
        o_BTwHK = weigh(z_BTwbHC, v_up_wbHCK, "btwrhc,wrhck->btwhk")
        return self._by_part(o_BTwHK * self.branch_factor)

    def _parts(self):
        """The branch heads are so many parts, of which each adds up branches of so many heads."""
        return 1, self.config.num_heads

    def _by_part(self, o_BTwHK):
        B, T, ways, heads, K = o_BTwHK.shape
        return o_BTwHK.reshape(B, T, ways * heads, K)


def absorbs(a: LatentConfig) -> bool:
    """Whether whole sequences attend to latents, too, instead of to keys and values made of them.

    That costs as many products or fewer where a latent is no wider than a head's key; MLA's one and
    GLA-2's two latents are wider.
    """
    return a.latent_head_dim <= a.nope_dim
