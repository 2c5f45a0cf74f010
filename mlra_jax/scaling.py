"""Sizes for another width of a model than the published one."""

import dataclasses
from collections.abc import Collection
from fractions import Fraction
from typing import Any

from mlra_jax.settings_tree import ConfigError

SIZES = {
    "small": {"num_layers": 12, "embed_dim": 768},
    "medium": {"num_layers": 24, "embed_dim": 1024},
}
"""Of presets whose name ends so: for one GPU, about 0.1 and 0.3 billion parameters."""
_COUNTS = ("num_heads", "num_kv_heads")
_WIDTHS = ("head_dim", "nope_dim", "rope_dim", "latent_dim", "base_dim")
_STEP = 64
"""The MLP's and the query latent's width are multiples of this, as hardware likes them."""
_WIDE, _NARROW = Fraction(1), Fraction(1, 2)
"""Of the published head width, 128: from a width of 2048 on, and below."""


def scale_mlp(mlp_dim: int, published: int, embed_dim: int) -> int:
    """The MLP's width of a model `embed_dim` wide, in the published proportion, rounded up."""
    return -(-mlp_dim * embed_dim // (published * _STEP)) * _STEP


def scale_attention(
    attention: Any, published: int, embed_dim: int, num_heads: int | None = None
) -> Any:
    """The attention of a model `embed_dim` wide.

    Heads stay as wide as published (128), below a width of 2048 half as wide, and their number
    follows; if `num_heads` is given, their width does. Latents and rotary parts go with the heads'
    width, the query latent with the model's. Groups, branches, ranks and a single
    key/value head stay.

    Args:
      attention: a config of `mlra_jax.config`, of the published model.
      published: its width.
      embed_dim: the width asked for.
      num_heads: the number of heads asked for, if it was.

    Raises ConfigError naming the size that would be no whole number.
    """
    ratio = Fraction(embed_dim, published)
    wide = _WIDE if embed_dim >= 2048 else _NARROW
    many = ratio / wide
    if num_heads is not None:
        many = Fraction(num_heads, attention.num_heads)
        wide = ratio / many
    names = {field.name for field in dataclasses.fields(attention)}
    sizes: dict[str, int] = {}
    for factor, of in ((many, _COUNTS), (wide, _WIDTHS)):
        for name in names & set(of):
            value = getattr(attention, name)
            if value == 0 or (name == "num_kv_heads" and value == 1):
                continue
            sizes[name] = _whole(name, value * factor, embed_dim, num_heads)
    if "q_latent_dim" in names:
        sizes["q_latent_dim"] = max(1, round(attention.q_latent_dim * ratio / _STEP)) * _STEP
    return dataclasses.replace(attention, **sizes)


def _whole(name: str, value: Fraction, embed_dim: int, num_heads: int | None) -> int:
    if value.denominator > 1 or value < 1:
        heads = "" if num_heads is None else f" and num_heads={num_heads}"
        raise ConfigError(
            f"embed_dim={embed_dim}{heads} would make {name} {float(value):g}: choose a width that "
            "gives whole heads, or make the attention's config yourself"
        )
    return int(value)


def split_size(name: str, presets: Collection[str]) -> tuple[str, dict[str, int]]:
    """(preset, sizes) of a name such as `mlra_4_small`."""
    base, _, size = name.rpartition("_")
    return (base, SIZES[size]) if base in presets and size in SIZES else (name, {})
