"""Command lines end alike: exit codes, one line, interruptions where nothing is left behind."""

import contextlib
import dataclasses
import errno
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from mlra_jax.__main__ import COMMANDS
from mlra_jax.__main__ import main as list_commands
from mlra_jax.command import Parser, Switch, claim_gpu_memory, progress_bar, run
from mlra_jax.config import preset
from mlra_jax.convert.errors import CheckpointFileError, in_one_line, reason
from mlra_jax.extras import EXTRAS
from mlra_jax.files import DestinationError
from mlra_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def handlers():
    """As a command sets them; parallel test workers ignore the signals."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, _ in before:
        signal.signal(number, interrupt)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_next_update(number):
    before, reached = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True) as update:
        update(1)
        os.kill(os.getpid(), number)
        reached.append("after the signal")
        update(1)
        reached.append("after the update")
    assert reached == ["after the signal"]
    assert signal.getsignal(number) is before


def test_an_interruption_without_another_update_takes_effect_at_the_end():
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True):
        os.kill(os.getpid(), signal.SIGINT)


def test_errors_that_follow_from_an_interruption_are_not_told():
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True) as update:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            update(1)
        except RuntimeError:
            raise ValueError("what the library makes of it") from None


def test_a_second_interruption_takes_effect_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(2)
    assert reached == [1]


def test_other_errors_come_through_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="mine"), progress_bar("text", 10, True):
        assert signal.getsignal(signal.SIGINT) is not before
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with progress_bar("text", 10, True) as update:
        os.kill(os.getpid(), signal.SIGINT)
        update(1)


def test_a_bar_shows_its_name_and_leaves_nothing(capsys):
    with progress_bar("some text", 2000, False) as update:
        update(1000)
    shown = capsys.readouterr().err
    assert "some text" in shown and shown.endswith("\r")
    with progress_bar("some text", 2000, True) as update:
        update(1000)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "whatever"), "the disk is full"),
        (RuntimeError("ts: No space left on device [x]"), "the disk is full"),
        (RuntimeError("a [source='x'] os_error_code='27'"), "not done (File too large)"),
        (RuntimeError("first\n second [and a whole specification]"), "not done (first second)"),
        (RuntimeError("x" * 500), f"not done ({'x' * 300})"),
        (KeyError(), "not done (KeyError)"),
    ],
)
def test_reasons_are_one_short_line(error, line):
    assert reason(error) == line


def test_errors_while_writing_are_one_line(tmp_path):
    out = tmp_path / "out"
    for error, line in (
        (ValueError("two\nlines"), f"{out}: not done (two lines)"),
        (OSError(errno.ENOSPC, "No space left on device"), f"{out}: the disk is full"),
        (DestinationError("as it is"), "as it is"),
        (CheckpointFileError("as it is"), "as it is"),
    ):
        with pytest.raises(CheckpointFileError) as caught, in_one_line(out):
            raise error
        assert str(caught.value) == line
    with pytest.raises(KeyboardInterrupt), in_one_line(out):
        raise KeyboardInterrupt
    with in_one_line(out):
        pass


def module(name):
    """The module that `python -m NAME` runs."""
    found = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(found, "__path__") else found


def ended(main, *arguments):
    """(exit code, standard output, standard error) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def test_the_list_of_commands_is_that_of_the_console_scripts():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    scripts = pyproject["project"]["scripts"]
    assert scripts.keys() == COMMANDS.keys()
    for script, place in scripts.items():
        name, function = place.split(":")
        assert name.removesuffix(".__main__") == COMMANDS[script][0]
        assert getattr(importlib.import_module(name), function)
    code, out, err = ended(list_commands)
    assert code == 0 and err == "" and len(out.splitlines()) == len(COMMANDS)
    for line, (script, (name, does)) in zip(out.splitlines(), COMMANDS.items(), strict=True):
        assert line.split()[:4] == [script, "python", "-m", name] and line.endswith(does)
    code, out, err = ended(list_commands, "--tokens=8")
    assert code == 2 and "unknown flag --tokens" in err


