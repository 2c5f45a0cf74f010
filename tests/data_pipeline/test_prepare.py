import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data import token_file
from mlra_jax.data.inputs import Rows, open_input
from mlra_jax.data.journal import one_tokenizer, tokenizer_of
from mlra_jax.data.prepare import _in_order, main, prepare
from mlra_jax.data.sources import load_source, pydoc_documents
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.extras import install_line
from mlra_jax.files import DestinationError, only_writer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """JSON lines and text in subfolders, a long document among short and empty ones."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(5)
    words = ["the", "thing", "é", "界", "other", "", "token\nline\n\n", "x"]
    text = lambda count: " ".join(generator.choice(words) for _ in range(count))
    documents = []
    for name, sizes in {"a/1.jsonl": [5, 0, 30_000, 40] * 3, "b.jsonl": [700] * 400}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        texts = [text(size) for size in sizes]
        path.write_text("\n\n".join(json.dumps({"body": item}) for item in texts) + "\n")
        documents += texts
    long = text(200_000)
    (folder / "c.txt").write_text(long)
    (folder / "d.txt").write_text("")
    return folder, [*documents, long]


def run(corpus, destination, tokenizer, *, workers=1, shard_tokens=100_000, **options):
    return prepare(
        open_input(str(corpus[0]), text_key="body"),
        destination,
        tokenizer=get_tokenizer(tokenizer),
        name="x",
        shard_tokens=shard_tokens,
        workers=workers,
        **options,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(corpus, destination, tokenizer, **options):
    flags = {
        "source": corpus[0],
        "destination": destination,
        "tokenizer": tokenizer,
        "name": "x",
        "text_key": "body",
        **options,
    }
    return [f"--{key}={value}" for key, value in flags.items()]


def test_shards_are_the_documents_each_begun_by_end_of_text(corpus, ranks_file, tmp_path):
    shards = run(corpus, tmp_path, ranks_file, validation_first_shard=True)
    tokenizer = get_tokenizer(ranks_file)
    expected = [
        token for text in corpus[1] for token in [tokenizer.end_of_text, *tokenizer.encode(text)]
    ]
    assert [path.name for path in shards[:2]] == ["x_val_000000.bin", "x_train_000001.bin"]
    arrays = [token_file.read(path) for path in shards]
    assert len(arrays) == -(-len(expected) // 100_000) > 5
    assert all(len(array) == 100_000 for array in arrays[:-1])
    assert np.array_equal(np.concatenate(arrays), expected)
    # What is written is what training reads.
    source = load_source(str(tmp_path), tokenizer=None, vocab_size=tokenizer.vocab_size)
    assert np.array_equal(source.validation[0].tokens, expected[:100_000])
    assert len(source.train) == len(shards) - 1


def test_text_for_validation_alone_is_refused_and_leaves_nothing(tmp_path):
    text, folder, tokenizer = tmp_path / "text.txt", tmp_path / "shards", get_tokenizer("bytes")
    text.write_text("few words")
    how = dict(tokenizer=tokenizer, name="x", validation_first_shard=True)
    with pytest.raises(ValueError, match="has 10 tokens, one shard of 100, .* smaller --shard_tok"):
        prepare(open_input(str(text)), folder, shard_tokens=100, **how)
    assert [*folder.glob("x*")] == []
    made = prepare(open_input(str(text)), folder, shard_tokens=6, **how)
    assert [path.name for path in made] == ["x_val_000000.bin", "x_train_000001.bin"]


@pytest.mark.parametrize("held", ["checkpoints/10/model", "experiment.json"])
def test_the_folder_of_a_run_is_no_destination(tmp_path, held):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("words")
    (run / held).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{run} is the folder of a run or a checkpoint; choose"):
        prepare(open_input(str(text)), run, tokenizer=get_tokenizer("bytes"), name="x")
    assert len([*run.iterdir()]) == 1


def test_workers_do_not_change_a_byte(corpus, ranks_file, tmp_path):
    for workers in (1, 3):
        run(corpus, tmp_path / str(workers), ranks_file, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_killed_run_goes_on_and_keeps_what_was_finished(corpus, ranks_file, tmp_path):
    # Many more shards than are waited for, so that the process is still at work when it is killed.
    run(corpus, tmp_path / "whole", ranks_file, shard_tokens=40_000)
    folder = tmp_path / "killed"
    flags = command(corpus, folder, ranks_file, shard_tokens=40_000, workers=2)
    kept = {}
    for least in (3, 20):
        process = subprocess.Popen(
            [sys.executable, "-m", "mlra_jax.data.prepare", *flags],
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        while process.poll() is None and len(list(folder.glob("x_*.bin"))) < least:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        for name, changed in kept.items():
            assert (folder / name).stat().st_mtime_ns == changed
        finished = json.loads((folder / "x_prepare.json").read_text())["shards"]
        names = [f"x_train_{number:06d}.bin" for number in range(len(finished))]
        kept = {name: (folder / name).stat().st_mtime_ns for name in names}
    assert len(kept) < len(list((tmp_path / "whole").glob("*.bin")))
    assert main(flags) == 0
    assert contents(folder) == contents(tmp_path / "whole")
    assert all((folder / name).stat().st_mtime_ns == changed for name, changed in kept.items())
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    assert main(flags) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}


def test_going_on_from_every_shard_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("mlra_jax.data.prepare._BATCH_CHARACTERS", 90)

    class Stop(Exception):
        pass

    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": "ab" * size}) + "\n" for size in range(40)]
    (folder / "a.jsonl").write_text("".join(lines[:20]))
    (folder / "b.jsonl").write_text("".join(lines[20:]))
    (folder / "c.txt").write_text("tail" * 50)
    write = lambda destination: prepare(
        open_input(str(folder)),
        destination,
        tokenizer=get_tokenizer("bytes"),
        name="x",
        shard_tokens=100,
    )
    shards = write(tmp_path / "whole")
    real = token_file.write

    def second_write_fails():
        calls = itertools.count(1)

        def interrupted(path, chunks):
            if next(calls) == 2:
                raise Stop
            return real(path, chunks)

        return interrupted

    for _ in shards[:-1]:
        monkeypatch.setattr(token_file, "write", second_write_fails())
        with pytest.raises(Stop):
            write(tmp_path / "steps")
    write(tmp_path / "steps")
    assert contents(tmp_path / "steps") == contents(tmp_path / "whole")


class Interrupted(Exception):
    pass


def interrupted_write(after_chunks):
    """`token_file.write` that fails once it has been given so many chunks in all."""
    real, left = token_file.write, [after_chunks]

    def write(path, chunks):
        def counted():
            for chunk in chunks:
                left[0] -= 1
                if left[0] < 0:
                    raise Interrupted
                yield chunk

        return real(path, counted())

    return write


@st.composite
def corpora(draw):
    """Files by name: JSON lines of documents, and texts that are cut into many pieces."""
    words = st.text("ab é界\n", max_size=12)
    lines = draw(st.lists(words, max_size=6))
    texts = draw(st.lists(words, max_size=5))
    long = "".join(f"{word}x\ny" for word in draw(st.lists(words, min_size=1, max_size=8)))
    files = {
        "a.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in lines),
        "b/c.txt": long,
        "d.ndjson": "\n \n".join(json.dumps({"n": 1, "text": t}) for t in texts),
        "e.txt": "x" + draw(words),
    }
    return files, [*lines, long, *texts, files["e.txt"]]


@given(
    corpus=corpora(),
    shard=st.integers(5, 60),
    piece=st.integers(1, 8),
    batch=st.integers(1, 30),
    workers=st.integers(1, 3),
    stops=st.lists(st.integers(0, 12), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_any_input_interrupted_anywhere_gives_the_same_bytes(
    tmp_path_factory, corpus, shard, piece, batch, workers, stops
):
    """Also inside a document of many pieces, of which a batch holds one or some."""
    files, documents = corpus
    folder = tmp_path_factory.mktemp("prepare")
    for name, text in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    expected = [token for text in documents for token in (256, *text.encode())]

    def write(name, workers=1):
        return prepare(
            open_input(str(folder / "in")),
            folder / name,
            tokenizer=get_tokenizer("bytes"),
            name="x",
            shard_tokens=shard,
            workers=workers,
        )

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("mlra_jax.data.text_reader._PIECE_CHARACTERS", piece)
        monkeypatch.setattr("mlra_jax.data.prepare._BATCH_CHARACTERS", batch)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody cuts the power here
        arrays = [token_file.read(path) for path in write("whole")]
        assert np.concatenate(arrays).tolist() == expected
        assert [len(a) for a in arrays[:-1]] == [shard] * (len(arrays) - 1)
        assert 1 <= len(arrays[-1]) <= shard
        for stop in stops:
            with monkeypatch.context() as once, contextlib.suppress(Interrupted):
                once.setattr(token_file, "write", interrupted_write(stop))
                write("steps", workers)
            left = {path.name for path in (folder / "steps").iterdir()} - {"x_prepare.json"}
            assert left == {f"x_train_{i:06d}.bin" for i in range(len(left))}
        write("steps", workers)
        assert contents(folder / "steps") == contents(folder / "whole")


def test_going_on_reads_nothing_that_lies_before(tmp_path, monkeypatch):
    """One document of many pieces: the journal's place is inside it, and reading begins there."""
    monkeypatch.setattr("mlra_jax.data.text_reader._PIECE_CHARACTERS", 10)
    monkeypatch.setattr("mlra_jax.data.prepare._BATCH_CHARACTERS", 1)
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    asked = []

    def write():
        source = open_input(str(tmp_path / "a.txt"))
        pieces = source.pieces
        monkeypatch.setattr(source, "pieces", lambda place: asked.append(place) or pieces(place))
        return prepare(
            source,
            tmp_path / "out",
            tokenizer=get_tokenizer("bytes"),
            name="x",
            shard_tokens=300,
        )

    with monkeypatch.context() as once:
        once.setattr(token_file, "write", interrupted_write(30))
        with pytest.raises(Interrupted):
            write()
    journal = json.loads((tmp_path / "out/x_prepare.json").read_text())
    assert journal["shards"] == [300] and journal["complete"] is False
    file, offset = journal["position"]
    # The tokens of a text of bytes lie where its bytes do, one further for end-of-text.
    assert file == 0 and 250 < offset < 299 and offset + journal["used"] + 1 == 300
    shards = write()
    assert asked == [(0, 0), (0, offset)]
    journal = json.loads((tmp_path / "out/x_prepare.json").read_text())
    assert journal["complete"] is True and journal["shards"] == [300, 300, len(text) - 599]
    write()
    assert len(asked) == 2, "what is complete is not read again"
    tokens = np.concatenate([token_file.read(path) for path in shards])
    assert tokens.tolist() == [256, *text.encode()]


