"""Draws `who_holds_what.png`: python docs/images/who_holds_what.py"""

from pathlib import Path

import matplotlib.figure
from matplotlib.patches import Rectangle

from mlra_jax.files import whole_figure

DEVICES, HEADS = 4, 24
# Widths of what is cached of a token and layer, in units of d_h, the width of a head.
ROWS = (
    (
        "MLRA-4, tensor=4: each device caches one latent and the rotary key,\n"
        "1 + 0.5 = 1.5 d_h a token and layer (d_h: the width of a head)",
        lambda d: (f"latent {d}", 1, f"C{d}"),
        lambda d: f"projections from and to\nlatent {d}, for all heads",
        "query and output\nprojections, whole",
    ),
    (
        "MLA, tensor=4: each device caches the whole latent and the rotary key,\n"
        "4 + 0.5 = 4.5 d_h a token and layer",
        lambda d: ("the latent", 4, "C0"),
        lambda d: (
            f"heads {d * HEADS // DEVICES} to {(d + 1) * HEADS // DEVICES - 1}:\n"
            "projections from latent to output"
        ),
        "query projections, whole",
    ),
)


def draw() -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(11, 7.6), layout="constrained")
    for half, (title, latent, projections, whole) in zip(
        figure.subfigures(2, 1), ROWS, strict=True
    ):
        half.suptitle(title, fontsize=12, x=0.01, ha="left")
        for device, axes in enumerate(half.subplots(1, DEVICES)):
            axes.set(xlim=(0, 5), ylim=(0, 5), xticks=(), yticks=())
            axes.set_title(f"device {device}", fontsize=10, loc="left")
            axes.set_facecolor("#eef2f6")
            name, width, color = latent(device)
            box(axes, 0.25, 3.4, width, 1.1, color, name, "white")
            box(axes, 0.25 + width, 3.4, 0.5, 1.1, "#a3afc2", "rotary\nkey", rotation=90)
            axes.text(0.25, 4.6, "cache of a token", fontsize=8, color="#44546a")
            for y, color, text in (
                (2.3, "#cbd5e0", projections(device)),
                (1.25, "#d6dde7", whole),
                (0.2, "#e2e8f0", "a quarter of MLP\nand vocabulary"),
            ):
                box(axes, 0.25, y, 4.5, 0.95, color, text)
    return figure


def box(axes, x, y, width, height, color, text, text_color="black", rotation=0):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white"))
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        fontsize=7 if rotation else 8.5 if width > 1 else 7.5,
        color=text_color,
        rotation=rotation,
    )


if __name__ == "__main__":
    whole_figure(Path(__file__).with_suffix(".png"), draw(), dpi=110)