def test_the_extras_of_the_package_are_what_messages_advise():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["docs"]  # of the pages, by `make docs`
    said = {name: libraries[0].partition(";")[0] for name, libraries in extras.items()}
    assert said == EXTRAS and all(len(libraries) == 1 for libraries in extras.values())


# Flags with which a command fails when it begins to work.
FAILING = {
    "mlra-jax": [],
    "mlra-train": [
        f"--config={ROOT}/configs/quickstart.py",
        f"--workdir={ROOT}/train.py",
        "--config.virtual_cpu_devices=0",
    ],
    "mlra-profile": [
        f"--config={ROOT}/configs/quickstart.py",
        "--config.data.source=/nowhere",
        "--config.virtual_cpu_devices=0",
    ],
    "mlra-report": ["/nowhere"],
    "mlra-plan": [f"--config={ROOT}/configs/quickstart.py", "--topology=v0:2x2"],
    "mlra-decode": ["--checkpoint=/nowhere", "--prompt=x"],
    "mlra-convert": ["--source=/nowhere", "--destination=/nowhere/out"],
    "mlra-export": ["--checkpoint=/nowhere", "--destination=/nowhere/out"],
    "mlra-evaluate": ["--checkpoint=/nowhere", "--tokens=/nowhere.bin"],
    "mlra-tasks": ["--checkpoint=/nowhere"],
    "mlra-prepare": ["--source=/nowhere", "--destination=/nowhere/out", "--tokenizer=bytes"],
    "mlra-costs": [],
    "mlra-equivariance": ["--checkpoint=/nowhere"],
    "mlra-variance": ["--checkpoint=/nowhere"],
    "mlra-branches": ["--checkpoint=/nowhere"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_ends_alike(script, monkeypatch):
    """Help with 0, wrong flags with 2, failures with 1, interruptions with 130; in one line."""
    command = module(COMMANDS[script][0])
    prog = f"python -m {COMMANDS[script][0]}: "
    code, out, err = ended(command.main, "--help")
    assert code == 0 and err == ""
    flags = sorted(set(re.findall(r"^  (--\w+)", out, re.M)))
    assert flags, "the flags are listed"
    # What stands alone is a run for the report.
    wrong = [["--nonsense=1"], *([["stray"]] if script != "mlra-report" else [])]
    if script not in ("mlra-jax", "mlra-costs", "mlra-train", "mlra-profile", "mlra-plan"):
        wrong += [[], [*FAILING[script], f"{flags[0]}x=1"]]
    for arguments in wrong:
        if arguments in (["--nonsense=1"], ["stray"]):
            arguments = [*FAILING[script], *arguments]
        code, out, err = ended(command.main, *arguments)
        assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith(prog), arguments
        assert "--help lists the flags" in err
    if FAILING[script]:
        code, out, err = ended(command.main, *FAILING[script])
        said = [line for line in err.splitlines() if not line.startswith("loading")]
        assert code == 1 and out == "" and len(said) == 1 and said[0].startswith(prog)

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes first")

    work = {
        "mlra-jax": "commands",
        "mlra-train": "train",
        "mlra-profile": "profile_steps",
        "mlra-report": "read",
        "mlra-plan": "run_plan",
        "mlra-decode": "decode",
        "mlra-convert": "convert",
        "mlra-export": "export",
        "mlra-evaluate": "evaluate",
        "mlra-tasks": "_work",
        "mlra-prepare": "prepare",
        "mlra-costs": "table",
        "mlra-equivariance": "opened",
        "mlra-variance": "open_checkpoint",
        "mlra-branches": "opened",
    }[script]
    monkeypatch.setattr(command, work, interrupted)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    before = lambda *_: None
    signal.signal(signal.SIGTERM, before)
    arguments = FAILING[script]
    if script == "mlra-prepare":
        monkeypatch.setattr(command, "open_input", lambda *_, **__: None)
    code, out, err = ended(command.main, *arguments)
    assert code == 130 and err.count("\n") == 1 and err.startswith(f"{prog}interrupted; ")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_the_environment_says_of_gpu_memory_stays(monkeypatch):
    new, old = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for given, want in (({}, "0.95"), ({new: "0.5"}, "0.5"), ({old: "0.6"}, None)):
        monkeypatch.setattr(os, "environ", given)
        claim_gpu_memory(0.95)
        assert given.get(new) == want


def test_programs_are_called_as_they_were_started(monkeypatch):
    for started, prog in (
        ("/usr/bin/mlra-train", "mlra-train"),
        ("train.py", "train.py"),
        ("./decode.py", "decode.py"),
        ("/x/mlra_jax/training/__main__.py", "python -m mlra_jax.training"),
        ("/usr/bin/pytest", "python -m mlra_jax.training"),
        ("", "python -m mlra_jax.training"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        assert Parser("mlra_jax.training", "").prog == prog


def test_wrong_flags_name_the_nearest():
    parser = Parser("x", "")
    parser.add_argument("--checkpoint")
    parser.add_argument("--stop", action=Switch, default=True)
    for argument, line in (
        ("--chekpoint=a", "unknown flag --chekpoint; did you mean --checkpoint?"),
        ("--check=a", "unknown flag --check"),
        ("--zzz", "unknown flag --zzz ("),
        ("zzz", "unexpected argument 'zzz' ("),
        ("--stop=maybe", "--stop=maybe: give true or false, or only the name"),
        ("--nostop=true", "--nostop=true: give true or false, or only the name"),
    ):
        code, out, err = ended(parser.parse_args, argument)
        assert code == 2 and out == "" and line in err and err.count("\n") == 1
    for arguments, on in (
        ([], True),
        (["--stop"], True),
        (["--nostop"], False),
        (["--stop=true"], True),
        (["--stop=false"], False),
        (["--nostop", "--stop"], True),
    ):
        assert parser.parse_args(arguments).stop is on


def test_only_errors_of_one_line_are_the_users(capsys):
    parser = Parser("x", "")

    def raising(error):
        def work():
            raise error

        return work

    for error, line in (
        (ValueError(" what and why\n"), "what and why"),
        (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
        (OSError(), "OSError"),
    ):
        assert run(parser, raising(error)) == 1
        assert capsys.readouterr().err == f"python -m x: {line}\n"
    for error in (ValueError("of\nothers"), RuntimeError("of others"), AssertionError()):
        with pytest.raises(type(error)):
            run(parser, raising(error))
    assert run(parser, raising(KeyboardInterrupt()), "so far") == 130
    assert capsys.readouterr().err == "python -m x: interrupted; so far\n"
    assert run(parser, lambda: 7) == 0


def test_lines_of_others_come_before_or_after_an_error_not_into_it(monkeypatch):
    """Each write is one of its own where Python does not buffer."""
    written = []

    def work():
        raise ValueError("it is full")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    assert run(Parser("x", ""), work) == 1
    assert [text for text in written if text] == ["python -m x: it is full\n"]


def test_settings_are_those_of_the_file_and_the_command_line(monkeypatch, tmp_path):
    training = module("mlra_jax.training")
    seen = []
    monkeypatch.setattr(training, "train", lambda experiment, *_: not seen.append(experiment))
    file = f"{ROOT}/configs/paper.py"

    def experiment(*arguments):
        code, _, err = ended(training.main, *arguments, f"--workdir={tmp_path}")
        assert code == 0, err
        return seen[-1]

    plain = experiment(f"--config={file}")
    assert plain.model == preset("mlra_4") and plain.data.accumulate == 30
    assert experiment(f"--config={file}:gqa").model == preset("gqa")
    changed = experiment(
        "--config",
        f"{file}:mla",
        "--config.model.remat=false",
        "--config.steps=7700",
        "--config.optimizer.peak_learning_rate=1",
        "--config.data.source=a,b",
        "--config.mesh.fsdp",
        "8",
        "--config.steps=7800",
    )
    assert changed == dataclasses.replace(
        plain,
        model=preset("mla", remat=False),
        steps=7800,
        optimizer=dataclasses.replace(plain.optimizer, peak_learning_rate=1.0),
        data=dataclasses.replace(plain.data, source="a,b"),
        mesh=dataclasses.replace(plain.mesh, fsdp=8),
    )
    # Where they stand does not matter, and a switch may be named alone.
    switched = experiment("--noconfig.model.zero_init", f"--config={file}:mla")
    assert switched.model.zero_init is False
    (tmp_path / "none.py").write_text("def get_config():\n    return 3\n")
    (tmp_path / "broken.py").write_text("def get_config():\n    raise ValueError('for a reason')\n")
    for arguments, line in (
        ([f"--config={file}", "--config.model.rmat=1"], "did you mean --config.model.remat?"),
        ([f"--config={file}", "--config.lr=1"], "mean --config.optimizer.peak_learning_rate?"),
        ([f"--config={file}", "--config.batch_size=1"], "did you mean --config.data.global_batch?"),
        ([f"--config={file}", "--config.model.steps=1"], "did you mean --config.steps?"),
        ([f"--config={file}", "--config.model.attention.x=1"], "unknown setting --config.model.at"),
        ([f"--config={file}", "--config.steps=x"], "invalid literal for int() with base 10: 'x'"),
        ([f"--config={file}:mlra_5"], "unknown preset 'mlra_5'; did you mean"),
        (["--config=paper:mlra_5"], "configs/paper.py:mlra_5: unknown preset 'mlra_5'; did you"),
        ([f"--config={tmp_path}/absent.py"], "absent.py"),
        ([f"--config={tmp_path}/none.py"], "get_config() must return a ConfigDict"),
        ([f"--config={tmp_path}/broken.py"], "for a reason"),
        ([f"--config={file}", "stray"], "unexpected argument 'stray'; settings are given as"),
        ([f"--config={file}", "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
    ):
        code, out, err = ended(training.main, *arguments, f"--workdir={tmp_path}")
        assert code == 2 and line in err and err.count("\n") == 1 and out == "", err
    assert ended(training.main, f"--config={file}", "--workdir=")[0] == 2


def handed(monkeypatch, script, work, *flags):
    """What a command's work is called with: (positional arguments, the others)."""
    command, seen = module(COMMANDS[script][0]), []
    monkeypatch.setattr(command, work, lambda *some, **named: seen.append((some, named)))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    # The table of what came back is another matter.
    monkeypatch.setattr(command, "table", lambda result: "", raising=False)
    code, _, err = ended(command.main, *flags)
    assert code == 0, err
    return seen[0]


@pytest.mark.parametrize(
    ("script", "work", "flags", "positional", "named"),
    [
        (
            "mlra-convert", "convert", "--source=a --destination=b", ("a", "b"),
            dict(variant=None, dtype=None, mesh=None, expected=None, allow_nonfinite=False),
        ),
        (
            "mlra-convert", "convert",
            "--source=a --destination=b --variant=mla --dtype=float16 --mesh=tensor=4,fsdp=2 "
            "--allow_nonfinite",
            ("a", "b"),
            dict(
                variant="mla", dtype="float16", mesh=dict(data=1, fsdp=2, tensor=4, context=1),
                expected=None,
                allow_nonfinite=True,
            ),
        ),
        (
            "mlra-export", "export", "--checkpoint=a --destination=b", ("a", "b"),
            dict(step=None, dtype=None),
        ),
        (
            "mlra-export", "export", "--checkpoint=a --destination=b --step=7 --dtype=bfloat16",
            ("a", "b"), dict(step=7, dtype="bfloat16"),
        ),
        (
            "mlra-evaluate", "evaluate", "--checkpoint=a --tokens=x,,y", ("a", ["x", "y"]),
            dict(
                window=None, max_tokens=100_000_000, output=None, mesh=make_mesh(), batch=None,
                dtype=None, step=None, token_format="header", allow_nonfinite=False,
            ),
        ),
        (
            "mlra-evaluate", "evaluate",
            "--checkpoint=a --tokens=x --window=3 --max_tokens=9 --output=o --mesh=data=2 "
            "--batch=4 --dtype=float32 --step=5 --token_format=uint32 --allow_nonfinite",
            ("a", ["x"]),
            dict(
                window=3, max_tokens=9, output="o", mesh=make_mesh(data=2), batch=4,
                dtype="float32", step=5, token_format="uint32",
                allow_nonfinite=True,
            ),
        ),
    ],
)  # fmt: skip
def test_flags_are_handed_on(monkeypatch, script, work, flags, positional, named):
    assert handed(monkeypatch, script, work, *flags.split()) == (positional, named)


@pytest.mark.parametrize(
    ("platform", "flags", "dtype"),
    [
        ("cpu", [], None),
        ("gpu", [], "bfloat16"),
        ("tpu", [], "bfloat16"),
        ("gpu", ["--dtype=float32"], "float32"),
        ("cpu", ["--dtype=float16"], "float16"),
    ],
)
def test_accelerators_decode_in_bfloat16(monkeypatch, platform, flags, dtype):
    decoding, seen = module("mlra_jax.generation"), []

    def load_model(checkpoint, mesh, dtype, step, allow_nonfinite):
        seen.append((checkpoint, dtype, step, allow_nonfinite))
        raise ValueError("enough")

    monkeypatch.setattr(decoding, "load_model", load_model)
    monkeypatch.setattr(decoding.sharding, "platform", lambda mesh: platform)
    for more, *handed_on in (([], None, False), (["--step=3", "--allow_nonfinite"], 3, True)):
        assert ended(decoding.main, "--checkpoint=a", "--prompt=x", *flags, *more)[0] == 1
        assert seen.pop() == ("a", dtype, *handed_on)


def test_a_failed_command_ends_though_a_thread_waits():
    """As the threads of the checkpoint library do, and those that wait for other processes."""
    program = """
import sys, threading, time
from mlra_jax.command import Parser, run
def work():
    threading.Thread(target=time.sleep, args=(100,)).start()
    print("said before")
    raise ValueError("no")
sys.exit(run(Parser("m", "d"), work))
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1 and done.stdout == "said before\n"
    assert done.stderr.splitlines()[-1].endswith(": no")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_has_no_bytes_there_is_printed_as_something_else(encoding, monkeypatch):
    """Another script, a lone surrogate (a byte of the command line that is no UTF-8), an emoji."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def work():
        print("\u00c4 \u6f22 \udcff \U0001f600.")
        raise ValueError("\u00c4 \u6f22 \udcff.")

    assert run(Parser("x", ""), work) == 1
    for stream in (out, err):
        stream.flush()
    printed, said = out.buffer.getvalue(), err.buffer.getvalue()
    shown = {
        "ascii": (b"? ? ? ?.\n", rb"\xc4 \u6f22 \udcff."),
        "latin-1": (b"\xc4 ? ? ?.\n", b"\xc4 " + rb"\u6f22 \udcff."),
        "utf-8": (
            "\u00c4 \u6f22 ? \U0001f600.\n".encode(),
            "\u00c4 \u6f22 ".encode() + rb"\udcff.",
        ),
    }
    assert printed == shown[encoding][0]
    assert said == b"python -m x: " + shown[encoding][1] + b"\n"