def small(tmp_path, **changes):
    """Prepares two documents; `changes` to the arguments of `prepare`."""
    path = tmp_path / "in.jsonl"
    if not path.exists():
        path.write_text('{"text": "ab", "other": "x"}\n{"text": "cde", "other": "y"}\n')
    source = open_input(str(path), text_key=changes.pop("text_key", "text"))
    arguments = dict(tokenizer=get_tokenizer("bytes"), name="x", shard_tokens=4) | changes
    return prepare(source, tmp_path / "out", **arguments)


@pytest.mark.parametrize(
    "key, value, field",
    [
        ("text_key", "other", "input"),
        ("shard_tokens", 5, "shard_tokens"),
        ("validation_first_shard", True, "validation_first_shard"),
    ],
)
def test_each_setting_of_what_was_begun_is_compared(tmp_path, key, value, field):
    names = [path.name for path in small(tmp_path)]
    assert names == ["x_train_000000.bin", "x_train_000001.bin"]
    before = contents(tmp_path / "out")
    assert json.loads(before["x_prepare.json"]).keys() == {
        "settings",
        "shards",
        "position",
        "used",
        "complete",
    }
    with pytest.raises(ValueError, match=f"was begun with another {field} "):
        small(tmp_path, **{key: value})
    assert contents(tmp_path / "out") == before
    # Under another name it is another set beside the first, and workers may be others.
    small(tmp_path, **{key: value}, name="y")
    small(tmp_path, workers=3)
    assert before.items() <= contents(tmp_path / "out").items()


