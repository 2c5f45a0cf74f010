"""The fenced blocks of README and docs, and the commands that stand in them."""

import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlra_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
_SCRIPTS = {"train.py": "mlra_jax.training", "decode.py": "mlra_jax.generation"}
# What the shell does by itself, or what only makes room for a command.
_SHELL = re.compile(
    r"(cd|export|set|unset|source|echo|if|then|else|fi|for|do|done|while|wait|exec)$|[(\[{]"
)
_FILES = ("mkdir", "cp", "mv", "ls", "cat", "head", "tail", "wc")


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    """Of the fence."""
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a block, without redirections and variables before it."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    @property
    def is_shell(self) -> bool:
        return _SHELL.match(self.words[0]) is not None

    @property
    def is_of_files(self) -> bool:
        """One that makes, copies or shows files, and that every system has."""
        return self.words[0] in _FILES


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks; one that is not closed reaches to the end, as on GitHub."""
    name = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if fence := re.match(r"( *)(`{3,}|~{3,})\s*(\S*)", line):
            indent, marks, language = fence.groups()
            held = []
            for _, inner in lines:
                if inner.strip() == marks:
                    break
                held.append(inner.removeprefix(indent))
            yield Block(name, number, language, "\n".join(held))


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block; of a `console` block those behind a `$`."""
    lines = block.text.splitlines()
    at = 0
    while at < len(lines):
        start, text = at, lines[at]
        if block.language == "console":
            if not text.startswith("$ "):
                at += 1
                continue
            text = text[2:]
        while True:
            at += 1
            words = None if text.endswith("\\") else _words(text)
            if words is not None or at == len(lines):
                break
            text = text.removesuffix("\\") + "\n" + lines[at]
        yield from _commands(block.page, block.line + 1 + start, words or [])


def _words(text: str) -> list[str] | None:
    """As the shell splits them; None inside of quotes."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError:
        return None


def _commands(page: str, line: int, words: list[str]) -> Iterator[Command]:
    held: list[str] = []
    redirected = False
    for word in [*words, ";"]:
        if redirected:
            redirected = False
        elif set(word) <= set("<>&") and set(word) & set("<>"):
            redirected = True
        elif set(word) <= set("|&;"):
            while held and re.match(r"[A-Za-z_]\w*=", held[0]):
                held.pop(0)
            if held:
                yield Command(page, line, tuple(held))
            held = []
        else:
            held.append(word)


def ours(command: Command) -> tuple[str, list[str]] | None:
    """(module, arguments) of this project's command that is started, maybe by another one."""
    for at, word in enumerate(command.words):
        rest, name = list(command.words[at + 1 :]), word.rpartition("/")[2]
        if name in COMMANDS:
            return COMMANDS[name][0], rest
        if re.fullmatch(r"python[\d.]*|\$\{?\w+\}?", name) and rest:
            if rest[0] == "-m" and re.match(r"(mlra_jax|benchmarks|studies)\b", rest[1]):
                return rest[1], rest[2:]
            if rest[0] in _SCRIPTS:
                return _SCRIPTS[rest[0]], rest[1:]
        if " " in word and re.search(r"python |mlra-", word):
            held = re.sub(r"^--[\w-]+=", "", word)
            for inner in _commands(command.page, command.line, _words(held) or []):
                if found := ours(inner):
                    return found
    return None


def module(name: str):
    """What `python -m NAME` runs."""
    found = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(found, "__path__") else found
