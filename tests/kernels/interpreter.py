"""What JAX's interpreter of Mosaic GPU lacks for kernels that multiply into accumulators."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Accumulator:
    """An accumulator: the interpreter knows no start values and no left side in registers."""

    def __init__(self, start: jax.Array):
        self.value, self.shape = start, start.shape

    def __getitem__(self, _):
        return self.value

    def __setitem__(self, _, value):
        self.value = value

    @property
    def at(self):
        return Parts(self)


class Parts:
    """`acc.at[part]`, which a product adds to as to an accumulator."""

    def __init__(self, whole: Accumulator, part=None):
        self.whole, self.part = whole, part

    def __getitem__(self, part):
        return Parts(self.whole, part)

    @property
    def value(self):
        return self.whole.value[self.part]

    @value.setter
    def value(self, value):
        self.whole.value = self.whole.value.at[self.part].set(value)

    @property
    def shape(self):
        return self.value.shape


def run_state(products):
    def run(refs):
        leaf = lambda kind: dict(is_leaf=lambda x: isinstance(x, kind))
        start = lambda ref: Accumulator(ref._init)
        accumulators = jax.tree.map(start, refs, **leaf(plgpu.ACC))
        products(accumulators)
        return jax.tree.map(lambda acc: acc.value, accumulators, **leaf(Accumulator))

    return run


def run_scoped(products, *kinds, run=pl.run_scoped, **how):
    if not all(isinstance(kind, plgpu.ACC) for kind in kinds):
        return run(products, *kinds, **how)
    return products(*(Accumulator(jnp.zeros(kind.shape, jnp.float32)) for kind in kinds))


def wgmma(acc, a, b, product=plgpu.wgmma, run=pl.run_scoped):
    if not isinstance(acc, Accumulator | Parts):
        product(acc, a, b)
    elif isinstance(a, jax.Array):
        acc.value += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        # A product reads as copies write; a load needs a fence between itself and the next copy.
        plgpu.commit_smem()
    else:

        def from_zero(ref):
            product(ref, a, b)
            return ref[...]

        acc.value += run(from_zero, plgpu.ACC(acc.shape, jnp.float32))


def stand_in(monkeypatch):
    """Puts all of it in place, or skips the test where the interpreter is too old."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of JAX before 0.12 wants all barriers waited for")
    monkeypatch.setattr(pl, "run_state", run_state)
    monkeypatch.setattr(pl, "run_scoped", run_scoped)
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
    monkeypatch.setattr(plgpu, "wgmma_accumulator_load", lambda acc, wait_n: acc.value)
