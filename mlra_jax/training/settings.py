"""Everything an experiment may set, with the paper's recipe as the default.

A file in `configs/` builds an `Experiment` and hands its `to_config_dict()` to the command line,
which may override any key; `Experiment.from_dict` checks what comes back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mlra_jax.config import ModelConfig
from mlra_jax.data.pipeline import ORDERS
from mlra_jax.data.token_file import FORMATS
from mlra_jax.execution import dtype_name
from mlra_jax.settings_tree import among, at_least, build, check_kinds, require, within


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How many devices lie along each axis of the mesh; whole numbers from 1 on."""

    data: int = 1
    """Devices that split the batch."""
    fsdp: int = 1
    """Devices that split the batch, and weights and moments."""
    tensor: int = 1
    """Devices that split latent heads, heads, MLP and vocabulary."""
    context: int = 1
    """As `tensor`, beyond the number of latent heads."""

    def __post_init__(self):
        at_least(1, self, "mesh.", "data", "fsdp", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where the tokens come from and how many of them make a step."""

    source: str = ""
    """Text files, folders of them, `.bin` token files, patterns, or `pydoc` for the language
    reference inside every CPython; several with commas between (`mlra_jax.data.sources`)."""
    validation: str = ""
    """The same for validation; empty takes the source's own validation files or holds out
    `validation_fraction` of its end."""
    validation_fraction: float = 0.05
    """In (0, 1); the part of a source without validation files that is held out."""
    validation_tokens: int = 10_485_760
    """Validate on this many tokens at most."""
    tokenizer: str = ""
    """`bytes`, `gpt2` or a ranks file (`mlra_jax.data.tokenizers`); empty: what token files were
    prepared with, `gpt2` if nothing says."""
    token_format: str = "header"
    """Of token files: `header`, or `uint16` or `uint32` where they have none, as nanoGPT's."""
    global_batch: int = 480
    """Sequences of `model.context_length` tokens in one step, over all devices."""
    accumulate: int = 1
    """Parts in which a step's batch is computed, one after the other, to save memory."""
    cache_bytes: int = 1 << 30
    """Of token files in a bucket: how much of them each process keeps in memory."""
    order: str = "shuffled"
    """Of the windows: `shuffled`, anew each epoch, or `sequential`, as they stand in the files."""

    def __post_init__(self):
        at_least(1, self, "data.", "global_batch", "accumulate", "validation_tokens", "cache_bytes")
        check_kinds(self, "data.")
        require(bool(self.source), "data.source is empty; give a text file, a folder or .bin files")
        among(ORDERS, self, "order", "data.")
        among(FORMATS, self, "token_format", "data.")
        within(self, "data.", validation_fraction="(0, 1)")

    @property
    def part_batch(self) -> int:
        """Sequences that are computed together."""
        return self.global_batch // self.accumulate


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, linear warm-up, cosine decay that ends at the last step; the paper's values."""

    peak_learning_rate: float = 1.6e-4
    """In [0, inf); of the update after the warm-up. 0 changes no weight."""
    warmup_steps: int = 2000
    """From 0 on; updates over which the rate rises from 0, fewer than `steps`."""
    final_fraction: float = 0.1
    """In [0, inf); the learning rate of the last step, as a part of the peak."""
    b1: float = 0.9
    """In [0, 1); decay of the gradients' mean."""
    b2: float = 0.95
    """In [0, 1); decay of the squared gradients' mean."""
    eps: float = 1e-8
    """In (0, inf); added to the root of that mean."""
    weight_decay: float = 0.1
    """In [0, inf); on every parameter."""
    clip_norm: float = 1.0
    """In [0, inf); largest norm of all gradients together, in (0, inf), or 0: nothing is
    clipped."""
    moment_dtype: str = ""
    """In which both means are kept between steps, which compute in float32; empty: all in the dtype
    of the parameters."""

    def __post_init__(self):
        at_least(0, self, "optimizer.", "warmup_steps")
        within(
            self,
            "optimizer.",
            peak_learning_rate="[0, inf)",
            final_fraction="[0, inf)",
            b1="[0, 1)",
            b2="[0, 1)",
            eps="(0, inf)",
            weight_decay="[0, inf)",
        )
        if self.moment_dtype:
            name = dtype_name(self.moment_dtype, "optimizer.moment_dtype")
            object.__setattr__(self, "moment_dtype", name)
        at_least(0, self, "optimizer.", "clip_norm")
        if self.clip_norm:
            within(self, "optimizer.", clip_norm="(0, inf)")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training run. Whole numbers are from 1 on where nothing else is said."""

    model: ModelConfig
    data: DataSettings
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    steps: int = 100_000
    """In [1, 2**31); updates, counted in int32."""
    seed: int = 0
    """In [0, 2**32); of the weights and of the order of the data."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    validate_every: int = 1000
    """Steps between two validations."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    save_minutes: float = 0.0
    """In [0, inf); minutes after which a checkpoint is due besides, saved with the next line of
    metrics. 0 is never."""
    keep: int = 2
    """Checkpoints that stay; older ones are deleted."""
    keep_every: int = 0
    """From 0 on; a checkpoint is saved at every multiple of so many steps, too, and stays. 0 is
    none."""
    skip_budget: int = 10
    """From 0 on; how often in the whole run a step may be skipped because its loss or gradients are
    not finite. One more ends the run."""
    loss_chunk: int = 512
    """Positions whose logits exist at a time: all of them would be `B * T * V` float32."""
    virtual_cpu_devices: int = 0
    """From 0 on; if not 0, train on this many virtual devices of the CPU."""
    validate_first: bool = False
    """Validate before the first step, too."""
    keep_best: bool = False
    """Keep the weights of the lowest validation loss besides, a checkpoint in `workdir/best`."""
    init_from: str = ""
    """Folder of a run or of a converted checkpoint: a new run takes its weights, and nothing
    else, from there. A run that goes on does not look at it."""
    xla_options: str = ""
    """For the compiler of the step, over what the program sets, as `NAME=VALUE NAME=VALUE`; a line
    at the start says what is in force."""

    def __post_init__(self):
        at_least(
            1, self, "", "steps", "log_every", "validate_every", "save_every", "keep", "loss_chunk"
        )
        at_least(0, self, "", "seed", "virtual_cpu_devices")
        at_least(0, self, "", "save_minutes", "keep_every", "skip_budget")
        check_kinds(self, "")
        for item in self.xla_options.split():
            require(
                item.startswith("xla_") and "=" in item,
                f"xla_options has {item!r}, which is no NAME=VALUE with a NAME of XLA's",
            )
        require(self.steps < 2**31, f"steps={self.steps} must lie in [1, 2**31)")
        require(self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32)")
        require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below "
            f"steps={self.steps}",
        )
        ways = self.mesh.data * self.mesh.fsdp * self.data.accumulate
        require(
            self.data.global_batch % ways == 0,
            f"data.global_batch={self.data.global_batch} does not divide over "
            f"mesh.data={self.mesh.data} x mesh.fsdp={self.mesh.fsdp} x "
            f"data.accumulate={self.data.accumulate}; choose a multiple of {ways}",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.data.global_batch * self.model.context_length

    def to_config_dict(self) -> ConfigDict:
        """For config_flags: every value can be overridden on the command line, none added."""
        return ConfigDict(
            dataclasses.asdict(self) | {"model": self.model.to_dict()}, type_safe=True
        ).lock()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Experiment":
        """Raises ConfigError (one line) for an unknown, missing or impossible value."""
        parts = {"data": DataSettings, "mesh": MeshSettings, "optimizer": OptimizerSettings}
        built = {
            name: build(parts[name], value, f"{name}.") if name in parts else value
            for name, value in values.items()
        }
        if "model" in values:
            built["model"] = ModelConfig.from_dict(values["model"])
        return build(cls, built)
