"""Commands from a bucket and to it give what they give on a disk."""

import json
import time

import numpy as np
import pytest

from mlra_jax import loading, saving, sharding
from mlra_jax.convert.__main__ import main as convert
from mlra_jax.data import token_file
from mlra_jax.data.prepare import main as prepare
from mlra_jax.evaluate.__main__ import main as evaluate
from mlra_jax.evaluate.stored import Answers
from mlra_jax.export import main as export
from mlra_jax.generation.__main__ import main as decode
from mlra_jax.profile import main as profile
from mlra_jax.storage.paths import BucketError
from tests import tiny
from tests.conftest import RELEASED


def arrays(folder):
    model = loading.load_model(folder)
    return {name: np.asarray(x) for name, x in loading.flatten(model.weights).items()}


@pytest.fixture
def model(tmp_path, bucket):
    """A model of bytes, on the disk (the folder) and at `gs://bucket/model`."""
    model = tiny.random_model(tiny.config("mlra_4", vocab_size=260), sharding.make_mesh())
    saving.save_model(model, tmp_path / "model", tokenizer="bytes")
    saving.save_model(model, "gs://bucket/model", tokenizer="bytes")
    return tmp_path / "model"


def test_weights_are_converted_from_a_bucket_and_exported_to_it(bucket, tmp_path, released):
    for file in (RELEASED / "mlra_4").iterdir():
        bucket.put(f"released/{file.name}", file.read_bytes())
    flags = ["--source=gs://bucket/released", "--destination=gs://bucket/models/mlra_4"]
    flags += ["--expected=gs://bucket/released/expected.npz"]
    assert convert(flags) == 0
    assert {name.split("/")[0] for name in bucket.names()} == {"released", "models"}
    here, there = arrays(released("mlra_4")), arrays("gs://bucket/models/mlra_4")
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)

    for checkpoint, destination in (
        ("gs://bucket/models/mlra_4", "gs://bucket/back"),
        (released("mlra_4"), tmp_path / "back"),
    ):
        assert export([f"--checkpoint={checkpoint}", f"--destination={destination}"]) == 0
    for file in (tmp_path / "back").iterdir():
        assert bucket.objects[f"back/{file.name}"].data == file.read_bytes()
    assert len(bucket.names("back/")) == 2
    assert convert(["--source=gs://bucket/back", "--destination=gs://bucket/models/again"]) == 0
    again = arrays("gs://bucket/models/again")
    assert all(np.array_equal(here[name], again[name]) for name in here)


def test_what_is_wrong_with_weights_in_a_bucket_is_one_line(bucket, capsys):
    def refused(source, text):
        flags = [f"--source=gs://bucket/{source}", "--destination=gs://bucket/made"]
        assert convert(flags) == 1
        told = capsys.readouterr().err.strip()
        assert text in told and "\n" not in told
        assert bucket.names("made") == [] and bucket.names(".made") == []

    refused("none", "--source=gs://bucket/none: no such folder")
    for file in (RELEASED / "mlra_4").iterdir():
        bucket.put(f"bad/{file.name}", file.read_bytes())
    shard = "bad/pytorch_model-00002-of-00002.bin"
    data = bucket.objects[shard].data
    bucket.put(shard, data[:-100])
    refused("bad", f"gs://bucket/{shard}: ")
    middle = len(data) // 2
    bucket.put(shard, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    refused("bad", f"gs://bucket/{shard}: ")
    del bucket.objects[shard]
    refused("bad", "this shard is missing")
    bucket.put("held/config.json", b"{}")
    bucket.put("held/model.safetensors", (1 << 40).to_bytes(8, "little") + b"{")
    refused("held", "gs://bucket/held/model.safetensors: no safetensors file")
    bucket.put("held/model.safetensors", (100).to_bytes(8, "little") + b"{" * 200)
    refused("held", "gs://bucket/held/model.safetensors: no whole safetensors file")


def test_a_conversion_that_the_bucket_refuses_leaves_nothing(bucket, capsys):
    """Also not what was still on its way then: small files need longer than the refusal."""
    for file in (RELEASED / "mlra_4").iterdir():
        bucket.put(f"released/{file.name}", file.read_bytes())
    small = []

    def refuse(method, path):
        if method != "POST":
            return None
        if "/params" in path.replace("%2F", "/"):
            return 403
        small.append(path)
        return 0.5

    bucket.fault = refuse
    assert convert(["--source=gs://bucket/released", "--destination=gs://bucket/made"]) == 1
    assert "\n" not in capsys.readouterr().err.strip()
    time.sleep(1.0)
    assert small and {name.split("/")[0] for name in bucket.names()} == {"released"}


def test_perplexity_and_text_are_those_of_the_disk(model, bucket, tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(0, 257, 400)
    (tmp_path / "sets").mkdir()
    token_file.write(tmp_path / "sets/one.bin", tokens)
    bucket.put("sets/one.bin", (tmp_path / "sets/one.bin").read_bytes())
    bucket.put("prompts.txt", b"One\nTwo, three\n")
    (tmp_path / "prompts.txt").write_bytes(b"One\nTwo, three\n")
    results = []
    for root in (str(tmp_path), "gs://bucket"):
        flags = [f"--checkpoint={root}/model", f"--tokens={root}/sets", "--window=32"]
        assert evaluate([*flags, f"--output={root}/sums.json"]) == 0
        flags = [f"--checkpoint={root}/model", f"--prompt_file={root}/prompts.txt"]
        assert decode([*flags, "--max_new_tokens=4", f"--output={root}/texts.jsonl"]) == 0
        capsys.readouterr()
    names = ("sums.json", "texts.jsonl")
    results = [
        [(tmp_path / name).read_text() for name in names],
        [bucket.objects[name].data.decode() for name in names],
    ]
    (one, text), (other, same_text) = results
    assert text == same_text and len(text.splitlines()) == 2
    one, other = json.loads(one), json.loads(other)
    assert list(one["sets"].values()) == list(other["sets"].values())
    assert [n for n in bucket.names() if n.startswith(".")] == []


def test_token_files_are_prepared_in_a_bucket(bucket, tmp_path):
    for number in range(3):
        text = f"Text {number}, and more of it. " * 40
        bucket.put(f"texts/{number}.txt", text.encode())
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{number}.txt").write_text(text)
    for root in (str(tmp_path), "gs://bucket"):
        flags = [f"--source={root}/texts", f"--destination={root}/shards", "--tokenizer=bytes"]
        assert prepare([*flags, "--shard_tokens=1000"]) == 0
    made = sorted((tmp_path / "shards").glob("*.bin"))
    assert len(made) == 3 and [p.name for p in made] == [
        name.removeprefix("shards/") for name in bucket.names("shards/") if name.endswith(".bin")
    ]
    assert all(bucket.objects[f"shards/{p.name}"].data == p.read_bytes() for p in made)


def test_what_cannot_lie_in_a_bucket_says_so(bucket, capsys):
    with pytest.raises(BucketError, match="^--cache=gs://bucket/a_rank0.db must be on a disk"):
        Answers("gs://bucket/a", {})
    flags = ["--config=tests/training/tiny.py", "--output=gs://bucket/profile"]
    assert profile(flags) == 1
    assert "--output=gs://bucket/profile must be on a disk" in capsys.readouterr().err
