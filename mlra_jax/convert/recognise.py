"""Which model released tensors are: by their names and shapes, beside their config.json."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlra_jax.config import (
    DTYPES,
    AttentionConfig,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
)
from mlra_jax.convert import foreign
from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.released import EMBEDDING, HEAD, LAYER, Shape, base_name, layout

_VARIANT = re.compile(
    r"(?P<base>mha|mqa|gqa|gta|mfa|tpa|mla|gla_2|gla_4|mlra_2|mlra_4)(?P<gated>_gated)?"
    r"(_double_heads)?(?P<normal>_normal_initialization)?(?P<unscaled>_no_scale)?"
)


def recognise(
    shapes: Mapping[str, Shape],
    values: Mapping[str, Any],
    variant: str | None = None,
    folder_name: str = "",
) -> tuple[ModelConfig, list[str]]:
    """The model that released tensors and their config.json describe.

    Args:
      shapes: released name to shape.
      values: config.json. It never names the attention; names and shapes do.
      variant: the released name of the model, for what the weights cannot tell: `_no_scale` (no
        calibration factors) and `_normal_initialization` (only matters for training anew).
      folder_name: where the weights lie; a `_no_scale` there must be confirmed by `variant`.

    Returns:
      The model, its parameters' dtype float32, and notes for the user, a line each.

    Raises:
      CheckpointFileError, ConfigError: no variant matches, a size is missing or absurd, or
        `variant` is unknown or contradicts the weights. Shapes are compared by `check_tensors`.
    """
    named = _VARIANT.fullmatch(variant) if variant else None
    if variant and not named:
        raise CheckpointFileError(
            f"--variant={variant} is no released variant; there are mha, mqa, gqa, gta, mfa, tpa, "
            "mla, gla_2, gla_4, mlra_2, mlra_4, with _gated, _double_heads, "
            "_normal_initialization or _no_scale behind it"
        )
    sizes = _Sizes(values)
    attention = _recognise_attention(shapes, sizes)
    config = ModelConfig(
        attention=attention,
        vocab_size=sizes["vocab_size"],
        num_layers=sizes["n_layer"],
        embed_dim=sizes["n_embd"],
        mlp_dim=sizes["intermediate_size"],
        context_length=sizes["block_size"],
        rope_base=foreign.rope_base(values),
        norm_eps=foreign.norm_eps(values),
    )
    # Bounds the list of names that the comparison makes.
    per_layer = attention.num_latents if isinstance(attention, LatentConfig) else 1
    if config.num_layers * per_layer > len(shapes):
        raise CheckpointFileError(
            f"config.json: n_layer={config.num_layers} is too much for {len(shapes)} tensors"
        )
    base = base_name(config)
    if named:
        _check_variant(config, base, named)
        config = dataclasses.replace(config, zero_init=not named["normal"])
        if named["unscaled"]:
            config = dataclasses.replace(
                config, attention=dataclasses.replace(attention, scaled=False)
            )
        return config, []
    notes = []
    if isinstance(attention, LatentConfig):
        full = base + ("_gated" if attention.gated else "")
        hinted = _VARIANT.fullmatch(folder_name)
        if hinted and hinted["unscaled"]:
            raise CheckpointFileError(
                f"the folder is called {folder_name}, and weights cannot tell {full} from "
                f"{full}_no_scale; say --variant={full}_no_scale or --variant={full}"
            )
        notes.append(
            f"taken for {full}; the weights look the same without calibration factors, "
            f"if these are, say --variant={full}_no_scale"
        )
    return config, notes


def _check_variant(config: ModelConfig, base: str, named: re.Match) -> None:
    latent = isinstance(config.attention, LatentConfig)
    gated = getattr(config.attention, "gated", False)
    if named["base"] != base or bool(named["gated"]) != gated:
        found = base + ("_gated" if gated else "")
        raise CheckpointFileError(
            f"--variant={named[0]} and the weights disagree: their names and shapes are {found}'s"
        )
    if named["unscaled"] and not latent:
        raise CheckpointFileError(f"--variant={named[0]}: {base} has no factors to leave out")


class _Sizes:
    """Whole positive numbers of config.json."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __getitem__(self, name: str) -> int:
        value = self.values.get(name)
        if name not in self.values:
            raise CheckpointFileError(f"config.json: {name} is missing")
        if type(value) is not int or not 0 < value < 2**31:
            shown = value if isinstance(value, int | float | str) else type(value).__name__
            raise CheckpointFileError(f"config.json: {name}={shown!r:.40} is no size of a model")
        return value

    def divided(self, name: str, by: str) -> int:
        if self[name] % self[by]:
            raise CheckpointFileError(
                f"config.json: {name}={self[name]} does not divide by {by}={self[by]}"
            )
        return self[name] // self[by]


