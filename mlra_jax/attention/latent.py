"""The latent family: MLA, GLA-2, GLA-4, MLRA-2 and MLRA-4 (paper, section 3).

The keys and values of a token are up-projections of a few latent heads. Latent `r * G + g` serves
the query heads of group `g` in branch `r`; each branch has its own softmax and the branch outputs
are summed. Up-projections are stored by branch head `p = r * H + h`, so that head `h` of branch `r`
reads latent `p // (H / G)` and any even split of `p` over devices follows the latents.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import cache as kv
from mlra_jax import sharding
from mlra_jax.attention import sharded
from mlra_jax.config import LatentConfig, ModelConfig
from mlra_jax.kernels.absorbed_decode import absorbed_decode
from mlra_jax.layers import Projection, RMSNorm, output_init, precision, rotate


class LatentAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        a: LatentConfig = config.attention
        self.config, self.mesh, self.rope_base = a, mesh, config.rope_base
        kv.held_copies(a.num_latents, sharding.size(mesh, sharding.TENSOR))
        D, H, C, P = config.embed_dim, a.num_heads, a.latent_head_dim, a.branches * a.num_heads
        self.scale = 1 / math.sqrt(a.query_dim)
        self.branch_factor = 1 / math.sqrt(a.branches) if a.scaled else 1.0
        project = functools.partial(Projection, config=config, rngs=rngs)
        norm = functools.partial(RMSNorm, config=config, rngs=rngs)

        self.q_down = project((D, a.q_latent_dim), ("embed", "q_latent"))
        self.q_norm = norm(
            a.q_latent_dim, factor=math.sqrt(D / a.q_latent_dim) if a.scaled else 1.0
        )
        self.q_up = project((a.q_latent_dim, H, a.query_dim), ("q_latent", "heads", "head_dim"))
        self.kv_down = project((D, a.latent_dim), ("embed", "latent"))
        self.kv_norm = norm(
            C,
            blocks=a.num_latents,
            factor=math.sqrt(D / C) if a.scaled else 1.0,
        )
        self.k_rope = project((D, a.rope_dim), ("embed", "rope"))
        up = ((P, C, a.nope_dim), ("latent_heads", "latent_dim", "head_dim"))
        self.k_up, self.v_up = project(*up), project(*up)
        if a.gated:
            self.gate = project((D, H, a.value_dim), ("embed", "heads", "head_dim"))
        self.out = project(
            (H, a.value_dim, D),
            ("heads", "head_dim", "embed"),
            num_in=2,
            init=output_init(config),
        )

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The whole sequence attends to itself; `[B, T, D]` in and out."""
        return self.prefill(x_BTD, positions_BT)[0]

    def prefill(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `__call__`, and what decoding needs to keep: `[B, T, ...]` arrays by name."""
        a, (B, T, _) = self.config, x_BTD.shape
        q_nope_BTHK, q_rope_BTHR = self._queries(x_BTD, positions_BT, "heads")
        c_BTLC, k_rope_BTR = self._latents(x_BTD, positions_BT)

        q_BTHK = jnp.concatenate([q_nope_BTHK, q_rope_BTHR], axis=-1)
        q_BTPK = self._by_branch_head(jnp.tile(q_BTHK, (1, 1, a.branches, 1)))
        rope_BTPR = jnp.broadcast_to(
            k_rope_BTR[:, :, None], (B, T, a.branches * a.num_heads, a.rope_dim)
        )
        k_BTPK = self._by_branch_head(
            jnp.concatenate([self._up(c_BTLC, self.k_up), rope_BTPR], axis=-1)
        )
        v_BTPK = self._by_branch_head(self._up(c_BTLC, self.v_up))
        o_BTPK = sharded.causal(q_BTPK, k_BTPK, v_BTPK, scale=self.scale, mesh=self.mesh)
        return self._output(x_BTD, o_BTPK), self._entries(c_BTLC, k_rope_BTR)

    def decode(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: dict, length, starts_B
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`T` new tokens in slots `length ...`; keys and values are never materialised.

        The up-projections are absorbed into the query and the output (paper, section 3.3), so that
        each latent head is a multi-query attention whose value is the first part of its key.
        """
        # Every device needs all heads' queries for its latents: gathered once, before the split.
        q_nope_BTHK, q_rope_BTHR = self._queries(x_BTD, positions_BT, None)
        entries = self._entries(*self._latents(x_BTD, positions_BT))
        whole = sharding.spec("batch", "length", None, None)
        up = sharding.spec("latent_heads", None, None)
        cached = {name: sharding.spec(*axes) for name, axes in self.cache_axes.items()}
        added = {
            n: sharding.spec("batch", "length", *axes[2:]) for n, axes in self.cache_axes.items()
        }
        rows = sharding.spec("batch")
        o_BTPK, cache = jax.shard_map(
            self._decode_shard,
            mesh=self.mesh,
            in_specs=(whole, whole, up, up, added, cached, sharding.spec(), rows),
            out_specs=(sharding.spec("batch", "length", "latent_heads", "head_dim"), cached),
            check_vma=False,
        )(
            q_nope_BTHK,
            q_rope_BTHR,
            self.k_up.kernel[...],
            self.v_up.kernel[...],
            entries,
            cache,
            length,
            starts_B,
        )
        return self._output(x_BTD, o_BTPK), cache

    def _decode_shard(
        self, q_nope_BTHK, q_rope_BTHR, k_up_pCK, v_up_pCK, new, cache, length, starts_B
    ):
        """One device: its latents, its share of the positions, its slice `p` of branch heads."""
        a, dtype = self.config, q_nope_BTHK.dtype
        (B, T), p = q_nope_BTHK.shape[:2], k_up_pCK.shape[0]
        shares = sharding.size(self.mesh, sharding.CONTEXT)
        share = jax.lax.axis_index(sharding.CONTEXT)
        cache = {n: kv.write(cache[n], new[n], length, shares, share) for n in cache}
        lengths_BT, starts_B = kv.bounds(length, starts_B, T, shares, share)
        latents_BSLC = cache["latents"]
        num_latents = latents_BSLC.shape[2]

        # The branch heads of this device's latents, and of those the part whose weights it holds.
        first = jax.lax.axis_index(sharding.TENSOR) * p * shares
        head_of = lambda branch_heads: branch_heads % a.num_heads
        mine = head_of(first + share * p + jnp.arange(p))
        q_BTpC = jnp.einsum(
            "btpk,pck->btpc",
            jnp.take(q_nope_BTHK, mine, axis=2),
            k_up_pCK.astype(dtype),
            precision=precision(dtype),
        )
        if shares > 1:
            q_BTpC = jax.lax.all_gather(q_BTpC, sharding.CONTEXT, axis=2, tiled=True)
        q_rope_BTpR = jnp.take(q_rope_BTHR, head_of(first + jnp.arange(p * shares)), axis=2)
        by_latent = lambda x: x.reshape(B, T, num_latents, -1, x.shape[-1])
        # Latents of the same group share their heads' rotary queries.
        groups = min(a.groups, num_latents)
        z_BTLHC, lse_BTLH = absorbed_decode(
            by_latent(q_BTpC),
            by_latent(q_rope_BTpR)[:, :, :groups],
            latents_BSLC,
            cache["k_rope"],
            lengths_BT,
            starts_B,
            scale=self.scale,
        )
        z_BTpC = z_BTLHC.reshape(B, T, p * shares, -1)
        if shares > 1:
            z_BTpC = kv.merge(z_BTpC, lse_BTLH.reshape(B, T, -1), sharding.CONTEXT, dim=2)
        o_BTpK = jnp.einsum(
            "btpc,pck->btpk", z_BTpC, v_up_pCK.astype(dtype), precision=precision(dtype)
        )
        return o_BTpK, cache

    cache_axes = {
        "latents": ("batch", "cache_length", "cache_latent", None),
        "k_rope": ("batch", "cache_length", None),
    }

    @staticmethod
    def cache_shapes(
        a: LatentConfig, batch: int, capacity: int, tensor: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept; a latent held by several devices of `tensor` is repeated."""
        held = kv.held_copies(a.num_latents, tensor)
        return {
            "latents": (batch, capacity, held, a.latent_head_dim),
            "k_rope": (batch, capacity, a.rope_dim),
        }

    def _entries(self, c_BTLC, k_rope_BTR):
        tensor = sharding.size(self.mesh, sharding.TENSOR)
        copies = kv.held_copies(self.config.num_latents, tensor) // self.config.num_latents
        return {"latents": jnp.repeat(c_BTLC, copies, axis=2), "k_rope": k_rope_BTR}

    def _queries(self, x_BTD, positions_BT, heads_axis):
        # Gathered before the norm, whose statistics would cost another exchange. Each product is
        # named as its weights are split first: else XLA would gather the weights instead.
        down_BTQ = sharding.constrain(self.q_down(x_BTD), self.mesh, "batch", "length", "q_latent")
        down_BTQ = sharding.constrain(down_BTQ, self.mesh, "batch", "length", None)
        q_BTHK = self.q_up(self.q_norm(down_BTQ))
        q_BTHK = sharding.constrain(q_BTHK, self.mesh, "batch", "length", "heads", "head_dim")
        q_BTHK = sharding.constrain(q_BTHK, self.mesh, "batch", "length", heads_axis, "head_dim")
        q_nope, q_rope = jnp.split(q_BTHK, [self.config.nope_dim], axis=-1)
        return q_nope, rotate(q_rope, positions_BT, self.rope_base)

    def _latents(self, x_BTD, positions_BT):
        a, (B, T) = self.config, x_BTD.shape[:2]
        down_BTE = sharding.constrain(self.kv_down(x_BTD), self.mesh, "batch", "length", "latent")
        down_BTLC = down_BTE.reshape(B, T, a.num_latents, a.latent_head_dim)
        fewer = a.num_latents % sharding.size(self.mesh, sharding.TENSOR)
        axes = ("batch", "length", None if fewer else "cache_latent", None)
        down_BTLC = sharding.constrain(down_BTLC, self.mesh, *axes)
        c_BTLC = self.kv_norm(down_BTLC.reshape(B, T, -1)).reshape(down_BTLC.shape)
        k_rope_BTR = rotate(self.k_rope(x_BTD)[:, :, None], positions_BT, self.rope_base)[:, :, 0]
        return sharding.constrain(c_BTLC, self.mesh, *axes), k_rope_BTR

    def _up(self, c_BTLC, projection):
        """Keys or values of every branch head from its latent head."""
        (B, T, L, C), kernel_PCK = c_BTLC.shape, projection.kernel[...].astype(c_BTLC.dtype)
        up_BTLHK = jnp.einsum(
            "btlc,lhck->btlhk",
            c_BTLC,
            kernel_PCK.reshape(L, -1, C, kernel_PCK.shape[-1]),
            precision=precision(c_BTLC.dtype),
        )
        return up_BTLHK.reshape(B, T, kernel_PCK.shape[0], -1)

    def _by_branch_head(self, x_BTPK):
        return sharding.constrain(x_BTPK, self.mesh, "batch", "length", "latent_heads", "head_dim")

    def _output(self, x_BTD, o_BTPK):
        """Sum of the branches, gate, output projection."""
        a, (B, T) = self.config, o_BTPK.shape[:2]
        o_BTHK = o_BTPK.reshape(B, T, a.branches, a.num_heads, a.value_dim)
        o_BTHK = o_BTHK.sum(2) * self.branch_factor
        o_BTHK = sharding.constrain(o_BTHK, self.mesh, "batch", "length", "heads", "head_dim")
        if a.gated:
            o_BTHK = o_BTHK * jax.nn.sigmoid(self.gate(x_BTD))
        return self.out(o_BTHK)
