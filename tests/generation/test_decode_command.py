"""The decode command and `generate`: same text however it is split, errors in one line."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

import mlra_jax
from mlra_jax import checkpoints
from mlra_jax import model as models
from mlra_jax.config import Execution, LatentConfig, ModelConfig
from mlra_jax.generation import __main__ as decoding
from mlra_jax.generation.__main__ import main, read_prompts
from mlra_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
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
    execution=Execution(dtype="float32"),
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


load_once = functools.cache(decoding.load_model)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Commands that ask for the same model are given the same."""
    monkeypatch.setattr(decoding, "load_model", load_once)


def run(*arguments: str) -> tuple[str, str, int]:
    """(standard output, standard error, exit code) of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = stop.code
    return out.getvalue(), err.getvalue(), code


def failure(*arguments: str) -> str:
    """The one line in which the command says why it failed."""
    out, err, code = run(*arguments)
    said = [line for line in err.splitlines() if not line.startswith(("loading", "loaded"))]
    assert code == 1 and out == "" and len(said) == 1
    assert said[0].startswith("python -m mlra_jax.generation: ")
    return said[0]


def test_each_mesh_and_batch_gives_the_same_text(checkpoint):
    alone = {}
    for prompt in ("Hello", "A longer prompt, "):
        flag = f"--checkpoint={checkpoint}"
        out, err, code = run(flag, f"--prompt={prompt}", "--max_new_tokens=8")
        assert code == 0 and out.startswith(prompt) and out.endswith("\n")
        assert "tokens/s" in err and "MLA would hold" in err
        waited = r"first token after [\d.]+ s: loading [\d.]+, compiling [\d.]+, prefill [\d.]+; "
        assert re.search(waited, err)
        alone[prompt] = out.rstrip("\n")
    prompts = [f"--prompt={p}" for p in alone]
    out, err, code = run(flag, *prompts, "--max_new_tokens=8", "--mesh=tensor=4,context=2")
    assert code == 0
    for row, text in enumerate(alone.values()):
        for line in text.split("\n"):
            assert f"[{row}] {line}" in out
    # 128 slots over 2 context shares, (32/4 + 4) values, 2 prompts and layers, 4 bytes.
    assert f"cache: {128 // 2 * (32 // 4 + 4) * 2 * 2 * 4:,} bytes per device" in err
    mla = 128 // 2 * (32 + 4) * 2 * 2 * 4
    assert f"(2 x 128 positions); MLA would hold {mla:,}, 3.00 times as much" in err


def test_tokens_beyond_the_trained_length_are_said_once(checkpoint, monkeypatch):
    """Of the longest prompt with what is to come; the model's own length is enough for it."""
    monkeypatch.setattr(decoding, "load_model", shortened(decoding.load_model, 12))
    flags = [f"--checkpoint={checkpoint}", "--prompt=four", "--prompt=eightsix"]
    for new, warned in ((4, 0), (5, 1)):
        out, err, code = run(*flags, f"--max_new_tokens={new}")
        said = "13 tokens are beyond the 12 that the model was trained with: expect what lies there"
        assert code == 0 and err.count(said) == err.count("beyond") == warned


