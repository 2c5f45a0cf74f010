"""What a run leaves to read: each line, the picture, durations, FLOPs counted by hand."""

import errno
import json
import math
import os
import struct
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mlra_jax.config import GroupedConfig, LatentConfig, ModelConfig, preset
from mlra_jax.costs import PEAK_FLOPS, flops_per_token, peak_flops
from mlra_jax.training.metrics import (
    DAMAGED_FILE,
    METRICS_FILE,
    MetricsWriter,
    plot_losses,
    read_metrics,
)


def board(folder):
    """What the newest TensorBoard file has: (its scalars, the step from which it begins anew)."""
    data = max((folder / "tensorboard").iterdir(), key=os.path.getmtime).read_bytes()
    scalars, purged = [], None
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        assert event.wall_time > 1e9
        scalars += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
        if event.session_log.status == event_pb2.SessionLog.START:
            purged = event.step
    return scalars, purged


def test_a_line_is_in_the_file_when_write_ends(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 0.1 + 0.2, "tokens": 96})
    assert (tmp_path / METRICS_FILE).read_text() == (
        '{"step": 1, "loss": 0.30000000000000004, "tokens": 96}\n'
    )
    writer.write(2, {"validation_loss": 2.0})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.1 + 0.2, "tokens": 96},
        {"step": 2, "validation_loss": 2.0},
    ]
    scalars = [
        ("loss", float(np.float32(0.1 + 0.2)), 1),
        ("tokens", 96, 1),
        ("validation_loss", 2.0, 2),
    ]
    assert board(tmp_path) == (scalars, None)
    writer.close()


