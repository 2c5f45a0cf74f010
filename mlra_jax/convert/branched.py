"""A trained MLA as branches that share its latent, as tensor-parallel latent attention has it.

TPLA (arXiv 2508.15881, section 4) turns the latent by an orthogonal matrix and gives
each device a slice, with which all heads attend by a softmax of their own. That is MLRA with one
group: slice `r` is the latent of branch `r`. It costs quality in two places. A branch knows its own
slice's part of each score only, and multiplies it by a number instead of adding the others' parts;
and a slice is normalised by its own mean square, which is the whole latent's only on average.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg

from mlra_jax.config import ConfigError, LatentConfig, ModelConfig

TURNS = ("none", "hadamard", "pca", "pca_in_order")


def branched_config(config: ModelConfig, branches: int) -> ModelConfig:
    """The model that `branched` makes. Raises ConfigError for another attention than MLA."""
    a = config.attention
    if not isinstance(a, LatentConfig) or a != dataclasses.replace(
        a, groups=1, branches=1, base_dim=0, num_kv_heads=0, branch_gated=False
    ):
        raise ConfigError("only MLA's latent becomes branches: a latent of one group and branch")
    return dataclasses.replace(config, attention=dataclasses.replace(a, branches=branches))


def turn(word: str, branches: int, second_moments_CC: np.ndarray) -> np.ndarray:
    """An orthogonal `[C, C]` whose columns, cut into `branches` slices, are the new latents.

    Args:
      word: one of `TURNS`: the latent as it is; a Hadamard matrix, which spreads all over all
        slices; principal components, dealt to the slices in turn; or these in order, the largest
        in the first slice.
      branches: the slices.
      second_moments_CC: of the normalised latent over some text.

    Raises ConfigError for another word, or a width for which there is no Hadamard matrix.
    """
    width = len(second_moments_CC)
    if word == "none":
        return np.eye(width)
    if word == "hadamard":
        if width & (width - 1):
            raise ConfigError(f"latent_dim={width} is no power of 2, as hadamard needs: take pca")
        return scipy.linalg.hadamard(width) / np.sqrt(width)
    if word not in TURNS:
        raise ConfigError(f"turn {word!r} is none of {', '.join(TURNS)}")
    components = np.linalg.eigh(second_moments_CC)[1][:, ::-1]
    if word == "pca_in_order":
        return components
    return np.concatenate([components[:, r::branches] for r in range(branches)], axis=1)


def branched(
    config: ModelConfig,
    params: Mapping[str, Any],
    branches: int,
    turns_NCC: np.ndarray,
    strengths_NRH: np.ndarray,
    sizes_NR: np.ndarray | float = 1.0,
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, parameters) of the MLRA that an MLA becomes.

    Args:
      config, params: of the MLA; a nested dict of float arrays, layers stacked.
      branches: of the result, a divisor of the latent's width.
      turns_NCC: each layer's orthogonal matrix, from `turn`.
      strengths_NRH: what a branch multiplies its part of a head's scores by; `branches` stands in
        for the other slices, if they say the same.
      sizes_NR: the root mean square of each slice of the normalised latent, which its own norm
        makes 1; keys and values are made as large again.
    """
    made = branched_config(config, branches)
    attention = dict(params["layers"]["attention"])
    value = lambda name, leaf: np.asarray(attention[name][leaf], np.float64)
    gain_NC = value("kv_norm", "scale")
    # The latents' factor is larger by the root of what they are narrower. Of values, the factor of
    # the sum over branches takes that back.
    narrower = branches**-0.5 if config.attention.scaled else 1.0
    sizes_NRH = np.broadcast_to(np.expand_dims(sizes_NR, -1), strengths_NRH.shape)

    def sliced(name, factors_NRH):
        kernels = (turns_NCC, gain_NC, value(name, "kernel"))
        turned = np.einsum("ncu,nc,nhck->nhuk", *kernels, optimize=True)
        N, H, C, K = turned.shape
        by_branch = turned.reshape(N, H, branches, C // branches, K).swapaxes(1, 2)
        by_branch = by_branch * factors_NRH[..., None, None]
        return {"kernel": by_branch.reshape(N, branches * H, C // branches, K).astype(np.float32)}

    attention |= {
        "kv_down": {"kernel": np.matmul(value("kv_down", "kernel"), turns_NCC).astype(np.float32)},
        "kv_norm": {"scale": np.ones_like(gain_NC, np.float32)},
        "k_up": sliced("k_up", narrower * strengths_NRH * sizes_NRH),
        "v_up": sliced("v_up", sizes_NRH),
    }
    return made, {**params, "layers": {**params["layers"], "attention": attention}}
