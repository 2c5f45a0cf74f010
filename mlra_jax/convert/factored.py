"""GQA's keys and values as up-projections of one latent: a trained GQA becomes an MLA, at a cost.

GQA turns all of a key by its position, MLA one rotary key that all heads share. Of every second
rotary pair, whose frequencies MLA's rotary key has, the combination of key heads that varies most
becomes the shared key: as complex numbers, pairs may be multiplied and still turn alike. What is
left of the keys is taken as not turned, each pair's product with a query as large as it is
on average over distances. These keys, the values and the queries then go through the principal
components of what they are on some text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlra_jax.config import ConfigError, GroupedConfig, LatentConfig, ModelConfig


def factored_config(
    config: ModelConfig, latent_dim: int | None = None, q_latent_dim: int | None = None
) -> ModelConfig:
    """The MLA that `factored` makes; by default in the published proportions.

    Raises ConfigError for another attention than GQA, or latents wider than what they are made of.
    """
    a = config.attention
    if not isinstance(a, GroupedConfig) or a.head_dim % 4:
        raise ConfigError("only GQA, MHA and MQA with heads a multiple of 4 wide become an MLA")
    most_kv, most_q = 2 * a.num_kv_heads * a.head_dim, a.num_heads * a.head_dim * 3 // 2
    most_kv, most_q = (min(most, config.embed_dim) for most in (most_kv, most_q))
    latent_dim = latent_dim or min(4 * a.head_dim, most_kv)
    q_latent_dim = q_latent_dim or min(config.embed_dim // 2, most_q)
    for name, width, most in (
        ("latent_dim", latent_dim, most_kv),
        ("q_latent_dim", q_latent_dim, most_q),
    ):
        if width > most:
            raise ConfigError(f"{name}={width} is more than the {most} dimensions there are")
    made = LatentConfig(
        num_heads=a.num_heads,
        groups=1,
        branches=1,
        latent_dim=latent_dim,
        q_latent_dim=q_latent_dim,
        nope_dim=a.head_dim,
        rope_dim=a.head_dim // 2,
        gated=a.gated,
    )
    return dataclasses.replace(config, attention=made)


def factored(
    config: ModelConfig, params: Mapping[str, Any], moments_NDD: np.ndarray, made: ModelConfig
) -> dict[str, Any]:
    """The parameters of the MLA that a GQA becomes.

    Args:
      config, params: of the GQA; a nested dict of float arrays, layers stacked.
      moments_NDD: second moments of each attention's input over some text.
      made: from `factored_config`.
    """
    attention, layers = dict(params["layers"]["attention"]), []
    kernels = [np.asarray(attention.pop(name)["kernel"], np.float64) for name in "qkv"]
    for q_DHK, k_DJK, v_DJK, moments_DD in zip(*kernels, moments_NDD, strict=True):
        layers.append(_layer(config, made, q_DHK, k_DJK, v_DJK, moments_DD))
    for name in layers[0]:
        leaf = "scale" if name.endswith("norm") else "kernel"
        stacked = np.stack([layer[name] for layer in layers])
        attention[name] = {leaf: stacked.astype(np.float32)}
    return {**params, "layers": {**params["layers"], "attention": attention}}


def _layer(config, made, q_DHK, k_DJK, v_DJK, moments_DD) -> dict[str, np.ndarray]:
    a, D = made.attention, config.embed_dim
    J, group = k_DJK.shape[1], a.num_heads // k_DJK.shape[1]
    q_DHN, k_DJN = _complex(q_DHK), _complex(k_DJK)
    # Another width of queries, another scale.
    q_DHN = q_DHN * (a.query_dim / a.nope_dim) ** 0.5
    q_rope, k_rope = [], []
    for pair in range(0, a.nope_dim // 2, 2):
        k_DJ = k_DJN[:, :, pair]
        _, vectors = np.linalg.eigh(k_DJ.conj().T @ moments_DD @ k_DJ)
        chosen_J = vectors[:, -1]
        k_rope.append(k_DJ @ chosen_J)
        k_DJN[:, :, pair] -= np.outer(k_rope[-1], chosen_J.conj())
        q_rope.append(q_DHN[:, :, pair] * np.repeat(chosen_J, group))
    q_nope_DHK = _real(q_DHN * _mean_turn(config, a.nope_dim).conj())
    q_DHX = np.concatenate([q_nope_DHK, _real(np.stack(q_rope, -1))], axis=-1)
    k_DJK = _real(k_DJN)
    # Keys and values count alike in the principal components of both.
    size = lambda x: np.einsum("djk,de,ejk->", x, moments_DD, x, optimize=True) ** 0.5
    balance = size(v_DJK) / max(size(k_DJK), 1e-30)
    both = np.concatenate([balance * k_DJK, v_DJK], axis=1)
    kv_down, kv_up, kv_size = _principal(both.reshape(D, -1), moments_DD, a.latent_dim)
    q_down, q_up, q_size = _principal(q_DHX.reshape(D, -1), moments_DD, a.q_latent_dim)
    kv_up = kv_up.reshape(a.latent_dim, 2 * J, a.nope_dim).swapaxes(0, 1)
    factor = lambda width: (D / width) ** 0.5
    return {
        "q_down": q_down,
        "q_norm": np.full(a.q_latent_dim, q_size / factor(a.q_latent_dim)),
        "q_up": q_up.reshape(a.q_latent_dim, a.num_heads, a.query_dim),
        "kv_down": kv_down,
        "kv_norm": np.full(a.latent_dim, kv_size / factor(a.latent_dim)),
        "k_rope": _real(np.stack(k_rope, -1)),
        "k_up": np.repeat(kv_up[:J] / balance, group, axis=0),
        "v_up": np.repeat(kv_up[J:], group, axis=0),
    }


def _principal(kernel_DX, moments_DD, width) -> tuple[np.ndarray, np.ndarray, float]:
    """(down `[D, width]`, up `[width, X]`, root mean square of what is between)."""
    values, vectors = np.linalg.eigh(kernel_DX.T @ moments_DD @ kernel_DX)
    kept = vectors[:, -width:]
    return kernel_DX @ kept, kept.T, float(np.sqrt(max(values[-width:].mean(), 1e-30)))


def _mean_turn(config: ModelConfig, width: int) -> np.ndarray:
    """Complex `[width / 2]`: how pairs turn between key and query, near ones counting more."""
    distances = np.arange(config.context_length)
    frequencies = config.rope_base ** (-2 * np.arange(width // 2) / width)
    weights = 1 / (1 + distances)
    return np.exp(-1j * np.outer(frequencies, distances)) @ weights / weights.sum()


def _complex(x: np.ndarray) -> np.ndarray:
    """Rotary pairs, the halves of the last dimension, as complex numbers."""
    first, second = np.split(x, 2, axis=-1)
    return first + 1j * second


def _real(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.real, x.imag], axis=-1)