def test_a_shard_of_another_length_is_not_the_journals(tmp_path):
    first, _ = small(tmp_path)
    token_file.write(first, np.arange(3))
    with pytest.raises(ValueError, match=f"{first} is not the shard that .*; delete both"):
        small(tmp_path)


def test_an_input_is_known_by_names_sizes_times_and_field(tmp_path):
    def identity(folder, **options):
        return open_input(str(tmp_path / folder), **options).identity

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("1.txt", "2.txt"):
            (tmp_path / folder / name).write_text("text")
            os.utime(tmp_path / folder / name, ns=(1, 10**9 + 1))
    first = identity("a")
    assert identity("b") == first, "a moved folder is the same input"
    seen = {first, identity("a", text_key="body"), identity("a/1.txt")}
    os.utime(tmp_path / "b/1.txt", ns=(1, 10**9 + 2))
    seen.add(identity("b"))
    (tmp_path / "b/1.txt").write_text("texts")
    os.utime(tmp_path / "b/1.txt", ns=(1, 10**9 + 1))
    seen.add(identity("b"))
    (tmp_path / "a/2.txt").rename(tmp_path / "a/3.txt")
    seen.add(identity("a"))
    assert len(seen) == 6
    source = open_input(str(tmp_path / "b"))
    assert (source.size, source.unit) == (9, "B")
    assert [source.done(place) for place in ((0, 0), (0, 3), (1, 0), (1, 2))] == [0, 3, 5, 7]


