"""Every released variant, converted and loaded, gives the authors' logits."""

import numpy as np
import pytest
from flax import nnx

import mlra_jax

from .files import FOLDERS, RELEASED

FORWARD = nnx.jit(lambda model, tokens_BT: model(tokens_BT))


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_whole_and_sharded(released, name):
    expected = np.load(RELEASED / name / "expected.npz")
    wanted_BTV, rows = expected["logits"], len(expected["tokens"])
    # One more row, so that two groups of devices share the batch evenly.
    tokens_BT = np.concatenate([expected["tokens"], expected["tokens"][:1]])
    for mesh in (None, mlra_jax.make_mesh(fsdp=2, tensor=4)):
        model = mlra_jax.load_model(released(name), mesh=mesh, dtype="float32")
        found_BTV = np.asarray(FORWARD(model, tokens_BT))[:rows]
        error = np.linalg.norm(found_BTV - wanted_BTV) / np.linalg.norm(wanted_BTV)
        assert found_BTV.dtype == np.float32
        assert error < 1e-5, f"{name} on {'one device' if mesh is None else mesh.shape}: {error}"
