"""The optimizer is AdamW written out in NumPy, over many steps; the schedule at its exact ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.training.optimizer import make_optimizer, make_schedule
from mlra_jax.training.settings import OptimizerSettings

# No two numbers alike and none without effect: eps is as large as a gradient, the betas are far
# from each other and from 1.
SETTINGS = OptimizerSettings(
    peak_learning_rate=0.02,
    warmup_steps=3,
    final_fraction=0.25,
    b1=0.8,
    b2=0.6,
    eps=1e-2,
    weight_decay=0.3,
    clip_norm=1.5,
)
STEPS = 8


def rate(settings, steps, step):
    """The learning rate of update `step`, in float64."""
    peak, warmup = settings.peak_learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    floor = settings.final_fraction
    return peak * (floor + (1 - floor) * (1 + np.cos(np.pi * done)) / 2)


def adamw(settings, steps, params, gradients):
    """The parameters after each of the updates; `gradients` has a list of arrays for each."""
    params = [np.asarray(p, np.float64) for p in params]
    first = [np.zeros_like(p) for p in params]
    second = [np.zeros_like(p) for p in params]
    history = []
    for step, arrays in enumerate(gradients):
        norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in arrays))
        factor = min(1.0, settings.clip_norm / norm)
        for i, g in enumerate(arrays):
            g = g.astype(np.float64) * factor
            first[i] = settings.b1 * first[i] + (1 - settings.b1) * g
            second[i] = settings.b2 * second[i] + (1 - settings.b2) * g * g
            mean = first[i] / (1 - settings.b1 ** (step + 1))
            square = second[i] / (1 - settings.b2 ** (step + 1))
            direction = mean / (np.sqrt(square) + settings.eps)
            direction += settings.weight_decay * params[i]
            params[i] = params[i] - rate(settings, steps, step) * direction
        history.append([p.copy() for p in params])
    return history


def test_updates_against_numpy_with_gradients_of_changing_size():
    """A matrix and a vector; norms far below, just below, just above and far above the bound."""
    generator = np.random.default_rng(0)
    draw = lambda: [generator.standard_normal(s).astype(np.float32) for s in ((5, 3), (4,))]
    params, gradients = draw(), []
    for norm in (0.2, 30.0, 1.49, 1.51, 0.05, 4.0, 2.0, 0.5, 3.0, 0.3):
        arrays = draw()
        size = np.sqrt(sum(np.square(a).sum() for a in arrays))
        gradients.append([a * np.float32(norm / size) for a in arrays])
    optimizer = make_optimizer(SETTINGS, STEPS)
    update = jax.jit(optimizer.update)
    got, moments = [jnp.asarray(p) for p in params], optimizer.init(params)
    expected = adamw(SETTINGS, STEPS, params, gradients)
    for step, arrays in enumerate(gradients):
        updates, moments = update(arrays, moments, got)
        got = [p + u for p, u in zip(got, updates, strict=True)]
        for a, b in zip(got, expected[step], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=f"update {step}")
    # The last two updates are beyond the last step, where the rate stays what it was.
    assert len(gradients) == STEPS + 2


def test_a_gradient_is_clipped_as_a_whole_not_by_tensor_or_element():
    """Clipping keeps the direction: moments of a clipped gradient are those of it made shorter."""
    optimizer = make_optimizer(SETTINGS, STEPS)
    gradient = [np.float32([[3, 0.1], [0.2, 0]]), np.float32([4, 0, 0])]
    _, moments = optimizer.update(gradient, optimizer.init(gradient), gradient)
    factor = 1.5 / np.sqrt(sum(np.square(g).sum() for g in gradient))
    mean, square = (
        [np.asarray(leaf) for leaf in jax.tree.leaves(moments) if leaf.ndim][i : i + 2]
        for i in (0, 2)
    )
    for g, m, s in zip(gradient, mean, square, strict=True):
        np.testing.assert_allclose(m, 0.2 * factor * g, rtol=1e-5)
        np.testing.assert_allclose(s, 0.4 * (factor * g) ** 2, rtol=1e-5)


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_a_bound_of_0_clips_nothing(zero):
    """The moments are those of the whole gradient, with a state of the structure of a clipped."""
    unclipped = make_optimizer(dataclasses.replace(SETTINGS, clip_norm=zero), STEPS)
    gradient = [np.float32([[300, 0.1], [0.2, 0]]), np.float32([4, 0, 0])]
    start = unclipped.init(gradient)
    assert jax.tree.structure(start) == jax.tree.structure(
        make_optimizer(SETTINGS, STEPS).init(gradient)
    )
    _, moments = unclipped.update(gradient, start, gradient)
    mean = [leaf for leaf in jax.tree.leaves(moments) if leaf.ndim][:2]
    for g, m in zip(gradient, mean, strict=True):
        np.testing.assert_allclose(m, 0.2 * g, rtol=1e-5)


def test_the_first_update_moves_nothing_and_weights_decay_without_gradients():
    """Rate 0 at update 0. Later, weights without a gradient shrink by rate * decay, no more."""
    optimizer = make_optimizer(SETTINGS, STEPS)
    params, nothing = np.float32([2.0, -4.0]), np.zeros(2, np.float32)
    moments = optimizer.init(params)
    updates, moments = optimizer.update(nothing, moments, params)
    np.testing.assert_array_equal(updates, nothing)
    updates, _ = optimizer.update(nothing, moments, params)
    np.testing.assert_allclose(updates, -0.02 / 3 * 0.3 * params, rtol=1e-6)


@pytest.mark.parametrize("warmup, final", [(0, 0.1), (1, 0.0), (3, 0.25), (7, 1.0)])
def test_schedule_at_its_ends(warmup, final):
    settings = dataclasses.replace(SETTINGS, warmup_steps=warmup, final_fraction=final)
    schedule = make_schedule(settings, STEPS)
    for step in range(STEPS + 3):
        want = rate(settings, STEPS, step)
        np.testing.assert_allclose(schedule(step), want, rtol=1e-6, atol=1e-9, err_msg=str(step))
    peak = settings.peak_learning_rate
    assert schedule(0) == (0 if warmup else np.float32(peak))
    assert np.float32(schedule(warmup)) == np.float32(peak)
    last = max(STEPS - 1, warmup + 1)
    for after in (last, STEPS, STEPS + 1, 1000):
        np.testing.assert_allclose(schedule(after), final * peak, rtol=1e-6, atol=1e-10)


def test_moments_may_be_kept_narrower_than_the_parameters():
    """Both are rounded between steps and nowhere else."""
    generator = np.random.default_rng(3)
    draw = lambda: jnp.asarray(generator.standard_normal((40, 30)), jnp.float32)
    params, first, second = draw(), draw(), draw()
    wide = make_optimizer(SETTINGS, STEPS)
    narrow = make_optimizer(dataclasses.replace(SETTINGS, moment_dtype="bfloat16"), STEPS)
    kept = narrow.init(params)
    assert {x.dtype.name for x in jax.tree.leaves(kept) if x.ndim} == {"bfloat16"}
    _, kept = narrow.update(first, kept, params)
    wanted, moments = wide.update(first, wide.init(params), params)
    round_trip = lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim else x
    wanted, moments = wide.update(second, jax.tree.map(round_trip, moments), params)
    got, kept = narrow.update(second, kept, params)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(moments), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), round_trip(b).astype(jnp.float32))