def test_pydoc_is_an_input():
    source, documents = open_input("pydoc"), pydoc_documents()
    assert source.identity == open_input("pydoc").identity and source.size == len(documents)
    pieces = list(source.pieces((0, 0)))
    assert [piece.text for piece in pieces] == documents
    assert all(piece.begins_document for piece in pieces)


@pytest.mark.parametrize("at_once", [1, 3, 256])
def test_rows_are_read_from_any_place(monkeypatch, at_once):
    monkeypatch.setattr("mlra_jax.data.inputs._ROWS_READ_AT_ONCE", at_once)
    texts, asked = [f"row {i}" for i in range(10)], []
    source = Rows(lambda a, b: asked.append((a, b)) or texts[a:b], 10, "me")
    for start in range(11):
        asked.clear()
        pieces = list(source.pieces((0, start)))
        assert pieces == [((0, i), True, texts[i]) for i in range(start, 10)]
        assert [stop for _, stop in asked[:-1]] == [start for start, _ in asked[1:]]
        assert all(0 < stop - start <= at_once for start, stop in asked)
        assert source.done((0, start)) == start
    texts[7] = None
    with pytest.raises(ValueError, match="row 7 of the data set holds no text"):
        list(source.pieces((0, 2)))


def test_what_is_read_ahead_is_bounded_and_stays_in_order():
    read = []
    items = (read.append(i) or i for i in range(50))
    with ThreadPoolExecutor(4) as pool:
        results = _in_order(pool, lambda i: (time.sleep(0.001 * (i % 3)), i)[1], items, 5)
        for expected in range(50):
            assert next(results) == expected
            assert len(read) <= expected + 6
        assert next(results, None) is None


class Columns(dict):
    """Stands for a data set of the hub: columns by name, rows by slice."""

    column_names = property(list)

    def __getitem__(self, rows):
        return {name: column[rows] for name, column in self.items()}

    def __len__(self):
        return len(next(iter(self.values())))


