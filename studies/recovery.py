"""What training wins back of the loss that a conversion to MLRA costs.

    python -m studies.recovery --config=studies/configs/small.py --workdir=runs/recovery
                               [--starts=gqa,mla] [--percents=5,10,25]

trains each start as the study does, all seeds side by side, makes an MLRA of four branches of it (a
GQA becomes an MLA first) and trains it on for so many percent of the steps, each a run with a
learning rate of its own that falls to its end. Beside it stand the start itself, trained on for the
most of them, and MLRA-4 from random weights with as many steps in all. `recovery.json` is written
anew after each run, `recovery.png` after each start.
"""

import dataclasses
import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.analysis.subject import of_params
from mlra_jax.command import Parser, run, say
from mlra_jax.config import ConfigError, GroupedConfig, ModelConfig
from mlra_jax.convert.branched import branched, branched_config, turn
from mlra_jax.convert.factored import factored, factored_config
from mlra_jax.data.sources import Source, describe
from mlra_jax.files import whole_figure, whole_file
from mlra_jax.sharding import make_mesh
from mlra_jax.training.__main__ import read_settings
from mlra_jax.training.feed import Feed, load_data
from mlra_jax.training.settings import Experiment
from mlra_jax.training.state import TrainState, make_optimizer_state
from studies.branching import input_moments
from studies.report import mean_and_error
from studies.settings import Study, parameters
from studies.training import fit, fresh_states, validation

_BRANCHES = 4
_LATER = 1000
"""Added to the seeds of the data's order once a model is trained on."""
_PEAK, _WARMUP = 1 / 3, 10
"""Learning rate of what is trained on, of the start's; the part of the steps it takes to rise."""


class Row(NamedTuple):
    """What is known of one model."""

    start: str
    """The preset that was trained first."""
    model: str
    steps: int
    """After the first training."""
    losses: list[float]
    """Nats per held-out token, of each seed."""


def converted(
    config: ModelConfig, params: dict, tokens_BT: np.ndarray
) -> Iterator[tuple[str, ModelConfig, dict]]:
    """(name, config, parameters) of what a GQA or MLA becomes: an MLA where it is none, an MLRA.

    The latent is turned by a Hadamard matrix, scores are multiplied by the number of branches.
    `tokens_BT` is the text of which a GQA's keys and values are factored.
    """
    if isinstance(config.attention, GroupedConfig):
        made = factored_config(config)
        moments_NDD = input_moments(of_params("", config, params), tokens_BT)
        params, config = factored(config, params, moments_NDD, made), made
        yield "as MLA", config, params
    a, layers = config.attention, config.num_layers
    turns = np.stack([turn("hadamard", _BRANCHES, np.eye(a.latent_dim))] * layers)
    strengths = np.full((layers, _BRANCHES, a.num_heads), float(_BRANCHES))
    yield ("as MLRA", *branched(config, params, _BRANCHES, turns, strengths))


def check_start(name: str, config: ModelConfig) -> None:
    """Raises ConfigError for what `converted` does not take."""
    grouped = isinstance(config.attention, GroupedConfig)
    try:
        branched_config(factored_config(config) if grouped else config, _BRANCHES)
    except ConfigError as e:
        raise ConfigError(f"--starts={name} becomes no MLRA: {e}; take gqa, mha or mla") from None


