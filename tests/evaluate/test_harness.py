"""The lm-evaluation-harness on a task with local data, offline."""

import importlib.util
import json
import os

import jax
import numpy as np
import pytest
from flax import nnx

from mlra_jax import checkpoints
from mlra_jax import model as models
from mlra_jax.config import Execution, LatentConfig, ModelConfig
from mlra_jax.evaluate import loglikelihood, tasks
from mlra_jax.extras import install_line
from mlra_jax.sharding import make_mesh

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the lm-evaluation-harness is not installed (pip install lm_eval)",
)
QUESTIONS = [
    {
        "question": f"What follows {n}?",
        "choices": [f"{n + 1}", "a very long answer", "x"],
        "gold": 0,
    }
    for n in range(7)
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
NEXT = """
task: local_next
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list:
  - metric: perplexity
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model that reads bytes."""
    attention = LatentConfig(4, 1, 4, 16, 12, nope_dim=4, rope_dim=4)
    config = ModelConfig(
        attention,
        260,
        1,
        32,
        40,
        context_length=64,
        zero_init=False,
        execution=Execution(dtype="float32"),
    )
    model = models.create(config, make_mesh(), seed=3)
    # Far from uniform, so that answers differ.
    _, state = nnx.split(model)
    params = jax.tree.map(lambda x: x * 4, nnx.to_pure_dict(state))
    folder = tmp_path_factory.mktemp("bytes")
    with checkpoints.make_manager(folder) as manager:
        checkpoints.save(manager, 0, params=params, model=checkpoints.describe(config, "bytes"))
        manager.wait_until_finished()
    return folder


@needs_harness
def test_local_tasks_from_the_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    from mlra_jax.evaluate.harness import HarnessModel

    def fork():
        raise AssertionError("a process with JAX in it may hang when it forks")

    monkeypatch.setattr(os, "fork", fork)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=data))
    (tmp_path / "local_next.yaml").write_text(NEXT.format(data=data))
    code = tasks.main(
        [
            f"--checkpoint={checkpoint}",
            "--tasks=local_choice,local_next",
            f"--include_path={tmp_path}",
            "--batch=4",
            "--mesh=data=2",
            f"--output={tmp_path / 'result.json'}",
        ]
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    model = HarnessModel(checkpoint, batch_size=4)
    right = {"acc": 0, "acc_norm": 0}
    for question in QUESTIONS:
        context = model.tok_encode(question["question"] + "\nAnswer:")
        pairs = [(context, model.tok_encode(" " + choice)) for choice in question["choices"]]
        scores = np.array([score for score, _ in loglikelihood(model.model, pairs)])
        right["acc"] += scores.argmax() == question["gold"]
        lengths = [len(choice) for choice in question["choices"]]
        right["acc_norm"] += (scores / lengths).argmax() == question["gold"]
    found = json.loads((tmp_path / "result.json").read_text())
    choice = {m: pytest.approx(n / 7) for m, n in right.items()} | {"examples": 7}
    assert found["tasks"] == {"local_choice": choice}
    pairs = [
        tuple(map(model.tok_encode, (q["question"], f" {q['choices'][0]}"))) for q in QUESTIONS
    ]
    mean = np.mean([score for score, _ in loglikelihood(model.model, pairs)])
    assert found["others"]["local_next"]["perplexity,none"] == pytest.approx(np.exp(-mean))
    assert "local_choice" in printed.out


@needs_harness
def test_rolling_and_generation_as_the_harness_asks(checkpoint):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = get_model("mlra_jax")(checkpoint=checkpoint, batch_size=2, max_length=24)
    text = "A text of more than two windows, and then some more of it."
    ask = lambda kind, *arguments: Instance(kind, {}, arguments, 0)
    windows = get_rolling_token_windows(model.tok_encode(text), 256, 24, 1)
    wanted = loglikelihood(model.model, [make_disjoint_window(w) for w in windows], max_length=24)
    found = model.loglikelihood_rolling([ask("loglikelihood_rolling", text)], disable_tqdm=True)
    assert found == [pytest.approx(sum(score for score, _ in wanted))]
    empty = model.loglikelihood([ask("loglikelihood", "", "ab")], disable_tqdm=True)
    assert empty[0][0] == pytest.approx(loglikelihood(model.model, [([256], [97, 98])])[0][0])
    options = {"max_gen_toks": 8, "until": []}
    (whole,) = model.generate_until([ask("generate_until", "abc", options)], disable_tqdm=True)
    asked = [
        ask("generate_until", "abc", {"max_gen_toks": 8, "until": [whole[2]]}),
        ask("generate_until", "abc", {"max_gen_toks": 3}),
    ]
    first, second = model.generate_until(asked, disable_tqdm=True)
    assert first == whole[: whole.index(whole[2])] and whole.startswith(second[:-1])


def test_without_the_harness_the_command_says_how_to_get_it(checkpoint, monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(tasks.sys.modules, name, None)
    monkeypatch.delitem(tasks.sys.modules, "mlra_jax.evaluate.harness", raising=False)
    assert tasks.main([f"--checkpoint={checkpoint}"]) == 1
    error = capsys.readouterr().err
    assert f"): {install_line('lm_eval')}\n" in error and error.count("\n") == 1


def test_means_take_the_length_normalised_accuracy_where_there_is_one():
    results = {"a": {"acc,none": 0.5, "acc_norm,none": 0.7}, "b": {"acc,none": 0.1}}
    found = tasks.summarise(results, {name: {"effective": 10} for name in results})
    assert found["mean"] == {"acc": pytest.approx(0.3), "acc_norm_or_acc": pytest.approx(0.4)}
    assert "50.00" in tasks.table(found) and "40.00" in tasks.table(found)
