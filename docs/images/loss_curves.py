"""Trains the five small runs of docs/monitoring.md and draws `loss_curves.png`.

python docs/images/loss_curves.py [WORKDIR]      some minutes on a CPU; finished runs are kept
"""

import sys
from pathlib import Path

import matplotlib.figure

from mlra_jax.files import whole_figure
from mlra_jax.training.__main__ import main
from mlra_jax.training.metrics import read_metrics

COMMON = (
    "--config=configs/quickstart.py --config.model.num_layers=2 --config.model.context_length=64 "
    "--config.data.global_batch=8 --config.mesh.data=1 --config.mesh.tensor=1 "
    "--config.virtual_cpu_devices=0 --config.steps=400 --config.validate_every=40 "
    "--config.save_every=400 --config.log_every=10 --config.data.validation_tokens=8192"
)
RUNS = {
    "healthy": "--config.optimizer.peak_learning_rate=4e-3",
    "rate too low": "--config.optimizer.peak_learning_rate=1e-4",
    "rate too high": "--config.optimizer.peak_learning_rate=1",
    "too little text": "--config.data.source=README.md --config.data.validation=CHANGELOG.md",
    "no warm-up, no clipping": "--config.optimizer.peak_learning_rate=2e-2 "
    "--config.optimizer.warmup_steps=0 --config.optimizer.clip_norm=0",
}


def draw(runs: dict[str, list[dict]]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    loss, norm = figure.subplots(1, 2)
    for i, (name, lines) in enumerate(runs.items()):
        for axes, key, style in (
            (loss, "loss", dict(linewidth=1)),
            (loss, "validation_loss", dict(linestyle="none", marker="o", markersize=4)),
            (norm, "gradient_norm", dict(linewidth=1)),
        ):
            points = [(line["step"], line[key]) for line in lines if key in line]
            label = name if key == "loss" else None
            axes.plot(*zip(*points, strict=True), color=f"C{i}", label=label, **style)
    loss.plot([], [], "o", color="gray", markersize=4, label="validation")
    loss.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, 8))
    norm.set(xlabel="step", ylabel="norm of all gradients, before clipping", yscale="log")
    loss.legend(fontsize=8)
    for axes in (loss, norm):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/curves")
    for name, changes in RUNS.items():
        workdir = folder / name.replace(" ", "_").replace(",", "")
        main([*COMMON.split(), *changes.split(), f"--workdir={workdir}"])
        RUNS[name] = read_metrics(workdir)
    whole_figure(Path(__file__).with_suffix(".png"), draw(RUNS), dpi=110)
