"""A step by formula: products, traffic of the memory, memory, exchanges of one device.

`docs/plan.md` has the formulas. Products and traffic are used for every plan; memory and exchanges
only where there is no compiler (GPUs) and to choose what is worth compiling.
"""

import dataclasses

import jax.numpy as jnp

from mlra_jax import costs
from mlra_jax.config import LatentConfig, ModelConfig
from mlra_jax.plan.program import Collective
from mlra_jax.training.settings import Experiment, MeshSettings

_BLOCK = 512
"""Of the attention kernels: half of what lies on the diagonal is computed for nothing."""
_ATTENTION_BACKWARD = 3.5
"""Products of attention's backward kernels, in those of the forward one: 7 for 2."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One step of one device."""

    model_flops: float
    """That the step is for."""
    flops: float
    """That it computes, with what it computes again."""
    traffic: float
    """Bytes to and from its memory."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    """Moments; in decoding the cache."""
    activations: int
    """Kept for the backward pass."""
    temporaries: int

    @property
    def bytes(self) -> int:
        return self.parameters + self.optimizer + self.activations + self.temporaries


class Training:
    """A training step of `experiment`, whose model has `parameters`.

    `in_loop`: the blocks run in a loop, as on TPUs, so that `remat=none` keeps what the compiler
    would rather compute again.
    """

    def __init__(self, experiment: Experiment, parameters: int, *, in_loop: bool = False):
        self.in_loop = in_loop
        model, mesh = experiment.model, experiment.mesh
        self.model, self.experiment, self.parameters = model, experiment, parameters
        self.data, self.fsdp = mesh.data, mesh.fsdp
        self.split = mesh.tensor * mesh.context
        self.devices = self.data * self.fsdp * self.split
        self.parts = experiment.data.accumulate
        self.rows = experiment.data.global_batch // (self.data * self.fsdp * self.parts)
        self.tokens = self.rows * model.context_length
        """Of one part on one device."""
        self.size = jnp.dtype(model.execution.dtype).itemsize
        remat = model.execution.remat
        self.remat = "block" if remat == "auto" else remat

    def work(self) -> Work:
        model, all_tokens = self.model, self.experiment.tokens_per_step / self.devices
        products, useful = self.parameters, costs.flops_per_token(model, self.parameters)
        attention = useful / 6 - products  # 2 of 6 are the forward pass
        blocks = -(-model.context_length // _BLOCK)
        diagonal = (blocks + 1) / blocks
        in_blocks = products - model.vocab_size * model.embed_dim
        again = {"none": 0, "products": 0}.get(self.remat, 2 * in_blocks)
        again += 2 * attention * diagonal if self.remat == "block" else 0
        computed = 6 * products + 2 * (1 + _ATTENTION_BACKWARD) * attention * diagonal + again
        return Work(useful * all_tokens, computed * all_tokens, self._traffic())

    def _traffic(self) -> float:
        """Weights written as gathered and read by each pass; gradients; activations; AdamW."""
        model, weights = self.model, self.parameters / self.split
        passes = 2 if self.remat in ("none", "products") else 3
        of_weights = self.parts * weights * (2 * passes * self.size + 2 * 4)
        layer = self._widths(elementwise=True)
        of_tokens = self.parts * self.tokens * model.num_layers * (passes + 1) * layer * self.size
        of_logits = self.parts * self.tokens * 4 * 4 * model.vocab_size / self.split
        mine = self.parameters / (self.split * self.fsdp)
        moments = 2 * self._moment_size()
        of_update = mine * (4 + 4 + 4 + 2 * moments)
        of_update += mine * 3 * 4 * self.parts if self.parts > 1 else 0
        return of_weights + of_tokens + of_logits + of_update

    def _widths(self, elementwise: bool = False) -> float:
        """Values a token and layer that products give; `elementwise`: what is read besides, too."""
        model, a, s = self.model, self.model.attention, self.split
        D, H, F = model.embed_dim, a.num_heads, model.mlp_dim
        branches = costs.branches_of(a)
        narrow = a.q_latent_dim + a.latent_dim if isinstance(a, LatentConfig) else 0
        heads = H * (a.query_dim + branches * a.value_dim)
        given = 2 * D + narrow + (heads + 2 * F) / s
        if not elementwise:
            return given
        return 2 * given + 6 * D + (F + branches * H * (a.query_dim + a.value_dim)) / s

    def _moment_size(self) -> int:
        settings = self.experiment.optimizer
        return jnp.dtype(settings.moment_dtype or self.model.param_dtype).itemsize

    def memory(self) -> Memory:
        model, mine = self.model, self.parameters / (self.split * self.fsdp)
        parameters = mine * jnp.dtype(model.param_dtype).itemsize
        moments = 2 * mine * self._moment_size()
        gradients = 4 * mine * (2 if self.parts > 1 else 1)
        head = model.vocab_size * model.embed_dim / self.split
        chunk = self.rows * min(self.experiment.loss_chunk, model.context_length)
        logits = 2 * 4 * chunk * model.vocab_size / self.split + (4 + self.size) * head
        within = 2 * self._widths(elementwise=True) * self.tokens * self.size
        backward = max(logits, within + 2 * self.parameters / self.split / model.num_layers * 4)
        return Memory(round(parameters), round(moments), self.kept(), round(gradients + backward))

    def kept(self) -> int:
        """Bytes of what the backward pass finds kept of the blocks and of the last one."""
        a, D = self.model.attention, self.model.embed_dim
        branches = costs.branches_of(a)
        answered = branches * a.num_heads * (a.value_dim * self.size + 4 / self.split) / self.split
        width = {
            "block": D * self.size,
            "offload": 0,
            "attention": D * self.size + answered,
            "products": (D + self._widths()) * self.size,
            "none": self._everything() * self.size,
        }[self.remat]
        weights = self.size * self._in_blocks() if self._keeps_gathered() else 0
        return round(self.tokens * (self.model.num_layers * width + D * self.size) + weights)

    def _in_blocks(self) -> float:
        """Parameters of the blocks that a device has when it has gathered them."""
        return (self.parameters - self.model.vocab_size * self.model.embed_dim) / self.split

    def _keeps_gathered(self) -> bool:
        return self.remat == "none" and not self.in_loop and self.fsdp > 1

    def _everything(self) -> float:
        """Values that `none` keeps of a token and layer; both factors are measured."""
        if self.in_loop:
            return 1.2 * self._widths(elementwise=True)
        return 3 * self.model.embed_dim + self._widths() + self.model.mlp_dim / self.split

    def collectives(self, slices: int = 1) -> list[Collective]:
        """The exchanges that cannot be avoided, over all links of a device."""
        found, weights = [], self.parameters / self.split
        ring = lambda n: (n - 1) / n
        data_slices = slices if self.data % slices == 0 else 1
        fsdp_slices = slices // data_slices
        inner = self.fsdp // fsdp_slices

        def add(kind, axes, count, size, links=2):
            if size:
                found.append(Collective(kind, axes, links, count, round(size)))

        # The table of token vectors for the look-up and for the head, the others for each pass.
        again = 0 if self._keeps_gathered() else self._in_blocks()
        gathered = self.parts * self.size * (2 * weights - self._in_blocks() + again)
        summed = self.parts * 4 * weights
        layers = self.parts * self.model.num_layers
        add("all-gather", ("fsdp",), 2 * layers, gathered * ring(inner))
        add("reduce-scatter", ("fsdp",), layers, summed * ring(inner))
        add("all-gather", ("slices",), layers, gathered / inner * ring(fsdp_slices), 0)
        add("reduce-scatter", ("slices",), layers, summed / inner * ring(fsdp_slices), 0)
        mine = 2 * self.parts * 4 * weights / self.fsdp
        add("all-reduce", ("data",), layers, mine * ring(self.data // data_slices))
        add("all-reduce", ("slices",), layers, mine * ring(data_slices), 0)
        streams = 8 if self.remat in ("block", "attention", "offload") else 6
        stream = self.tokens * self.model.embed_dim * self.size
        sent = 2 * streams * layers * stream * ring(self.split)
        # Neighbours in a row, which seldom go around.
        add("all-reduce", ("tensor",), streams * layers, sent, 1)
        a = self.model.attention
        if isinstance(a, LatentConfig):
            queries = 4 * self.tokens * a.num_heads * a.query_dim * self.size
            add("all-gather", ("tensor",), 4 * layers, layers * queries * ring(self.split), 1)
        return found


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A decoding step of `rows` over all devices, `positions` of each cached."""

    rows: int
    positions: int

    def plan(
        self, config: ModelConfig, mesh: MeshSettings, parameters: int
    ) -> tuple[Work, Memory, list[Collective]]:
        """By the bytes of weights and cache; the memory has nothing of what works beside them."""
        rows, ways = self.rows // (mesh.data * mesh.fsdp), mesh.tensor * mesh.context
        size = jnp.dtype(config.execution.dtype).itemsize
        weights = parameters * size // ways
        held = costs.cache_bytes_per_device(
            config, batch=rows, capacity=self.positions, tensor=mesh.tensor, context=mesh.context
        )
        a, layers = config.attention, config.num_layers
        branches, widths = 1, a.query_dim + a.value_dim
        if isinstance(a, LatentConfig):  # Queries and answers are as wide as a latent.
            branches, widths = a.branches, 2 * a.latent_head_dim + a.rope_dim
        scores = 2 * branches * a.num_heads * widths * self.positions * layers
        flops = rows * (2 * parameters + scores) / ways
        found = []
        if ways > 1:
            sent = 2 * layers * 2 * rows * config.embed_dim * size * (ways - 1) / ways
            found.append(Collective("all-reduce", ("tensor",), 2, 2 * layers, round(sent)))
        if mesh.context > 1:
            merged = rows * branches * a.num_heads * widths * 4 / mesh.tensor
            sent = layers * merged * (mesh.context - 1) / mesh.context
            found.append(Collective("all-gather", ("context",), 2, 2 * layers, round(sent)))
        return Work(flops, flops, weights + held), Memory(weights, held, 0, 0), found
