"""Losses of fifty steps are those of plain attention in float32, however they are computed."""

import dataclasses
import functools
import itertools
import os

import numpy as np
import pytest
import tiny

from mlra_jax.training.settings import MeshSettings
from tests.training.test_step import EXPERIMENT, LENGTH, run

STEPS = 50
WAYS = {
    "everything kept": dict(remat="none", unroll=2, chunk=LENGTH),
    "blocks again": dict(remat="block", chunk=7),
    "attention kept": dict(remat="attention", chunk=10),
    "products kept": dict(remat="products", unroll=2, chunk=1),
    "plain attention, blocks again": dict(remat="block", chunk=5, attention_kernel="reference"),
}
# Every attention in every way takes minutes; a few are enough to see that one goes astray.
FEW = (("mlra_4", "attention kept"), ("mla", "blocks again"), ("gqa", "products kept"))
EVERY = tuple(itertools.product(tiny.ALL, WAYS))


@functools.cache
def losses(name, way=None):
    plain = dict(attention_kernel="reference", remat="none", unroll=1, chunk=LENGTH)
    how = dict(WAYS[way]) if way else plain
    chunk = how.pop("chunk")
    experiment = dataclasses.replace(
        EXPERIMENT,
        model=tiny.config(name, 2, context_length=LENGTH, **how),
        mesh=MeshSettings(),
        # At which rounding does not grow.
        optimizer=dataclasses.replace(EXPERIMENT.optimizer, peak_learning_rate=1e-3),
        steps=STEPS,
        loss_chunk=chunk,
    )
    return np.array([metrics["loss"] for metrics in run(experiment, STEPS)[1]])


@pytest.mark.parametrize("name, way", EVERY if os.environ.get("EVERY_TRAJECTORY") else FEW)
def test_fifty_steps_have_the_losses_of_plain_attention(name, way):
    want = losses(name)
    assert want[-1] < want[0] - 0.1, "the steps must do something"
    np.testing.assert_allclose(losses(name, way), want, rtol=1e-5)
