"""TPA: queries, keys and values are means over `rank` outer products of two factors.

`k = A_k B_k / r` with `A_k [H, r]` and `B_k [r, K]`, both projections of the token; likewise values
and, with its own rank, queries. The factors are cached, `2 r (H + K)` values a token, and a step
contracts them one after the other, so that no key or value is ever made.
"""

import math

import jax
import jax.numpy as jnp

from mlra_jax.attention import heads
from mlra_jax.attention.base import Attention
from mlra_jax.config import ConfigError, TensorProductConfig
from mlra_jax.kernels.softmax import precision, visible_softmax
from mlra_jax.layers import rotate


class TensorProductAttention(Attention):
    reads = ("q_a", "q_b", "k_a", "k_b", "v_a", "v_b")
    cache_axes = {
        "k_a": ("batch", "cache_length", "cache_latent", None),
        "k_b": ("batch", "cache_length", None, None),
        "v_a": ("batch", "cache_length", "cache_latent", None),
        "v_b": ("batch", "cache_length", None, None),
    }
    rotated = "k_b"

    def _add_parameters(self, config, project, rngs):
        a: TensorProductConfig = config.attention
        D, H, K = config.embed_dim, a.num_heads, a.head_dim
        self.shared_axes = (None, heads.feature_axis(self.mesh, K))

        def factors(rank):
            """Projections to A `[H, rank]` and B `[rank, K]`, Xavier-uniform."""
            by_head = project(
                (D, H, rank),
                ("embed", "heads", None),
                init=_uniform(math.sqrt(6 / ((H + D) * rank))),
            )
            shared = project(
                (D, rank, K),
                ("embed", *self.shared_axes),
                init=_uniform(math.sqrt(6 / ((rank + D) * K))),
            )
            return by_head, shared

        self.q_a, self.q_b = factors(a.q_rank)
        self.k_a, self.k_b = factors(a.rank)
        self.v_a, self.v_b = factors(a.rank)

    @classmethod
    def cache_shapes(cls, a, batch, capacity, tensor):
        """The factors; B belongs to all heads and so to every device."""
        if a.num_heads % tensor:
            raise ConfigError(
                f"{a.num_heads} heads do not divide over tensor={tensor} devices; use "
                f"tensor={math.gcd(a.num_heads, tensor)} and put the rest on the context axis"
            )
        by_head = (batch, capacity, a.num_heads, a.rank)
        shared = (batch, capacity, a.rank, a.head_dim)
        return {"k_a": by_head, "k_b": shared, "v_a": by_head, "v_b": shared}

    def _queries(self, y, positions_BT):
        b_BTrK = rotate(self._shared(y["q_b"]), positions_BT, self.rope_base)
        return self._product(self._by_head(y["q_a"]), b_BTrK / self.config.q_rank)

    def _kept(self, y, positions_BT):
        """The factors as cached: keys' B after the rotation, both B already divided by the rank."""
        rank = self.config.rank
        return {
            "k_a": self._by_head(y["k_a"]),
            "k_b": rotate(self._shared(y["k_b"]), positions_BT, self.rope_base) / rank,
            "v_a": self._by_head(y["v_a"]),
            "v_b": self._shared(y["v_b"]) / rank,
        }

    def _operands(self, q_BTHK, kept):
        k_BTHK = self._product(kept["k_a"], kept["k_b"])
        return q_BTHK, k_BTHK, self._product(kept["v_a"], kept["v_b"])

    def _entries(self, kept):
        return kept

    def _attend(self, q_BThK, cache, lengths_BT):
        """q · (A B) = A · (B q): the B factors first, which all heads share."""
        dtype, nothing_B = q_BThK.dtype, jnp.zeros(q_BThK.shape[0], jnp.int32)
        product = dict(preferred_element_type=jnp.float32, precision=precision(dtype))
        scores_BThrS = jnp.einsum("BThK,BSrK->BThrS", q_BThK, cache["k_b"], **product)
        k_a_BhrS = jnp.moveaxis(cache["k_a"], 1, -1)
        scores_BThS = (scores_BThrS * k_a_BhrS[:, None]).sum(axis=3) * self.scale
        weights_BThS, total_BTh, lse_BTh = visible_softmax(scores_BThS, lengths_BT, nothing_B)
        v_a_BhrS = jnp.moveaxis(cache["v_a"], 1, -1)
        weights_BThrS = (weights_BThS[:, :, :, None] * v_a_BhrS[:, None]).astype(dtype)
        o_BThK = jnp.einsum("BThrS,BSrK->BThK", weights_BThrS, cache["v_b"], **product)
        return (o_BThK / total_BTh[..., None]).astype(dtype), lse_BTh

    def _grouped(self, q_BThK, entries):
        keys, values = (_contract(entries[f"{x}_a"], entries[f"{x}_b"]) for x in "kv")
        return q_BThK[:, :, :, None], keys, values

    def _product(self, a_BTHr, b_BTrK):
        return self._by_head(_contract(a_BTHr, b_BTrK))

    def _shared(self, x_BTrK):
        return heads.whole_heads(x_BTrK, self.shared_axes, self.mesh)


def _contract(a_BTHr, b_BTrK):
    return jnp.einsum("bthr,btrk->bthk", a_BTHr, b_BTrK, precision=precision(a_BTHr.dtype))


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
