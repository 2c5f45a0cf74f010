"""The benchmarks that need an accelerator to say something run on a CPU too, on tiny models."""

import importlib.machinery
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny

from benchmarks import causal_attention, decode, decode_worker, long_streams, models
from benchmarks.absorbed_decode import __main__ as absorbed_decode
from mlra_jax.config import ConfigError, LatentConfig, preset
from mlra_jax.data import token_file
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.evaluate.scoring import token_scores
from mlra_jax.kernels.causal_attention import reference
from mlra_jax.saving import save_model
from mlra_jax.sharding import make_mesh


@pytest.mark.parametrize("tensor, context", [(4, 1), (2, 2), (4, 2), (1, 4)])
@pytest.mark.parametrize("name", ["mlra_4", "mlra_2", "mla", "mha", "mqa"])
def test_a_share_holds_what_a_device_of_the_mesh_holds(name, tensor, context):
    config, slots = preset(name, num_layers=1), 4096
    mesh, alone = make_mesh(tensor=tensor, context=context), make_mesh()
    share = models.share_of(config, tensor, context)
    cache = abstract_cache(config, mesh, 2, slots)
    of_share = abstract_cache(share, alone, 2, models.positions_of(f"{tensor}x{context}", slots))
    held = models.bytes_per_device
    assert held(of_share.layers) == held(cache.layers)
    if context == 1 or isinstance(config.attention, LatentConfig):
        weights = held(abstract_decoder(config, mesh).weights)
        assert held(abstract_decoder(share, alone).weights) == pytest.approx(weights, rel=0.16)


def test_points_are_read():
    assert models.parse_points("1x2K,8x96,2x1M") == [(1, 2048), (8, 96), (2, 1 << 20)]
    assert models.positions_of("4x2", 4096) == 2048 == models.positions_of("4", 2048)


def test_decoding_is_measured_and_drawn(tmp_path, capsys):
    output = tmp_path / "decode.json"
    arguments = ["--tiny", "--models=gqa:1/4", "--points=1x64,1x128"]
    arguments += [f"--output={output}", f"--figures={tmp_path}"]
    assert decode.main(arguments) == 0
    result = json.loads(output.read_text())
    assert [row["context"] for row in result["rows"]] == [64, 128]
    assert result["device"] == "cpu"
    words = "python -m benchmarks.decode --tiny --models=gqa:1/4 --points=1x64,1x128"
    assert result["command"] == words
    for row in result["rows"]:
        assert "error" not in row
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["milliseconds"])
        assert row["ratio"] == pytest.approx(row["milliseconds"] / row["floor"])
        assert row["floor"] > 0 and row["peak_GB"] > 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"decode_shares_time.png"}, "no line"
    more = [row | dict(batch=4) for row in result["rows"]]
    output.write_text(json.dumps([result, result | dict(rows=more)]))
    again = [f"--input={output}", f"--figures={tmp_path / 'again'}"]
    assert decode.main([*again, "--report"]) == 0
    assert f"| gqa, 1/4 | {more[0]['tokens_per_second'] / 1e3:.1f} |" in capsys.readouterr().out
    drawn = {p.name for p in (tmp_path / "again").glob("*.png")}
    assert drawn == {"decode_shares_time.png", "decode_shares_throughput.png"}


def _row(mesh, milliseconds, context=128 * 1024, **more):
    row = dict(model="mla" if mesh else "mlra_4", mesh=mesh, share="", batch=8, context=context)
    row |= dict(tokens_per_call=8, milliseconds=milliseconds, ratio=1.5, read=3e12)
    return row | dict(floor=milliseconds / 1.5) | more


def test_meshes_are_compared(tmp_path, capsys):
    rows = [_row("", 10.0), _row("tensor=4", 4.0, exchanging=0.25), _row("context=4", 2.0)]
    rows += [_row("", 3.0, 2048), _row("tensor=4", 6.0, 2048)]
    lost = dict(error="needs 83.1 GB of the device, which gives 79.5")
    rows += [{k: v for k, v in _row("context=4", 1.0, 2048).items() if k != "read"} | lost]
    path = tmp_path / "four.json"
    path.write_text(json.dumps(dict(device="one of four", jax="0.11.2", rows=rows)))
    assert decode.main([f"--input={path}", "--report", f"--figures={tmp_path}"]) == 0
    assert [p.name for p in tmp_path.glob("*.png")] == ["four.png"]
    out = capsys.readouterr().out
    assert "| | 8 x 2K | 8 x 128K |" in out and "3.00 to 3.00 TB/s" in out
    assert "| mla, tensor=4 | 6.00 (1.50) | 4.00 (1.50) |" in out
    assert "| mla, context=4 | needs 83.1 GB | 2.00 (1.50) |" in out
    assert "mla, tensor=4 is so many times as fast as each (below 1: slower):" in out
    assert "| mlra_4, one device | 0.50 | 2.50 |" in out
    assert "| mla, context=4 |  | 0.50 |" in out
    assert "| | 8 x 128K |\n|---|---|\n| mla, tensor=4 | 25% |" in out
    assert decode.main([f"--input={path}", "--report", "--points=8x2K"]) == 0
    assert "128K" not in capsys.readouterr().out


