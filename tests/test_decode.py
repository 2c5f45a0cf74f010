"""The decode command and `generate`: same text however it is split, errors in one line."""

import contextlib
import io
import shutil
import sys

import numpy as np
import pytest
from absl import flags
from flax import nnx

import decode
import mlra_jax
from mlra_jax import checkpoints
from mlra_jax import model as models
from mlra_jax.config import LatentConfig, ModelConfig
from mlra_jax.sharding import make_mesh

CONFIG = ModelConfig(
    LatentConfig(
        num_heads=8,
        groups=1,
        branches=4,
        latent_dim=32,
        q_latent_dim=16,
        nope_dim=8,
        rope_dim=4,
    ),
    vocab_size=264,
    num_layers=2,
    embed_dim=32,
    mlp_dim=48,
    dtype="float32",
    zero_init=False,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = models.create(CONFIG, make_mesh(data=2, fsdp=2), seed=1)
    manager = checkpoints.make_manager(folder)
    params = nnx.to_pure_dict(nnx.state(model))
    checkpoints.save(manager, 0, params=params, model=checkpoints.describe(CONFIG, "bytes"))
    manager.close()
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return mlra_jax.load_model(checkpoint, mesh=make_mesh(tensor=2))


def run(*arguments: str) -> tuple[str, str, object]:
    """(standard output, standard error, exit code) of decode.py in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.get_flags_for_module(decode):
        flag.unparse()
    flags.FLAGS(["decode.py", *arguments])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            decode.run([])
        except SystemExit as stop:
            code = stop.code
    return out.getvalue(), err.getvalue(), code


def test_each_mesh_and_batch_gives_the_same_text(checkpoint):
    alone = {}
    for prompt in ("Hello", "A longer prompt, "):
        flag = f"--checkpoint={checkpoint}"
        out, err, code = run(flag, f"--prompt={prompt}", "--max_new_tokens=8")
        assert code == 0 and out.startswith(prompt) and out.endswith("\n")
        assert "tokens/s" in err and "MLA would hold" in err
        alone[prompt] = out.rstrip("\n")
    prompts = [f"--prompt={p}" for p in alone]
    out, err, code = run(flag, *prompts, "--max_new_tokens=8", "--mesh=tensor=4,context=2")
    assert code == 0
    for row, text in enumerate(alone.values()):
        for line in text.split("\n"):
            assert f"[{row}] {line}" in out
    # 128 slots over 2 context shares, (32/4 + 4) values, 2 prompts and layers, 4 bytes.
    assert f"cache: {128 // 2 * (32 // 4 + 4) * 2 * 2 * 4:,} bytes per device" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt=x", "--checkpoint=/nowhere"], "/nowhere does not exist"),
        ([], "nothing to continue"),
        (["--prompt="], "prompt 0 is empty"),
        (["--prompt_file=/nowhere.txt"], "/nowhere.txt is not a file"),
        ([f"--prompt_file={sys.executable}"], f"{sys.executable} is not UTF-8 text"),
        (["--prompt=x", "--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["--prompt=" + 50 * "x", "--cache_length=40"], "need 177 cache slots"),
        (["--prompt=x", "--mesh=tensor=16"], "needs 16 devices and there are 8"),
        (["--prompt=x", "--mesh=tensors=2"], "'tensors=2' is not one of"),
        (["--prompt=x", "--mesh=tensor=3"], "4 latent heads and tensor=3"),
        (["--prompt=x", "--mesh=data=2"], "1 prompts do not divide over the 2 devices"),
        (["--prompt=x", "--temperature=-1"], "temperature=-1.0 must be 0 or more"),
        (["--prompt=x", "--top_p=0"], "top_p=0.0 must be above 0"),
        (["--prompt=x", "--dtype=int8"], "dtype='int8' is none of"),
        (["--prompt=x", "--tokenizer=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, words):
    if not any(a.startswith("--checkpoint") for a in arguments):
        arguments = [f"--checkpoint={checkpoint}", *arguments]
    out, err, code = run(*arguments)
    assert isinstance(code, str) and code.startswith("decode.py: ")
    assert words in code and "\n" not in code
    assert out == "" and "Traceback" not in err


def test_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    for file in (copy / "checkpoints/0/params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code = run(f"--checkpoint={copy}", "--prompt=x")[2]
    assert isinstance(code, str) and "\n" not in code and str(copy) in code


@pytest.mark.parametrize(
    "prompts, new, words",
    [
        ([], 1, "no prompts"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1, 257]], 1, "prompt 0 has token 257"),
        ([[-1]], 1, "prompt 0 has token -1"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_generate_refuses(model, prompts, new, words):
    with pytest.raises(ValueError, match=words):
        mlra_jax.generate(model, prompts, max_new_tokens=new)


def test_generate_is_the_argmax_of_whole_passes_and_stops(model):
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6]]
    rows = mlra_jax.generate(model, prompts, max_new_tokens=6)
    for prompt, row in zip(prompts, rows, strict=True):
        logits = np.asarray(model(np.array([prompt + row], np.int32)))[0, :, : model.num_tokens]
        assert row == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    stop = rows[0][2]
    stopped = mlra_jax.generate(model, prompts, max_new_tokens=6, stop_token=stop)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in rows]


def test_sampling_depends_on_the_seed_only(model):
    draw = lambda seed: mlra_jax.generate(
        model, [[1, 2], [3, 4, 5]], max_new_tokens=12, temperature=1.0, seed=seed
    )
    assert draw(1) == draw(1) != draw(2)


def test_a_stacked_model_says_what_to_do():
    model = models.create(CONFIG, make_mesh(), seed=0)
    with pytest.raises(ValueError, match=r"model\.unstack\(\)"):
        mlra_jax.generate(model, [[1]], max_new_tokens=1)