def test_a_data_set_of_the_hub_by_name_configuration_and_split(tmp_path, monkeypatch, capsys):
    """The library is not needed for this: a stand-in is asked for what the command names."""
    asked = []

    def load_dataset(repository, configuration, split):
        asked.append((repository, configuration, split))
        if repository == "gone":
            raise RuntimeError("no such\n  data set")
        return Columns(text=["ab", "c"], body=["d", "e"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    flags = lambda source: [f"--source={source}", f"--destination={tmp_path}", "--tokenizer=bytes"]
    assert main([*flags("hf:org/name.v1:part"), "--split=test", "--text_key=body"]) == 0
    assert capsys.readouterr().out == f"4 tokens in 1 shards of {tmp_path}\n"
    assert token_file.read(tmp_path / "name_train_000000.bin").tolist() == [256, 100, 256, 101]
    assert open_input("hf:org/name").size == 2
    assert asked == [("org/name.v1", "part", "test"), ("org/name", None, "train")]
    assert "data set gone: no such data set" in failure(capsys, flags("hf:gone"))
    message = failure(capsys, [*flags("hf:a"), "--text_key=x"])
    assert "data set a has no column 'x' but text, body; name it with --text_key" in message
    identities = [
        open_input(source, **options).identity
        for source, options in (
            ("hf:a", {}),
            ("hf:b", {}),
            ("hf:a:c", {}),
            ("hf:a", {"text_key": "body"}),
            ("hf:a", {"split": "test"}),
        )
    ]
    assert len(set(identities)) == len(identities)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert f"hf:a needs the datasets library: {install_line('datasets')}" in failure(
        capsys, flags("hf:a")
    )


def test_the_command_names_its_files_and_says_what_it_wrote(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("abc")
    flags = [f"--source={tmp_path / 'book.txt'}", f"--destination={tmp_path / 'out'}"]
    flags += ["--tokenizer=bytes", "--shard_tokens=2", "--validation_first_shard", "--workers=2"]
    assert main(flags) == 0
    assert capsys.readouterr().out == f"4 tokens in 2 shards of {tmp_path / 'out'}\n"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["book_prepare.json", "book_train_000001.bin", "book_val_000000.bin"]


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(path, chunks):
        raise KeyboardInterrupt

    monkeypatch.setattr(token_file, "write", interrupt)
    (tmp_path / "a.txt").write_text("abc")
    flags = [f"--source={tmp_path / 'a.txt'}", f"--destination={tmp_path / 'out'}"]
    assert main([*flags, "--tokenizer=bytes"]) == 130
    assert "the same command goes on after the last shard" in capsys.readouterr().err


def test_folders_without_text_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.hidden").write_text("x")
    with pytest.raises(ValueError, match="folder .*empty has no files"):
        open_input(str(tmp_path / "empty"))
    token_file.write(tmp_path / "empty/a.bin", np.arange(3))
    with pytest.raises(ValueError, match="a.bin is a token file already; give text"):
        open_input(str(tmp_path / "empty"))


def test_token_files_tell_the_tokenizer_that_they_were_prepared_with(ranks_file, tmp_path):
    (tmp_path / "text.txt").write_text("the thing and the other thing")
    made = {}
    for name, tokenizer in (("a", get_tokenizer("bytes")), ("b", get_tokenizer(ranks_file))):
        how = dict(name=name, shard_tokens=10, validation_first_shard=True)
        source = open_input(str(tmp_path / "text.txt"))
        made[name] = prepare(source, tmp_path / name, tokenizer=tokenizer, **how)
        assert len(made[name]) > 1
        assert {tokenizer_of(path) for path in made[name]} == {tokenizer.name}
        assert one_tokenizer(made[name]) == one_tokenizer(made[name], tokenizer.name)
    last = made["a"][-1]
    moved, beyond = tmp_path / last.name, last.with_name("a_train_000099.bin")
    for path in (moved, beyond, last.with_name("a.bin"), last.with_name("x_train_000000.bin")):
        shutil.copy(last, path)
        assert tokenizer_of(path) is None and one_tokenizer([path], "gpt2") == "gpt2"
    ranks = get_tokenizer(ranks_file).name
    both = (
        f"{made['b'][0]} was prepared with tokenizer {ranks}, and that of {made['a'][0]} is bytes"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(both)}: .*; prepare all with one$"):
        one_tokenizer([made["a"][0], moved, made["b"][0]])
    with pytest.raises(ValueError, match="tokenizer bytes, and data.tokenizer is gpt2: .*; do$"):
        one_tokenizer([moved, last], "gpt2", "data.tokenizer", "do")
    for damage in ("{", "[]", '{"settings": {"tokenizer": "bytes"}}'):
        (tmp_path / "a" / "a_prepare.json").write_text(damage)
        with pytest.raises(ValueError, match=f"a_prepare.json is damaged, .*{last.name}"):
            tokenizer_of(last)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shard_tokens": 0}, "shard_tokens must be 1 to .*, not 0"),
        ({"shard_tokens": 2**31}, "shard_tokens must be 1 to .*, not 2147483648"),
        ({"workers": 0}, "workers must be positive, not 0"),
        ({"name": ""}, "'' cannot begin a file name"),
        ({"name": "a/b"}, "'a/b' cannot begin a file name"),
        ({"name": ".a"}, "'.a' cannot begin a file name"),
    ],
)
def test_numbers_and_names_that_cannot_be(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **change)
    assert not (tmp_path / "out").exists()


def failure(capsys, flags):
    capsys.readouterr()
    assert main(flags) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.split("\n") if line and "tokenising" not in line]
    assert len(lines) == 1 and captured.out == ""
    return lines[0]


