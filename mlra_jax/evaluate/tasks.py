"""Zero-shot accuracy on the paper's seven tasks, through the lm-evaluation-harness.

`mlra-tasks --checkpoint=DIR [--tasks=arc_easy,piqa] [--output=FILE.json]`
"""

import difflib
import sys
from collections.abc import Mapping
from typing import Any

from mlra_jax import command
from mlra_jax.command import Parser, Switch
from mlra_jax.evaluate.perplexity import check_output, write_json
from mlra_jax.extras import install_line
from mlra_jax.storage import paths

PAPER_TASKS = (
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "boolq",
    "hellaswag",
    "winogrande",
    "piqa",
)
METRICS = ("acc", "acc_norm")


def run(
    model: Any,
    tasks: tuple[str, ...] = PAPER_TASKS,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    include_path: str | None = None,
) -> dict[str, Any]:
    """Runs harness tasks on a `HarnessModel`.

    Args:
      model: a `HarnessModel`; it keeps the answers, if it has a `cache`.
      tasks: names the harness knows, or that task files in `include_path` define.
      num_fewshot: solved examples before each question; the paper uses none.
      limit: only so many examples of each task, to try things out.
      include_path: folder with task files (YAML) of your own.

    Returns:
      `{"tasks": {name: {"acc": …, "acc_norm": …, "examples": n}}, "mean": {"acc": …,
      "acc_norm_or_acc": …}}`: `acc_norm` where the task has it, and what other metrics the tasks
      gave under "others".

    Raises:
      ValueError: a task that the harness does not know.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"the lm-evaluation-harness has no task {name!r}{hint}")
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        # Its estimates of the error of other metrics than accuracies fork a process with JAX in it.
        bootstrap_iters=0,
    )
    return summarise(found["results"], found["n-samples"])


def summarise(results: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies in the harness's results, and their means over the tasks."""
    rows = {}
    for name, values in results.items():
        row = {m: values[f"{m},none"] for m in METRICS if f"{m},none" in values}
        if row:
            rows[name] = row | {"examples": samples[name]["effective"]}
    means = {}
    if rows:
        means["acc"] = sum(row["acc"] for row in rows.values()) / len(rows)
        means["acc_norm_or_acc"] = sum(row.get("acc_norm", row["acc"]) for row in rows.values())
        means["acc_norm_or_acc"] /= len(rows)
    others = {name: values for name, values in results.items() if name not in rows}
    return {"tasks": rows, "mean": means} | ({"others": others} if others else {})


def table(result: Mapping[str, Any]) -> str:
    """Lines of text, in percent.

    `acc` takes the answer of the highest probability, `acc_norm` that of the highest probability
    per byte, where the harness defines it.
    """
    lines = [f"{'task':16}{'acc':>8}{'acc_norm':>10}{'examples':>10}"]
    for name, row in result["tasks"].items():
        norm = f"{100 * row['acc_norm']:.2f}" if "acc_norm" in row else "-"
        lines.append(f"{name:16}{100 * row['acc']:8.2f}{norm:>10}{row['examples']:10,}")
    if result["mean"]:
        mean = result["mean"]
        lines.append(f"{'mean':16}{100 * mean['acc']:8.2f}{100 * mean['acc_norm_or_acc']:10.2f}")
    for name, values in result.get("others", {}).items():
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        lines.append(f"{name}: " + ", ".join(f"{k} {v:.6g}" for k, v in numbers.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the tasks that the flags name; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.evaluate.tasks", __doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="training run or converted checkpoint")
    parser.add_argument("--tasks", default=",".join(PAPER_TASKS), help="joined by commas")
    parser.add_argument("--output", help="JSON file for the result")
    parser.add_argument("--tokenizer", help="ranks file, where the tokenizer cannot be fetched")
    parser.add_argument("--mesh", default="", help="devices along each axis, as in data=4")
    parser.add_argument("--batch", type=int, default=16, help="sequences at a time")
    parser.add_argument("--dtype", help="of parameters and products (default: the checkpoint's)")
    parser.add_argument("--num_fewshot", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only so many examples of each task")
    parser.add_argument("--include_path", help="folder with task files of your own")
    parser.add_argument("--cache", help="database of answers, to go on after an interruption")
    parser.add_argument(
        "--allow_nonfinite", action=Switch, default=False, help="take infinities and NaN, too"
    )
    flags = parser.parse_args(argv)
    kept = "--cache keeps the answers" if flags.cache is None else "the same command goes on"
    return command.run(parser, lambda: _work(flags), kept)


def _work(flags) -> None:
    try:
        from mlra_jax.evaluate.harness import HarnessModel
    except ImportError as error:
        raise ValueError(
            f"needs the lm-evaluation-harness ({error}): {install_line('lm_eval')}"
        ) from None
    check_output(flags.output)
    model = HarnessModel(
        flags.checkpoint,
        tokenizer=flags.tokenizer,
        mesh=flags.mesh,
        batch_size=flags.batch,
        dtype=flags.dtype,
        cache=flags.cache,
        allow_nonfinite=flags.allow_nonfinite,
    )
    result = run(
        model,
        tuple(name for name in flags.tasks.split(",") if name),
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        include_path=flags.include_path,
    )
    if flags.output:
        write_json(paths.path(flags.output), result)
    print(table(result))


if __name__ == "__main__":
    sys.exit(main())
