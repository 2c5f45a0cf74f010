"""The released names and shapes, and how each leaf of our tree lies in them.

One table serves both directions. A `Part` says which released tensor holds a part of a leaf, and
gives a *view*: a function of reshapes, transposes and slices only. Reading, the view of the
released tensor is the part; writing, the part is assigned to the view of an empty released tensor.
Linear weights are `[out, in]` there and `[in, out...]` here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mlra_jax.config import (
    GPT2_VOCABULARY,
    ConfigError,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
)

Shape = tuple[int, ...]
View = Callable[[np.ndarray], np.ndarray]

EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
LAYER = "transformer.h.{}."
COMPUTE_DTYPE = "compute_dtype"
"""Our own key of config.json: the dtype of activations and products, where it is not bfloat16."""
TOKENIZER = "tokenizer"
"""Another: the tokenizer's name, where it is not `usual_tokenizer`."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a leaf: the released tensor `name` seen through `view`, `shape` after it."""

    name: str
    shape: Shape
    view: View


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours.

    Attributes:
      shape: in our tree, with the layers first if `stacked`.
      stacked: whether `parts` describe one layer, their names being those within a block.
      parts: what it is made of, one after the other along the first axis (after the layers).
    """

    shape: Shape
    stacked: bool
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model's parameters in both worlds.

    Attributes:
      leaves: our dotted path to `Leaf`.
      tensors: released name to shape; `HEAD` is there beside `EMBEDDING`, which it equals.
    """

    leaves: Mapping[str, Leaf]
    tensors: Mapping[str, Shape]


class _Builder:
    """Collects a block's leaves, and the shapes of the released tensors they are views of."""

    def __init__(self, embed_dim: int):
        self.embed_dim = embed_dim
        self.tensors: dict[str, Shape] = {}
        self.leaves: dict[str, tuple[Part, ...]] = {}

    def vector(self, path: str, *names: str, width: int) -> None:
        """A norm's weights; several tensors follow each other."""
        self.tensors |= {name: (width,) for name in names}
        self.leaves[path] = tuple(Part(name, (width,), lambda a: a) for name in names)

    def linear(self, path: str, name: str, *out: int, width: int | None = None) -> None:
        """`[out, in]` there, `[in, *out]` here; `width` of the input, the model's by default."""
        width = width or self.embed_dim
        self.tensors[name] = (math.prod(out), width)
        view = lambda a: np.moveaxis(a.reshape(*out, width), -1, 0)
        self.leaves[path] = (Part(name, (width, *out), view),)

    def rows(self, path: str, name: str, start: int, stop: int) -> None:
        """A linear map that is some of the rows of a released one."""
        rows = max(stop, self.tensors.get(name, (0,))[0])
        self.tensors[name] = (rows, self.embed_dim)
        view = lambda a: a[start:stop].T
        self.leaves[path] = (Part(name, (self.embed_dim, stop - start), view),)

    def output(self, heads: int, width: int) -> None:
        """The attention's output projection, `[D, H*K]` there and `[H, K, D]` here."""
        d = self.embed_dim
        self.tensors["attn.c_proj.weight"] = (d, heads * width)
        view = lambda a: a.reshape(d, heads, width).transpose(1, 2, 0)
        self.leaves["attention.out.kernel"] = (Part("attn.c_proj.weight", (heads, width, d), view),)


def layout(config: ModelConfig) -> Layout:
    """Every parameter of the model, with the released tensors that hold it."""
    builder = _Builder(config.embed_dim)
    builder.vector("attention_norm.scale", "input_layernorm.weight", width=config.embed_dim)
    builder.vector("mlp_norm.scale", "post_attention_layernorm.weight", width=config.embed_dim)
    builder.linear("mlp.gate.kernel", "mlp.c_fc1.weight", config.mlp_dim)
    builder.linear("mlp.up.kernel", "mlp.c_fc2.weight", config.mlp_dim)
    builder.linear("mlp.down.kernel", "mlp.c_proj.weight", config.embed_dim, width=config.mlp_dim)
    _ATTENTIONS[type(config.attention)](builder, config.attention)

    n, v, d = config.num_layers, config.vocab_size, config.embed_dim
    leaves = {
        "embed.embedding": Leaf((v, d), False, (Part(EMBEDDING, (v, d), lambda a: a),)),
        "final_norm.scale": Leaf((d,), False, (Part("layernorm.weight", (d,), lambda a: a),)),
    }
    for path, parts in builder.leaves.items():
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        leaves[f"layers.{path}"] = Leaf((n, *shape), True, parts)
    tensors = {EMBEDDING: (v, d), HEAD: (v, d), "layernorm.weight": (d,)}
    for i in range(n):
        tensors |= {LAYER.format(i) + name: shape for name, shape in builder.tensors.items()}
    return Layout(leaves, tensors)


