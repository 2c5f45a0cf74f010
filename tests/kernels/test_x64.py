"""Programs that set `jax_enable_x64`: indices stay int32, results are the same."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mlra_jax.kernels import target
from mlra_jax.kernels.causal_attention import api

HERE = Path(__file__).parent
# Of each way of sharing the work among warpgroups one is lowered for Hopper, a whole step on four
# devices is, and the TPU kernel runs in the interpreter.
CHOSEN = "alternate or rows_of_a_batch or columns or donated or table or edges"


def test_the_kernels_under_x64():
    pytest.importorskip(
        "mlra_jax.kernels.absorbed_decode.mosaic_gpu", reason="this jaxlib has no Mosaic GPU"
    )
    names = ("test_mosaic_gpu.py", "test_mosaic_tpu.py")
    files = [str(HERE / name) for name in names]
    flags = ["-x", "-n", "0", "-p", "no:cacheprovider", "-k", CHOSEN]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *flags, *files],
        cwd=HERE.parents[1],
        env=os.environ | {"JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_a_kernel_sees_int32_and_its_arguments_otherwise_as_they_are():
    @target.int32_indices
    def kernel(*arrays, scale):
        assert scale == 2
        return [(x.dtype.name, (x + 1).dtype.name) for x in (*arrays, jnp.arange(3))]

    with jax.enable_x64(True):
        arrays = jnp.arange(3), jnp.ones(2, jnp.float32), jnp.ones(2, jnp.bfloat16)
        assert arrays[0].dtype == jnp.int64
        found = kernel(*arrays, scale=2)
        assert jnp.arange(3).dtype == jnp.int64, "the program's own setting is back"
    assert found == [(name, name) for name in ("int32", "float32", "bfloat16", "int32")]


def test_splash_attention_is_not_chosen_under_x64():
    tpu = type("Device", (), {"platform": "tpu"})
    x = jax.ShapeDtypeStruct((1, 128, 2, 192), jnp.bfloat16)
    assert api.implementation_for(tpu, x, x, x) == "splash"
    with jax.enable_x64(True):
        assert api.implementation_for(tpu, x, x, x) == "reference"
