import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mlra_jax.data import token_file
from mlra_jax.data.prepare import main, open_input, prepare
from mlra_jax.data.sources import load_source
from mlra_jax.data.tokenizers import get_tokenizer


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
        ('{"text": "a"}\nnot json\n', "line at byte 14: no JSON"),
        ('{"text": "a"}\n{"body": "b"}\n', "line at byte 14: no field 'text'"),
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
    import fcntl

    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="another process is preparing"):
        run(corpus, tmp_path, ranks_file)
    os.close(descriptor)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_does_not_fit_16_bits_is_refused(corpus, tmp_path):
    class Large:
        name, vocab_size, end_of_text = "large", 65537, 65536

    with pytest.raises(ValueError, match="tokenizer large has 65537 ids, more than the 65536"):
        prepare(open_input(str(corpus[0])), tmp_path / "out", tokenizer=Large(), name="x")
    assert not (tmp_path / "out").exists()


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
