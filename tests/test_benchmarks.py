"""The benchmarks that need an accelerator to say something run on a CPU too, on tiny models."""

import json

import numpy as np
import pytest
import tiny

from benchmarks import decode, long_streams, models
from benchmarks.absorbed_decode import __main__ as absorbed_decode
from mlra_jax.config import ConfigError, LatentConfig, preset
from mlra_jax.data import token_file
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.evaluate.scoring import token_scores
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


def test_decoding_is_measured_and_drawn(tmp_path):
    output = tmp_path / "decode.json"
    arguments = ["--tiny", "--models=gqa", "--points=1x64,1x128", "--shares=4"]
    arguments += ["--first_token", f"--output={output}", f"--figures={tmp_path}"]
    assert decode.main(arguments) == 0
    result = json.loads(output.read_text())
    assert [row["context"] for row in result["rows"]] == [64, 128]
    for row in result["rows"]:
        assert "error" not in row
        assert row["tokens_per_second"] == pytest.approx(1e3 / row["milliseconds"])
        assert row["floor"] > 0 and row["peak_GB"] > 0 and row["first_token_seconds"] > 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"decode_time.png"}, "one batch is no line"
    more = [row | dict(batch=4, mesh="tensor=2", share="") for row in result["rows"]]
    more += [row | dict(batch=8) for row in more]
    output.write_text(json.dumps([result, result | dict(rows=more)]))
    assert decode.main([f"--input={output}", f"--figures={tmp_path / 'again'}"]) == 0
    drawn = {p.name for p in (tmp_path / "again").glob("*.png")}
    assert drawn == {"decode_time.png", "decode_throughput.png"}


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
