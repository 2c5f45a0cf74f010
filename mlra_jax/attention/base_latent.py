"""A base latent beside the others: one more branch, whose latent every device holds.

All heads attend in it; as MLA's it cannot be split, so that each device has all of it and asks it
its own heads' queries. The latents beside it are split as ever.
"""

import jax.numpy as jnp

from mlra_jax.attention import heads
from mlra_jax.attention.from_latents import keys_and_values, up_projected
from mlra_jax.attention.latent import LatentAttention, absorbs
from mlra_jax.kernels.absorbed_decode import absorbed_decode
from mlra_jax.kernels.causal_attention import with_shared
from mlra_jax.layers import RMSNorm, weigh


class BaseLatentAttention(LatentAttention):
    cache_axes = LatentAttention.cache_axes | {"base": ("batch", "cache_length", None)}

    def _add_parameters(self, config, project, rngs):
        super()._add_parameters(config, project, rngs)
        D, a = config.embed_dim, config.attention
        factor = (D / a.base_dim) ** 0.5 if a.scaled else 1.0
        self.base_down = project((D, a.base_dim), ("embed", "latent"))
        self.base_norm = RMSNorm(a.base_dim, factor=factor, config=config, rngs=rngs)
        up = self._up_shape(a.kv_heads, a.base_dim)
        self.base_k_up, self.base_v_up = project(*up), project(*up)

    @classmethod
    def input_names(cls, a):
        return (*super().input_names(a), "base_down")

    @classmethod
    def cache_shapes(cls, a, batch, capacity, tensor):
        return super().cache_shapes(a, batch, capacity, tensor) | {
            "base": (batch, capacity, a.base_dim)
        }

    def _kept(self, y, positions_BT):
        base_BTC = self.base_norm(self._down(y["base_down"], "latent"))
        return super()._kept(y, positions_BT) | {"base": base_BTC}

    def _operands(self, q_BTHK, kept):
        """Its heads are behind the other branches' ones."""
        of_others, of_base = super()._operands(q_BTHK, kept), self._of_base(q_BTHK, kept)
        return tuple(jnp.concatenate(x, axis=2) for x in zip(of_others, of_base, strict=True))

    def _of_base(self, q_BTHK, kept):
        base_BT1C = kept["base"][:, :, None]
        made = keys_and_values(base_BT1C, kept["k_rope"], self.base_k_up, self.base_v_up)
        made = (heads.repeat_for_mesh(x, self.mesh) for x in made)
        return self._by_branch_head(q_BTHK), *made

    def _whole(self, y, q_BTHK, kept):
        if not absorbs(self.config):
            return super()._whole(y, q_BTHK, kept)
        o_BTHK = self._to_itself(*self._of_base(q_BTHK, kept))
        return self._with_base(y, super()._whole(y, q_BTHK, kept), o_BTHK)

    def _sum(self, y, o_BTPK):
        others = self.config.branches * self.config.num_heads
        if o_BTPK.shape[2] == others:
            return super()._sum(y, o_BTPK)
        return self._with_base(y, super()._sum(y, o_BTPK[:, :, :others]), o_BTPK[:, :, others:])

    def _with_base(self, y, o_BTHK, base_BTHK):
        """The other branches' sum, by part, and the base's output."""
        if "branch_gate" in y:
            base_BTHK = base_BTHK * self._choice(y, slice(-1, None))[:, :, 0, :, None]
        return self._beside(o_BTHK, self._by_branch_head(base_BTHK) * self.branch_factor)

    def _beside(self, o_BTHK, base_BTHK):
        return o_BTHK + base_BTHK

    def _ask(self, q_BTHK):
        # As in `_ask_latents`.
        q_BTHK = self._all_heads(q_BTHK)
        q_nope_BTHK, q_rope_BTHR = jnp.split(q_BTHK, [self.config.nope_dim], axis=-1)
        q_nope_BTHK = self._by_branch_head(q_nope_BTHK)
        q_BTHC = weigh(q_nope_BTHK, self._per_head(self.base_k_up), "bthk,hck->bthc")
        return *self._ask_latents(q_BTHK), self._by_branch_head(q_BTHC), q_rope_BTHR

    def _attend(self, queries, cache, lengths_BT):
        *others, q_BThC, q_rope_BThR = queries
        z_BTphC, lse_BTph = super()._attend(others, cache, lengths_BT)
        z_BT1hC, lse_BT1h = absorbed_decode(
            q_BThC[:, :, None],
            q_rope_BThR,
            cache["base"][:, :, None],
            cache["k_rope"],
            lengths_BT,
            scale=self.scale,
        )
        return (z_BTphC, z_BT1hC[:, :, 0]), (lse_BTph, lse_BT1h[:, :, 0])

    def _answer(self, y, z):
        others_BTPC, z_BTHC = z
        o_BTHK = weigh(z_BTHC, self._per_head(self.base_v_up), "bthc,hck->bthk")
        return self._with_base(y, self._from_latents(y, others_BTPC), o_BTHK)

    def _ask_chunk(self, q_BTHK):
        """A chunk attends to keys and values made of the base, whatever it does to the others."""
        asked, weights = super()._ask_chunk(q_BTHK)
        up = (self._per_head(self.base_k_up), self._per_head(self.base_v_up))
        return (asked, q_BTHK), (*weights, *up)

    def _attend_grouped(self, attend, queries, entries, *weights):
        others, q_BThK = queries
        *weights, k_up_hCK, v_up_hCK = weights
        o_BTpX, lse_BTp = super()._attend_grouped(attend, others, entries, *weights)
        base_BS1C = entries["base"][:, :, None]
        k_BShK = with_shared(up_projected(base_BS1C, k_up_hCK), entries["k_rope"])
        o_BTh1K, lse_BTh1 = attend(q_BThK[:, :, :, None], k_BShK, up_projected(base_BS1C, v_up_hCK))
        return (o_BTpX, o_BTh1K[:, :, :, 0]), (lse_BTp, lse_BTh1[..., 0])

    def _answer_chunk(self, y, o):
        others_BTPX, o_BTHK = o
        return self._with_base(y, super()._answer_chunk(y, others_BTPX), o_BTHK)
