"""The study of the variants: equal sizes, runs side by side, stopping and going on, statistics."""

import dataclasses
import json
import math
import zipfile
from base64 import b64encode

import numpy as np
import pytest
from scipy import stats

from mlra_jax.config import NEIGHBOURS, PRESETS, VARIANTS, preset
from mlra_jax.data import token_file
from mlra_jax.settings_tree import ConfigError
from mlra_jax.sharding import make_mesh
from mlra_jax.training.feed import Feed, load_data
from mlra_jax.training.loop import mean_loss
from mlra_jax.training.state import create_state
from mlra_jax.training.step import make_train_step, make_validation_step
from studies import report, text, training, variants
from studies.configs import quick, small
from studies.settings import ABLATIONS, ALL, GATED, Study, changed, parameters

QUICK = "--config=studies/configs/quick.py"
FOREVER = 1e18


def study(**changes) -> Study:
    settings = quick.get_config()
    settings.update(dict(steps=4, validate_every=2) | changes)
    settings.optimizer.warmup_steps = 1
    settings.data.validation_tokens = 512
    return Study.from_dict(settings.to_dict())


def result(name: str, seed: int, loss: float) -> dict:
    return {
        "variant": name,
        "seed": seed,
        "parameters": 10,
        "mlp_dim": 8,
        "tokens": 1000,
        "training_flops": 1e9,
        "tokens_per_second": 50.0,
        "side_by_side": 2,
        "device": "cpu",
        "validation_loss": [(2, loss + 1), (4, loss)],
    }


def test_all_variants_gates_and_ablations_are_trained():
    assert set(VARIANTS) < set(ALL) <= {*PRESETS, *NEIGHBOURS}
    assert [changed(name) for name in NEIGHBOURS] == ["mlra_4"] * 3 + [None]
    assert {changed(name) for name in GATED} == {"gqa", "mla", "gla_2", "mlra_2", "mlra_4"}
    endings = {name.removeprefix(changed(name)) for name in ABLATIONS}
    assert endings == {"_no_scale", "_double_heads", "_normal_initialization"}


def test_models_are_the_published_ones_shrunk_and_equally_large():
    whole = Study.from_dict(small.get_config().to_dict())
    aim = parameters(whole.model("mha"))
    assert aim == 4096 * 384 + 384 + 8 * (2 * 384 + 4 * 384**2 + 3 * 384 * 1024)
    for name in ("mqa", "gta", "tpa", "mlra_4", "gqa_gated", "mla_double_heads", *NEIGHBOURS):
        model = whole.model(name)
        assert model.mlp_dim % 8 == 0
        assert abs(parameters(model) - aim) <= 4 * 3 * 384 * 8, "half a step of the MLP's width"
        published = preset(name)
        assert model.attention.num_heads == published.attention.num_heads
        if name != "tpa":  # its factors have a row for each head, which stay as many
            caches = [report.cache_values(published, ways) / 8 for ways in report.WAYS]
            assert [report.cache_values(model, ways) for ways in report.WAYS] == caches
    assert [report.cache_values(whole.model("mlra_4"), w) / 16 for w in report.WAYS] == [
        4.5,
        2.5,
        1.5,
        1.5,
    ]
    assert report.cache_values(preset("gqa"), 9) is None, "24 heads do not divide over 9"


def test_runs_side_by_side_are_what_each_is_alone():
    settings = study(variants="mla")
    # Each run is clipped by its own norm, which differs.
    clipped = dataclasses.replace(settings.optimizer, clip_norm=0.1)
    settings = dataclasses.replace(settings, optimizer=clipped)
    _, source = load_data(settings.data, settings.vocab_size)
    results = training.train(settings, "mla", [0, 7], source, lambda line: None, FOREVER)
    seeds = {found["seed"]: found for found in results}
    experiment, mesh = settings.experiment("mla", 7), make_mesh()
    state, step = create_state(experiment, mesh), make_train_step(experiment, mesh)
    validate = make_validation_step(experiment, mesh)
    feed = Feed(mesh, 4, experiment.model)
    order, losses, validation = feed.train(source, 7), [], []
    for number in range(4):
        state, metrics = step(state, next(order))
        losses.append(float(metrics["loss"]))
        assert metrics["gradient_norm"] > 0.1
        if number % 2:
            validation.append(mean_loss(validate, state.params, feed.validation(source, 512))[0])
    order.close()
    assert np.array(seeds[7]["loss"])[:, 1] == pytest.approx(np.mean(np.reshape(losses, (2, 2)), 1))
    assert np.array(seeds[7]["validation_loss"]) == pytest.approx(
        np.array([(2, validation[0]), (4, validation[1])])
    )
    assert seeds[0]["validation_loss"] != seeds[7]["validation_loss"]
    assert seeds[7]["tokens"] == 4 * 4 * 64


