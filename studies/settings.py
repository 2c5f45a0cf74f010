"""What a study of the variants trains: the published models shrunk, all with as many parameters."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from mlra_jax import model as models
from mlra_jax.config import NEIGHBOURS, PRESETS, VARIANTS, Execution, ModelConfig, preset
from mlra_jax.settings_tree import ConfigError, at_least, build, closest, require
from mlra_jax.sharding import make_mesh
from mlra_jax.training.settings import DataSettings, Experiment, OptimizerSettings

_WIDTHS = ("head_dim", "latent_dim", "base_dim", "q_latent_dim", "nope_dim", "rope_dim")
_MLP_STEP = 8
GATED = tuple(name for name in PRESETS if name.endswith("_gated"))
ABLATIONS = tuple(
    name for name in PRESETS if name.endswith(("_no_scale", "_double_heads"))
) + tuple(f"{name}_normal_initialization" for name in ("gqa", "mla", "mlra_4"))
ALL = (*VARIANTS, *GATED, *ABLATIONS, *NEIGHBOURS)
CHANGES = (
    *("_base", "_head_gated", "_branch_gated", "_gated"),
    *("_no_scale", "_double_heads", "_normal_initialization"),
)


@dataclasses.dataclass(frozen=True)
class Study:
    """All runs of it have these settings, and differ in variant and seed alone.

    Run `seed` of each variant sees the same tokens in the same order; weights are drawn from the
    same key, so that those of the same shape are the same.
    """

    data: DataSettings
    """`global_batch` is that of one run."""
    optimizer: OptimizerSettings
    variants: str = "all"
    """Presets, joined by commas; `all` is the eleven variants, the gated ones, the ablations and
    the neighbours."""
    reference: str = "mla"
    """The preset to which all are compared."""
    seeds: int = 3
    side_by_side: int = 3
    """Runs of a variant that one device computes at the same time."""
    shrink: int = 8
    """By how much all widths of the published models are divided; numbers of heads stay."""
    num_layers: int = 6
    vocab_size: int = 4096
    context_length: int = 512
    steps: int = 1000
    validate_every: int = 100
    dtype: str = "bfloat16"

    def __post_init__(self):
        counts = ("seeds", "side_by_side", "shrink", "num_layers", "steps", "validate_every")
        at_least(1, self, "", *counts)
        require(self.data.accumulate == 1, "data.accumulate must be 1 in a study")
        self.experiment(self.reference, 0)
        for name in self.names:
            self.experiment(name, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The presets that are trained, each once."""
        return ALL if self.variants == "all" else tuple(dict.fromkeys(self.variants.split(",")))

    def model(self, name: str) -> ModelConfig:
        """The preset shrunk, its MLP as wide as gives it MHA's number of parameters.

        The embedding counts, too. Widths are multiples of 8, as the paper's are, so that numbers
        of parameters differ by half of such a step at most.
        """
        model, aim = self._shrunk(name), parameters(self._shrunk("mha"))
        each = 3 * model.embed_dim * model.num_layers
        missing = (aim - parameters(model)) / (each * _MLP_STEP)
        return dataclasses.replace(model, mlp_dim=model.mlp_dim + _MLP_STEP * round(missing))

    def experiment(self, name: str, seed: int) -> Experiment:
        """The run of a variant and seed. Raises ConfigError for an unknown preset."""
        if name not in (known := (*PRESETS, *NEIGHBOURS)):
            raise ConfigError(f"variants: unknown preset {name!r}; {closest(name, known)}")
        return Experiment(
            model=self.model(name),
            data=self.data,
            optimizer=self.optimizer,
            steps=self.steps,
            seed=seed,
            loss_chunk=self.context_length,
        )

    def _shrunk(self, name: str) -> ModelConfig:
        published = preset(name)
        attention = published.attention
        widths = {n: getattr(attention, n) for n in _WIDTHS if _is_field(attention, n)}
        for width in (*widths.values(), published.embed_dim):
            require(width % self.shrink == 0, f"shrink={self.shrink} does not divide {width}")
        attention = dataclasses.replace(
            attention, **{n: width // self.shrink for n, width in widths.items()}
        )
        return dataclasses.replace(
            published,
            attention=attention,
            embed_dim=published.embed_dim // self.shrink,
            mlp_dim=published.mlp_dim // self.shrink // _MLP_STEP * _MLP_STEP,
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            execution=Execution(dtype=self.dtype, remat=False, attention_kernel=self._attention()),
        )

    def _attention(self) -> str:
        """cuDNN's rule for mapped attention wants values as wide as keys."""
        sixteen_bits = self.dtype != "float32"
        return "cudnn_padded" if sixteen_bits and jax.default_backend() == "gpu" else "auto"

    def identity(self) -> dict[str, Any]:
        """What all results in a folder share: more variants and seeds may be added to them."""
        values = dataclasses.asdict(self)
        for name in ("variants", "reference", "seeds", "side_by_side"):
            del values[name]
        del values["data"]["cache_bytes"]
        return json.loads(json.dumps(values))

    def to_config_dict(self) -> ConfigDict:
        """For config_flags."""
        return ConfigDict(dataclasses.asdict(self), type_safe=True).lock()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Study":
        """Raises ConfigError (one line) for an unknown, missing or impossible value."""
        parts = {"data": DataSettings, "optimizer": OptimizerSettings}
        built = {
            name: build(parts[name], value, f"{name}.") if name in parts else value
            for name, value in values.items()
        }
        return build(cls, built)


def _is_field(attention: Any, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(attention)}


def parameters(model: ModelConfig) -> int:
    """How many numbers a model of this config is made of."""
    _, shapes = models.structure(model, make_mesh())
    return sum(x.size for x in jax.tree.leaves(shapes))


def changed(name: str) -> str | None:
    """The variant that a gated one or an ablation changes; None for a variant itself."""
    return next((name.removesuffix(end) for end in CHANGES if name.endswith(end)), None)
