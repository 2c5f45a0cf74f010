"""Checkpoints come back whole on any mesh, or not at all and with one line that says why."""

import asyncio
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from benchmarks import bit_flips
from mlra_jax import checkpoints, checksums, sharding
from mlra_jax import model as models
from mlra_jax.checkpoints import CheckpointError
from mlra_jax.config import (
    Execution,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
)

ROOT = Path(__file__).parents[1]
CONFIG = ModelConfig(
    attention=GroupedConfig(num_heads=4, num_kv_heads=4, head_dim=8),
    vocab_size=24,
    num_layers=3,
    embed_dim=16,
    mlp_dim=24,
)


def abstract_params(mesh, dtype=None):
    _, shapes = models.structure(CONFIG, mesh)
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=s.sharding), shapes
    )


def random_params(mesh):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jax.device_put(generator.standard_normal(s.shape, np.float32), s.sharding),
        abstract_params(mesh),
    )


def write(folder, steps, params, **items):
    manager = checkpoints.make_manager(folder, keep=2)
    description = checkpoints.describe(CONFIG, "bytes")
    for step in steps:
        checkpoints.save(manager, step, params=params, model=description, **items)
    manager.wait_until_finished()
    manager.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder with steps 2 and 3 of a training run, its parameters and optimizer state)"""
    folder = tmp_path_factory.mktemp("run")
    params = random_params(sharding.make_mesh(data=1, fsdp=2, tensor=4))
    moments = optax.adamw(1e-3).init(params)
    write(folder, (1, 2, 3), params, optimizer=moments, iterator={"next": 5}, progress={"step": 3})
    return folder, params, moments


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copy")


def test_arrays_are_cast_one_after_the_other(tmp_path):
    """Beside the result, few arrays are in memory as stored, not all of them."""
    where = sharding.named(sharding.make_mesh(tensor=4), "heads")

    def kilobytes(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    # The small ones first: imports and threads are there afterwards.
    for size in (1, 1 << 18):
        ones = np.ones((8, size), np.float32)
        params = {f"{i}": ones for i in range(32)}
        write(tmp_path / f"{size}", (0,), params)
        asked = jax.ShapeDtypeStruct(ones.shape, jnp.bfloat16, sharding=where)
        opened = checkpoints.open_checkpoint(tmp_path / f"{size}")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = kilobytes("VmRSS")
        restored = jax.tree.leaves(opened.restore("params", dict.fromkeys(params, asked)))
        grown = (kilobytes("VmHWM") - before) << 10
    assert all(x.dtype == jnp.bfloat16 and (x == 1).all() for x in restored)
    # As read, with its checksums verified, and cast.
    assert grown < sum(x.nbytes for x in restored) + 8 * ones.nbytes


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 2, 2), (1, 8, 1, 1)])
def test_every_mesh_reads_what_one_mesh_wrote(written, mesh_shape):
    folder, params, _ = written
    abstract = abstract_params(sharding.make_mesh(*mesh_shape))
    opened = checkpoints.open_checkpoint(folder)
    restored = opened.restore("params", abstract)
    for got, want, asked in zip(*map(jax.tree.leaves, (restored, params, abstract)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.sharding == asked.sharding
    assert (opened.step, opened.model, opened.tokenizer) == (3, CONFIG, "bytes")
    assert opened.read_json("iterator") == {"next": 5}


def test_reading_casts_to_the_dtype_asked_for(written):
    folder, params, _ = written
    abstract = abstract_params(sharding.make_mesh(tensor=4), jnp.bfloat16)
    restored = checkpoints.open_checkpoint(folder).restore("params", abstract)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, np.asarray(want).astype(jnp.bfloat16))


def test_optimizer_state_comes_back_in_its_own_structure(written):
    folder, _, moments = written
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), moments
    )
    restored = checkpoints.open_checkpoint(folder).restore("optimizer", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(moments)
    jax.tree.map(np.testing.assert_array_equal, restored, moments)


def test_weights_alone_are_a_checkpoint_and_only_the_last_two_stay(written, tmp_path):
    folder, params, _ = written
    assert checkpoints.finished_steps(folder) == [2, 3]
    write(tmp_path, [0], params)
    opened = checkpoints.open_checkpoint(tmp_path)
    restored = opened.restore("params", abstract_params(sharding.make_mesh()))
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert not opened.has("optimizer")
    assert checkpoints.open_checkpoint(tmp_path).model == CONFIG


def test_a_save_that_was_killed_is_never_restored(tmp_path):
    """A process dies while step 2 is being written; step 1 stays the latest, and 2 can be saved."""
    program = f"""