def shortened(load, context_length):
    """`load` for models that were trained with so many tokens."""

    def loaded(*arguments, **named):
        model = load(*arguments, **named)
        config = dataclasses.replace(model.config, context_length=context_length)
        return dataclasses.replace(model, config=config)

    return loaded


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt=x", "--checkpoint=/nowhere"], "/nowhere does not exist"),
        ([], "nothing to continue"),
        (["--prompt="], "prompt 0 is empty"),
        (["--prompt_file=/nowhere.txt"], "/nowhere.txt is not a file"),
        ([f"--prompt_file={sys.executable}"], f"{sys.executable} is a program"),
        (["--prompt=x", "--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["--prompt=" + 50 * "x", "--cache_length=40"], "need 177 cache slots"),
        (["--prompt=x", "--mesh=tensor=16"], "needs 16 devices and there are 8"),
        (["--prompt=x", "--mesh=tensors=2"], "'tensors=2' is not one of"),
        (["--prompt=x", "--mesh=tensor=3"], "4 latent heads and tensor=3"),
        (["--prompt=x", "--mesh=data=2"], "1 prompts do not divide over the 2 devices"),
        (["--prompt=x", "--temperature=-1"], "temperature=-1.0 must be at least 0"),
        (["--prompt=x", "--top_p=0"], "top_p=0.0 must lie in (0, 1]"),
        (["--prompt=x", "--tokens_per_call=0"], "tokens_per_call=0 must be at least 1"),
        (["--prompt=x", "--dtype=int8"], "dtype='int8' is none of"),
        (["--prompt=x", "--tokenizer=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(checkpoint, arguments, words):
    if not any(a.startswith("--checkpoint") for a in arguments):
        arguments = [f"--checkpoint={checkpoint}", *arguments]
    assert words in failure(*arguments)


def test_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    for file in (copy / "checkpoints/0/params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert str(copy) in failure(f"--checkpoint={copy}", "--prompt=x")


def test_prompts_from_a_file_on_a_data_mesh(checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Hello\nA longer prompt, \nÄ\nfour\n", encoding="utf-8")
    settings = [f"--checkpoint={checkpoint}", "--max_new_tokens=8"]
    prompts = ["first", *file.read_text(encoding="utf-8").splitlines(), "last"]
    flags = [f"--prompt={prompts[0]}", f"--prompt={prompts[-1]}"]
    whole = run(*settings, *(f"--prompt={p}" for p in [prompts[0], prompts[-1], *prompts[1:-1]]))
    # Those of the command line first, then the file's lines.
    split = run(*settings, *flags, f"--prompt_file={file}", "--mesh=data=2")
    assert split[2] == whole[2] == 0 and split[0] == whole[0]
    assert "[5] four" in split[0] and "[4] Ä" in split[0]
    # Half of the rows on each device, with 128 slots of 36 values, in 2 layers of 4 bytes.
    assert f"cache: {3 * 128 * (32 + 4) * 2 * 4:,} bytes per device (6 x 128 positions)" in split[1]
    assert "; MLA would hold" in split[1] and ", 1.00 times as much" in split[1]


@pytest.mark.parametrize(
    "data, prompts",
    [
        (
            "one\u2028still\ntwo\x0cstill\x0b\x85\x1c\n",
            ["one\u2028still", "two\x0cstill\x0b\x85\x1c"],
        ),
        ("\ufeffOnce\r\nIn the\r\n", ["Once", "In the"]),
        ("old\rMac\r\n\rend", ["old", "Mac", "end"]),
        ("\none\n\n \t\n two \n\n", ["one", " two "]),
        ("a\ufeffb", ["a\ufeffb"]),
    ],
)
def test_only_ends_of_lines_end_a_prompt(data, prompts, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(data.encode())
    assert read_prompts([], str(file)) == prompts
    assert read_prompts(["first"], str(file)) == ["first", *prompts]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "has no prompt: it is blank from line 1 to line 1"),
        (b"\xef\xbb\xbf\r\n \r\n", "has no prompt: it is blank from line 1 to line 2"),
        (b"\n\x0c\n\t", "has no prompt: it is blank from line 1 to line 3"),
        (b"\xef\xbb\xbfone\r\ntwo\rthr\xffee\n", "is not UTF-8 text (line 3: invalid start byte)"),
        (b"o\xffe", "is not UTF-8 text (line 1: invalid start byte)"),
        (b"one\xe2\x82", "is not UTF-8 text (line 1: unexpected end of data)"),
    ],
)
def test_a_prompt_file_without_prompts_is_named_with_its_line(data, words, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f"--prompt_file={file} {words}")):
        read_prompts(["first"], str(file))


def in_a_process(*arguments: str | bytes, **environment: str) -> tuple[bytes, bytes, int]:
    """(standard output, standard error, exit code) of the command in one of its own."""
    command = [sys.executable, "-m", "mlra_jax.generation", *arguments]
    given = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    given |= {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, capture_output=True, env=given, cwd=ROOT, timeout=120)
    return done.stdout, done.stderr, done.returncode


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """An environment in which processes keep their compiled programs for each other."""
    folder = tmp_path_factory.mktemp("programs")
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.mark.parametrize(
    "environment, first",
    [
        ({"PYTHONIOENCODING": "ascii"}, b"? ?"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, None),
        ({"PYTHONUTF8": "1"}, "\u00c4 ?".encode()),
    ],
)
def test_no_text_and_no_terminal_ends_in_a_codec_error(checkpoint, programs, environment, first):
    prompt = "--prompt=\u00c4 ".encode() + b"\xff|"
    out, err, code = in_a_process(
        f"--checkpoint={checkpoint}", prompt, "--max_new_tokens=4", **programs, **environment
    )
    assert code == 0, err
    printed, end, _ = out.partition(b"|")
    assert end and (printed == first if first else printed.isascii())


def test_64_bit_mode_gives_the_same_text(checkpoint):
    arguments = [f"--checkpoint={checkpoint}", "--max_new_tokens=6"]
    arguments += ["--prompt=abc", "--prompt=A longer one", "--temperature=0.5", "--top_k=9"]
    meshes = ["--mesh=tensor=2,context=2", "--virtual_cpu_devices=4"]
    out, err, code = in_a_process(*arguments, *meshes, JAX_ENABLE_X64="1")
    assert code == 0, err
    assert out.decode() == run(*arguments, "--mesh=tensor=2,context=2")[0]


def test_the_end_of_text_token_ends_a_prompt_unless_told_otherwise(checkpoint):
    # So hot that each of the 257 ids is about as likely: the end comes within 800 draws.
    settings = [f"--checkpoint={checkpoint}", "--prompt=x", "--max_new_tokens=800"]
    settings += ["--temperature=1e6", "--seed=2"]
    steps = lambda err: int(re.search(r"1 prompt\(s\), (\d+) steps", err)[1])
    out, err, code = run(*settings)
    whole_out, whole_err, whole_code = run(*settings, "--nostop")
    assert run(*settings, "--stop=false")[0] == whole_out
    assert code == whole_code == 0
    assert steps(err) < steps(whole_err) == 800
    assert whole_out.startswith(out.rstrip("\n")[:-1]) and len(whole_out) > len(out)


def test_sampling_flags_reach_the_sampler(checkpoint):
    settings = [f"--checkpoint={checkpoint}", "--prompt=abc", "--max_new_tokens=12"]
    greedy = run(*settings)[0]
    hot = [*settings, "--temperature=1e6"]
    drawn = run(*hot, "--seed=1")[0]
    assert run(*hot, "--seed=1")[0] == drawn != run(*hot, "--seed=2")[0]
    assert run(*hot, "--seed=1", "--tokens_per_call=4")[0] == drawn
    assert (
        run(*hot, "--top_k=1")[0] == greedy == run(*settings, "--temperature=1", "--top_p=1e-9")[0]
    )


def test_a_cache_that_fits_exactly_and_one_slot_less(checkpoint):
    settings = [f"--checkpoint={checkpoint}", "--prompt=" + 9 * "x", "--max_new_tokens=8"]
    out, err, code = run(*settings, "--cache_length=16")
    assert code == 0 and out == run(*settings)[0] and "(1 x 16 positions)" in err
    assert "need 16 cache slots and cache_length is 15" in failure(*settings, "--cache_length=15")


def test_a_batch_into_a_file(checkpoint, tmp_path):
    settings = [f"--checkpoint={checkpoint}", "--max_new_tokens=4", "--prompt=ab", "--prompt=c"]
    printed = run(*settings)[0]
    file = tmp_path / "out.jsonl"
    out, err, code = run(*settings, f"--output={file}", "--step=0")
    assert (out, code) == ("", 0) and "computes in float32, as its weights are stored" in err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["prompt"], len(line["tokens"])) for line in lines] == [("ab", 4), ("c", 4)]
    texts = [(line["prompt"] + line["text"]).removesuffix("\n") for line in lines]
    shown = [f"[{i}] {line}\n" for i, text in enumerate(texts) for line in text.split("\n")]
    assert "".join(shown) == printed
    assert "is a folder or in none" in failure(*settings, f"--output={tmp_path}/none/out.jsonl")
    assert "has no step 9; it has 0" in failure(*settings, "--step=9")
    with pytest.raises(ValueError, match=r"prompt 0 is text, and a list of tokens is expected"):
        mlra_jax.generate(mlra_jax.load_model(checkpoint), ["The "], max_new_tokens=1)
