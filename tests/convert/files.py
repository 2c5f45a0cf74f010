"""Weight files for tests."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from mlra_jax.convert.torch_format.unpickle import Storage
from mlra_jax.convert.torch_format.writer import contiguous, pickle_tensors, write_torch_file
from mlra_jax.convert.weights import Weights

RELEASED = Path(__file__).parents[1] / "data" / "released"
FOLDERS = sorted(path.name for path in RELEASED.iterdir() if path.is_dir())


def write_arrays(path, arrays):
    """A torch.save file with a storage of its own for each array."""
    tensors, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        tensors[name] = contiguous(Storage(str(i), array.dtype, array.size), array.shape)
        storages[str(i)] = [array.tobytes()]
    write_torch_file(path, tensors, storages)


def small_arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.standard_normal((3, 5), np.float32),
        "b": rng.standard_normal((2, 3, 4), np.float32).astype(ml_dtypes.bfloat16),
        "c": rng.standard_normal(7).astype(np.float16),
    }


def archive(entries, compression=zipfile.ZIP_STORED):
    """The bytes of a zip archive with these entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as writer:
        for name, data in entries.items():
            writer.writestr(name, data)
    return file.getvalue()


def torch_bytes(pickle=None, tensors=None, data=None, **extra):
    """The bytes of a torch.save file of one float32 storage `0`, with any pickle."""
    data = np.arange(12, dtype=np.float32).tobytes() if data is None else data
    pickle = pickle_tensors(tensors) if pickle is None else pickle
    entries = {"m/data.pkl": pickle, "m/byteorder": b"little", "m/data/0": data}
    return archive(entries | extra)


def training_pickle(tensors, key, **more):
    """The pickle of a training run's dictionary: the tensors under `key`, beside anything else."""
    values = {key: pickle_tensors(tensors)} | {n: pickle.dumps(v, 2) for n, v in more.items()}
    items = (pickle.dumps(name, 2)[2:-1] + data[2:-1] for name, data in values.items())
    return b"\x80\x02}(" + b"".join(items) + b"u."


def read_folder(folder):
    """All arrays of a released folder, copied."""
    with Weights(folder) as weights:
        return {name: weights.read(name).copy() for name in weights.specs}


def write_folder(folder, arrays, config):
    """A folder with one pytorch_model.bin."""
    folder.mkdir(parents=True)
    write_arrays(folder / "pytorch_model.bin", arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