def _latent(builder: _Builder, a: LatentConfig) -> None:
    heads, q_dim, c, k = a.num_heads, a.q_latent_dim, a.latent_head_dim, a.nope_dim
    builder.linear("attention.q_down.kernel", "attn.q_a_proj.weight", q_dim)
    builder.vector("attention.q_norm.scale", "attn.q_a_layernorm.weight", width=q_dim)
    builder.linear("attention.q_up.kernel", "attn.q_b_proj.weight", heads, a.query_dim, width=q_dim)
    down = "attn.kv_a_proj_with_mqa.weight"
    builder.rows("attention.k_rope.kernel", down, a.latent_dim, a.latent_dim + a.rope_dim)
    builder.rows("attention.kv_down.kernel", down, 0, a.latent_dim)
    per_latent = heads // a.groups
    if a.num_latents == 1:
        norms, ups = ["kv_a_layernorm"], ["kv_b_proj"]
    elif (a.groups, a.branches) == (2, 1):
        norms, ups = ["kv_a_layernorm_1", "kv_a_layernorm_2"], ["kv_b_proj_1", "kv_b_proj_2"]
    else:
        norms, ups = [f"kv_a_layernorms.{i}" for i in range(a.num_latents)], []
    builder.vector("attention.kv_norm.scale", *(f"attn.{name}.weight" for name in norms), width=c)
    # The up-projection of a latent gives, per head, [key | value]; ours is [head, latent, width].
    for path, start in (("attention.k_up.kernel", 0), ("attention.v_up.kernel", k)):
        shape, part = (per_latent, c, k), slice(start, start + k)
        if ups:
            view = lambda x, part=part: x.reshape(per_latent, 2 * k, c)[:, part].transpose(0, 2, 1)
            builder.tensors |= {f"attn.{n}.weight": (per_latent * 2 * k, c) for n in ups}
            parts = [Part(f"attn.{n}.weight", shape, view) for n in ups]
        else:
            builder.tensors["attn.kv_b_proj"] = (a.num_latents, c, per_latent * 2 * k)
            parts = [
                Part(
                    "attn.kv_b_proj",
                    shape,
                    lambda x, i=i, part=part: (
                        x[i].reshape(c, per_latent, 2 * k)[:, :, part].transpose(1, 0, 2)
                    ),
                )
                for i in range(a.num_latents)
            ]
        builder.leaves[path] = tuple(parts)
    if a.gated:
        builder.linear("attention.gate.kernel", "attn.gated_proj.weight", heads, a.value_dim)
    builder.output(heads, a.value_dim)


def _grouped(builder: _Builder, a: GroupedConfig) -> None:
    builder.linear("attention.q.kernel", "attn.c_q.weight", a.num_heads, a.head_dim)
    builder.linear("attention.k.kernel", "attn.c_k.weight", a.num_kv_heads, a.head_dim)
    builder.linear("attention.v.kernel", "attn.c_v.weight", a.num_kv_heads, a.head_dim)
    if a.gated:
        builder.linear("attention.gate.kernel", "attn.c_gated.weight", a.num_heads, a.head_dim)
    builder.output(a.num_heads, a.head_dim)


def _tied(builder: _Builder, a: TiedConfig) -> None:
    builder.linear("attention.q.kernel", "attn.c_q.weight", a.num_heads, a.head_dim)
    builder.linear("attention.kv.kernel", "attn.kv_proj.weight", a.num_kv_heads, a.head_dim)
    builder.linear("attention.k_rope.kernel", "attn.W_rope_k.weight", a.rope_dim)
    builder.output(a.num_heads, a.head_dim)


