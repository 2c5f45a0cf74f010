"""One file per mechanism, one shape: `__call__` (training), `prefill`, `decode`."""

from mlra_jax.attention.grouped import GroupedAttention
from mlra_jax.attention.latent import LatentAttention
from mlra_jax.attention.multi_matrix import MultiMatrixAttention
from mlra_jax.attention.tensor_product import TensorProductAttention
from mlra_jax.attention.tied import TiedAttention
from mlra_jax.config import (
    GroupedConfig,
    LatentConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
)

MODULES = {
    LatentConfig: LatentAttention,
    GroupedConfig: GroupedAttention,
    TiedConfig: TiedAttention,
    MultiMatrixConfig: MultiMatrixAttention,
    TensorProductConfig: TensorProductAttention,
}
