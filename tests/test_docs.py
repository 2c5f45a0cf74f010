"""Every block of README and docs is run by `make docs` or listed with its reason; nothing rots."""

import contextlib
import dataclasses
import io
import re

import pytest

from mlra_jax.__main__ import COMMANDS
from mlra_jax.training.reference import all_settings
from studies.settings import Study
from tests.docs import checking, table
from tests.docs.blocks import ROOT, blocks, commands, module, ours, pages
from tests.docs.checking import DocsError
from tests.docs.running import Done, run_block

PAGES = [path.relative_to(ROOT).as_posix() for path in pages()]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_can_run_or_says_why_not(page):
    for block in blocks(ROOT / page):
        checking.check_block(block)


def test_sentences_name_what_exists():
    settings = {x.name for section in all_settings().values() for x in section}
    settings |= {field.name for field in dataclasses.fields(Study)}
    flags = set()
    for name, _ in COMMANDS.values():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            module(name).main(["--help"])
        flags |= set(re.findall(r"--(\w+)", out.getvalue()))
    for path in [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("studies/*.py")]:
        flags |= set(re.findall(r'"--(\w+)"', path.read_text()))
    wrong = [line for page in PAGES for line in checking.inline_wrong(ROOT / page, settings, flags)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "training",
            "--config.mesh.data=4",
            "the mesh data=4 x tensor=4 needs 16 devices and there",
        ),
        ("training", "--config.data.global_batch=15", "data.global_batch=15 does not divide over "),
        (
            "training",
            "--config.model.vocab_size=128",
            "tokenizer bytes has 257 ids, more than the model's vocab_size 128",
        ),
        ("training", "--config.lr=1", "unknown setting --config.lr; did you mean "),
        (
            "training",
            "--workdir=s3://b/x",
            "s3://b/x is an address that is not served (gs:// is); "
            "to read it, mount it and give its path",
        ),
        (
            "training",
            "--config.data.source=latin.txt",
            "latin.txt is not UTF-8 text: byte 3 cannot be read (line 1)",
        ),
        ("training", "--config.data.source=x.bin", "x.bin is no token file: it is text"),
        (
            "training",
            "--config.data.source=short.txt",
            "too little training data in short.txt: 3 tokens are less than one window",
        ),
        (
            "training",
            "--config.data.source=nowhere.txt",
            "no data: nowhere.txt is neither a file nor a folder, nor matches any",
        ),
        (
            "generation",
            "--checkpoint=weights",
            "has weights as they are released: convert them first",
        ),
        ("generation", "--checkpoint=empty", "no finished checkpoint in "),
        ("convert", "--destination=empty", "exists already; delete it or choose another"),
    ],
)
def test_troubleshooting_quotes_what_commands_say(name, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 and so on\n" * 50)
    (tmp_path / "x.bin").write_bytes(b"abc" * 100)
    (tmp_path / "short.txt").write_text("hi")
    (tmp_path / "empty").mkdir()
    released = ROOT / "tests/data/released/mlra_4"
    (tmp_path / "weights").symlink_to(released)
    usual = {
        "training": f"--config={ROOT}/configs/quickstart.py --workdir=w "
        "--config.virtual_cpu_devices=0",
        "generation": "--prompt=x",
        "convert": f"--source={released}",
    }[name]
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = module(f"mlra_jax.{name}").main([*usual.split(), arguments])
        except SystemExit as stop:
            code = stop.code
    # The page's numbers are of a machine with one device.
    of = lambda text: re.sub(r"\d+", "0", text)
    assert code and of(message) in of(err.getvalue())
    assert of(message) in of((ROOT / "docs/troubleshooting.md").read_text())


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
            path, _, anchor = target.partition("#")
            if path.startswith(("http", "mailto")):
                continue
            found = (ROOT / page).parent / path if path else ROOT / page
            if not found.exists() or anchor and anchor not in anchors(found):
                wrong.append(f"{page}: {target}")
    assert not wrong, ", ".join(wrong)


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def page_of(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    return list(blocks(path))


def test_commands_are_read_as_the_shell_reads_them(tmp_path):
    [block] = page_of(
        tmp_path,
        "```\nA=1 python -m mlra_jax.costs \\\n  --tokens=8 > out.txt  # so many\n"
        "cd x && mlra-decode --prompt='a; b' | tail -1\n"
        'gcloud ssh --command="cd x\npython train.py --config=c.py"\n```\n',
    )
    found = list(commands(block))
    assert [command.line for command in found] == [2, 4, 4, 4, 5]
    assert [command.words[0] for command in found] == [
        "python",
        "cd",
        "mlra-decode",
        "tail",
        "gcloud",
    ]
    assert [ours(command) for command in found] == [
        ("mlra_jax.costs", ["--tokens=8"]),
        None,
        ("mlra_jax.generation", ["--prompt=a; b"]),
        None,
        ("mlra_jax.training", ["--config=c.py"]),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```\nfrobnicate --all\n```", "say in NOT_RUN of tests/docs/table.py why"),
        ("```\n# only a comment\n```", "mark it `text`"),
        ("```rust\nx\n```", "blocks of 'rust' are unknown"),
        ("```\npython -m mlra_jax.costs --tokns=8\n```", "did you mean --tokens?"),
        ("```\npython -m mlra_jax.cost\n```", "No module named"),
        (
            "```\npython train.py --config=configs/paper.py --workdir=a --config.step=1\n```",
            "did you mean --config.steps?",
        ),
        ('```\nsrun sh -c "mlra-train --config=configs/paper.py:mlra --workdir=a"\n```', "unknown"),
        ("```\npython -m benchmarks.decode --tinny\n```", "--tinny"),
        ("```\nmake quickstrat\n```", "the Makefile has no quickstrat"),
        ("```\npip install '.[nothing]'\n```", "no extra nothing"),
        ("```python\nfrom mlra_jax import lode_model\n```", "mlra_jax has no lode_model"),
        ("```python\nx = = 1\n```", "invalid syntax"),
    ],
)
def test_what_cannot_run_is_named(tmp_path, text, said):
    [block] = page_of(tmp_path, text)
    with pytest.raises(DocsError, match=r"^page\.md:\d+: ") as caught:
        checking.check_block(block)
    assert said in str(caught.value)


def test_outputs_are_those_of_the_block_before(tmp_path, monkeypatch):
    monkeypatch.setitem(table.PRELUDES, "page.md", "word = 'line'")
    first, same, cut, other = page_of(
        tmp_path,
        "```python\nfor i in range(3):\n    print(word, i)\n```\n```output\nline 0\nline 1\n```\n"
        "```output\nline 0\n...\nline 2\n```\n```output\nline 0\nline 3\n```",
    )
    names, done = {"__name__": "__page__"}, Done()
    names["__output__"] = "of a command before"
    for block in (first, same, cut):
        run_block(block, names, tmp_path, done)
    with pytest.raises(DocsError, match=r"page\.md:14: not printed: line 3"):
        run_block(other, names, tmp_path, done)
    assert (done.ran, done.listed) == (3, [])


def test_commands_run_on_tiny_sizes_or_are_listed(tmp_path, monkeypatch):
    training = module("mlra_jax.training")
    seen = []
    monkeypatch.setattr(training, "train", lambda experiment, *_, **__: not seen.append(experiment))
    for name in ("configs", "book.txt"):
        (tmp_path / name).symlink_to(ROOT / ("README.md" if name == "book.txt" else name))
    (tmp_path / "w").mkdir()
    [block, failing] = page_of(
        tmp_path,
        "```\npip install x\nmkdir -p out && cp *.txt out\n"
        "python train.py --config=configs/paper.py:mla --workdir=w "
        "--config.data.source=book.txt\n```\n```\nmlra-decode --checkpoint=w --prompt=x\n```",
    )
    done = Done()
    run_block(block, {}, tmp_path, done)
    assert done.listed == ["page.md:2  needs the network: pip install x"] and done.ran == 3
    assert (tmp_path / "out/book.txt").read_text() == (ROOT / "README.md").read_text()
    [experiment] = seen
    assert experiment.steps == 2 and experiment.model.num_layers == 1
    assert experiment.data.source == "book.txt" and experiment.data.global_batch == 2
    assert not (tmp_path / "w").exists(), "what lay there is in the way of a new run"
    with pytest.raises(DocsError, match=r"page\.md:7: ended with 1: (?s:.)*no checkpoint"):
        run_block(failing, {}, tmp_path, done)
