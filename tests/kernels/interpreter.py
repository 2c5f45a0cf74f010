"""What JAX's interpreter of Mosaic GPU lacks for kernels that multiply into accumulators."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Accumulator:
    """An accumulator with a start value, which the interpreter does not have (`pl.run_state`)."""

    def __init__(self, ref: plgpu.ACC):
        self.value, self.shape = ref._init, ref.shape


def run_state(products):
    def run(refs):
        leaf = lambda kind: dict(is_leaf=lambda x: isinstance(x, kind))
        accumulators = jax.tree.map(Accumulator, refs, **leaf(plgpu.ACC))
        products(accumulators)
        return jax.tree.map(lambda acc: acc.value, accumulators, **leaf(Accumulator))

    return run


def wgmma(acc, a, b, product=plgpu.wgmma):
    if not isinstance(acc, Accumulator):
        product(acc, a, b)
    elif isinstance(a, jax.Array):
        # The interpreter has no product whose left side is in registers.
        acc.value += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        # A product reads as copies write; a load needs a fence between itself and the next copy.
        plgpu.commit_smem()
    else:

        def from_zero(ref):
            product(ref, a, b)
            return ref[...]

        acc.value += pl.run_scoped(from_zero, plgpu.ACC(acc.shape, jnp.float32))


def stand_in(monkeypatch):
    """Puts all of it in place, or skips the test where the interpreter is too old."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of JAX before 0.12 wants all barriers waited for")
    monkeypatch.setattr(pl, "run_state", run_state)
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
