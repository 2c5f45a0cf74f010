"""The smallest models that have everything: one for every attention, for all tests to import."""

import base64
import dataclasses

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import model as models
from mlra_jax.config import (
    AttentionConfig,
    Execution,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
)

VOCAB = 88
SIZES = dict(num_heads=8, latent_dim=48, q_latent_dim=24, nope_dim=10, rope_dim=6)
LATENT = {
    "mla": LatentConfig(groups=1, branches=1, **SIZES),
    "gla_2": LatentConfig(groups=2, branches=1, **SIZES),
    "gla_4": LatentConfig(groups=4, branches=1, **SIZES),
    "mlra_2": LatentConfig(groups=2, branches=2, **SIZES),
    "mlra_4": LatentConfig(groups=1, branches=4, **SIZES),
}
LATENT |= {
    "mlra_2_gated": dataclasses.replace(LATENT["mlra_2"], gated=True),
    "mlra_4_no_scale": dataclasses.replace(LATENT["mlra_4"], scaled=False),
}
NEIGHBOURS = {
    # Latents wider than a head's keys, and narrower ones.
    "mlra_2_base": dataclasses.replace(LATENT["mlra_2"], base_dim=16),
    "mlra_4_base_gated": dataclasses.replace(
        LATENT["mlra_4"], latent_dim=32, base_dim=16, head_gated=True, branch_gated=True
    ),
    "gqla": dataclasses.replace(LATENT["mla"], num_kv_heads=4),
    "gqla_expanded": dataclasses.replace(LATENT["mla"], num_kv_heads=4, expanded=True),
}
K = 12
OTHERS = {
    "mha": GroupedConfig(8, 8, K),
    "gqa": GroupedConfig(8, 4, K),
    "gqa_gated": GroupedConfig(8, 2, K, gated=True),
    "mqa": GroupedConfig(8, 1, 10),
    "gta": TiedConfig(8, 4, K),
    "mfa": MultiMatrixConfig(8, K, 24),
    "tpa": TensorProductConfig(8, K, 3, 5),
}
ATTENTIONS: dict[str, AttentionConfig] = LATENT | OTHERS
ALL = ATTENTIONS | NEIGHBOURS


def config(attention: AttentionConfig | str, num_layers: int = 1, **changes) -> ModelConfig:
    """A model of this attention, or of the one that has this name in `ALL`.

    `changes` are to fields of `ModelConfig` and of `Execution`.
    """
    names = [f.name for f in dataclasses.fields(Execution) if f.name in changes]
    how = {name: changes.pop(name) for name in names}
    sizes = dict(
        attention=ALL[attention] if isinstance(attention, str) else attention,
        vocab_size=VOCAB,
        num_layers=num_layers,
        embed_dim=40,
        mlp_dim=56,
        execution=Execution(**{"dtype": "float32"} | how),
        zero_init=False,
    )
    return ModelConfig(**sizes | changes)


def random_model(config: ModelConfig, mesh: Mesh, seed: int = 0) -> models.Model:
    """The same numbers on every mesh, wide enough that softmaxes are far from uniform."""
    definition, shapes = models.structure(config, mesh)
    # Drawn by NumPy: compiling JAX's generator would take longer than everything else here.
    rng = np.random.default_rng(seed)

    def draw(path, x):
        values = rng.normal(1.0 if path[-1].key == "scale" else 0.0, 0.2, x.shape)
        return jax.device_put(values.astype(np.float32), x.sharding)

    return nnx.merge(definition, jax.tree.map_with_path(draw, shapes))


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def write_ranks(file, order=range(255, -1, -1)) -> None:
    """A ranks file of single bytes; by default byte `b` is token `255 - b`."""
    lines = (f"{base64.b64encode(bytes([b])).decode()} {rank}\n" for rank, b in enumerate(order))
    file.write_text("".join(lines))
