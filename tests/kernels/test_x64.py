"""Programs that set `jax_enable_x64`: indices stay int32, results are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of each way of sharing the work among warpgroups one is lowered for Hopper, a whole step on four
# devices is, and one runs in the interpreter.
CHOSEN = "alternate or rows_of_a_batch or columns or donated or table or only_where"


def test_the_hopper_kernel_under_x64():
    pytest.importorskip(
        "mlra_jax.kernels.absorbed_decode.mosaic_gpu", reason="this jaxlib has no Mosaic GPU"
    )
    files = [str(HERE / f"test_mosaic_gpu{part}.py") for part in ("", "_interpreted")]
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
