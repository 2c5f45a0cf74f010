"""What JAX's interpreter of Mosaic GPU lacks for kernels that multiply into accumulators."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Accumulator:
    """An accumulator with a start value, which the interpreter does not have."""

    def __init__(self, value: jax.Array):
        self.value, self.shape = value, value.shape

    def __getitem__(self, index):
        return self.value[index]

    def __setitem__(self, index, value):
        assert index is Ellipsis
        self.value = value


def run_state(products):
    def run(refs):
        leaf = lambda kind: dict(is_leaf=lambda x: isinstance(x, kind))
        accumulators = jax.tree.map(lambda ref: Accumulator(ref._init), refs, **leaf(plgpu.ACC))
        products(accumulators)
        return jax.tree.map(lambda acc: acc.value, accumulators, **leaf(Accumulator))

    return run


def run_scoped(products, *refs):
    return products(*(Accumulator(jnp.zeros(ref.shape, ref.dtype)) for ref in refs))


def wgmma(acc, a, b, product=plgpu.wgmma, run_scoped=pl.run_scoped):
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

        acc.value += run_scoped(from_zero, plgpu.ACC(acc.shape, jnp.float32))


def stand_in(monkeypatch):
    """Puts all of it in place, or skips the test where the interpreter is too old."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of JAX before 0.12 wants all barriers waited for")
    monkeypatch.setattr(pl, "run_state", run_state)
    monkeypatch.setattr(pl, "run_scoped", run_scoped)
    load = lambda accumulator, wait_n: accumulator.value
    monkeypatch.setattr(plgpu, "wgmma_accumulator_load", load)
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