def fake_train(calls):
    """Stands in for training, which other tests do."""

    def train(study, name, seeds, source, say, deadline):
        calls.append((name, list(seeds)))
        return [result(name, seed, 3.0 + seed / 10) for seed in seeds]

    return train


def test_a_study_goes_on_where_it_stopped_and_repeats_nothing(tmp_path, monkeypatch):
    settings, calls, lines = study(seeds=3, side_by_side=2), [], []
    monkeypatch.setattr(variants, "train", fake_train(calls))
    assert not variants.conduct(settings, tmp_path, 0, lines.append)
    assert calls == [] and lines[-1] == "out of time; the same command goes on"

    def given_up(*_):
        raise training.OutOfTime

    monkeypatch.setattr(variants, "train", given_up)
    assert not variants.conduct(settings, tmp_path, 1, lines.append)
    assert list((tmp_path / "runs").iterdir()) == [], "half a run is no run"
    monkeypatch.setattr(variants, "train", fake_train(calls))
    (tmp_path / "runs" / "mla_1.json").write_text(json.dumps(result("mla", 1, 9.0)))
    assert variants.conduct(settings, tmp_path, 1, lines.append)
    assert calls == [("mla", [0, 2]), ("mlra_4", [0, 1]), ("mlra_4", [2])]
    assert variants.conduct(settings, tmp_path, 1, lines.append) and len(calls) == 3
    more = dataclasses.replace(settings, variants="gqa", seeds=1)
    assert variants.conduct(more, tmp_path, 1, lines.append) and calls[3:] == [("gqa", [0])]
    with pytest.raises(ConfigError, match="steps is 4 there and 6 here; use another workdir"):
        variants.conduct(dataclasses.replace(settings, steps=6), tmp_path, 1, lines.append)
    (tmp_path / "runs" / "gqa_0.json").write_text("{")
    with pytest.raises(ConfigError, match="gqa_0.json is damaged; delete it"):
        variants.finished(more, tmp_path)
    found = variants.finished(settings, tmp_path)
    assert [r["validation_loss"][-1][1] for r in found["mla"]] == [3.0, 9.0, 3.2]


