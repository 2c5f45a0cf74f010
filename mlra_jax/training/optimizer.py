"""The paper's optimizer: clipping, AdamW on every parameter, warm-up and cosine."""

import jax
import jax.numpy as jnp
import optax

from mlra_jax.training.settings import OptimizerSettings


def make_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate of update number 0, 1, ...: linear from 0 to the peak over `warmup_steps`,
    then a cosine to `final_fraction` of the peak, which is that of the last of `steps` updates."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.peak_learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=max(steps - 1, settings.warmup_steps + 1),
        end_value=settings.final_fraction * settings.peak_learning_rate,
    )


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping to `clip_norm`, unless that is 0, then AdamW with decoupled weight decay on every
    parameter. The state has the same structure with and without clipping."""
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    adamw = optax.adamw(
        make_schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    return optax.chain(clip, _kept_in(settings.moment_dtype, adamw))


def _kept_in(dtype: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, its state kept in `dtype` between steps that compute in float32."""
    if not dtype:
        return optimizer

    def cast(state, dtype):
        floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, state)

    def update(gradients, state, params=None):
        updates, state = optimizer.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)
