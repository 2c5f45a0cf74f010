"""The paper's optimizer: clipping, AdamW on every parameter, warm-up and cosine."""

import optax

from mlra_jax.training.settings import OptimizerSettings


def make_schedule(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Learning rate of update number 0, 1, ...: linear from 0 to the peak over `warmup_steps`,
    then a cosine to `final_fraction` of the peak at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.peak_learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=steps,
        end_value=settings.final_fraction * settings.peak_learning_rate,
    )


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Clipping to `clip_norm`, unless that is 0, then AdamW with decoupled weight decay on every
    parameter. The state has the same structure with and without clipping."""
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(
            make_schedule(settings, steps),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
    )
