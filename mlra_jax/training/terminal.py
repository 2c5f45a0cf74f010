"""Curves of characters, for terminals."""

import shutil
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]
_MARKERS = "*+xo#%@="


def draw(curves: Mapping[str, Points], axis: str = "step", height: int = 16) -> str:
    """Points by name, as lines of text as wide as the terminal; no colours.

    Curves without points are left out. Where there are none at all, nothing is drawn.

    Args:
      curves: (x, y) in order of x.
      axis: what x is.
      height: lines in all.
    """
    import plotext

    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    # The library has one figure.
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(shutil.get_terminal_size((100, 24)).columns, 120), height)
    for i, (name, points) in enumerate(curves.items()):
        marker = _MARKERS[i % len(_MARKERS)] if len(curves) > 1 else "braille"
        plotext.plot(*zip(*points, strict=True), label=name, marker=marker)
    plotext.xlabel(axis)
    lines = plotext.uncolorize(plotext.build()).splitlines()
    return "\n".join(line.rstrip() for line in lines)
