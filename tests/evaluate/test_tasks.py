"""What goes to the lm-evaluation-harness and what comes back, with a stand-in for the harness."""

import dataclasses
import json
import sys
import types

import pytest

from mlra_jax import evaluate
from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.decoder import Vocabulary
from mlra_jax.evaluate import tasks

RESULTS = {
    "piqa": {"acc,none": 0.25, "acc_norm,none": 0.5, "alias": "piqa"},
    "boolq": {"acc,none": 0.75, "acc_stderr,none": "N/A"},
    "lambada": {"perplexity,none": 12.5, "alias": "lambada"},
}
SAMPLES = {name: {"original": 9, "effective": 1234} for name in RESULTS}


@pytest.fixture
def asked(monkeypatch):
    """A harness that notes what it is asked; `mlra_jax.evaluate.harness` is imported with it."""
    calls = []

    class TemplateLM:
        def __init__(self):
            self.cache_hook = types.SimpleNamespace(
                add_partial=lambda *arguments: calls.append(("kept", *arguments))
            )

        @property
        def prefix_token_id(self):
            return self.eot_token_id

    class TaskManager:
        all_tasks = ["piqa", "boolq", "lambada"]

        def __init__(self, include_path=None):
            calls.append(("manager", include_path))

    def simple_evaluate(**settings):
        calls.append(("evaluate", settings))
        return {"results": RESULTS, "n-samples": SAMPLES}

    def register(name):
        return lambda cls: calls.append(("registered", name)) or cls

    modules = {
        "lm_eval": dict(simple_evaluate=simple_evaluate),
        "lm_eval.tasks": dict(TaskManager=TaskManager),
        "lm_eval.api": {},
        "lm_eval.api.model": dict(TemplateLM=TemplateLM),
        "lm_eval.api.registry": dict(register_model=register),
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlra_jax.evaluate.harness", raising=False)
    monkeypatch.delattr(evaluate, "harness", raising=False)
    yield calls
    # It was made with the stand-in.
    sys.modules.pop("mlra_jax.evaluate.harness", None)
    evaluate.__dict__.pop("harness", None)


@dataclasses.dataclass(frozen=True)
class Loaded:
    config: types.SimpleNamespace
    vocabulary: Vocabulary | None = None


@pytest.fixture
def model(asked, monkeypatch):
    """A harness model on a loaded model that is none; scores count tokens."""
    from mlra_jax.evaluate import harness

    def load_model(*arguments, allow_nonfinite):
        asked.append(("load", *arguments, allow_nonfinite))
        return Loaded(types.SimpleNamespace(context_length=8, vocab_size=264))

    monkeypatch.setattr(harness, "load_model", load_model)
    monkeypatch.setattr(harness, "tokenizer_of", lambda model, name: ByteTokenizer())
    monkeypatch.setattr(harness.sharding, "parse_mesh", lambda text: f"mesh {text}")
    monkeypatch.setattr(harness.scoring, "check_batch", lambda *a: asked.append(("batch", a[1])))

    def loglikelihood(model, pairs, *, batch, max_length, progress, kept):
        asked.append(("score", pairs, batch, max_length))
        return [(-float(sum(rest)), len(rest) == 1) for _, rest in pairs]

    def generate_until(model, text, prompts, *, until, max_new_tokens, sampling, **settings):
        asked.append(("generate", prompts, until, max_new_tokens, sampling, settings))
        return [f"{text.decode(prompt)}+{max_new_tokens}" for prompt in prompts]

    monkeypatch.setattr(harness.scoring, "loglikelihood", loglikelihood)
    monkeypatch.setattr(harness.scoring, "generate_until", generate_until)
    made = harness.HarnessModel("DIR", mesh="data=2", batch_size="4", dtype="bfloat16", device="x")
    return made


def only(asked, kind):
    return [call[1:] for call in asked if call[0] == kind]


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


def test_a_model_is_loaded_as_the_flags_say(asked, model):
    assert only(asked, "registered") == [("mlra_jax",)]
    assert only(asked, "load") == [("DIR", "mesh data=2", "bfloat16", None, False)]
    assert only(asked, "batch") == [(4,)] and model.batch_size == 4
    assert model.max_length == 8 and model.model.vocabulary.num_tokens == 257
    assert model.eot_token_id == 256 and model.tokenizer_name == "bytes"
    assert model.tok_encode("aä") == [97, 195, 164]


def test_scores_come_back_in_order_and_are_kept(asked, model):
    requests = [(("a", "b"), [1, 2], [3]), (("", "cd"), [], [4, 5]), (None, [6], [7])]
    answers = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert answers == [(-3.0, True), (-9.0, False), (-7.0, True)]
    pairs = [([1, 2], [3]), ([256], [4, 5]), ([6], [7])]
    assert only(asked, "score") == [(pairs, 4, 8)]
    assert only(asked, "kept") == [
        ("loglikelihood", ("a", "b"), (-3.0, True)),
        ("loglikelihood", ("", "cd"), (-9.0, False)),
    ]


def test_rolling_scores_are_summed_by_text(asked, model):
    texts = ["abcdefghij", "", "k", "abcdefgh"]
    found = model.loglikelihood_rolling([request(text) for text in texts], disable_tqdm=True)
    assert found == [-float(sum(text.encode())) for text in texts]
    ((pairs, _, _),) = only(asked, "score")
    assert [len(rest) for _, rest in pairs] == [8, 2, 1, 8]
    assert [context[0] for context, _ in pairs] == [256, ord("b"), 256, 256]


def test_texts_come_back_in_order_by_way_of_sampling(asked, model):
    options = [{"max_gen_toks": 3}, {"until": "x"}, {"max_gen_toks": 3}, {"until": ["x"]}]
    requests = [request(text, o) for text, o in zip("abcd", options, strict=True)]
    found = model.generate_until([*requests, request("", {"until": "x"})], disable_tqdm=True)
    assert found == ["a+3", "b+256", "c+3", "d+256", "+256"]
    calls = only(asked, "generate")
    assert [(prompts, until, new) for prompts, until, new, *_ in calls] == [
        ([[97], [99]], (), 3),
        ([[98], [100], [256]], ("x",), 256),
    ]
    assert calls[0][4]["batch"] == 4 and calls[0][4]["max_length"] == 8
    kept = only(asked, "kept")
    assert sorted(kept, key=lambda k: k[1][0])[1] == ("generate_until", requests[0].args, "a+3")
    assert len(kept) == 5


@pytest.mark.parametrize(
    ("options", "until", "new", "sampling"),
    [
        ({}, (), 256, (0.0, 0, 1.0)),
        ({"until": "a"}, ("a",), 256, (0.0, 0, 1.0)),
        ({"until": ["a", "b"]}, ("a", "b"), 256, (0.0, 0, 1.0)),
        ({"until": None, "max_new_tokens": 7}, (), 7, (0.0, 0, 1.0)),
        ({"max_tokens": "9"}, (), 9, (0.0, 0, 1.0)),
        ({"max_tokens": 9, "max_gen_toks": 5}, (), 5, (0.0, 0, 1.0)),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9}, (), 256, (0.5, 4, 0.9)),
        ({"temperature": 0.5, "do_sample": True}, (), 256, (0.5, 0, 1.0)),
        ({"temperature": 0.5, "do_sample": False}, (), 256, (0.0, 0, 1.0)),
        ({"temperature": 0.0, "top_p": None, "top_k": None}, (), 256, (0.0, 0, 1.0)),
    ],
)
def test_generation_options(model, options, until, new, sampling):
    from mlra_jax.evaluate import harness
    from mlra_jax.generation import Sampling

    assert harness._generation(options) == (until, new, Sampling(*sampling))


