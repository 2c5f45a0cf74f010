"""Damaged input files by the thousand: each is read, or refused in one line, soon.

    python -m benchmarks.fuzz_inputs [--count=5000] [--seed=0]

Text, JSON lines and arrays, compressed files, token files and prompt files are made, damaged at
random and read as the commands read them. Said at the end: how many were read and refused, the
longest time for one, and how far the memory grew beyond the largest file. What does not end in one
of the two ways stays in the folder, and the exit code is 1.
"""

import argparse
import collections
import gzip
import json
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlra_jax.data import token_file
from mlra_jax.data.inputs import open_input
from mlra_jax.data.sources import Segment, Windows, load_source
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.generation.__main__ import read_prompts

SECONDS = 20
MEMORY = 300 << 20
VOCABULARY = 300
_SCRAPS = (
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\0" * 40, b"\r", b"\r\n", b"\n\n", b"\x0c",
    "\u2028".encode(), "\U0001f600".encode(), b"{", b"}", b"[" * 3000, b'{"text":' * 2000, b"]",
    b'"', b",", b"\\u", b"\\ud800", b'{"text": 1}', b'{"text": "x"}\n', b"[[", b"1e999", b"NaN",
    b"1" * 5000, b"PAR1", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x80\x02}q",
    b" " * 70_000, b"\x88\xd8\x34\x01", b"\xa1\xd9\x34\x01\x07\0\0\0", b"\xff" * 8,
)  # fmt: skip


class Hung(Exception):
    """A file that takes more than `SECONDS`."""


def make(rng: np.random.Generator) -> tuple[str, bytes]:
    """A file's name and content: something valid, then damaged."""
    kind = rng.choice(["text", "lines", "array", "tokens", "prompts"])
    words = [
        "".join(map(chr, rng.integers(32, rng.choice([127, 1000, 60_000]), rng.integers(1, 12))))
        .encode("utf-8", "replace")
        .decode()
        for _ in range(rng.integers(1, 60))
    ]
    text = str(rng.choice([" ", "\n", "\r\n", "\n\n", ""])).join(words)
    values = [{"text": word, "n": len(word)} for word in words]
    content, names = {
        "text": (text.encode(), ["a.txt", "a", "a.md", "a.json"]),
        "lines": (
            "\n".join(map(json.dumps, values)).encode(),
            ["a.jsonl", "A.JSONL", "a.json", "a.txt"],
        ),
        "array": (
            json.dumps(values, indent=int(rng.integers(0, 3)) or None).encode(),
            ["a.json", "a.txt", "a.jsonl"],
        ),
        "tokens": (_tokens(rng), ["a.bin", "A.BIN", "a.txt"]),
        "prompts": (text.encode(), ["prompts.txt"]),
    }[str(kind)]
    content = content * int(rng.choice([1, 1, 1, 40]))
    before = rng.random() < 0.5
    if before:
        content = _damage(rng, content)
    name = str(rng.choice(names))
    if rng.random() < 0.2:
        # Also of what is small only while it is compressed.
        much = b"\n" * (3 << 20) if rng.random() < 0.1 else b""
        content, name = gzip.compress(content + much, 1), f"{name}.gz"
    return name, content if before else _damage(rng, content)


def _tokens(rng: np.random.Generator) -> bytes:
    magic, version, dtype = ((20240520, 1, "<u2"), (20240801, 7, "<u4"))[rng.integers(2)]
    tokens = rng.integers(0, VOCABULARY + rng.integers(2), rng.integers(0, 400)).astype(dtype)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) + int(rng.choice([0, 0, 0, -1, 1, 2**31 - 500]))
    return (header.tobytes() if rng.random() < 0.8 else b"") + tokens.tobytes()


def _damage(rng: np.random.Generator, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.integers(0, 5)):
        place = int(rng.integers(0, len(data) + 1))
        match rng.integers(6):
            case 0:
                del data[place:]
            case 1:
                del data[place : place + int(rng.integers(1, 50))]
            case 2:
                data[place:place] = _SCRAPS[rng.integers(len(_SCRAPS))]
            case 3:
                data[place : place + 4] = rng.bytes(4)
            case 4:
                data[place:place] = data[: int(rng.integers(0, 200))]
            case 5 if place < len(data):
                data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def readers(path: Path) -> list[Callable[[], object]]:
    """The ways in which commands read a file of this name."""
    if token_file.is_named(path):
        return [lambda f=f: _read_tokens(path, f) for f in token_file.FORMATS]
    tokenizer = get_tokenizer("bytes")
    return [
        lambda: _prepare(path),
        lambda: load_source(str(path), tokenizer=tokenizer, vocab_size=VOCABULARY),
        lambda: read_prompts([], str(path)),
    ]


def _read_tokens(path: Path, token_format: str) -> None:
    source = load_source(
        str(path), tokenizer=None, vocab_size=VOCABULARY, token_format=token_format
    )
    windows = Windows([Segment("x", part.tokens) for part in source.train], 8, VOCABULARY)
    for index in range(len(windows)):
        windows[index]


def _prepare(path: Path) -> None:
    """Reads all, and once more from a place in the middle: the same must come."""
    source = open_input(str(path))
    pieces = list(source.pieces((0, 0)))
    middle = len(pieces) // 2
    if pieces and list(source.pieces(pieces[middle].position)) != pieces[middle:]:
        raise AssertionError("read on from the middle, it is another text")


def outcome(read: Callable[[], object]) -> str:
    """`read`, `refused`, or what else happened."""

    def hung(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        read()
        return "read"
    except (ValueError, OSError) as error:
        return "refused" if str(error) and "\n" not in str(error) else f"lines: {error!r}"
    except Hung:
        return f"hung: more than {SECONDS} s"
    except Exception as error:
        return f"trace: {error!r}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def memory() -> int:
    """The most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fuzz(
    count: int, seed: int, folder: Path, say: Callable[[str], object] = print
) -> tuple[collections.Counter, float, int]:
    """Makes and reads so many files.

    Returns:
      How often each outcome came, the longest seconds of one file, and the bytes by which the
      memory grew beyond the largest file.
    """
    outcomes, longest, largest, begin = collections.Counter(), 0.0, 0, memory()
    for number in range(count):
        name, content = make(np.random.default_rng([seed, number]))
        path = folder / f"{number}_{name}"
        path.write_bytes(content)
        largest, started = max(largest, len(content)), time.perf_counter()
        found = [outcome(read) for read in readers(path)]
        longest = max(longest, time.perf_counter() - started)
        outcomes.update(each.partition(":")[0] for each in found)
        wrong = [each for each in found if each not in ("read", "refused")]
        if wrong:
            say(f"{path}: {wrong[0][:300]}")
        else:
            path.unlink()
    return outcomes, longest, memory() - begin - largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    outcomes, longest, grown = fuzz(flags.count, flags.seed, folder)
    print(
        f"{flags.count} files: {dict(outcomes)}; at most {longest:.2f} s a file, memory grew by "
        f"{max(grown, 0) >> 20} MiB beyond the largest"
    )
    if set(outcomes) <= {"read", "refused"} and grown <= MEMORY:
        folder.rmdir()
        return 0
    print(f"see {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
