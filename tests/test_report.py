"""Runs compared: what differs, the numbers, the curves as text, PNG and HTML."""

import base64
import json
import re

import pytest

from mlra_jax import report
from mlra_jax.training import terminal
from mlra_jax.training.metrics import MetricsWriter


def made(folder, *, batch=4, rate=1e-3, losses=(3.0, 2.0, 1.5), validated=(2.5, 1.75), **extra):
    """A run of steps 10, 20, ... with these losses, validated at 10, 20, ..."""
    folder.mkdir(parents=True)
    settings = {"steps": 50, "optimizer": {"rate": rate}, "data": {"global_batch": batch}}
    (folder / "experiment.json").write_text(json.dumps(settings))
    writer = MetricsWriter(folder, 0)
    for i, loss in enumerate(losses, 1):
        values = {"loss": loss, "tokens": 10 * i * batch, "tokens_per_second": 100.0 * i**2}
        writer.write(10 * i, values | {"seconds": 1800.0 * i} | extra)
        if i <= len(validated):
            writer.write(10 * i, {"validation_loss": validated[i - 1], "validation_tokens": 9})
    writer.close()
    return folder


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "runs/a")
    made(tmp_path / "runs/b<i>", batch=8, validated=(2.0, 2.25), goodput=0.875)
    return ["runs/a", "runs/b<i>"]


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_the_text_has_numbers_and_what_differs(two, capsys):
    assert report.main(two) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cells(lines[0]) == [
        *("run", "step", "of", "tokens", "loss", "validation", "lowest, at step", "tokens/s"),
        *("goodput", "hours"),
    ]
    # The median of 100, 400 and 900; three times half an hour.
    last = ["1.5000", "1.7500", "1.7500, 20", "400", "-", "1.50"]
    assert cells(lines[1]) == ["runs/a", "30", "50", "120", *last]
    last = ["1.5000", "2.2500", "2.0000, 10", "400", "87.5%", "1.50"]
    assert cells(lines[2]) == ["runs/b<i>", "30", "50", "240", *last]
    assert [cells(line) for line in lines[4:6]] == [
        ["setting", "runs/a", "runs/b<i>"],
        ["data.global_batch", "4", "8"],
    ]
    assert lines[7] == "validation loss (nats per token)"
    assert lines[-1] == "report/report.png and report/report.html"
    drawn = "\n".join(lines[8:-1])
    # Steps of unlike batches are drawn over tokens: 2 x 10 x 8 is the last.
    assert "tokens" in drawn and "160" in drawn and "runs/a" in drawn and "\x1b" not in drawn


def test_the_page_is_one_file_with_the_figure_and_escaped_names(two, tmp_path):
    assert report.main([*two, "--output=out"]) == 0
    png, page = (tmp_path / "out/report.png").read_bytes(), (tmp_path / "out/report.html")
    text = page.read_text()
    assert png.startswith(b"\x89PNG") and base64.b64encode(png).decode() in text
    assert "runs/b&lt;i&gt;" in text and "<i>" not in text
    assert "<td>data.global_batch</td><td>4</td><td>8</td>" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)


def test_curves_are_over_steps_where_batches_are_alike(tmp_path):
    runs = [report.read(made(tmp_path / name)) for name in "ab"]
    assert report._scale(runs) == ([1, 1], "step")
    runs.append(report.read(made(tmp_path / "c", batch=2)))
    assert report._scale(runs) == ([4, 4, 2], "tokens")
    assert runs[2].points("loss", 2) == [(20, 3.0), (40, 2.0), (60, 1.5)]


def test_one_run_that_has_just_begun(tmp_path):
    runs = [report.read(made(tmp_path / "a", losses=(), validated=()))]
    assert report.text(runs).splitlines()[1].split() == [str(tmp_path / "a"), "0", "50"]
    assert report.figure(runs).startswith(b"\x89PNG")
    alike = [*runs, report.read(made(tmp_path / "b", losses=(1.0,), validated=()))]
    assert "all settings are the same" in report.text(alike)
    assert "training loss (nats per token)" in report.text(alike)


def test_what_is_no_run_is_refused_before_anything_is_written(two, tmp_path, capsys):
    assert report.main([two[0], "runs"]) == 1
    assert capsys.readouterr().err.endswith(
        "runs: there is no metrics.jsonl; give the --workdir of a run\n"
    )
    (tmp_path / "runs/a/experiment.json").write_text("[1, ")
    assert report.main(two) == 1
    assert "runs/a/experiment.json is damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["runs/a", "runs/a/"])
    assert "runs/a is given twice" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_a_curve_of_characters_falls_where_the_loss_falls(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = terminal.draw({"loss": [(0, 4.0), (100, 1.0)], "none": []}, height=12).splitlines()
    assert len(lines) == 12 and max(map(len, lines)) <= 60
    assert "4.0" in lines[1] and "1.0" in "".join(lines[-4:]) and lines[-1].strip() == "step"
    columns = [
        [i for i, character in enumerate(line) if "\u2801" <= character <= "\u28ff"]
        for line in lines
    ]
    first, last = (next(filter(None, order)) for order in (columns, columns[::-1]))
    assert max(first) < min(last)
    assert terminal.draw({"loss": []}) == ""
