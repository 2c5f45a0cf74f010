"""The latent family: MLA, GLA-2, GLA-4, MLRA-2 and MLRA-4 (paper, section 3).

The keys and values of a token are up-projections of a few latent heads (`from_latents.py`). A
decode step makes none of them. The up-projections are absorbed into the query and the output
(paper, section 3.3), so that each latent head is a multi-query attention whose value is the first
part of its key.
"""

import math

import jax
import jax.numpy as jnp

from mlra_jax import sharding
from mlra_jax.attention import heads, sharded
from mlra_jax.attention.from_latents import FromLatents, up_projected
from mlra_jax.config import LatentConfig
from mlra_jax.kernels.absorbed_decode import absorbed_decode
from mlra_jax.kernels.causal_attention import with_shared
from mlra_jax.layers import angles, weigh


def per_head(a: LatentConfig, kernel_JCK: jax.Array) -> jax.Array:
    """An up-projection's kernel with one matrix for each branch head."""
    shared = a.num_heads // a.kv_heads
    return kernel_JCK if shared == 1 else jnp.repeat(kernel_JCK, shared, axis=0)


class LatentAttention(FromLatents):
    cache_axes = {
        "latents": ("batch", "cache_length", "cache_latent", None),
        "k_rope": ("batch", "cache_length", None),
    }

    def __init__(self, config, *, mesh, rngs):
        heads.held_copies(config.attention.num_latents, sharding.size(mesh, sharding.TENSOR))
        super().__init__(config, mesh=mesh, rngs=rngs)

    @classmethod
    def cache_shapes(cls, a, batch, capacity, tensor):
        held = heads.held_copies(a.num_latents, tensor)
        return {
            "latents": (batch, capacity, held, a.latent_head_dim),
            "k_rope": (batch, capacity, a.rope_dim),
        }

    def _per_head(self, projection):
        return per_head(self.config, projection.kernel[...])

    def _whole(self, y, q_BTHK, kept):
        if not absorbs(self.config):
            return super()._whole(y, q_BTHK, kept)
        ways = sharding.size(self.mesh, sharding.MODEL)
        by_copies = self.exchanges.copied and self.config.branches % ways == 0
        whole = self._whole_by_copies if by_copies else self._whole_absorbed
        return whole(y, q_BTHK, kept["latents"], kept["k_rope"])

    def _whole_absorbed(self, y, q_BTHK, c_BTLC, k_rope_BTR):
        """The same without a key or value of any branch head: each latent is a key/value head."""
        a, (B, T, H, _) = self.config, q_BTHK.shape
        # As in `_ask_latents`; the branches of a head are columns of one product.
        q_BTHK = self._all_heads(q_BTHK)
        q_nope_BTHK, q_rope_BTHR = jnp.split(q_BTHK, [a.nope_dim], axis=-1)
        k_up_bHCK = self._per_head(self.k_up).reshape(a.branches, H, -1, a.nope_dim)
        k_up_HKbC = k_up_bHCK.transpose(1, 3, 0, 2)
        place = self.mesh, (None, "head_dim", "latent_heads", "latent_dim")
        q_nope_HBTK = jnp.moveaxis(q_nope_BTHK, 2, 0)
        q_HBTbC = weigh(q_nope_HBTK, k_up_HKbC, "abcd,adef->abcef", place=place)
        q_BTbHC = jnp.moveaxis(q_HBTbC, 0, 3)
        rope_BTbHR = jnp.broadcast_to(q_rope_BTHR[:, :, None], (B, T, a.branches, H, a.rope_dim))
        q_BTPC, rope_BTPR = (x.reshape(B, T, -1, x.shape[-1]) for x in (q_BTbHC, rope_BTbHR))
        z_BTPC = self._to_latents(q_BTPC, rope_BTPR, c_BTLC, k_rope_BTR)
        return self._joined(y, z_BTPC)

    def _whole_by_copies(self, y, q_BTHK, c_BTLC, k_rope_BTR):
        """The same where each of W devices has a copy of all queries and a part of the branches."""
        a, (B, T, H, _) = self.config, q_BTHK.shape
        W = sharding.size(self.mesh, sharding.MODEL)
        b, C = a.branches // W, a.latent_head_dim
        q_WBTHK = self.exchanges.gathered(q_BTHK, "batch", "length", "heads", "head_dim")
        q_nope_WBTHK, q_rope_WBTHR = jnp.split(q_WBTHK, [a.nope_dim], axis=-1)
        k_up_WbHCK, v_up_WbHCK = (
            self._per_head(up).reshape(W, b, H, C, -1) for up in (self.k_up, self.v_up)
        )
        k_up_WHKbC = k_up_WbHCK.transpose(0, 2, 4, 1, 3)
        q_WHBTbC = weigh(jnp.moveaxis(q_nope_WBTHK, 3, 1), k_up_WHKbC, "wabcd,wadef->wabcef")
        q_BTWbHC = q_WHBTbC.transpose(2, 3, 0, 4, 1, 5)
        rope_WBTbHR = jnp.broadcast_to(q_rope_WBTHR[:, :, :, None], (W, B, T, b, H, a.rope_dim))
        rope_BTWbHR = jnp.moveaxis(rope_WBTbHR, 0, 2)
        q_BTPC, rope_BTPR = (x.reshape(B, T, -1, x.shape[-1]) for x in (q_BTWbHC, rope_BTWbHR))
        z_BTPC = self._chosen(y, self._to_latents(q_BTPC, rope_BTPR, c_BTLC, k_rope_BTR))
        z_WHBTbC = z_BTPC.reshape(B, T, W, b, H, C).transpose(2, 4, 0, 1, 3, 5)
        o_WHBTK = weigh(z_WHBTbC, v_up_WbHCK.swapaxes(1, 2), "wabcde,wadef->wabcf")
        o_HBTK = self.exchanges.scattered(o_WHBTK, "heads", "batch", "length", "head_dim")
        return jnp.moveaxis(o_HBTK, 0, 2) * self.branch_factor

    def _to_latents(self, q_BTPC, q_rope_BTPR, c_BTLC, k_rope_BTR):
        return sharded.whole_sequence_of_latents(
            *map(self._by_branch_head, (q_BTPC, q_rope_BTPR)),
            heads.repeat_for_mesh(c_BTLC, self.mesh),
            k_rope_BTR,
            heads=self.config.num_heads,
            scale=self.scale,
            mesh=self.mesh,
            implementation=self.kernel,
        )

    def _entries(self, kept):
        tensor = sharding.size(self.mesh, sharding.TENSOR)
        copies = heads.held_copies(self.config.num_latents, tensor) // self.config.num_latents
        return kept | {"latents": jnp.repeat(kept["latents"], copies, axis=2)}

    def _enter(self, x_BTD, positions_BT, cache, lengths_B):
        turned = angles(positions_BT, self.config.rope_dim, self.rope_base)
        entered = sharded.enter(
            self.input_summands(x_BTD),
            turned,
            (self.q_norm, self.kv_norm),
            cache,
            lengths_B,
            **self.of_cache,
        )
        if entered is None:
            return super()._enter(x_BTD, positions_BT, cache, lengths_B)
        q_BTQ, cache = entered
        kernel = self.q_up.kernel
        how = dict(axes=kernel.get_metadata()["out_sharding"], rope=self.config.rope_dim)
        q_BTHK = sharded.queries(q_BTQ, kernel[...], turned, **how, mesh=self.mesh)
        return {}, q_BTHK, {}, cache

    @property
    def of_cache(self):
        """How the cache lies, as functions of `sharded` take it."""
        return dict(cache_axes=self.cache_axes, mesh=self.mesh)

    def asked_widths(self, width):
        """`entry_widths` of an entry of this width."""
        kernel, a = self.q_up.kernel, self.config
        where = sharding.named(self.mesh, *kernel.get_metadata()["out_sharding"])
        query, *queries = where.shard_shape(kernel[...].shape)
        return dict(
            entry=width,
            query=query,
            latent=a.latent_head_dim,
            rope=a.rope_dim,
            nope=self._fixed_width(),
            asked=math.prod(queries),
        )

    def _ask(self, q_BTHK):
        return self._ask_latents(q_BTHK)

    def _ask_latents(self, q_BTHK):
        """Queries of the latents themselves, by branch head, and the rotary queries."""
        # Every device needs all heads' queries for its latents: gathered once, before the split.
        q_BTHK = self._all_heads(q_BTHK)
        split = jnp.split(q_BTHK, [self.config.nope_dim], axis=-1)
        q_nope_BTPK, q_rope_BTPR = (jnp.tile(x, (1, 1, self.config.branches, 1)) for x in split)
        q_nope_BTPK = self._as_asked(q_nope_BTPK)
        q_BTPC = weigh(q_nope_BTPK, self._per_head(self.k_up), "btpk,pck->btpc")
        return self._as_asked(q_BTPC), q_rope_BTPR

    def _as_asked(self, q_BTPX):
        return self._by_branch_head(q_BTPX)

    def _attend(self, queries, cache, lengths_BT):
        """One device: its latents, its share of the positions, all branch heads of its latents."""
        (B, T), num_latents = queries[0].shape[:2], cache["latents"].shape[2]
        by_latent = lambda x: x.reshape(B, T, num_latents, -1, x.shape[-1])
        q_BTLHC, q_rope_BTLHR = map(by_latent, queries)
        # Latents of the same group share their heads' rotary queries.
        groups = min(self.config.groups, num_latents)
        found = absorbed_decode(
            q_BTLHC,
            q_rope_BTLHR[:, :, :groups],
            cache["latents"],
            cache["k_rope"],
            lengths_BT,
            scale=self.scale,
            in_parts=self.in_parts,
        )
        if self.in_parts:
            return found, None
        z_BTLHC, lse_BTLH = found
        return z_BTLHC.reshape(queries[0].shape), lse_BTLH.reshape(B, T, -1)

    def _ask_chunk(self, q_BTHK):
        """Where latents are wider than keys, a chunk attends to keys and values made of them."""
        if absorbs(self.config):
            return self._ask_latents(q_BTHK), ()
        q_BTHK = self._all_heads(q_BTHK)
        up = (self._per_head(self.k_up), self._per_head(self.v_up))
        return jnp.tile(q_BTHK, (1, 1, self.config.branches, 1)), up

    def _answer_chunk(self, y, o_BTPX):
        if absorbs(self.config):
            return self._from_latents(y, o_BTPX)
        return self._sum(y, self._by_branch_head(o_BTPX))

    def _grouped(self, queries, entries, *up):
        latents_BSLC, k_rope_BSR = entries["latents"], entries["k_rope"]
        if up:
            k_BSPK, v_BSPK = (up_projected(latents_BSLC, kernel_PCK) for kernel_PCK in up)
            return queries[:, :, :, None], with_shared(k_BSPK, k_rope_BSR), v_BSPK
        (B, T), q_BTPX = queries[0].shape[:2], jnp.concatenate(queries, axis=-1)
        q_BTLHX = q_BTPX.reshape(B, T, latents_BSLC.shape[2], -1, q_BTPX.shape[-1])
        return q_BTLHX, with_shared(latents_BSLC, k_rope_BSR), latents_BSLC

    def _key_width(self):
        a = self.config
        return a.latent_head_dim + a.rope_dim if absorbs(a) else a.query_dim

    def _answer(self, y, z_BTPC):
        return self._from_latents(y, z_BTPC)

    def _from_latents(self, y, z_BTPC):
        o_BTPK = weigh(z_BTPC, self._per_head(self.v_up), "btpc,pck->btpk")
        return self._sum(y, self._by_branch_head(o_BTPK))

    def _joined(self, y, z_BTPC):
        """As `_from_latents`, the sum over branches being that of one product."""
        (B, T, _, C), (ways, heads) = z_BTPC.shape, self._parts()
        v_up_PCK = self._per_head(self.v_up)
        v_up_wbHCK = v_up_PCK.reshape(ways, -1, heads, C, self.config.value_dim)
        v_up_PbCK = jnp.swapaxes(v_up_wbHCK, 1, 2).reshape(
            ways * heads, -1, C, self.config.value_dim
        )
        z_BTwbHC = self._chosen(y, z_BTPC).reshape(B, T, ways, -1, heads, C)
        z_PBTbC = z_BTwbHC.transpose(2, 4, 0, 1, 3, 5).reshape(ways * heads, B, T, -1, C)
        place = self.mesh, ("latent_heads", None, "latent_dim", "head_dim")
        o_PBTK = weigh(z_PBTbC, v_up_PbCK, "abcde,adef->abcf", place=place)
        o_BTwHK = jnp.moveaxis(o_PBTK, 0, 2).reshape(B, T, ways, heads, -1)
        return self._by_part(o_BTwHK * self.branch_factor)


def absorbs(a: LatentConfig) -> bool:
    """Whether whole sequences attend to latents, too, instead of to keys and values made of them.

    That costs as many products or fewer where a latent is no wider than a head's key; MLA's one and
    GLA-2's two latents are wider.
    """
    return a.latent_head_dim <= a.nope_dim