import os, numpy as np
from mlra_jax import checkpoints
from mlra_jax.config import ModelConfig
manager = checkpoints.make_manager({str(tmp_path)!r})
model = checkpoints.describe(ModelConfig.from_dict({CONFIG.to_dict()!r}), None)
checkpoints.save(manager, 1, params={{"a": np.ones(4, np.float32)}}, model=model)
manager.wait_until_finished()
big = np.random.default_rng(0).standard_normal((64, 1 << 18), np.float32)
checkpoints.save(manager, 2, params={{"a": big}}, model=model)
os._exit(9)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, "-c", program], env=environment, timeout=300)
    assert died.returncode == 9
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert left != ["1"] and "2" not in left, "the process must die in the middle of the save"
    assert checkpoints.finished_steps(tmp_path) == [1]
    assert checkpoints.open_checkpoint(tmp_path).step == 1
    params = {"a": np.zeros(3, np.float32)}
    manager = checkpoints.make_manager(tmp_path)
    checkpoints.save(manager, 2, params=params, model=checkpoints.describe(CONFIG, None))
    manager.close()
    assert checkpoints.open_checkpoint(tmp_path).step == 2
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_finished_steps_are_numbers_in_order(tmp_path):
    assert checkpoints.finished_steps(tmp_path / "absent") == []
    assert checkpoints.finished_steps(tmp_path) == []
    described = json.dumps(checkpoints.describe(CONFIG, None))
    for step in (9, 10, 2, 11):
        item = tmp_path / "checkpoints" / str(step) / "model"
        item.mkdir(parents=True)
        (item / "metadata").write_text(described)
    (tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert checkpoints.finished_steps(tmp_path) == [2, 9, 10, 11]
    opened = checkpoints.open_checkpoint(tmp_path)
    assert (opened.step, opened.tokenizer, opened.model) == (11, None, CONFIG)
    assert opened.folder == tmp_path / "checkpoints" / "11"
    assert checkpoints.open_checkpoint(tmp_path, 2).step == 2


def test_the_remedy_is_the_latest_step_that_is_whole(tmp_path):
    """And what an interrupted save left, of whatever step, is removed by the next one."""
    write(tmp_path / "run", (1, 2), {"a": np.zeros(1, np.float32)})
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "2", folder / "3")
    (folder / "3" / "model" / "metadata").unlink()
    one_line(tmp_path / "run", "/3 to go on from step 2", restore=False)
    left = folder / "7.orbax-checkpoint-tmp"
    shutil.copytree(folder / "1", left)
    with checkpoints.make_manager(tmp_path / "run") as manager:
        described = checkpoints.describe(CONFIG, None)
        checkpoints.save(manager, 4, params={"a": np.zeros(1, np.float32)}, model=described)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "4"]


def test_all_steps_stay_where_no_number_is_given(tmp_path):
    params = {"a": np.zeros(1, np.float32)}
    for keep, stay in ((None, [0, 1, 2, 3]), (3, [1, 2, 3]), (1, [3])):
        folder = tmp_path / f"{keep}"
        with checkpoints.make_manager(folder, keep=keep) as manager:
            for step in range(4):
                model = checkpoints.describe(CONFIG, None)
                checkpoints.save(manager, step, params=params, model=model)
            manager.wait_until_finished()
        assert checkpoints.finished_steps(folder) == stay


