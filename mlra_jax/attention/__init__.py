"""One file per mechanism, one shape: `__call__` (training), `prefill`, `decode`."""

from mlra_jax.attention.base import Attention
from mlra_jax.attention.base_latent import BaseLatentAttention
from mlra_jax.attention.grouped import GroupedAttention
from mlra_jax.attention.grouped_latent import GroupedLatentAttention
from mlra_jax.attention.latent import LatentAttention
from mlra_jax.attention.multi_matrix import MultiMatrixAttention
from mlra_jax.attention.tensor_product import TensorProductAttention
from mlra_jax.attention.tied import TiedAttention
from mlra_jax.config import (
    KINDS,
    AttentionConfig,
    ConfigError,
    GroupedConfig,
    LatentConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
)

MODULES: dict[type, type[Attention]] = {
    LatentConfig: LatentAttention,
    GroupedConfig: GroupedAttention,
    TiedConfig: TiedAttention,
    MultiMatrixConfig: MultiMatrixAttention,
    TensorProductConfig: TensorProductAttention,
}


def mechanism(a: AttentionConfig) -> type[Attention]:
    """What computes the attention of a config."""
    found = MODULES[type(a)]
    if found is LatentAttention:
        found = BaseLatentAttention if a.base_dim else found
        found = GroupedLatentAttention if a.expanded else found
    return found


def register(config: type, mechanism: type[Attention]) -> None:
    """Makes an attention of one's own known to models, configs and checkpoints.

    Args:
      config: a frozen dataclass with a `kind` of its own, as those of `mlra_jax.config`.
      mechanism: what computes it. A program that loads its checkpoints has to register it, too.

    Raises ConfigError for a `kind` that another config has.
    """
    if KINDS.setdefault(config.kind, config) is not config:
        raise ConfigError(f"kind={config.kind!r} is {KINDS[config.kind].__name__}'s already")
    MODULES[config] = mechanism
