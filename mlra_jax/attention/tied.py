"""GTA: a group's key and value are one tied vector, half of each key a shared rotary key.

Per key/value head one vector `[tied | rest]` is the value, `[tied | rotary key]` the key. With
queries `[q_nope | 0]` the scores need no key but that vector, which is then key and value at once,
as a latent head is: decoding is the latent family's absorbed decode.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention import heads, sharded
from mlra_jax.config import ModelConfig, TiedConfig
from mlra_jax.kernels.absorbed_decode import absorbed_decode
from mlra_jax.layers import Projection, output_init, rotate


class TiedAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        a: TiedConfig = config.attention
        self.config, self.mesh, self.rope_base = a, mesh, config.rope_base
        heads.check_heads(a.num_heads, mesh)
        self.held = _held(a, sharding.size(mesh, sharding.TENSOR))
        D, H, J, K = config.embed_dim, a.num_heads, a.num_kv_heads, a.head_dim
        self.scale = 1 / math.sqrt(K)
        project = functools.partial(Projection, config=config, rngs=rngs)
        self.q = project((D, H, K), ("embed", "heads", "head_dim"))
        self.kv_axes = heads.kv_axes(mesh, J, K)
        self.kv = project((D, J, K), ("embed", *self.kv_axes))
        self.k_rope = project((D, a.rope_dim), ("embed", "rope"))
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
        a = self.config
        q_BTHK = self._queries(x_BTD, positions_BT)
        tied_BTJK, k_rope_BTR = self._tied(x_BTD, positions_BT)
        v_BTJK = heads.repeat_for_mesh(tied_BTJK, self.mesh)
        rope_BTJR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*v_BTJK.shape[:3], a.rope_dim))
        k_BTJK = jnp.concatenate([v_BTJK[..., : -a.rope_dim], rope_BTJR], axis=-1)
        o_BTHK = sharded.causal(q_BTHK, k_BTJK, v_BTJK, scale=self.scale, mesh=self.mesh)
        return self._output(o_BTHK), self._entries(tied_BTJK, k_rope_BTR)

    def decode(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: dict, length, starts_B
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`T` new tokens in slots `length ...`, over the cached tied vectors."""
        o_BTHK, cache = heads.decode_step(
            self._attend,
            self._queries(x_BTD, positions_BT),
            self._entries(*self._tied(x_BTD, positions_BT)),
            cache,
            length,
            starts_B,
            cache_axes=self.cache_axes,
            mesh=self.mesh,
        )
        return self._output(o_BTHK), cache

    def _attend(self, q_BThK, cache, lengths_BT, starts_B):
        q_BTJGK = self.held.by_held_head(q_BThK)
        q_nope, q_rope_BTJGR = jnp.split(q_BTJGK, [-self.config.rope_dim], axis=-1)
        q_BTJGK = jnp.concatenate([q_nope, jnp.zeros_like(q_rope_BTJGR)], axis=-1)
        out_BTJGK, lse_BTJG = absorbed_decode(
            q_BTJGK,
            q_rope_BTJGR,
            cache["tied"],
            cache["k_rope"],
            lengths_BT,
            starts_B,
            scale=self.scale,
        )
        device = jax.lax.axis_index(sharding.TENSOR)
        return self.held.by_query_head(out_BTJGK, device), self.held.by_query_head(lse_BTJG, device)

    cache_axes = {
        "tied": ("batch", "cache_length", "cache_latent", None),
        "k_rope": ("batch", "cache_length", None),
    }

    @staticmethod
    def cache_shapes(
        a: TiedConfig, batch: int, capacity: int, tensor: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept; a head that several devices of `tensor` read is repeated."""
        return {
            "tied": (batch, capacity, tensor * _held(a, tensor).each, a.head_dim),
            "k_rope": (batch, capacity, a.rope_dim),
        }

    def _entries(self, tied_BTJK, k_rope_BTR):
        return {"tied": self.held.spread(tied_BTJK), "k_rope": k_rope_BTR}

    def _queries(self, x_BTD, positions_BT):
        """`[nope | rotary]` in the last dimension."""
        q_BTHK = sharding.constrain(
            self.q(x_BTD), self.mesh, "batch", "length", "heads", "head_dim"
        )
        q_nope, q_rope = jnp.split(q_BTHK, [-self.config.rope_dim], axis=-1)
        return jnp.concatenate([q_nope, rotate(q_rope, positions_BT, self.rope_base)], axis=-1)

    def _tied(self, x_BTD, positions_BT):
        k_rope_BTR = rotate(self.k_rope(x_BTD)[:, :, None], positions_BT, self.rope_base)[:, :, 0]
        return heads.whole_heads(self.kv(x_BTD), self.kv_axes, self.mesh), k_rope_BTR

    def _output(self, o_BTHK):
        o_BTHK = sharding.constrain(o_BTHK, self.mesh, "batch", "length", "heads", "head_dim")
        return self.out(o_BTHK)


def _held(a: TiedConfig, tensor: int) -> heads.HeldHeads:
    return heads.HeldHeads(a.num_heads, a.num_kv_heads, tensor)