def test_points_that_do_not_fit_or_run_are_rows(monkeypatch):
    monkeypatch.setattr(models, "device_gigabytes", lambda: 0.25)
    points, rows = [(1, 64, 1), (1, 1 << 20, 1), (2, 64, 1)], []
    part = decode_worker.Part("gqa", "", "", points, [(2, 64)], first_token=True, tiny=True)
    decode_worker.work(part, rows.append, lambda: "your turn")
    assert [next(iter(message)) for message in rows[:4]] == 3 * ["compiled"] + ["ready"]
    found = {(r["batch"], r["context"]): r for r in (m["row"] for m in rows[4:])}
    assert "error" not in found[1, 64] and found[1, 64]["first_token_seconds"] > 0
    assert found[1, 1 << 20]["error"].startswith("needs 3.2")
    assert found[1, 1 << 20]["error"].endswith("GB of the device, which gives 0.2")
    # There is no GPU to profile here.
    assert found[2, 64]["error"] == "the profiler saw no GPU in the call"


_FAKE = """
import json, os, sys, time
part, log = json.loads(sys.argv[1]), open("log", "a", buffering=1)
say = lambda **message: print(json.dumps(message), flush=True)
say(ready={"device": "none", "jax": "0"})
sys.stdin.readline()
model, mesh, gpus = part["model"], part["mesh"], os.environ.get("CUDA_VISIBLE_DEVICES")
print("begin", model, mesh, gpus, time.monotonic(), file=log)
batch, context, per_call = part["points"][0]
row = dict(model=model, mesh=mesh, share="", batch=batch, context=context, tokens_per_call=per_call)
say(row=row | dict(error="measured"))
time.sleep(0.1)
if model == "gqa":
    sys.exit("out of luck")
if model == "mha":
    time.sleep(60)
if model == "mqa":
    assert os.getsid(0) == os.getpid()
    written = lambda: os.path.exists("o.json") and open("o.json").read()
    while not all(f'"model": "{name}"' in (written() or "") for name in ("mla", "mqa")):
        time.sleep(0.01)
    os.kill(os.getppid(), 2)
    time.sleep(60)
print("end", model, mesh, gpus, time.monotonic(), file=log)
"""


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decode, "WORKER", (sys.executable, "-c", _FAKE))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    return tmp_path / "log"


