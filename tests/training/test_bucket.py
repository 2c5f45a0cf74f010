"""A run whose workdir and token files are in a bucket gives the numbers of one on the disk."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest

from mlra_jax import checkpoints
from mlra_jax.data import token_file
from mlra_jax.files import DestinationError
from mlra_jax.storage import lock
from mlra_jax.training import loop
from mlra_jax.training.metrics import MetricsWriter, read_metrics
from mlra_jax.training.progress import Progress, TrainingError
from mlra_jax.training.settings import MeshSettings
from mlra_jax.training.state import abstract_state
from tests.training import tiny
from tests.training.states import fresh_state
from tests.training.test_loop import Steps

WORKDIR = "gs://bucket/runs/one"


@pytest.fixture(scope="module")
def steps():
    return Steps()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for name, seed in (("a_train", 0), ("a_val", 1)):
        tokens = np.random.default_rng(seed).integers(0, 260, 2000)
        token_file.write(folder / f"{name}.bin", tokens)
    return folder


@pytest.fixture
def runs(shards, bucket, steps, monkeypatch):
    """(experiment on the disk, the same on the bucket), whose steps are compiled once."""
    for file in shards.iterdir():
        bucket.put(f"shards/{file.name}", file.read_bytes())
    monkeypatch.setattr(loop, "create_state", fresh_state)
    monkeypatch.setattr(loop, "make_train_step", lambda e, m: steps.train(on_disk, m))
    monkeypatch.setattr(loop, "make_validation_step", lambda e, m: steps.validation(on_disk, m))
    tiny_one = tiny.experiment()
    data = dataclasses.replace(tiny_one.data, source=str(shards))
    on_disk = dataclasses.replace(
        tiny_one, data=data, mesh=MeshSettings(), steps=6, save_every=2, validate_every=3
    )
    remote = dataclasses.replace(data, source="gs://bucket/shards")
    return on_disk, dataclasses.replace(on_disk, data=remote)


def numbers(workdir):
    names = ("step", "loss", "validation_loss", "gradient_norm")
    return [[line.get(name) for name in names] for line in read_metrics(workdir)]


def weights(workdir, experiment):
    abstract = abstract_state(experiment, loop._checked_mesh(experiment.mesh))
    found = checkpoints.open_checkpoint(workdir)
    return [
        np.asarray(x).tobytes()
        for item in ("params", "optimizer")
        for x in jax.tree.leaves(found.restore(item, getattr(abstract, item)))
    ]


def test_a_killed_run_goes_on_bit_for_bit(runs, bucket, tmp_path, monkeypatch):
    on_disk, there = runs
    loop.train(on_disk, tmp_path / "run", say=lambda line: None)

    log = Progress.log

    def until_step_5(self, values):
        if self.step == 5:
            raise SystemError("killed")
        log(self, values)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Progress, "log", until_step_5)
        patch.setattr(MetricsWriter, "close", lambda self: None)
        loop.train(there, WORKDIR, say=lambda line: None)
    # What a kill leaves: a lock whose owner is no more, a step of which the mark is missing, and
    # lines behind the last checkpoint.
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner = {"host": "here", "process": ended.pid, "kernel": lock._kernel(), "token": "t"}
    bucket.put("runs/one/.lock", json.dumps(owner).encode())
    for name in bucket.names("runs/one/checkpoints/4/"):
        if not name.endswith("4/commit_success.txt"):
            bucket.put(name.replace("/4/", "/6/"), bucket.objects[name].data)
    lines = bucket.objects["runs/one/metrics.jsonl"].data
    bucket.put("runs/one/metrics.jsonl", lines + b'{"step": 5, "loss": 9.0}\n{"step": 6, "lo')

    assert checkpoints.finished_steps(WORKDIR) == [2, 4]
    said = []
    loop.train(there, WORKDIR, say=said.append)
    assert said[0] == f"resuming {WORKDIR} from step 4"
    assert checkpoints.finished_steps(WORKDIR) == [4, 6]
    assert numbers(WORKDIR) == numbers(tmp_path / "run") and len(numbers(WORKDIR)) == 8
    assert weights(WORKDIR, on_disk) == weights(tmp_path / "run", on_disk)
    left = {name.split("/")[2] for name in bucket.names("runs/one")}
    assert left == {"checkpoints", "experiment.json", "metrics.jsonl", "tensorboard"} | {
        "loss_curve.png"
    }
    assert not [name for name in bucket.names("runs/one/checkpoints") if "/2/" in name]


def test_a_changed_bit_is_noticed(bucket):
    model = tiny.experiment().model
    params = {"w": jax.numpy.arange(1200.0)}
    with checkpoints.make_manager(WORKDIR) as manager:
        described = checkpoints.describe(model, "bytes")
        checkpoints.save(manager, 2, params=params, model=described, progress={"step": 2})
    folder, where = "runs/one/checkpoints/2", jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"w": jax.ShapeDtypeStruct((1200,), np.float32, sharding=where)}
    read = lambda: checkpoints.open_checkpoint(WORKDIR).restore("params", wanted)
    assert np.array_equal(read()["w"], params["w"])
    for name in bucket.names(f"{folder}/params/ocdbt.process_0/d/"):
        data = bytearray(bucket.objects[name].data)
        data[len(data) // 2] ^= 16
        bucket.put(name, bytes(data))
    with pytest.raises(checkpoints.CheckpointError, match=f"gs://bucket/{folder}: params is dam"):
        read()
    bucket.put(f"{folder}/progress/metadata", b"{}")
    with pytest.raises(checkpoints.CheckpointError, match="progress/metadata has changed since"):
        checkpoints.open_checkpoint(WORKDIR)


@pytest.mark.parametrize("what", ["params/d/", "progress", ""])
def test_a_bucket_that_refuses_is_not_taken_for_damage(what, bucket):
    described = checkpoints.describe(tiny.experiment().model, "bytes")
    with checkpoints.make_manager(WORKDIR) as manager:
        params = {"w": jax.numpy.arange(1200.0)}
        checkpoints.save(manager, 2, params=params, model=described, progress={"step": 2})
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"w": jax.ShapeDtypeStruct((1200,), np.float32, sharding=where)}
    place = f"runs/one/checkpoints/2/{what}"
    bucket.fault = lambda method, path: 403 if place in path.replace("%2F", "/") else None
    with pytest.raises((ValueError, OSError), match="cannot be read|the bucket") as error:
        checkpoints.open_checkpoint(WORKDIR).restore("params", wanted)
    told = str(error.value)
    assert "damaged" not in told and "delete" not in told and "\n" not in told


def test_a_bucket_that_refuses_a_checkpoint_ends_the_run_in_one_line(runs, bucket):
    _, there = runs

    def refuse(method, path):
        is_array = "name=runs/one/checkpoints/2/params" in path.replace("%2F", "/")
        return 403 if method == "POST" and is_array else None

    bucket.fault = refuse
    with pytest.raises(TrainingError) as error:
        loop.train(there, WORKDIR, say=lambda line: None)
    assert str(error.value).startswith(f"checkpoint {WORKDIR}/checkpoints/2: ")
    assert "\n" not in str(error.value) and checkpoints.finished_steps(WORKDIR) == []


def test_two_runs_at_a_time_are_refused(runs, bucket, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_PATIENCE", 2.0)
    _, there = runs
    with loop.only_run(loop._checked_workdir(WORKDIR)), pytest.raises(DestinationError) as error:
        loop.train(there, WORKDIR, say=lambda line: None)
    assert str(error.value).startswith(f"{WORKDIR}: process ")
    assert bucket.names("runs") == []


def test_metrics_are_put_up_before_a_checkpoint_and_now_and_then(bucket, monkeypatch):
    from mlra_jax import files
    from mlra_jax.storage.paths import path

    writer = MetricsWriter(path(WORKDIR), 0)
    writer.write(1, {"loss": 2.0})
    assert read_metrics(WORKDIR) == []
    writer.sync()
    assert read_metrics(WORKDIR) == [{"step": 1, "loss": 2.0}]
    monkeypatch.setattr(files, "_PUT_EVERY", 0.0)
    writer.write(2, {"loss": 1.0})
    assert len(read_metrics(WORKDIR)) == 2
    writer.close()
    events = bucket.names("runs/one/tensorboard/events.out.tfevents")
    assert len(events) == 1 and b"loss" in bucket.objects[events[0]].data
