"""One training step: loss, gradients (in parts if asked), AdamW."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.layers import einsum, gradient_parts
from mlra_jax.model import TABLE, Model, logits
from mlra_jax.training.optimizer import make_optimizer, make_schedule
from mlra_jax.training.settings import Experiment
from mlra_jax.training.state import TrainState, abstract_state


def loss_sum(
    model: Model,
    batch: Mapping[str, jax.Array],
    chunk: int,
    whole: dict[Any, jax.Array] | None = None,
) -> jax.Array:
    """Cross-entropy in nats, summed over all tokens of `batch`, float32 scalar.

    The logits of `chunk` positions exist at a time, and once: where a gradient is asked for, it is
    computed beside the loss. A last, shorter chunk takes what is left.

    Args:
      model: whose output head is the table of its token vectors.
      batch: `inputs` and `targets`, int32 [B, T]; if it has `weights`, float32 [B, T], each
        token's loss is multiplied by its own.
      chunk: positions per chunk.
      whole: of `Model.whole`, for several batches with the same weights.
    """
    x_BTD = model.hidden(batch["inputs"], whole=whole)
    known = batch["targets"], batch.get("weights")
    table_VD, where = model.embed.embedding[...], (model.mesh, TABLE, sharding.BATCH)
    table_VD = sharding.gathered(table_VD, *where, x_BTD.dtype.name, (whole or {}).get(TABLE))
    return _sum_of_chunks(model.mesh, chunk, x_BTD, table_VD, known)


def _losses(logits_BTV, targets_BT, weights_BT):
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return losses_BT.sum() if weights_BT is None else (losses_BT * weights_BT).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_chunks(mesh, chunk, x_BTD, table_VD, known):
    narrow_VD = table_VD.astype(x_BTD.dtype)
    add = lambda total, x, *known: (total + _losses(logits(x, narrow_VD, mesh), *known), None)
    return _over_chunks(add, chunk, jnp.zeros((), jnp.float32), (x_BTD, *known))[0]


def _sum_and_gradients(mesh, chunk, x_BTD, table_VD, known):
    """The sum, and its gradients of `x_BTD` and, added up in float32, of the table.

    Devices that split the batch add up their own shares of the latter, and exchange them once.
    """
    narrow_VD, shares = table_VD.astype(x_BTD.dtype), sharding.size(mesh, sharding.BATCH)
    D, parts, in_turn = table_VD.shape[1], gradient_parts(mesh, TABLE), sharding.copies(mesh, TABLE)
    cut, arrays = (parts, D // parts) if parts > 1 else (D,), 1
    if in_turn:
        arrays = sharding.size(mesh, sharding.FSDP)
        cut = (D // arrays,)

    def apart(x, axis):
        x = x.reshape(shares, -1, *x.shape[1:])
        return sharding.constrain(x, mesh, "batch", None, "length", axis)

    def add(sums, x, *known):
        total, slope = jax.value_and_grad(_losses)(logits(x, narrow_VD, mesh), *known)
        slope = slope.astype(x.dtype)
        x_slope = einsum("btv,vd->btd", slope, narrow_VD)
        features = sharding.parts_in_turn(x, mesh, "batch", "length") if in_turn else [x]
        features = [apart(x, None).reshape(shares, -1, x.shape[1], *cut) for x in features]
        slope = apart(slope, "vocab")
        of_table = [einsum("sbtv,sbt...->sv...", slope, x, jnp.float32) for x in features]
        return jax.tree.map(jnp.add, sums, (total, of_table)), x_slope

    none = jnp.zeros((shares, len(table_VD), *cut), jnp.float32)
    none = [sharding.constrain(none, mesh, "batch", "vocab")] * arrays
    sums = jnp.zeros((), jnp.float32), none
    (total, slopes), x_slope = _over_chunks(add, chunk, sums, (x_BTD, *known))
    slope = _summed_over_shares(mesh, slopes)
    return total, (x_slope, slope.astype(table_VD.dtype))


def _summed_over_shares(mesh, slopes):
    """The table's gradient, of which `[shares, V, ...]` are devices' own shares.

    There is one array; where engines copy, one for each part, in turn: what is sent first is not
    cut out of a whole gradient, but sent at once, and received while blocks' gradients are made.
    """
    if not sharding.copies(mesh, TABLE):
        (slope,) = slopes
        return sharding.constrain(slope.sum(0).reshape(slope.shape[1], -1), mesh, *TABLE)
    where = [sharding.spec("batch", "vocab")] * len(slopes)
    own = lambda turn, _, *parts_1Vd: parts_1Vd[turn][0]
    return sharding.summed_in_turn(own, mesh, TABLE, slopes, where)


def _scaled(mesh, chunk, gradients, slope):
    scale = lambda x: (x.astype(jnp.float32) * slope).astype(x.dtype)
    return *jax.tree.map(scale, gradients), None


_sum_of_chunks.defvjp(_sum_and_gradients, _scaled)


def _over_chunks(step, chunk: int, carry, arrays):
    """As `jax.lax.scan` of `step(carry, *arrays)`, over chunks of the T of `[B, T, ...]`."""
    B, T = arrays[0].shape[:2]
    whole = T // chunk

    def cut(array):
        array = array[:, : whole * chunk]
        return jnp.moveaxis(array.reshape(B, whole, chunk, *array.shape[2:]), 1, 0)

    carry, made = jax.lax.scan(lambda c, a: step(c, *a), carry, jax.tree.map(cut, arrays))
    made = jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(B, -1, *y.shape[3:]), made)
    if whole * chunk < T:
        carry, last = step(carry, *jax.tree.map(lambda array: array[:, whole * chunk :], arrays))
        made = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), made, last)
    return carry, made


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a step's `inputs` and `targets`, int32 [B, T]."""
    shape = (experiment.data.global_batch, experiment.model.context_length)
    where = sharding.named(mesh, "batch", "length")
    struct = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    return {"inputs": struct, "targets": struct}


