"""MHA, GQA and MQA: each key and value head serves a group of query heads."""

import jax

from mlra_jax import sharding
from mlra_jax.attention import heads
from mlra_jax.attention.base import Attention
from mlra_jax.config import GroupedConfig
from mlra_jax.kernels.grouped_decode import grouped_decode
from mlra_jax.layers import rotate


class GroupedAttention(Attention):
    reads = ("q", "k", "v")
    cache_axes = {
        "k": ("batch", "cache_length", "cache_latent", None),
        "v": ("batch", "cache_length", "cache_latent", None),
    }
    rotated = "k"

    def _add_parameters(self, config, project, rngs):
        a: GroupedConfig = config.attention
        self.held = self._held(a, sharding.size(self.mesh, sharding.TENSOR))
        D, H, J, K = config.embed_dim, a.num_heads, a.num_kv_heads, a.head_dim
        self.q = project((D, H, K), ("embed", "heads", "head_dim"))
        self.kv_axes = heads.kv_axes(self.mesh, J, K)
        self.k = project((D, J, K), ("embed", *self.kv_axes))
        self.v = project((D, J, K), ("embed", *self.kv_axes))

    @staticmethod
    def _held(a: GroupedConfig, tensor: int) -> heads.HeldHeads:
        return heads.HeldHeads(a.num_heads, a.num_kv_heads, tensor)

    @classmethod
    def cache_shapes(cls, a, batch, capacity, tensor):
        shape = (batch, capacity, tensor * cls._held(a, tensor).each, a.head_dim)
        return {"k": shape, "v": shape}

    def _queries(self, y, positions_BT):
        return rotate(self._by_head(y["q"]), positions_BT, self.rope_base)

    def _kept(self, y, positions_BT):
        k_BTJK = heads.whole_heads(y["k"], self.kv_axes, self.mesh)
        v_BTJK = heads.whole_heads(y["v"], self.kv_axes, self.mesh)
        return rotate(k_BTJK, positions_BT, self.rope_base), v_BTJK

    def _operands(self, q_BTHK, kept):
        return q_BTHK, *(heads.repeat_for_mesh(x, self.mesh) for x in kept)

    def _entries(self, kept):
        k_BTJK, v_BTJK = kept
        return {"k": self.held.spread(k_BTJK), "v": self.held.spread(v_BTJK)}

    def _attend(self, q_BThK, cache, lengths_BT):
        out_BTJGK, lse_BTJG = grouped_decode(
            *self._grouped(q_BThK, cache), lengths_BT, scale=self.scale
        )
        return self._ungrouped(out_BTJGK), self._ungrouped(lse_BTJG)

    def _grouped(self, q_BThK, entries):
        return self.held.by_held_head(q_BThK), entries["k"], entries["v"]

    def _ungrouped(self, x_BTJG):
        return self.held.by_query_head(x_BTJG, jax.lax.axis_index(sharding.TENSOR))
