"""GTA: a group's key and value are one tied vector, half of each key a shared rotary key.

Per key/value head one vector `[tied | rest]` is the value, `[tied | rotary key]` the key. With
queries `[q_nope | 0]` the scores need no key but that vector, which is then key and value at once,
as a latent head is: decoding is the latent family's absorbed decode.
"""

import jax
import jax.numpy as jnp

from mlra_jax import sharding
from mlra_jax.attention import heads
from mlra_jax.attention.base import Attention
from mlra_jax.config import TiedConfig
from mlra_jax.kernels.absorbed_decode import absorbed_decode
from mlra_jax.kernels.causal_attention import with_shared
from mlra_jax.layers import rotate


class TiedAttention(Attention):
    reads = ("q", "kv", "k_rope")
    cache_axes = {
        "tied": ("batch", "cache_length", "cache_latent", None),
        "k_rope": ("batch", "cache_length", None),
    }

    def _add_parameters(self, config, project, rngs):
        a: TiedConfig = config.attention
        self.held = _held(a, sharding.size(self.mesh, sharding.TENSOR))
        D, H, J, K = config.embed_dim, a.num_heads, a.num_kv_heads, a.head_dim
        self.q = project((D, H, K), ("embed", "heads", "head_dim"))
        self.kv_axes = heads.kv_axes(self.mesh, J, K)
        self.kv = project((D, J, K), ("embed", *self.kv_axes))
        self.k_rope = project((D, a.rope_dim), ("embed", "rope"))

    @classmethod
    def cache_shapes(cls, a, batch, capacity, tensor):
        return {
            "tied": (batch, capacity, tensor * _held(a, tensor).each, a.head_dim),
            "k_rope": (batch, capacity, a.rope_dim),
        }

    def _queries(self, y, positions_BT):
        """`[nope | rotary]` in the last dimension."""
        q_nope, q_rope = jnp.split(self._by_head(y["q"]), [-self.config.rope_dim], axis=-1)
        return jnp.concatenate([q_nope, rotate(q_rope, positions_BT, self.rope_base)], axis=-1)

    def _kept(self, y, positions_BT):
        k_rope_BTR = rotate(y["k_rope"][:, :, None], positions_BT, self.rope_base)[:, :, 0]
        return heads.whole_heads(y["kv"], self.kv_axes, self.mesh), k_rope_BTR

    def _operands(self, q_BTHK, kept):
        tied_BTJK, k_rope_BTR = kept
        v_BTJK = heads.repeat_for_mesh(tied_BTJK, self.mesh)
        k_BTJK = with_shared(v_BTJK[..., : -self.config.rope_dim], k_rope_BTR)
        return q_BTHK, k_BTJK, v_BTJK

    def _entries(self, kept):
        tied_BTJK, k_rope_BTR = kept
        return {"tied": self.held.spread(tied_BTJK), "k_rope": k_rope_BTR}

    def _attend(self, q_BThK, cache, lengths_BT):
        q_BTJGK = self.held.by_held_head(q_BThK)
        q_nope, q_rope_BTJGR = jnp.split(q_BTJGK, [-self.config.rope_dim], axis=-1)
        out_BTJGK, lse_BTJG = absorbed_decode(
            jnp.concatenate([q_nope, jnp.zeros_like(q_rope_BTJGR)], axis=-1),
            q_rope_BTJGR,
            cache["tied"],
            cache["k_rope"],
            lengths_BT,
            scale=self.scale,
        )
        return self._ungrouped(out_BTJGK), self._ungrouped(lse_BTJG)

    def _grouped(self, q_BThK, entries):
        tied_BSJK, rope_BSR = entries["tied"], entries["k_rope"]
        k_BSJK = with_shared(tied_BSJK[..., : -self.config.rope_dim], rope_BSR)
        return self.held.by_held_head(q_BThK), k_BSJK, tied_BSJK

    def _ungrouped(self, x_BTJG):
        return self.held.by_query_head(x_BTJG, jax.lax.axis_index(sharding.TENSOR))


def _held(a: TiedConfig, tensor: int) -> heads.HeldHeads:
    return heads.HeldHeads(a.num_heads, a.num_kv_heads, tensor)