def test_time_is_looked_at_on_the_way():
    settings = study(variants="mla")
    _, source = load_data(settings.data, settings.vocab_size)
    lines = []
    with pytest.raises(training.OutOfTime):
        training.train(settings, "mla", [0], source, lines.append, 0.0)
    assert len(lines) == 1 and lines[0].startswith("mla  step 2/4  validation ")


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(0)
    luck = rng.normal(size=9)  # far larger than what the variants differ by
    left = [result("a", s, 3 + luck[s] + 0.01 * s) for s in range(4)]
    right = [result("b", s, 3.05 + luck[s]) for s in (3, 1, 0, 2, 8)]
    found = report.compare(left, right)
    differences = [0.01 * s - 0.05 for s in range(4)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found == pytest.approx((np.mean(differences), *interval, 4))
    assert found.told_apart
    assert report.compare(left[:1], right) is None
    mean, error = report.mean_and_error([1.0, 2.0, 4.0])
    assert (mean, error) == pytest.approx((7 / 3, stats.sem([1.0, 2.0, 4.0])))
    assert math.isnan(report.mean_and_error([1.0])[1])


def test_the_report_says_what_is_told_apart(tmp_path):
    losses = {"mla": (3.0, 3.2), "mlra_4": (2.9, 3.1001), "mlra_4_gated": (2.7, 3.2)}
    results = {n: [result(n, s, x) for s, x in enumerate(losses[n])] for n in losses}
    results["gqa"] = [result("gqa", 0, 5.0)]
    said = report.write(study(), results, tmp_path)
    assert (tmp_path / "report.md").read_text() == said + "\n"
    rows = [line for line in said.splitlines() if line.startswith("| m") or line.startswith("| g")]
    names = [row.split(" | ")[0].strip("| ") for row in rows]
    assert names == ["mlra_4_gated", "mlra_4", "mla", "gqa"], "lowest loss first"
    assert "3.1000 ± 0.1000" in rows[2] and "± " not in rows[3]
    assert all(row.endswith("| 50 | cpu |") for row in rows)
    # Differences -0.1 and -0.0999: t = 12.706 at one degree of freedom, error 5e-5.
    assert "- mlra_4 ends 0.1000 nats below mla, 95% interval 0.0993 to 0.1006 (2 pairs)." in said
    assert "mlra_4_gated and mlra_4 are not told apart: -0.0500 nats" in said
    assert "gqa and mla: fewer than two seeds in common" in said
    assert "Of 2 comparisons, 0.1 would" in said
    for figure in ("loss_by_cache.png", "loss_by_tokens.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_and_reports(tmp_path, capsys):
    flags = [
        f"--workdir={tmp_path}/study",
        "--config.steps=4",
        "--config.validate_every=4",
        "--config.optimizer.warmup_steps=1",
        "--config.data.validation_tokens=512",
    ]
    assert variants.main([QUICK, *flags]) == 0
    out = capsys.readouterr().out
    assert "mlra_4  step 4/4  validation " in out and "| mlra_4 | " in out
    runs = {path.name for path in (tmp_path / "study" / "runs").iterdir()}
    assert runs == {"mla_0.json", "mla_1.json", "mlra_4_0.json", "mlra_4_1.json"}
    assert variants.main([QUICK, *flags]) == 0
    assert "step" not in capsys.readouterr().out
    assert variants.main([QUICK, *flags, "--config.variants=mlra4"]) == 1
    assert "variants: unknown preset 'mlra4'" in capsys.readouterr().err


def test_text_is_taken_from_the_packages(tmp_path, capsys):
    wheels, ranks = tmp_path / "wheels", tmp_path / "gpt2.tiktoken"
    wheels.mkdir()
    described = {"documentation": "<p>Adds &lt;one&gt;.</p><p>Twice</p>", "x": [{"y": 1}]}
    members = {
        "botocore-1-py3.whl": {"botocore/data/a/service-2.json": json.dumps(described)},
        "google_api_python_client-2-py3.whl": {
            "g/discovery_cache/documents/b.json": json.dumps({"description": "Adds <one>.\nTwice"})
        },
        "ansible-3-py3.whl": {"a/plugins/c.py": "import os\nDOCUMENTATION = r'''\nname: c\n'''\n"},
    }
    flags = [f"--wheels={wheels}", f"--ranks={ranks}", f"--destination={tmp_path}/out"]
    bytes_first = [f"{b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    ranks.write_text("".join([*bytes_first, f"{b64encode(b'tw').decode()} 256\n"]))
    assert text.main(flags) == 1
    assert "has no wheel of botocore" in capsys.readouterr().err
    for wheel, files in members.items():
        with zipfile.ZipFile(wheels / wheel, "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
    assert text.main([*flags, "--vocabulary=257"]) == 0
    lines = (tmp_path / "out" / "documentation.jsonl").read_text().splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    assert "c\n\nname: c" in texts and len(texts) == 2, "what two packages say is kept once"
    assert texts - {"c\n\nname: c"} <= {f"{n}\n\nAdds <one>.\nTwice" for n in ("b", "service-2")}
    (shard,) = (tmp_path / "out").glob("*.bin")
    tokens = token_file.read(shard)
    assert tokens.max() == 256 and (tokens == 256).sum() == 2, "a document, an end-of-text"
