"""One file per mechanism, one shape: `__call__` (training), `prefill`, `decode`."""

from mlra_jax.attention.latent import LatentAttention
from mlra_jax.config import LatentConfig

MODULES = {LatentConfig: LatentAttention}