def test_tasks_are_asked_for_as_they_are_named(asked):
    model = object()
    found = tasks.run(model, ("piqa", "boolq"), num_fewshot=2, limit=5, include_path="mine")
    assert only(asked, "manager") == [("mine",)]
    ((settings,),) = only(asked, "evaluate")
    assert settings.pop("task_manager").all_tasks
    assert settings == dict(
        model=model, tasks=["piqa", "boolq"], num_fewshot=2, limit=5,
        log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    assert found == {
        "tasks": {
            "piqa": {"acc": 0.25, "acc_norm": 0.5, "examples": 1234},
            "boolq": {"acc": 0.75, "examples": 1234},
        },
        "mean": {"acc": 0.5, "acc_norm_or_acc": 0.625},
        "others": {"lambada": RESULTS["lambada"]},
    }
    assert tasks.table(found).splitlines() == [
        "task                 acc  acc_norm  examples",
        "piqa               25.00     50.00     1,234",
        "boolq              75.00         -     1,234",
        "mean               50.00     62.50",
        "lambada: perplexity,none 12.5",
    ]
    with pytest.raises(ValueError, match="no task 'pica'; did you mean piqa"):
        tasks.run(model, ("boolq", "pica"))
    with pytest.raises(ValueError, match="no task 'zzzzz'$"):
        tasks.run(model, ("zzzzz",))


def test_the_papers_seven_tasks_are_the_default(asked, model, tmp_path, monkeypatch, capsys):
    """And the whole way of the command: flags, result file, table, exit code."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager, "all_tasks", list(tasks.PAPER_TASKS))
    output = tmp_path / "r.json"
    assert tasks.main(["--checkpoint=DIR", f"--output={output}", "--dtype=float32"]) == 0
    ((settings,),) = only(asked, "evaluate")
    assert settings["tasks"] == [
        "arc_easy", "arc_challenge", "openbookqa", "boolq", "hellaswag", "winogrande", "piqa"
    ]  # fmt: skip
    assert (settings["num_fewshot"], settings["limit"]) == (0, None)
    assert settings["model"].batch_size == 16 and settings["model"].kept is None
    assert only(asked, "load")[-1] == ("DIR", "mesh ", "float32", None, False)
    printed = capsys.readouterr().out
    assert printed == tasks.table(json.loads(output.read_text())) + "\n"
    flags = ["--tasks=piqa,,boolq", "--num_fewshot=3", "--limit=2", "--batch=5"]
    flags += ["--include_path=i", "--mesh=fsdp=2", "--allow_nonfinite"]
    assert tasks.main(["--checkpoint=DIR", *flags]) == 0
    settings = only(asked, "evaluate")[-1][0]
    assert settings["tasks"] == ["piqa", "boolq"] and settings["model"].batch_size == 5
    assert (settings["num_fewshot"], settings["limit"]) == (3, 2)
    assert only(asked, "manager")[-1] == ("i",)
    assert only(asked, "load")[-1][1:] == ("mesh fsdp=2", None, None, True)


def test_the_commands_mistakes_are_one_line(asked, model, tmp_path, capsys):
    for flags, message in (
        (["--tasks=pica"], "has no task 'pica'"),
        ([f"--output={tmp_path / 'absent' / 'r.json'}"], "its folder does not exist"),
        ([f"--output={tmp_path}"], "is a folder"),
    ):
        assert tasks.main(["--checkpoint=DIR", *flags]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