def make_train_step(experiment: Experiment, mesh: Mesh):
    """The jitted `train_step`; the state is donated.

    To compile it for devices that do not exist here, lower it with `abstract_state` and
    `abstract_batch` of a mesh of described devices.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment, mesh))
    return jax.jit(
        train_step(experiment, mesh),
        donate_argnums=0,
        out_shardings=(shardings, sharding.named(mesh)),
    )


def train_step(experiment: Experiment, mesh: Mesh):
    """The function `(state, batch) -> (state, metrics)` of one step.

    `metrics` has float32 scalars: `loss` (nats per token, before the update), `gradient_norm`
    (before clipping) and `learning_rate`. A step whose loss or gradient norm is not finite changes
    neither weights nor moments; only counters go on.
    """
    definition, _ = models.structure(experiment.model, mesh)
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    schedule = make_schedule(experiment.optimizer, experiment.steps)
    parts = experiment.data.accumulate
    chunk = min(experiment.loss_chunk, experiment.model.context_length)

    def loss_of(params, batch, whole=None):
        total = loss_sum(nnx.merge(definition, params), batch, chunk, whole)
        return total / batch["targets"].size

    def accumulated(params, batch):
        def cut(array_BT):
            # Rows b, b + parts, ... make a part, so that every device keeps the rows it has.
            rows = array_BT.reshape(-1, parts, array_BT.shape[1])
            return sharding.constrain(jnp.swapaxes(rows, 0, 1), mesh, None, "batch", "length")

        whole = nnx.merge(definition, params).whole()

        # In float32 whatever the parameters are: sums of many parts would lose what each adds.
        def add(sums, part):
            added = jax.value_and_grad(loss_of)(params, part, whole)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, added), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        sums = (jnp.zeros((), jnp.float32), zeros)
        (loss, gradients), _ = jax.lax.scan(add, sums, jax.tree.map(cut, batch))
        mean = jax.tree.map(lambda total, p: (total / parts).astype(p.dtype), gradients, params)
        return loss / parts, mean

    def step(state: TrainState, batch):
        compute = jax.value_and_grad(loss_of) if parts == 1 else accumulated
        loss, gradients = compute(state.params, batch)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            counter = lambda x: jnp.issubdtype(x.dtype, jnp.integer)
            params, moments = jax.tree.map(
                lambda new, old: new if counter(new) else jnp.where(finite, new, old),
                (params, moments),
                (state.params, state.optimizer),
            )
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(step=state.step + 1, params=params, optimizer=moments), metrics

    return step


def make_validation_step(experiment: Experiment, mesh: Mesh):
    """The jitted `validation_step`."""
    return jax.jit(validation_step(experiment, mesh), out_shardings=sharding.named(mesh))


def validation_step(experiment: Experiment, mesh: Mesh):
    """The function `(params, batch) -> (sum of losses, sum of weights)`, float32 scalars."""
    definition, _ = models.structure(experiment.model, mesh)
    chunk = min(experiment.loss_chunk, experiment.model.context_length)

    def losses(params, batch):
        total = loss_sum(nnx.merge(definition, params), batch, chunk)
        return total, batch["weights"].sum()

    return losses
