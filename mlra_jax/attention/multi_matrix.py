"""MFA: wide query heads made from a narrow latent, one key head and one value head."""

from mlra_jax import sharding
from mlra_jax.attention import heads
from mlra_jax.attention.grouped import GroupedAttention
from mlra_jax.config import MultiMatrixConfig
from mlra_jax.layers import RMSNorm, rotate


class MultiMatrixAttention(GroupedAttention):
    """An MQA whose queries are `RMSNorm(x W_DQ) W_UQ`."""

    reads = ("q_down", "k", "v")

    def _add_parameters(self, config, project, rngs):
        a: MultiMatrixConfig = config.attention
        self.held = self._held(a, sharding.size(self.mesh, sharding.TENSOR))
        D, H, K, Q = config.embed_dim, a.num_heads, a.head_dim, a.q_latent_dim
        self.q_down = project((D, Q), ("embed", "q_latent"))
        self.q_norm = RMSNorm(Q, config=config, rngs=rngs)
        self.q_up = project((Q, H, K), ("q_latent", "heads", "head_dim"))
        self.kv_axes = heads.kv_axes(self.mesh, 1, K)
        self.k = project((D, K), ("embed", self.kv_axes[1]))
        self.v = project((D, K), ("embed", self.kv_axes[1]))

    @staticmethod
    def _held(a: MultiMatrixConfig, tensor: int) -> heads.HeldHeads:
        return heads.HeldHeads(a.num_heads, 1, tensor)

    def _queries(self, y, positions_BT):
        down_BTQ = heads.gathered(y["q_down"], "q_latent", self.mesh)
        q_BTHK = self._by_head(self.q_up(self.q_norm(down_BTQ)))
        return rotate(q_BTHK, positions_BT, self.rope_base)

    def _kept(self, y, positions_BT):
        one_head = {name: y[name][:, :, None] for name in ("k", "v")}
        return super()._kept(one_head, positions_BT)