@pytest.mark.parametrize("step", range(6))
def test_a_resumed_file_keeps_the_lines_up_to_its_step(tmp_path, step):
    lines = [{"step": s, "loss": float(s)} for s in range(1, 5)]
    lines.insert(2, {"step": 2, "validation_loss": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # The last line was cut off by a kill, in the middle or just before its end.
    for tail in ('{"step": 5, "lo', '{"step": 5, "loss": 1.0}'):
        (tmp_path / METRICS_FILE).write_text(text + tail)
        assert read_metrics(tmp_path) == lines
        writer = MetricsWriter(tmp_path, step)
        kept = [line for line in lines if line["step"] <= step]
        assert read_metrics(tmp_path) == kept
        writer.write(step + 1, {"loss": 9.0})
        writer.close()
        assert read_metrics(tmp_path) == [*kept, {"step": step + 1, "loss": 9.0}]
        assert board(tmp_path) == ([("loss", 9.0, step + 1)], step + 1 if step else None)


DAMAGED = {
    "zeros": b"\0" * 7,
    "cut": b'{"step": 10, "lo',
    "two lines that ran together": b'{"step": 1, "lo{"step": 2, "loss": 1.0}',
    "empty": b"",
    "not UTF-8": b'{"step": 2, "loss\xff": 1.0}',
    "no object": b"17",
    "a list": b'[{"step": 1}]',
    "no step": b'{"loss": 1.0}',
    "a step that is text": b'{"step": "2", "loss": 1.0}',
    "a loss that is text": b'{"step": 2, "loss": "low"}',
    "nested without end": b"[" * 100_000,
    "a number too long": b'{"step": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_damaged_line_is_set_aside_with_a_note(tmp_path, line, place):
    good = [{"step": s, "loss": s / 3} for s in (1, 2, 3)]
    lines = [json.dumps(values).encode() for values in good]
    lines.insert(place, line)
    path = tmp_path / METRICS_FILE
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert read_metrics(tmp_path) == good
    plot_losses(tmp_path, 260)
    said = []
    writer = MetricsWriter(tmp_path, 3, said.append)
    assert said == [f"{path}, line {place + 1}: damaged; set aside in metrics.jsonl.damaged"]
    assert (tmp_path / DAMAGED_FILE).read_bytes() == line + b"\n"
    writer.write(4, {"loss": 1.5})
    writer.close()
    assert read_metrics(tmp_path) == [*good, {"step": 4, "loss": 1.5}]
    # Once set aside it is not spoken of again; another one is put behind it.
    MetricsWriter(tmp_path, 4, said.append).close()
    assert len(said) == 1
    with path.open("ab") as file:
        file.write(b"\0\n")
    MetricsWriter(tmp_path, 4, said.append).close()
    assert len(said) == 2 and "line 5:" in said[1]
    assert (tmp_path / DAMAGED_FILE).read_bytes() == line + b"\n\0\n"


def test_a_written_line_is_on_the_disk_not_only_in_memory(tmp_path, monkeypatch):
    writer, synced = MetricsWriter(tmp_path, 0), {}

    def fsync(fd):
        synced.setdefault(Path(os.readlink(f"/proc/self/fd/{fd}")).name, os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    for step in (1, 2):
        synced.clear()
        writer.write(step, {"loss": 1.0})
        assert synced[METRICS_FILE] == (tmp_path / METRICS_FILE).stat().st_size
    writer.close()


@pytest.mark.parametrize("file", ["metrics.jsonl", "tensorboard"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, file):
    """At once and by the caller, not in a thread: the run must know."""
    writer = MetricsWriter(tmp_path, 0)
    target = (
        writer._lines._file
        if file == "metrics.jsonl"
        else writer._board._py_recordio_writer._writer
    )
    os.dup2(full := os.open("/dev/full", os.O_WRONLY), target.fileno())
    os.close(full)
    with pytest.raises(OSError) as error:
        writer.write(1, {"loss": 1.0})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / file))
    writer.close()


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_the_curve_shows_both_losses_and_a_uniform_guess(tmp_path, monkeypatch):
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda s, *a, **k: drawn.append(s) or save(s, *a, **k)
    )
    lines = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.5, "tokens": 3}]
    lines += [{"step": 2, "validation_loss": 4.75}, {"step": 3, "loss": 4.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = plot_losses(tmp_path, 260)
    assert path == tmp_path / "loss_curve.png" and path.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    curves = {line.get_label(): np.transpose(line.get_data()).tolist() for line in axes.lines}
    assert curves.pop("training (last 4.000)") == [[1, 5], [2, 4.5], [3, 4]]
    assert curves.pop("validation (last 4.750)") == [[2, 4.75]]
    ((label, points),) = curves.items()
    assert label == "uniform guess, ln 260 = 5.56"
    assert {y for _, y in points} == {math.log(260)}
    assert axes.get_ylim()[0] == 0
    # A run that was stopped before its first line still gets a picture.
    (tmp_path / METRICS_FILE).unlink()
    plot_losses(tmp_path, 260)
    assert len(drawn[1].axes[0].lines) == 1


def test_flops_of_a_token_by_hand():
    sizes = dict(vocab_size=10, num_layers=3, embed_dim=4, mlp_dim=4, context_length=100)
    grouped = ModelConfig(GroupedConfig(num_heads=5, num_kv_heads=1, head_dim=6), **sizes)
    # A token sees 50 positions on average. For each head one of them costs 6 products for its
    # score and 6 for its value, a product and a sum each; backward is twice that.
    assert flops_per_token(grouped, 1000) == 6 * 1000 + 3 * (3 * 2 * 50 * 5 * (6 + 6))
    assert flops_per_token(grouped, 2000) - flops_per_token(grouped, 1000) == 6000
    for groups, branches in ((1, 1), (4, 1), (2, 2), (1, 4)):
        attention = LatentConfig(
            num_heads=4,
            groups=groups,
            branches=branches,
            latent_dim=16,
            q_latent_dim=8,
            nope_dim=6,
            rope_dim=2,
        )
        # Each branch has scores (6 + 2 wide) and values (6 wide) of its own for every head.
        want = 6 * 7 + 3 * (3 * 2 * 50 * branches * 4 * (8 + 6))
        assert flops_per_token(ModelConfig(attention, **sizes), 7) == want
    # The paper's own: 24 layers, 24 heads, 4 branches, 2048 tokens.
    large = flops_per_token(preset("mlra_4"), 0)
    assert large == 24 * 3 * 2 * 1024 * 4 * 24 * (192 + 128)


def test_peaks_of_the_data_sheets():
    tera = {name: peak / 1e12 for name, peak in PEAK_FLOPS.items()}
    assert tera == {
        "TPU v4": 275,
        "TPU v5 lite": 197,
        "TPU v5": 459,
        "TPU v6 lite": 918,
        "NVIDIA A100": 312,
        "NVIDIA H100": 989,
        "NVIDIA H200": 989,
        "NVIDIA B200": 2250,
    }
    for kind, peak in (
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("cpu", None),
        ("Some NVIDIA H100", None),
    ):
        assert peak_flops(kind) == peak
