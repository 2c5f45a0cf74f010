"""Damaged files, a few hundred of those that `python -m benchmarks.fuzz_inputs` makes."""

import gzip

import numpy as np
import pytest

from benchmarks import fuzz_inputs
from mlra_jax.data.documents import read_documents
from mlra_jax.data.sources import load_source
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.generation.__main__ import read_prompts

MIB = 1 << 20


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    said = []
    outcomes, longest, grown = fuzz_inputs.fuzz(300, 7, tmp_path, said.append)
    assert set(outcomes) == {"read", "refused"} and not said
    assert min(outcomes.values()) > 100 and longest < fuzz_inputs.SECONDS
    assert grown < fuzz_inputs.MEMORY and not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_reader_is_noticed():
    def fail(error):
        raise error

    assert fuzz_inputs.outcome(lambda: None) == "read"
    assert fuzz_inputs.outcome(lambda: fail(ValueError("one line"))) == "refused"
    assert fuzz_inputs.outcome(lambda: fail(ValueError("two\nlines"))).startswith("lines")
    assert fuzz_inputs.outcome(lambda: fail(KeyError("x"))).startswith("trace")
    seen = [fuzz_inputs.make(np.random.default_rng(n)) for n in range(200)]
    assert {name.lower().rpartition(".")[2] for name, _ in seen} >= {"txt", "jsonl", "bin", "gz"}


# Small files that ask for much memory: what they hold, and what is said.
GREEDY = {
    "a.jsonl": (b'{"text": "a", "b": [' + b"[]," * (3 * MIB) + b"[]]}", "values in a document"),
    "b.jsonl": (b'{"text": "' + b"x" * (40 * MIB) + b'"}', "longer than 32 MiB"),
    "c.json": (b'[{"text": "' + b"x" * (40 * MIB) + b'"}]', "byte 1: no JSON"),
    "d.json": (b'[{"text": [' + b"{}," * (4 * MIB), "byte 1: more than .* values"),
    "e.jsonl": (b" " * (40 * MIB), "longer than 32 MiB"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_little_that_unpacks_to_much_is_refused(tmp_path, name):
    content, message = GREEDY[name]
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(content, 1))
    before = fuzz_inputs.memory()
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents(path, "text"))
    assert "\n" not in str(error.value) and path.stat().st_size < MIB
    # What the test itself holds is counted before.
    assert fuzz_inputs.memory() - before < fuzz_inputs.MEMORY


def test_text_that_unpacks_to_much_is_prepared_not_held(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a line of text\n" * (5 * MIB), 1))
    with pytest.raises(ValueError, match="holds more than 64 Mi characters; .*data.prepare --sou"):
        load_source(str(path), tokenizer=get_tokenizer("bytes"), vocab_size=300)
    with pytest.raises(ValueError, match="more than 65,536 prompts or 64 Mi characters; .*parts"):
        read_prompts([], str(path))


def test_a_large_document_that_is_text_is_read(tmp_path):
    path = tmp_path / "a.json"
    texts = ['"quoted", [text]. ' * 20_000, "x" * (9 * MIB), "last"]
    lines = "".join(f"{v}\n" for v in map(fuzz_inputs.json.dumps, ({"text": t} for t in texts)))
    for content in (lines, "[" + lines.replace("}\n{", "},{") + "]"):
        path.write_text(content)
        assert [part.text for part in read_documents(path, "text")] == texts