def test_items_are_there_or_not(written, tmp_path):
    opened = checkpoints.open_checkpoint(written[0], 2)
    assert opened.step == 2
    items = ("params", "model", "optimizer", "iterator", "progress", "more")
    assert [opened.has(item) for item in items] == [True] * 5 + [False]
    assert opened.read_json("progress") == {"step": 3}
    assert opened.read_json("model") == checkpoints.describe(CONFIG, "bytes")
    with pytest.raises(CheckpointError, match="more is missing; delete .*/2 to go on from step 3"):
        opened.read_json("more")


def one_line(folder, *needles, restore=True, step=None):
    with pytest.raises(CheckpointError) as caught:
        opened = checkpoints.open_checkpoint(folder, step)
        if restore:
            opened.restore("params", abstract_params(sharding.make_mesh(tensor=2)))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for needle in (str(folder), *needles):
        assert needle in message


def test_missing_checkpoints_are_named(written, tmp_path):
    one_line(tmp_path / "nowhere", "does not exist")
    one_line(tmp_path, "no finished checkpoint")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    one_line(tmp_path, "weights as they are released: convert them first, python -m mlra_jax.conv")
    one_line(written[0], "has no step 7; it has 2, 3", step=7)


def test_each_missing_or_cut_file_is_an_error_or_harmless(copy, written, capfd):
    """Every file of the latest step is removed and cut: the weights are right or not there."""
    files = sorted(p for p in (copy / "checkpoints/3/params").rglob("*") if p.is_file())
    failures = 0
    for file in files:
        whole = file.read_bytes()
        for damage in (None, whole[: len(whole) // 2]):
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            try:
                opened = checkpoints.open_checkpoint(copy)
                restored = opened.restore("params", abstract_params(sharding.make_mesh()))
                jax.tree.map(np.testing.assert_array_equal, restored, written[1])
            except CheckpointError as e:
                failures += 1
                assert "\n" not in str(e) and "to go on from step 2" in str(e)
            file.write_bytes(whole)
    assert failures >= 6
    assert "Traceback" not in capfd.readouterr().err


def test_a_flipped_bit_is_refused_or_harmless(tmp_path):
    """In every file of the latest step, its arrays too: never other numbers."""
    folder, params = tmp_path / "run", random_params(sharding.make_mesh())
    moments = optax.adamw(1e-3).init(params)
    write(folder, (2, 3), params, optimizer=moments, iterator={"next": 5}, progress={"step": 3})
    files = [path for path in (folder / "checkpoints/3").rglob("*") if path.is_file()]
    for kind, file, message in bit_flips.outcomes(folder, len(files), seed=2):
        assert kind != "WRONG", f"{file}: {message}"
        # Orbax's marks, and tables of which the whole was merged, are not read.
        unread = "/" not in file and file != "checksums.json" or "/ocdbt.process_0/d/" in file
        assert unread or kind == "refused", f"{file}: {message}"
        assert kind == "harmless" or "to go on from step 2" in message


def test_every_array_carries_a_checksum(written):
    """Also in the store: what is read is compared with it by whoever reads."""
    for item in ("params", "optimizer"):
        path = written[0] / "checkpoints/3" / item
        for leaf in jax.tree.leaves(ocp.PyTreeCheckpointHandler().metadata(path).tree):
            store = {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{leaf.name}/"}
            array = ts.open({"driver": "zarr3", "kvstore": store}, open=True).result()
            assert {"name": "crc32c"} in array.codec.to_json()["codecs"]


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    """As Orbax writes them by itself: Zarr 2, compressed, without checksums."""
    params = random_params(sharding.make_mesh(tensor=2))
    description = checkpoints.describe(CONFIG, "bytes")
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        items = {"params": ocp.args.StandardSave(params), "model": ocp.args.JsonSave(description)}
        manager.save(4, args=ocp.args.Composite(**items))
    opened = checkpoints.open_checkpoint(tmp_path)
    restored = opened.restore("params", abstract_params(sharding.make_mesh(fsdp=2)))
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_files_that_changed_or_are_missing_are_named(copy):
    step = copy / "checkpoints/3"
    (step / "progress/metadata").write_text('{"step": 4}')
    one_line(copy, "progress/metadata has changed since it was written")
    (step / "progress/metadata").unlink()
    one_line(copy, "progress/metadata is missing", "to go on from step 2")
    # Someone who needs no training state may delete it; what is put beside the files does no harm.
    for item in ("progress", "iterator", "optimizer"):
        shutil.rmtree(step / item)
    (step / "params" / "._METADATA").write_text("")
    opened = checkpoints.open_checkpoint(copy)
    opened.restore("params", abstract_params(sharding.make_mesh()))
    assert not opened.has("optimizer")
    (step / "checksums.json").write_text("[1]")
    one_line(copy, "checksums.json is damaged")


@pytest.mark.parametrize("lost", ["a part", "a file", "the end of a file"])
def test_a_save_that_cannot_be_read_does_not_count(tmp_path, monkeypatch, lost):
    """And the one before it stays, though only one is kept."""
    mesh = sharding.make_mesh(fsdp=2)
    params = random_params(mesh)
    write(tmp_path, (1,), params)
    parts, seal = checksums._parts, checksums.seal

    def losing(step):
        data = max((step / "params").glob("d/*"), key=lambda file: file.stat().st_size)
        data.unlink() if lost == "a file" else os.truncate(data, data.stat().st_size - 1)
        seal(step)

    if lost == "a part":
        monkeypatch.setattr(
            checksums, "_parts", lambda values: [part[:1] for part in parts(values)]
        )
    else:
        monkeypatch.setattr(checksums, "seal", losing)
    manager = checkpoints.make_manager(tmp_path, keep=1)
    checkpoints.save(manager, 2, params=params, model=checkpoints.describe(CONFIG, None))
    with pytest.raises(Exception) as error:
        while not manager.poll():
            time.sleep(0.01)
    assert lost != "a part" or re.search("a part of .* is missing", str(error.value))
    assert checkpoints.finished_steps(tmp_path) == [1]
    checkpoints.open_checkpoint(tmp_path).restore("params", abstract_params(mesh))


class Slow(dict):
    """What JSON is made of it waits for an event."""

    def __init__(self, event, **values):
        super().__init__(**values)
        self.event = event

    def items(self):
        self.event.wait()
        return super().items()


@pytest.mark.parametrize("slow", ["optimizer", "progress"])
@pytest.mark.parametrize("told", ["by polling", "by waiting", "at once"])
def test_of_a_save_that_failed_nothing_is_written_when_that_is_told(
    slow, told, tmp_path, monkeypatch
):
    """Or it would be written into another run's checkpoint, which may begin now."""
    params, optimizer = {"a": np.ones(2, np.float32)}, {"a": np.ones(3, np.float32)}
    create, parts, release = checksums.create_array, checksums._parts, threading.Event()

    async def create_array(info, *args):
        if info.parent_dir.name.startswith("params"):
            raise OSError("params cannot be written")
        if slow == "optimizer":
            await asyncio.to_thread(release.wait)
        return await create(info, *args)

    def refuse(values):
        if values[0].shape == (2,):
            raise OSError("params cannot be copied")
        return parts(values)

    monkeypatch.setattr(checksums, "create_array", create_array)
    if told == "at once":
        monkeypatch.setattr(checksums, "_parts", refuse)
    manager, model = checkpoints.make_manager(tmp_path), checkpoints.describe(CONFIG, None)
    progress = Slow(release, step=1) if slow == "progress" else {"step": 1}
    items = dict(params=params, optimizer=optimizer, progress=progress)
    threading.Timer(0.5, release.set).start()
    with pytest.raises(OSError, match="params cannot be"):
        checkpoints.save(manager, 1, model=model, **items)
        if told == "by waiting":
            manager.wait_until_finished()
        while not manager.poll():
            time.sleep(0.01)
    assert release.is_set()
    step = tmp_path / "checkpoints" / f"1{ocp.path.step.TMP_DIR_SUFFIX}"
    assert any(step.glob(f"{slow}*/*")), "it must be under way when the error comes"


def test_damaged_descriptions_are_named(copy):
    """Also where no checksums are, as in checkpoints of earlier versions."""
    (copy / "checkpoints/3/checksums.json").unlink()
    model = copy / "checkpoints/3/model/metadata"
    described = json.loads(model.read_text())
    model.write_text(json.dumps(described)[:50])
    one_line(copy, "model is damaged", "delete", "step 2", restore=False)
    model.write_text(json.dumps(described | {"format_version": 2}))
    one_line(copy, "format version 2", restore=False)
    model.write_text(json.dumps(described | {"format_version": 0}))
    one_line(copy, "format version 0; this program reads 1", restore=False)
    for name in described:
        rest = {n: value for n, value in described.items() if n != name}
        model.write_text(json.dumps(rest))
        one_line(copy, "model is damaged", name, restore=False)
    described["model"]["embed_dmi"] = 3
    model.write_text(json.dumps(described))
    one_line(copy, "embed_dmi", restore=False)
    model.unlink()
    one_line(copy, "model is ", restore=False)
    shutil.rmtree(copy / "checkpoints/3/params")
    model.write_text(json.dumps({**described, "model": CONFIG.to_dict()}))
    one_line(copy, "params is missing", "delete")


def test_arrays_of_another_model_are_named(copy):
    opened = checkpoints.open_checkpoint(copy)
    abstract = abstract_params(sharding.make_mesh())
    wide = jax.ShapeDtypeStruct(
        (24, 17), jnp.float32, sharding=sharding.named(sharding.make_mesh())
    )
    with pytest.raises(CheckpointError, match=r"embed.embedding has shape \[24, 16\] there"):
        opened.restore("params", abstract | {"embed": {"embedding": wide}})
    with pytest.raises(CheckpointError, match=r"has no array extra, which the model needs"):
        opened.restore("params", abstract | {"extra": wide})
    del abstract["final_norm"]
    with pytest.raises(CheckpointError, match=r"has an array final_norm.scale that the model"):
        opened.restore("params", abstract)


LATENT = LatentConfig(
    num_heads=8, groups=2, branches=2, latent_dim=32, q_latent_dim=16, nope_dim=8, rope_dim=4
)
IDENTITIES = {
    "grouped": CONFIG,
    "latent": dataclasses.replace(CONFIG, attention=LATENT),
    "tied": dataclasses.replace(CONFIG, attention=TiedConfig(4, 2, 8)),
    "multi_matrix": dataclasses.replace(CONFIG, attention=MultiMatrixConfig(4, 8, 16)),
    "tensor_product": dataclasses.replace(CONFIG, attention=TensorProductConfig(4, 8, 2, 3)),
}
# What a model is; how it computes may change from one run to the next.
COMPUTES = {"execution": Execution("float32", False)}


def other(value):
    """A value of the same type that any size, name or switch may have instead."""
    if isinstance(value, Execution):
        return COMPUTES["execution"]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "float16"
    return value * 2


def every_change():
    for kind, config in IDENTITIES.items():
        for part in (config, config.attention):
            for field in dataclasses.fields(part):
                if field.name == "attention" or (part is config and kind != "grouped"):
                    continue
                yield kind, part is config, field.name


def beside(part, name):
    """What else a part needs to be whole with another value of a field."""
    if isinstance(part, LatentConfig) and name in ("num_kv_heads", "expanded"):
        kv_heads = {"num_kv_heads": 2} if name == "expanded" else {}
        return dict(groups=1, branches=1, num_heads=4, **kv_heads)
    # Heads double, so that twice as many groups or key heads still divide them.
    return {"num_heads": 2 * part.num_heads} if name in ("groups", "num_kv_heads") else {}


@pytest.mark.parametrize(("kind", "outer", "name"), list(every_change()))
def test_each_field_of_a_model_is_compared(tmp_path, kind, outer, name):
    """Those of the model and of every kind of attention, both ways round."""
    config = IDENTITIES[kind]
    part = config if outer else config.attention
    part = dataclasses.replace(part, **beside(part, name))
    old, new = getattr(part, name), other(getattr(part, name))
    if new == 0 and new is not False:  # may be left out
        new = 2 if name == "num_kv_heads" else part.latent_head_dim
    changed = dataclasses.replace(part, **{name: new})
    if not outer:
        part = dataclasses.replace(config, attention=part)
        changed = dataclasses.replace(config, attention=changed)
    for a, b, before, after in ((part, changed, old, new), (changed, part, new, old)):
        opened = checkpoints.Checkpoint(tmp_path, 0, a, "bytes")
        checkpoints.check_same_model(opened, a, "bytes", "runs/a")
        if outer and name in COMPUTES:
            checkpoints.check_same_model(opened, b, "bytes", "runs/a")
            continue
        full = f"model.{'' if outer else 'attention.'}{name}"
        with pytest.raises(CheckpointError) as caught:
            checkpoints.check_same_model(opened, b, "bytes", "runs/a")
        assert f"runs/a holds another model: {full} is {before!r} there and {after!r} here" in str(
            caught.value
        )


def test_kinds_and_tokenizers_are_compared(tmp_path):
    opened = checkpoints.Checkpoint(tmp_path, 0, CONFIG, None)
    checkpoints.check_same_model(opened, CONFIG, None, "runs/a")
    with pytest.raises(CheckpointError, match="tokenizer is None there and 'bytes' here"):
        checkpoints.check_same_model(opened, CONFIG, "bytes", "runs/a")
    for kind, config in IDENTITIES.items():
        if kind != "grouped":
            with pytest.raises(
                CheckpointError, match=r"model.attention\.\w+ is .* there and .* here"
            ):
                checkpoints.check_same_model(opened, config, None, "runs/a")


@pytest.mark.parametrize("name", ["lr[1e-3]", "a[!b]", "a]b", "a\\d", "run*", "run?", "a[b]/run"])
def test_a_path_that_is_a_pattern_is_refused_before_it_is_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in (name, tmp_path / name):
        with pytest.raises(CheckpointError, match="cannot be written to /.*; choose one") as caught:
            checkpoints.make_manager(folder)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lr=1e-3", "a b", "{a,b}", "é%5B1%5D", "a#~!&"])
def test_other_paths_are_served(tmp_path, name):
    ones = np.ones(4, np.float32)
    write(tmp_path / name, (1,), {"a": ones})
    asked = jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding.named(sharding.make_mesh()))
    found = checkpoints.open_checkpoint(tmp_path / name).restore("params", {"a": asked})
    np.testing.assert_array_equal(found["a"], ones)


def test_a_folder_renamed_to_a_pattern_is_read(copy, written):
    moved = copy.rename(copy.with_name("lr[1e-3]"))
    abstract = abstract_params(sharding.make_mesh())
    found = checkpoints.open_checkpoint(moved).restore("params", abstract)
    jax.tree.map(np.testing.assert_array_equal, found, written[1])


def test_a_workdir_of_another_model_names_the_difference(written):
    opened = checkpoints.open_checkpoint(written[0])

    def check(tokenizer="bytes", **changes):
        config = dataclasses.replace(CONFIG, **changes)
        checkpoints.check_same_model(opened, config, tokenizer, "runs/a")

    check(**COMPUTES)
    with pytest.raises(CheckpointError, match=r"runs/a .* model.mlp_dim is 24 there and 32 here"):
        check(mlp_dim=32)
    with pytest.raises(CheckpointError, match=r"tokenizer is 'bytes' there and 'gpt2' here"):
        check(tokenizer="gpt2")
    with pytest.raises(
        CheckpointError, match=r"model.attention.num_kv_heads is 4 there and 2 here"
    ):
        check(attention=GroupedConfig(num_heads=4, num_kv_heads=2, head_dim=8))