def _multi_matrix(builder: _Builder, a: MultiMatrixConfig) -> None:
    q_dim = a.q_latent_dim
    builder.linear("attention.q_down.kernel", "attn.c_q.weight", q_dim)
    builder.vector("attention.q_norm.scale", "attn.q_layernorm.weight", width=q_dim)
    builder.linear("attention.q_up.kernel", "attn.w_q.weight", a.num_heads, a.head_dim, width=q_dim)
    builder.linear("attention.k.kernel", "attn.c_k.weight", a.head_dim)
    builder.linear("attention.v.kernel", "attn.c_v.weight", a.head_dim)
    builder.output(a.num_heads, a.head_dim)


def _tensor_product(builder: _Builder, a: TensorProductConfig) -> None:
    for x, rank in (("q", a.q_rank), ("k", a.rank), ("v", a.rank)):
        builder.linear(f"attention.{x}_a.kernel", f"attn.c_qkv.W_A_{x}.weight", a.num_heads, rank)
        builder.linear(f"attention.{x}_b.kernel", f"attn.c_qkv.W_B_{x}.weight", rank, a.head_dim)
    builder.output(a.num_heads, a.head_dim)


_ATTENTIONS = {
    LatentConfig: _latent,
    GroupedConfig: _grouped,
    TiedConfig: _tied,
    MultiMatrixConfig: _multi_matrix,
    TensorProductConfig: _tensor_product,
}

_LATENT_NAMES = {
    (1, 1): "mla",
    (2, 1): "gla_2",
    (4, 1): "gla_4",
    (2, 2): "mlra_2",
    (1, 4): "mlra_4",
}


def base_name(config: ModelConfig) -> str:
    """The family of a model by its released name: `mha`, `gqa`, `mlra_4` ...

    Raises ConfigError for a latent model that was not released and so has no name.
    """
    match config.attention:
        case LatentConfig(groups=groups, branches=branches) as a:
            for name in ("head_gated", "branch_gated", "base_dim", "num_kv_heads"):
                if value := getattr(a, name):
                    raise ConfigError(
                        f"{name}={value}: no released model has such a part, so there is no format "
                        "for it; keep the checkpoint as it is"
                    )
            if (groups, branches) not in _LATENT_NAMES:
                raise ConfigError(
                    f"groups={groups}, branches={branches} is none of the released variants "
                    f"({', '.join(_LATENT_NAMES.values())})"
                )
            return _LATENT_NAMES[groups, branches]
        case GroupedConfig(num_heads=heads, num_kv_heads=kv_heads):
            return "mha" if kv_heads == heads else "mqa" if kv_heads == 1 else "gqa"
        case TiedConfig():
            return "gta"
        case MultiMatrixConfig():
            return "mfa"
    return "tpa"


def usual_tokenizer(config: ModelConfig) -> str | None:
    """That of released weights, whose config.json names none: by the size of the vocabulary."""
    return "gpt2" if config.vocab_size == GPT2_VOCABULARY else None


def released_values(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model, as the released ones are; `dtype` is that of its tensors."""
    a = config.attention
    values = {
        "architectures": ["GPT"],
        "bias": False,
        "block_size": config.context_length,
        "dropout": 0.0,
        "intermediate_size": config.mlp_dim,
        "model_type": "gpt2",
        "n_embd": config.embed_dim,
        "n_head": a.num_heads,
        "n_layer": config.num_layers,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }
    # The released code has no other base and eps; conversion reads these back.
    if config.rope_base != 10000.0:
        values["rope_theta"] = config.rope_base
    if config.norm_eps != 1e-6:
        values["rms_norm_eps"] = config.norm_eps
    match a:
        case LatentConfig():
            values |= {
                "kv_lora_rank": a.latent_dim,
                "q_lora_rank": a.q_latent_dim,
                "qk_nope_head_dim": a.nope_dim,
                "qk_rope_head_dim": a.rope_dim,
            }
        case GroupedConfig() | TiedConfig():
            values["head_dim"] = a.head_dim
            if isinstance(a, TiedConfig) or a.num_kv_heads != a.num_heads:
                values["group_size"] = a.num_heads // a.num_kv_heads
        case MultiMatrixConfig():
            values |= {"head_dim": a.head_dim, "share_q_dim": a.q_latent_dim}
        case TensorProductConfig():
            values |= {"head_dim": a.head_dim, "rank": a.rank, "q_rank": a.q_rank}
    return values
