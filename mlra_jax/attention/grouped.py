"""MHA, GQA and MQA: each key and value head serves a group of query heads."""

import functools
import math

import jax
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention import heads, sharded
from mlra_jax.config import GroupedConfig, ModelConfig
from mlra_jax.kernels.grouped_decode import grouped_decode
from mlra_jax.layers import Projection, output_init, rotate


class GroupedAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        a: GroupedConfig = config.attention
        self.mesh, self.rope_base = mesh, config.rope_base
        heads.check_heads(a.num_heads, mesh)
        self.held = self._held(a, sharding.size(mesh, sharding.TENSOR))
        D, H, J, K = config.embed_dim, a.num_heads, a.num_kv_heads, a.head_dim
        self.scale = 1 / math.sqrt(K)
        project = functools.partial(Projection, config=config, rngs=rngs)
        self.q = project((D, H, K), ("embed", "heads", "head_dim"))
        self.kv_axes = heads.kv_axes(mesh, J, K)
        self.k = project((D, J, K), ("embed", *self.kv_axes))
        self.v = project((D, J, K), ("embed", *self.kv_axes))
        self.gate = project((D, H, K), ("embed", "heads", "head_dim")) if a.gated else None
        self.out = project(
            (H, K, D), ("heads", "head_dim", "embed"), num_in=2, init=output_init(config)
        )

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The whole sequence attends to itself; `[B, T, D]` in and out."""
        return self.prefill(x_BTD, positions_BT)[0]

    def prefill(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `__call__`, and what decoding needs to keep: `[B, T, ...]` arrays by name."""
        q_BTHK = self._queries(x_BTD, positions_BT)
        k_BTJK, v_BTJK = self._keys_values(x_BTD, positions_BT)
        o_BTHK = sharded.causal(
            q_BTHK,
            heads.repeat_for_mesh(k_BTJK, self.mesh),
            heads.repeat_for_mesh(v_BTJK, self.mesh),
            scale=self.scale,
            mesh=self.mesh,
        )
        return self._output(x_BTD, o_BTHK), self._entries(k_BTJK, v_BTJK)

    def decode(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: dict, length, starts_B
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`T` new tokens in slots `length ...`, over the cached keys and values."""
        o_BTHK, cache = heads.decode_step(
            self._attend,
            self._queries(x_BTD, positions_BT),
            self._entries(*self._keys_values(x_BTD, positions_BT)),
            cache,
            length,
            starts_B,
            cache_axes=self.cache_axes,
            mesh=self.mesh,
        )
        return self._output(x_BTD, o_BTHK), cache

    def _attend(self, q_BThK, cache, lengths_BT, starts_B):
        out_BTJGK, lse_BTJG = grouped_decode(
            self.held.by_held_head(q_BThK),
            cache["k"],
            cache["v"],
            lengths_BT,
            starts_B,
            scale=self.scale,
        )
        device = jax.lax.axis_index(sharding.TENSOR)
        return self.held.by_query_head(out_BTJGK, device), self.held.by_query_head(lse_BTJG, device)

    cache_axes = {
        "k": ("batch", "cache_length", "cache_latent", None),
        "v": ("batch", "cache_length", "cache_latent", None),
    }

    @staticmethod
    def _held(a: GroupedConfig, tensor: int) -> heads.HeldHeads:
        return heads.HeldHeads(a.num_heads, a.num_kv_heads, tensor)

    @classmethod
    def cache_shapes(
        cls, a: GroupedConfig, batch: int, capacity: int, tensor: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept; a head that several devices of `tensor` read is repeated."""
        shape = (batch, capacity, tensor * cls._held(a, tensor).each, a.head_dim)
        return {"k": shape, "v": shape}

    def _entries(self, k_BTJK, v_BTJK):
        return {"k": self.held.spread(k_BTJK), "v": self.held.spread(v_BTJK)}

    def _queries(self, x_BTD, positions_BT):
        q_BTHK = sharding.constrain(
            self.q(x_BTD), self.mesh, "batch", "length", "heads", "head_dim"
        )
        return rotate(q_BTHK, positions_BT, self.rope_base)

    def _keys_values(self, x_BTD, positions_BT):
        k_BTJK = heads.whole_heads(self.k(x_BTD), self.kv_axes, self.mesh)
        v_BTJK = heads.whole_heads(self.v(x_BTD), self.kv_axes, self.mesh)
        return rotate(k_BTJK, positions_BT, self.rope_base), v_BTJK

    def _output(self, x_BTD, o_BTHK):
        o_BTHK = sharding.constrain(o_BTHK, self.mesh, "batch", "length", "heads", "head_dim")
        if self.gate is not None:
            o_BTHK = o_BTHK * jax.nn.sigmoid(self.gate(x_BTD))
        return self.out(o_BTHK)