def later(experiment: Experiment, model: ModelConfig, percent: float) -> Experiment:
    """The run in which a trained model is trained on."""
    steps = max(2, round(experiment.steps * percent / 100))
    optimizer = dataclasses.replace(
        experiment.optimizer,
        peak_learning_rate=_PEAK * experiment.optimizer.peak_learning_rate,
        warmup_steps=max(1, steps // _WARMUP),
    )
    return dataclasses.replace(experiment, model=model, optimizer=optimizer, steps=steps)


def states_of(experiment: Experiment, params: Any) -> TrainState:
    """Stacked states of stacked parameters, before their first step."""
    begin = lambda p: TrainState(jnp.zeros((), jnp.int32), p, make_optimizer_state(experiment, p))
    return jax.jit(jax.vmap(begin))(params)


def recover(
    study: Study, start: str, percents: Sequence[float], source: Source, say: Callable[[str], None]
) -> Iterator[Row]:
    """Trains one start, converts it and trains on; a row after each. Raises as `training.fit`."""
    first, seeds = study.experiment(start, 0), range(study.seeds)

    def train(name, experiment, states, order):
        run = fit(experiment, states, order, source, name, study.validate_every, say)
        return run.params, run.curves["validation_loss"][-1][1]

    trained, losses = train(start, first, fresh_states(first, seeds), seeds)
    trained = jax.device_get(trained)
    yield Row(start, start, 0, losses)
    feed = Feed(make_mesh(), first.data.global_batch, first.model)
    tokens_BT = np.asarray(next(iter(feed.train(source, _LATER)))["inputs"])
    of_seed = lambda seed: jax.tree.map(lambda x: x[seed], trained)
    made = [converted(first.model, of_seed(seed), tokens_BT) for seed in seeds]
    for stage in zip(*made, strict=True):
        name, model = stage[0][:2]
        params = jax.tree.map(lambda *x: jnp.stack(x), *(found[2] for found in stage))
        found = validation(later(first, model, 100), source)(params)
        say(f"{start} {name}  {parameters(model):,} parameters  {np.round(found, 4)}")
        yield Row(start, name, 0, found.tolist())
    order = [_LATER + seed for seed in seeds]
    for percent in percents:
        experiment = later(first, model, percent)
        states = states_of(experiment, params)
        _, losses = train(f"{start} {name}", experiment, states, order)
        yield Row(start, name, experiment.steps, losses)
    experiment = later(first, first.model, percents[-1])
    states = states_of(experiment, jax.tree.map(jnp.asarray, trained))
    yield Row(start, start, experiment.steps, train(start, experiment, states, order)[1])


def from_nothing(
    study: Study, steps: int, source: Source, say: Callable[[str], None]
) -> Iterator[Row]:
    """MLRA-4 from random weights with `steps` more than the study's."""
    name, seeds = f"mlra_{_BRANCHES}", range(study.seeds)
    experiment = study.experiment(name, 0)
    experiment = dataclasses.replace(experiment, steps=experiment.steps + steps)
    states = fresh_states(experiment, seeds)
    run = fit(experiment, states, seeds, source, name, study.validate_every, say)
    yield Row("nothing", name, steps, run.curves["validation_loss"][-1][1])


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each row, with mean and standard error over seeds."""
    lines = ["| trained first | then | steps after | loss |", "|---|---|---|---|"]
    for row in rows:
        mean, error = mean_and_error(row.losses)
        spread = f" ± {error:.4f}" if len(row.losses) > 1 else ""
        lines.append(f"| {row.start} | {row.model} | {row.steps} | {mean:.4f}{spread} |")
    return "\n".join(lines)


def write(study: Study, rows: Sequence[Row], path: Path) -> None:
    """All that is known, as JSON."""
    device = jax.devices()[0].device_kind
    found = dict(device=device, jax=jax.__version__, steps=study.steps)
    with whole_file(path) as file:
        json.dump(found | {"rows": [row._asdict() for row in rows]}, file, indent=1)


def draw(study: Study, rows: Sequence[Row], path: Path) -> None:
    """Losses by steps after the first training."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, start in enumerate(dict.fromkeys(row.start for row in rows)):
        ours = [row for row in rows if row.start == start and row.model != "as MLA"]
        for model, style in zip(sorted({row.model for row in ours}), ("o-", "s--"), strict=False):
            points = [(row.steps, np.mean(row.losses)) for row in ours if row.model == model]
            label = model if start in (model, "nothing") else f"{start} {model}"
            axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
    axes.set(xlabel=f"steps after {study.steps:,}", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    whole_figure(path, figure)


def main(argv: list[str] | None = None) -> int:
    """Trains, converts and trains on; see `command.run` for the exit codes."""
    parser = Parser("studies.recovery", __doc__, formatter_class=RawDescriptionHelpFormatter)
    numbers = lambda text: sorted(map(float, text.split(",")))
    parser.add_argument("--config", required=True, help="a file of studies/configs/")
    parser.add_argument("--workdir", required=True, help="folder for the results")
    parser.add_argument("--starts", default="gqa,mla", help="presets, joined by commas")
    parser.add_argument("--percents", type=numbers, default=[5.0, 10.0, 25.0], help="of the steps")
    flags, overrides = parser.parse_known_args(argv)
    settings = read_settings(parser, flags.config, overrides)

    def work():
        study, starts = Study.from_dict(settings.to_dict()), flags.starts.split(",")
        experiments = [study.experiment(start, 0) for start in starts]
        for start, experiment in zip(starts, experiments, strict=True):
            check_start(start, experiment.model)
        _, source = load_data(study.data, study.vocab_size)
        for line in describe(source, study.data.validation_tokens):
            say(line)
        folder, rows = Path(flags.workdir), []
        folder.mkdir(parents=True, exist_ok=True)
        parts = [recover(study, start, flags.percents, source, say) for start in starts]
        most = later(experiments[0], experiments[0].model, flags.percents[-1]).steps
        parts.insert(1, from_nothing(study, most, source, say))
        for part in parts:
            for row in part:
                rows.append(row)
                write(study, rows, folder / "recovery.json")
            draw(study, rows, folder / "recovery.png")
        print(table(rows))

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
