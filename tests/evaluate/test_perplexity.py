"""Perplexity against NumPy on the logits, on one device and eight, whole and interrupted."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest

import mlra_jax
from mlra_jax.data import token_file
from mlra_jax.data.sources import pydoc_documents
from mlra_jax.evaluate import evaluate, perplexity
from mlra_jax.evaluate.__main__ import main

WINDOW, TOKENS = 24, 24 * 11 + 6  # 11 windows and a tail
SETTINGS = dict(window=WINDOW, dtype="float32", batch=4, quiet=True)


@pytest.fixture(scope="module")
def checkpoint(released):
    return released("mlra_4")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two token files of the language reference, its characters folded into 96 ids."""
    folder, paths = tmp_path_factory.mktemp("tokens"), []
    for i, text in enumerate(max(pydoc_documents()[:9], key=len)[j:] for j in (0, 999)):
        paths.append(str(folder / f"set_{i}.bin"))
        token_file.write(paths[-1], np.array([ord(c) % 96 for c in text[:TOKENS]]))
    return paths


@pytest.fixture(scope="module")
def result(checkpoint, files):
    return evaluate(checkpoint, files, **SETTINGS)


def test_equals_numpy_on_the_logits(checkpoint, files, result):
    model = mlra_jax.load_model(checkpoint, dtype="float32")
    wanted = []
    for file in files:
        tokens = np.fromfile(file, "<u2", offset=1024).astype(np.int32)
        inputs = tokens[: 11 * WINDOW].reshape(11, WINDOW)
        targets = tokens[1 : 11 * WINDOW + 1].reshape(11, WINDOW)
        logits = np.asarray(model(inputs), np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        losses = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        wanted.append(np.exp(losses.mean()))
        assert result["sets"][file]["perplexity"] == pytest.approx(wanted[-1], rel=1e-6)
        assert result["sets"][file]["tokens"] == 11 * WINDOW
    assert abs(wanted[0] - wanted[1]) > 1e-3
    assert result["mean_perplexity"] == pytest.approx(np.mean(wanted), rel=1e-6)


def test_eight_devices_and_logits_in_parts_give_the_same(checkpoint, files, result, monkeypatch):
    monkeypatch.setattr("mlra_jax.evaluate.scoring._LOGITS_AT_ONCE", 5 * 48 * 1)
    mesh = mlra_jax.make_mesh(data=2, fsdp=2, tensor=2)
    found = evaluate(checkpoint, files[:1], mesh=mesh, **SETTINGS)["sets"][files[0]]
    assert found["perplexity"] == pytest.approx(result["sets"][files[0]]["perplexity"], rel=1e-6)


def test_interrupted_goes_on_where_it_was(checkpoint, files, result, tmp_path, monkeypatch):
    output, calls, real = tmp_path / "result.json", [], perplexity.token_scores

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(perplexity, "token_scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, files, output=output, **SETTINGS)
    assert not output.exists()
    partial = tmp_path / ".result.json.partial"
    kept = partial.read_text()
    assert json.loads(kept)["tallies"][files[0]]["windows"] == 11
    # Another evaluation is refused, and the sums stay.
    with pytest.raises(ValueError, match="of another evaluation: window is 24 there and 12 here"):
        evaluate(checkpoint, files, output=output, **SETTINGS | {"window": 12})
    assert partial.read_text() == kept
    found = evaluate(checkpoint, files, output=output, **SETTINGS)
    # Three batches a file: of the second, the first batch was on its way and is read again.
    assert len(calls) == 5 + 3
    assert found["sets"] == result["sets"]
    assert json.loads(output.read_text()) == found and list(tmp_path.iterdir()) == [output]
    assert evaluate(checkpoint, files, output=output, **SETTINGS) == found and len(calls) == 8


def test_a_full_disk_leaves_nothing_half_written(checkpoint, files, tmp_path, capsys):
    output = tmp_path / "r.json"
    flags = [f"--checkpoint={checkpoint}", f"--tokens={files[0]}", f"--window={WINDOW}"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        assert main([*flags, f"--output={output}"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{str(tmp_path)}/.r.json.partial'")
    assert not list(tmp_path.iterdir())


def test_every_flag_of_the_command_line_arrives(monkeypatch, result):
    asked = []

    def note(*paths, **rest):
        asked.append((paths, rest))
        return result

    monkeypatch.setattr("mlra_jax.evaluate.__main__.evaluate", note)
    assert main(["--checkpoint=C", "--tokens=a.bin"]) == 0
    sizes = ["--window=7", "--max_tokens=70", "--batch=6", "--step=3", "--token_format=uint16"]
    places = ["--dtype=float16", "--output=o.json", "--mesh=fsdp=2", "--allow_nonfinite"]
    assert main(["--checkpoint=C", "--tokens=a.bin,b.bin", *sizes, *places]) == 0
    (paths, plain), (more_paths, given) = asked
    assert paths == ("C", ["a.bin"]) and more_paths == ("C", ["a.bin", "b.bin"])
    assert (plain.pop("mesh").size, given.pop("mesh").shape["fsdp"]) == (1, 2)
    assert (plain.pop("token_format"), given.pop("token_format")) == ("header", "uint16")
    nothing = dict(batch=None, step=None, dtype=None, output=None)
    assert (plain.pop("allow_nonfinite"), given.pop("allow_nonfinite")) == (False, True)
    assert plain == dict(window=None, max_tokens=100_000_000, **nothing)
    assert given == dict(window=7, max_tokens=70, batch=6, step=3, dtype="float16", output="o.json")


def test_command_line_and_its_limit(checkpoint, files, result, tmp_path, capsys):
    flags = [f"--checkpoint={checkpoint}", f"--window={WINDOW}", "--dtype=float32", "--batch=4"]
    limited = [*flags, f"--tokens={files[0]}", f"--max_tokens={WINDOW * 5 - 1}"]
    assert main([*limited, f"--output={tmp_path / 'r.json'}"]) == 0
    name, value, _, tokens = capsys.readouterr().out.splitlines()[1].split()
    assert (name, tokens) == (files[0], str(4 * WINDOW))
    assert float(value) == pytest.approx(
        json.loads((tmp_path / "r.json").read_text())["mean_perplexity"], abs=1e-4
    )


@pytest.mark.parametrize(
    "tokens, wanted",
    [
        (["e*.bin"], ["e1.bin", "e2.bin", "e[1].bin"]),
        (["e[1].bin"], ["e[1].bin"]),
        (["e[12].bin", "d/f?.bin"], ["e1.bin", "e2.bin", "d/f3.bin"]),
        (["**/*.bin"], ["d/e4.bin", "d/f3.bin", "e1.bin", "e2.bin", "e[1].bin"]),
        (["d"], ["d/e4.bin", "d/f3.bin"]),
        (["d/e4.bin", "e?.bin"], ["d/e4.bin", "e1.bin", "e2.bin"]),
    ],
)
def test_patterns_are_the_files_that_they_match(tokens, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("e2.bin", "e1.bin", "e[1].bin", "d/e4.bin", "d/f3.bin", "e3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "e_folder.bin").mkdir()
    assert perplexity._files(tokens, None) == wanted


def test_a_pattern_on_the_command_line(checkpoint, files, result, capsys):
    pattern = str(Path(files[0]).with_name("set_*.bin"))
    flags = [f"--window={WINDOW}", "--dtype=float32", "--batch=4", f"--tokens={pattern}"]
    assert main([f"--checkpoint={checkpoint}", *flags]) == 0
    assert capsys.readouterr().out.rstrip("\n") == perplexity.table(result)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tokens=absent.bin", "no token file absent.bin"),
        ("--tokens=absent*.bin", "--tokens=absent*.bin matches no file"),
        ("--tokens={file},{file}?", "--tokens={file}? matches no file"),
        ("--tokens={file},{file}*", "names a file twice"),
        ("--tokens={file},{file}", "names a file twice"),
        ("--tokens={file} --window=4000", "too little evaluation data"),
        ("--tokens={file} --window=24 --max_tokens=3", "at least one window"),
        ("--tokens={file} --window=24 --batch=3 --mesh=data=2", "does not divide over the 2"),
        ("--tokens={file} --window=24 --output=absent/r.json", "its folder does not exist"),
        ("--tokens={file} --window=24 --output={file}", "is no result of an evaluation"),
        ("--tokens={file} --window=24 --step=7", "has no step 7"),
        ("--tokens={file} --window=x", "invalid int value"),
    ],
)
def test_mistakes_are_one_line(checkpoint, files, flags, message, capsys):
    before = Path(files[0]).read_bytes()
    arguments = flags.format(file=files[0]).split()
    try:
        code = main([f"--checkpoint={checkpoint}", *arguments])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == (2 if "--window=x" in flags else 1)
    assert message.format(file=files[0]) in error and error.count("\n") == 1
    assert Path(files[0]).read_bytes() == before