def test_processes_measure_at_once_only_on_different_gpus(fake_worker):
    models = "mlra_4,mlra_2:tensor=2 mla,gla_2 gla_4"
    flags = [f"--models={models}", "--points=1x64;8x64", "--processes=5", "--output=o.json"]
    assert decode.main(flags) == 0
    lines = [line.split(" ") for line in fake_worker.read_text().splitlines()]
    assert [line[1] for line in lines if line[0] == "begin"][:2] == ["mlra_4", "mlra_2"]
    assert [line[3] for line in lines[:2]] == ["3,5", "3,5"]
    running: set[str] = set()
    most = 0
    for what, *_, gpus, _ in sorted(lines, key=lambda line: float(line[-1])):
        mine = set(gpus.split(","))
        if what == "begin":
            assert not running & mine, "two at once on one GPU"
            running |= mine
            most = max(most, len(running) if len(mine) == 1 else 0)
        else:
            running -= mine
    assert most == 2, "nothing ran side by side"
    rows = json.loads(Path("o.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == 5 * [1] + 5 * [8], (
        "the first points are measured first"
    )


def test_a_process_that_fails_or_hangs_leaves_rows(fake_worker):
    flags = ["--models=gqa,mha,mla", "--points=1x64,8x64", "--processes=2", "--patience=1"]
    assert decode.main([*flags, "--output=o.json"]) == 0
    rows = json.loads(Path("o.json").read_text())["rows"]
    errors = {(row["model"], row["batch"]): row["error"] for row in rows}
    assert errors["gqa", 1] == "measured"
    assert errors["gqa", 8] == "the process ended with 1: out of luck"
    assert errors["mha", 8] == "nothing done in 1 s (--patience)"
    assert errors["mla", 8] == "the process ended with 0: "


def test_a_cut_run_has_what_was_measured(fake_worker, heeds_ctrl_c, monkeypatch, capsys):
    begun, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **how: begun.append(start(*a, **how)) or begun[-1]
    )
    # The last one wants the GPU of the second, too, which ends all.
    models = "--models=mla@1x64 mqa@8x64,1x64 gla_2:tensor=2@8x64,1x64"
    flags = [models, "--processes=3", "--output=o.json"]
    assert decode.main(flags) == 130
    rows = json.loads(Path("o.json").read_text())["rows"]
    found = [(row["model"], row["batch"], row["error"]) for row in rows]
    assert found == [("mla", 1, "measured"), ("mqa", 8, "measured")]
    assert "interrupted; o.json has what was measured" in capsys.readouterr().err
    assert len(begun) == 3 and all(process.returncode is not None for process in begun)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=mla:tensor=0", "'tensor=0' is not one of data"),
        ("--models=mlra_5", "mlra_5"),
        ("--models=mla:1/x", "'1/x'"),
        ("--models=mla@4", "'4' is no batch x context"),
        ("--points=1x2K,8", "'8' is no batch x context"),
        ("--output=nowhere/o.json", "its folder does not exist"),
        ("--tokens_per_call=a", "--tokens_per_call=a"),
        ("--processes=0", "--processes=0"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decode, "WORKER", ("false",))
    assert decode.main([flag]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m benchmarks.decode: ") and message in line


def test_kernel_times_are_drawn_from_an_earlier_run(tmp_path):
    earlier = "benchmarks/results/absorbed_decode.json"
    assert absorbed_decode.main([f"--input={earlier}", f"--output={tmp_path}"]) == 0
    drawn = {p.name for p in tmp_path.glob("*.png")}
    assert drawn == {"absorbed_decode_time.png", "absorbed_decode_bandwidth.png"}


@pytest.mark.parametrize("name", ["mlra_4_base", "gqla"])
def test_shares_of_neighbours_are_refused(name):
    with pytest.raises(ConfigError, match="no share of .* is made"):
        models.share_of(preset(name), 4)


def test_streams_are_read_under_each_policy(tmp_path, capsys):
    model = tiny.random_model(tiny.config("mlra_4", context_length=32), make_mesh())
    save_model(model, tmp_path / "model", "bytes")
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 200).astype(np.uint16)
    token_file.write(tmp_path / "tokens.bin", tokens)
    flags = [f"--checkpoint={tmp_path}/model", f"--tokens={tmp_path}/tokens.bin", "--rows=2"]
    flags += ["--length=96", "--policies=full,ladder:32", f"--output={tmp_path}/out"]
    assert long_streams.main(flags) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:]] == ["full", "ladder:32"]
    rows = tokens[-194:].reshape(2, 97).astype(np.int32)
    found = json.loads((tmp_path / "out" / "long_streams.json").read_text())
    full, ladder = found["policies"]
    losses = -np.asarray(token_scores(Decoder.from_model(model), rows[:, :-1], rows[:, 1:])[0])
    want = np.exp(losses.reshape(2, 3, 32).mean((0, 2)))
    assert full["perplexity"] == pytest.approx(want, rel=1e-4)
    # What fits is read alike; then something is missing.
    assert ladder["perplexity"][0] == pytest.approx(want[0], rel=1e-4)
    assert ladder["perplexity"][2] != pytest.approx(want[2], rel=1e-3)
    assert ladder["cache_bytes"] < full["cache_bytes"] / 2
    assert (tmp_path / "out" / "long_streams.png").read_bytes().startswith(b"\x89PNG")
    assert len(full["bytes_in_use"]) == len(full["milliseconds_per_token"]) == 12
    again = [f"--input={tmp_path}/out/long_streams.json", f"--output={tmp_path}/again"]
    assert long_streams.main(again) == 0
    assert (tmp_path / "again" / "long_streams.png").read_bytes().startswith(b"\x89PNG")
    for length, said in (("480", "wants 962"), ("80", "a multiple of the trained context of 32")):
        assert long_streams.main([*flags, f"--length={length}"]) == 1
        assert said in capsys.readouterr().err


def test_causal_attention_is_checked_and_timed(capsys):
    assert causal_attention.main(["--tiny"]) == 0
    said = capsys.readouterr().out
    assert "reference, (2, 128, 2, 1, 1): errors of dq, dq_rope, dc, dk_rope " in said
    assert "reference, (1, 128, 2, 2, 2): forward " in said


def test_tokamax_is_asked_for_the_same_attention(monkeypatch, capsys):
    def attend(q, k, v, *, scale, is_causal, implementation):
        assert is_causal and implementation == "mosaic"
        return reference.causal_attention(q, k, v, scale=scale)

    tokamax = types.ModuleType("tokamax")
    tokamax.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    tokamax.dot_product_attention = attend
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    flags = ["--tiny", "--over=tokamax:mosaic"]
    assert causal_attention.main(flags) == 0
    assert "tokamax:mosaic, (1, 128, 2, 2, 2): forward " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(SystemExit) as stopped:
        causal_attention.main(flags)
    assert stopped.value.code == 2
    assert "needs tokamax: pip install tokamax" in capsys.readouterr().err
