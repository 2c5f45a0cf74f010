"""Several prompts' text in order, JSON lines in and out."""

import json

import pytest

from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.generation.__main__ import follow, read_prompts
from mlra_jax.generation.texts import Printer, Recorder

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_text


def steps(*rows):
    """Lists of tokens, one a step, from each row's text; a row that is out of text has ended."""
    coded = [[*text.encode(), *[END] * 20] for text in rows]
    yield from map(list, zip(*coded, strict=False))


def test_each_prompt_is_whole_before_the_next(capsys):
    made = lambda: Printer(["a", "b\n", "c"], TOKENIZER)
    produced, _ = follow(steps("one\ntwo\n", "1\n2", "x"), made, END)
    assert produced == len("one\ntwo\n") + 1
    assert capsys.readouterr().out.splitlines() == [
        "[0] aone",
        "[0] two",
        "[1] b",
        "[1] 1",
        "[1] 2",
        "[2] cx",
    ]


def test_what_can_be_shown_does_not_wait(capsys):
    printer = Printer(["p", "q"], TOKENIZER)
    for token in b"a\nb":
        printer.push(0, token)
        printer.push(1, token)
    assert capsys.readouterr().out == "[0] pa\n"
    printer.end(1)
    assert capsys.readouterr().out == ""
    printer.end(0)
    printer.end(0)
    assert capsys.readouterr().out == "[0] b\n[1] qa\n[1] b\n"
    printer.close()
    assert capsys.readouterr().out == ""


def test_one_prompt_streams_character_by_character(capsys):
    printer = Printer(["p\n"], TOKENIZER)
    seen = [capsys.readouterr().out]
    for token in "ä\nx".encode():
        printer.push(0, token)
        seen.append(capsys.readouterr().out)
    assert seen == ["p\n", "", "ä", "\n", "x"]
    printer.push(0, 0xC3)
    printer.close()
    assert capsys.readouterr().out == "\ufffd\n"


def broken(*rows):
    yield from steps(*rows)
    raise KeyboardInterrupt


def test_interrupted_text_is_shown_and_an_interrupted_file_is_not_there(tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    for make in (
        lambda: Printer(["a", "b"], TOKENIZER),
        lambda: Recorder(["a", "b"], TOKENIZER, file),
    ):
        with pytest.raises(KeyboardInterrupt):
            follow(broken("1", "2"), make, None)
    out = capsys.readouterr().out
    assert out.startswith("[0] a1") and "[1] b2" in out
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_a_line_for_each_prompt(tmp_path):
    file = tmp_path / "out.jsonl"
    follow(steps("one\ntwo", "ä"), lambda: Recorder(["a\nb", "c"], TOKENIZER, file), END)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"prompt": "a\nb", "text": "one\ntwo", "tokens": list(b"one\ntwo")},
        {"prompt": "c", "text": "ä", "tokens": list("ä".encode())},
    ]


def test_prompts_with_newlines_come_from_json_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"two\\nlines"\n\n{"prompt": "of an object", "id": 3}\n')
    assert read_prompts([], str(file)) == ["two\nlines", "of an object"]
    for line in ('"open', "7", '""', "{}", '{"prompt": 1}', "plain text"):
        file.write_text(f'"one"\n\n{line}\n')
        with pytest.raises(ValueError, match=r"prompts.jsonl, line 3: give a JSON string or \{"):
            read_prompts([], str(file))