def _recognise_attention(shapes: Mapping[str, Shape], sizes: _Sizes) -> AttentionConfig:
    prefix = LAYER.format(0) + "attn."
    names = {n.removeprefix(prefix).removesuffix(".weight") for n in shapes if n.startswith(prefix)}
    if not names:
        raise CheckpointFileError(
            f"no tensor begins with {prefix}; there are {foreign.whose(shapes)}"
        )
    heads = sizes["n_head"]
    if "kv_a_proj_with_mqa" in names:
        nope = sizes["qk_nope_head_dim"]
        if "kv_b_proj_1" in names:
            groups, branches = 2, 1
        elif prefix + "kv_b_proj.weight" in shapes:
            groups, branches = 1, 1
        else:
            groups, branches = _groups_and_branches(shapes, prefix + "kv_b_proj", heads, nope)
        return LatentConfig(
            num_heads=heads,
            groups=groups,
            branches=branches,
            latent_dim=sizes["kv_lora_rank"],
            q_latent_dim=sizes["q_lora_rank"],
            nope_dim=nope,
            rope_dim=sizes["qk_rope_head_dim"],
            gated="gated_proj" in names,
        )
    if "c_qkv.W_A_q" in names:
        return TensorProductConfig(heads, sizes["head_dim"], sizes["rank"], sizes["q_rank"])
    if "kv_proj" in names:
        return TiedConfig(heads, sizes.divided("n_head", "group_size"), sizes["head_dim"])
    if "w_q" in names:
        return MultiMatrixConfig(heads, sizes["head_dim"], sizes["share_q_dim"])
    if "c_q" in names:
        kv_heads = sizes.divided("n_head", "group_size") if "group_size" in sizes.values else heads
        return GroupedConfig(heads, kv_heads, sizes["head_dim"], gated="c_gated" in names)
    raise CheckpointFileError(
        f"no attention variant has the tensors in {prefix}: "
        + foreign.whose(n.removeprefix(prefix) for n in shapes if n.startswith(prefix))
    )


def _groups_and_branches(
    shapes: Mapping[str, Shape], name: str, heads: int, nope: int
) -> tuple[int, int]:
    """From `[latents, latent width, heads of a group * 2 * nope]`."""
    shape = shapes.get(name)
    if shape is None:
        raise CheckpointFileError(f"{name} is missing; it tells the latent variants apart")
    per_latent = shape[-1] // (2 * nope) if len(shape) == 3 and shape[-1] % (2 * nope) == 0 else 0
    if per_latent == 0 or heads % per_latent or shape[0] % (heads // per_latent):
        raise CheckpointFileError(
            f"{name} has shape {list(shape)}, which fits no latent variant of {heads} heads"
        )
    groups = heads // per_latent
    return groups, shape[0] // groups


def check_tensors(config: ModelConfig, specs: Mapping[str, Any]) -> tuple[np.dtype, list[str]]:
    """Compares all tensors with what the model needs.

    The embedding and the head are one tensor, which may be there under either name or both.

    Args:
      config: the model.
      specs: released name to `TensorSpec`.

    Returns:
      The dtype in which all numbers can be stored as they are, float64 becoming float32, and notes
      for the user, a line each.

    Raises:
      CheckpointFileError: the first missing, extra, misshapen or mistyped tensor, and how many
        more there are of the kind.
    """
    wanted, notes = dict(layout(config).tensors), []
    for absent, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if absent not in specs and other in specs:
            del wanted[absent]
            notes.append(f"{absent} is not there: {other} is both, as in all these models")
    cause = "; is config.json another model's?"
    _complain([f"{n} is missing" for n in wanted if n not in specs], "; fetch all files again")
    _complain([f"{n} is no tensor of this model" for n in specs if n not in wanted], cause)
    _complain(
        [
            f"{n} has shape {list(specs[n].shape)} instead of {list(shape)}"
            for n, shape in wanted.items()
            if specs[n].shape != shape
        ],
        cause,
    )
    floats = (*DTYPES, "float64")
    _complain(
        [
            f"{n} has dtype {spec.dtype}; float32, bfloat16 or float16 is wanted"
            for n, spec in specs.items()
            if spec.dtype.name not in floats
        ],
        "; are the weights quantised? save them in a float type first",
    )
    first = {spec.dtype: name for name, spec in reversed(specs.items())}
    if len(first) == 1 and np.dtype(np.float64) not in first:
        return next(iter(first)), notes
    found = ", ".join(f"{dtype} (as {name})" for dtype, name in first.items())
    notes.append(f"tensors are {found}; stored as float32 unless --dtype says another")
    return np.dtype(np.float32), notes


def _complain(faults: list[str], remedy: str = "") -> None:
    if faults:
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise CheckpointFileError(f"tensor {faults[0]}{more}{remedy}")
