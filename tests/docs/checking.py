"""Whether a block could run: its program, flags, settings and imports exist. Compiles nothing."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
import tomllib
from pathlib import Path
from unittest import mock

from mlra_jax import command as command_module
from tests.docs import table
from tests.docs.blocks import ROOT, Block, Command, commands, module, ours

SHELLS = ("", "bash", "sh", "shell", "console")
DATA = ("text", "json", "yaml", "toml", "bibtex", "mermaid", "diff")


class DocsError(Exception):
    """What is wrong with a block, and what to do."""


def kind(block: Block) -> str:
    """`shell`, `python`, `output` (of the block before, compared with it) or `data`."""
    if block.language in ("python", "output"):
        return block.language
    if block.language in DATA:
        return "data"
    if block.language not in SHELLS:
        raise DocsError(
            f"{block.place}: blocks of {block.language!r} are unknown: name their language in "
            "tests/docs/checking.py"
        )
    return "shell"


def why_not(command: Command) -> str | None:
    """Why a command is not run; None if it is."""
    if command.is_shell:
        return "is the shell's own"
    found = next((why for pattern, why in table.NOT_RUN if re.search(pattern, command.text)), None)
    if found is None and not command.is_of_files and ours(command) is None:
        raise DocsError(
            f"{command.place}: `{command.words[0]}` is no command of this project: mark the block "
            "`text` behind its fence if it is output or a figure, or say in NOT_RUN of "
            "tests/docs/table.py why it is not run"
        )
    return found


def check_block(block: Block) -> None:
    """DocsError if the block could not run, or if nothing says what to do with it."""
    match kind(block):
        case "python":
            check_python(block)
        case "shell":
            found = list(commands(block))
            if not found:
                raise DocsError(f"{block.place}: no command in it; mark it `text` behind its fence")
            for command in found:
                why_not(command)
                check_command(command)


def check_command(command: Command) -> None:
    words = list(command.words)
    if found := ours(command):
        check_flags(command.place, *found)
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        variables = re.findall(r"^(\w+) [?:]=", (ROOT / "Makefile").read_text(), re.M)
        for word in words[1:]:
            name, equals, _ = word.partition("=")
            if name not in (variables if equals else targets):
                raise DocsError(f"{command.place}: the Makefile has no {name}")
    elif "install" in words:
        check_requirements(command)
    for word in words:
        is_file = re.fullmatch(r"(tests|benchmarks|configs|studies)/[\w/]+\.(py|md|json)", word)
        if is_file and not (ROOT / word).exists():
            raise DocsError(f"{command.place}: {word} does not exist")


def check_requirements(command: Command) -> None:
    """Of `pip install`: files named by `-r` and extras of this project exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for before, word in zip(command.words, command.words[1:], strict=False):
        if before == "-r" and not (ROOT / word).is_file():
            raise DocsError(f"{command.place}: {word} does not exist")
        if own := re.match(r"(?:\.|mlra[-_]jax)\[([\w,-]+)\]", word):
            for extra in own[1].split(","):
                if extra not in project["optional-dependencies"]:
                    raise DocsError(f"{command.place}: pyproject.toml has no extra {extra}")


class _Parsed(Exception):
    """The flags were read."""


def check_flags(place: str, name: str, arguments: list[str]) -> None:
    """Has the command read its flags, and for training the settings of its config, and no more."""
    try:
        main = module(name)
    except ImportError as error:
        raise DocsError(f"{place}: python -m {name}: {error}") from None
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser, *given, **named):
        parse_args(parser, *given, **named)
        raise _Parsed

    left_out = [flag for word in arguments if word == "..." for flag in table.LEFT_OUT[name]]
    arguments = [_readable_config(word) for word in arguments if word != "..."] + left_out
    said = io.StringIO()
    ended = lambda *_, **__: 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.suppress(_Parsed))
        stack.enter_context(mock.patch.object(command_module, "run", ended))
        stack.enter_context(mock.patch.object(main, "run", ended, create=True))
        stack.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", parsed))
        stack.enter_context(mock.patch.object(sys, "argv", [name, *arguments]))
        stack.enter_context(contextlib.chdir(ROOT))
        try:
            main.main(*([arguments] if main.main.__code__.co_argcount else []))
        except SystemExit as stop:
            if stop.code:
                raise DocsError(f"{place}: {said.getvalue().strip()}") from None


def _readable_config(word: str) -> str:
    """A config that is the reader's own, or that reads a checkpoint, has the settings of all."""
    found = re.fullmatch(r"(--config=)?([\w./]+\.py)(:.*)?", word)
    if not found or (ROOT / found[2]).exists() and "fine_tune" not in word:
        return word
    return f"{found[1] or ''}configs/quickstart.py"


def check_python(block: Block) -> None:
    """It can be parsed, and what it imports of this project is there."""
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        raise DocsError(f"{block.place}: {error}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlra_jax"):
            try:
                room = importlib.import_module(node.module)
            except ImportError as error:
                if error.name and not error.name.startswith("mlra_jax"):
                    continue  # An extra that is not installed.
                raise DocsError(f"{block.place}: {error}") from None
            for name in (alias.name for alias in node.names):
                if not hasattr(room, name) and not _is_module(f"{node.module}.{name}"):
                    raise DocsError(f"{block.place}: {node.module} has no {name}")


def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def inline(page: Path):
    """(line, code) of the code inside of a page's sentences."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(r" *(```|~~~)", line):
            fenced = not fenced
        elif not fenced:
            for code in re.findall(r"`([^`]+)`", line):
                yield number, code


def inline_wrong(page: Path, settings: set[str], flags: set[str]) -> list[str]:
    """Modules, settings and flags in a page's sentences that do not exist."""
    wrong = []
    for number, code in inline(page):
        place = f"{page.name}:{number}"
        for name in re.findall(r"python -m ((?:mlra_jax|benchmarks|studies)[\w.]*)", code):
            if not _is_module(name.rstrip(".")):
                wrong.append(f"{place}: there is no module {name}")
        for setting in re.findall(r"--(?:no)?config\.([\w.]+)", code):
            known = settings | set(table.NO_SETTINGS)
            if setting not in known and not setting.isupper():
                wrong.append(f"{place}: there is no setting {setting}")
        for flag in re.findall(r"(?<![\w-])--([\w-]+)", code):
            other = "-" in flag or flag.startswith("xla") or flag in table.OTHER_FLAGS
            if not other and not {flag, flag.removeprefix("no")} & (flags | {"config"}):
                wrong.append(f"{place}: no command has a flag --{flag}")
    return wrong


def substituted(text: str) -> str:
    """As it runs: on tiny sizes."""
    for pattern, instead, _ in table.SUBSTITUTIONS:
        text = re.sub(pattern, instead, text)
    return text


def as_run(command: Command) -> tuple[str, list[str]]:
    """(module, arguments) of a command on tiny sizes."""
    name, arguments = ours(command)
    text = f"{name} {substituted(shlex.join(arguments))}"
    text += "".join(f" {flags}" for part, flags in table.APPENDED if re.match(part, text))
    return name, shlex.split(text)[1:]