def test_faults_are_one_line_and_leave_finished_shards_alone(corpus, ranks_file, tmp_path, capsys):
    done = tmp_path / "done"
    run(corpus, done, ranks_file)
    before = contents(done)
    flags = lambda **options: (
        command(corpus, done, ranks_file, shard_tokens=100_000)
        + [f"--{key}={value}" for key, value in options.items()]
    )
    assert "begun with another shard_tokens" in failure(capsys, flags(shard_tokens=1000))
    assert "begun with another tokenizer" in failure(capsys, flags(tokenizer="bytes"))
    assert "begun with another input" in failure(capsys, flags(text_key="text"))
    assert "no source" in failure(capsys, flags(source=tmp_path / "absent"))
    assert "token file already" in failure(capsys, flags(source=done / "x_train_000000.bin"))
    assert "shard_tokens must be" in failure(capsys, flags(shard_tokens=0))
    assert "workers must be" in failure(capsys, flags(workers=0))
    assert "cannot begin a file name" in failure(capsys, flags(name="../x"))
    with pytest.raises(SystemExit):
        main([*flags(), "--workers=x"])
    error = capsys.readouterr().err
    assert "invalid int value: 'x'" in error and error.count("\n") == 1
    assert contents(done) == before
    (done / "x_prepare.json").unlink()
    assert "is there already" in failure(capsys, flags())
    (done / "x_prepare.json").write_text("{")
    assert "is damaged" in failure(capsys, flags())


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\nnot json\n', "line 2 at byte 14: no JSON"),
        ('{"text": "a"}\n  \r\nnot json\n', "line 3 at byte 18: no JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', "line 2 at byte 14: no field 'text'"),
        ('{"text": 3}\n', "holds no text"),
        ("[1]\n", "no field"),
        ("\n", "no text in the source"),
    ],
)
def test_bad_json_lines(tmp_path, capsys, content, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    flags = [f"--source={path}", f"--destination={tmp_path / 'out'}", "--tokenizer=bytes"]
    assert message in failure(capsys, flags)
    assert not list((tmp_path / "out").iterdir())
    # Nothing is in the way of the mended input.
    path.write_text('{"text": "a"}\n')
    assert main(flags) == 0


def test_a_damaged_finished_shard_is_not_taken_for_whole(corpus, ranks_file, tmp_path, capsys):
    shards = run(corpus, tmp_path, ranks_file)
    with open(shards[1], "r+b") as file:
        file.truncate(5000)
    line = failure(capsys, command(corpus, tmp_path, ranks_file, shard_tokens=100_000))
    assert str(shards[1]) in line and "truncated" in line


def test_two_writers_do_not_meet(corpus, ranks_file, tmp_path):
    with only_writer(tmp_path / ".lock", tmp_path):
        with pytest.raises(DestinationError, match=f"process {os.getpid()} on .* is writing it"):
            run(corpus, tmp_path, ranks_file)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert not list(tmp_path.iterdir())


def test_a_writer_keeps_others_out_while_it_writes(tmp_path):
    met = []

    class Meeting(Rows):
        def pieces(self, position):
            with pytest.raises(DestinationError, match=f"process {os.getpid()} on .* is writing"):
                small(tmp_path, name="y")
            met.append(True)
            yield from super().pieces(position)

    texts = ["ab", "c"]
    source = Meeting(lambda start, stop: texts[start:stop], 2, "me")
    prepare(source, tmp_path / "out", tokenizer=get_tokenizer("bytes"), name="x")
    assert met
    # Afterwards the folder is free again.
    small(tmp_path, name="y")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_with_a_mark_and_any_line_end(tmp_path, end, mark):
    texts = ["a", "b\u2028c", "d\x85\u2029", "\ufeff"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "in.jsonl"
    path.write_bytes((mark + end.join(lines) + end + end + "{").encode())
    pieces = open_input(str(path)).pieces((0, 0))
    seen = [next(pieces) for _ in texts]
    assert [piece.text for piece in seen] == texts and seen[0].position == (0, 0)
    with pytest.raises(ValueError, match=r"in.jsonl, line 6 at byte \d+: no JSON$"):
        next(pieces)
    for i, piece in enumerate(seen):
        assert next(open_input(str(path)).pieces(piece.position)) == seen[i]


def test_a_fault_behind_finished_shards_leaves_them_and_their_journal(tmp_path, monkeypatch):
    monkeypatch.setattr("mlra_jax.data.prepare._BATCH_CHARACTERS", 1)
    lines = "".join(f'{{"text": "{i:03}"}}\n' for i in range(20))
    (tmp_path / "in.jsonl").write_text(lines + "no json\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="line .* at byte 320: no JSON"):
            small(tmp_path, shard_tokens=10)
        left = contents(tmp_path / "out")
        assert "x_prepare.json" in left and "x_train_000002.bin" in left


def test_a_vocabulary_that_does_not_fit_16_bits_is_refused(corpus, tmp_path):
    class Large:
        name, vocab_size, end_of_text = "large", 65537, 65536

    with pytest.raises(ValueError, match="tokenizer large has 65537 ids, more than the 65536"):
        prepare(open_input(str(corpus[0])), tmp_path / "out", tokenizer=Large(), name="x")
    assert not (tmp_path / "out").exists()
    # The largest that fits, and the largest shard.
    Large.vocab_size, Large.end_of_text = 65536, 65535
    Large.encode_array = lambda self, text: np.full(len(text), 65534, np.uint32)
    (shard,) = small(tmp_path, tokenizer=Large(), shard_tokens=2**31 - 1)
    assert token_file.read(shard).tolist() == [65535, *[65534] * 2, 65535, *[65534] * 3]


@pytest.mark.parametrize(
    "name, there, blocks",
    [
        ("x", "x_val_000007.bin", True),
        ("x", "x_train_000000.bin", True),
        ("a+b", "a+b_train_000000.bin", True),
        ("x.y", "xzy_train_000000.bin", False),
        ("x", "yx_train_000000.bin", False),
        ("x", "x_test_000000.bin", False),
        ("x", "x_train_000000.bin.txt", False),
    ],
)
def test_shards_without_a_journal_are_not_overwritten(tmp_path, name, there, blocks):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_text("mine")
    if blocks:
        with pytest.raises(FileExistsError, match="is there already; take another destination"):
            small(tmp_path, name=name)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [there]
    else:
        assert len(small(tmp_path, name=name)) == 2
    assert (tmp_path / "out" / there).read_text() == "mine"


def test_a_hugging_face_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"document {number} é" * (number % 5) for number in range(600)]
    (tmp_path / "set").mkdir()
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "set" / "train.jsonl").write_text(lines)
    shards = prepare(
        open_input(f"hf:{tmp_path / 'set'}", text_key="body"),
        tmp_path / "out",
        tokenizer=get_tokenizer("bytes"),
        name="x",
        shard_tokens=3000,
    )
    tokens = np.concatenate([token_file.read(path) for path in shards])
    assert tokens.tolist() == [token for text in texts for token in [256, *text.encode()]]
    with pytest.raises(ValueError, match="no column 'text' but body"):
        open_input(f"hf:{tmp_path / 'set'}")
