"""The style of figures, panels of axes, and SVG text of a figure, by matplotlib.

Nothing here uses pyplot, so that no window opens and no state is left. Colours are those of Okabe and Ito, which colour-blind
readers can distinguish, each with its own marker and dash pattern; maps are in cividis.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from nullspace.errors import MissingPackageError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise MissingPackageError(f"figures need matplotlib: pip install 'nullspace-lora[report]' ({error})") from None

import numpy as np

from nullspace.analysis import Row

# A page of 1280 pixels leaves 1152 for a figure, of which an inch is 96: 10.5 points are 14 pixels.
WIDTH, PANEL_HEIGHT, COLUMNS = 12.0, 2.35, 4
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "nullspace",
}


class Look(NamedTuple):
    """Colour, marker and dashes of one line among several."""

    color: str
    marker: str
    dashes: Any


LOOKS = (
    Look("#0072B2", "o", "-"),
    Look("#D55E00", "s", (0, (5, 1.5))),
    Look("#009E73", "^", (0, (1.5, 1.2))),
    Look("#CC79A7", "D", (0, (5, 1.5, 1.2, 1.5))),
    Look("#E69F00", "v", (0, (8, 2))),
    Look("#56B4E9", "P", (0, (3, 1, 1, 1, 1, 1))),
    Look("#000000", "X", (0, (2.5, 2.5))),
)
# The number of a row that a line shows; None if it is not known.
Value = Callable[[Row], float | None]


def svg(figure: Figure) -> str:
    """The figure as SVG text, letters as outlines; the same text for the same figure."""
    FigureCanvasSVG(figure)
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        # Without a date, for equal text, and without the metadata block, which has nothing but addresses.
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def many_looks() -> Iterable[Look]:
    """The looks, and then their colours with the markers and dashes of others."""
    turned = LOOKS[3:] + LOOKS[:3]
    return itertools.cycle([*LOOKS, *(Look(a.color, b.marker, b.dashes) for a, b in zip(LOOKS, turned, strict=True))])


def panels(
    names: Sequence[str],
    draw: Callable[[Axes, str], None],
    y: str,
    x: str,
    *,
    columns: int = COLUMNS,
    height: float = PANEL_HEIGHT,
    legend: bool = False,
    share: bool = True,
) -> Figure:
    """A grid of panels, one a name, drawn by `draw`; axis labels at the edges, and one legend above for all."""
    columns = min(columns, len(names))
    lines = math.ceil(len(names) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * lines + 0.7), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=share, sharex=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(names):
                axes.set_visible(False)
                continue
            draw(axes, names[index])
            axes.set_title(plain(names[index]), loc="left", fontweight="bold")
        figure.supxlabel(x, fontsize=STYLE["axes.labelsize"])
        figure.supylabel(y, fontsize=STYLE["axes.labelsize"])
        if legend:
            known: dict[str, Any] = {}
            for axes in grid.flat:
                known.update(
                    {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True) if label.strip()}
                )
            columns = int(WIDTH / (0.75 + 0.085 * max(map(len, known), default=1)))  # a handle, and some 0.085 inches a letter
            figure.legend(
                known.values(), known.keys(), loc="outside upper left", ncols=max(columns, 1), frameon=False, handlelength=3
            )
    return figure


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], x: str, label: str) -> Figure:
    """A map of positive values on a logarithmic colour scale; grey where a value is zero or NaN."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 1.5 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("#e4e4e4")
        known = values[values > 0]
        norm = LogNorm(known.min(), max(known.max(), 1.001 * known.min())) if len(known) else None
        image = axes.pcolormesh(positive(values), norm=norm, cmap="cividis", edgecolors="white", linewidth=0.6)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [plain(name) for name in rows])
        axes.invert_yaxis()
        every = math.ceil(len(columns) / 32)
        axes.set_xticks(np.arange(0, len(columns), every) + 0.5, [plain(name) for name in columns[::every]])
        axes.tick_params(length=0)
        axes.set_xlabel(x)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(known):
            bar = figure.colorbar(image, ax=axes, label=label, pad=0.01)
            bar.ax.yaxis.set_major_formatter(FuncFormatter("{:g}".format))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def over_blocks(
    axes: Axes, rows: Iterable[Row], value: Value, blocks: Sequence[Any], look: Look, label: str, *, open_: bool = False
) -> None:
    """A line over the blocks; of several layers in a block, such as experts, the mean."""
    values: dict[Any, list[float]] = {}
    for row in rows:
        number = value(row)
        if number is not None:
            values.setdefault(row["block"], []).append(number)
    at = [i for i, block in enumerate(blocks) if block in values]
    means = [float(np.mean(values[blocks[i]])) for i in at]
    axes.plot(
        at,
        means,
        color=look.color,
        linestyle=look.dashes if not open_ else (0, (1, 1.5)),
        linewidth=1.0 if open_ else None,
        marker=look.marker,
        markerfacecolor="white" if open_ else look.color,
        markeredgewidth=0.9,
        label=plain(label),
    )
    axes.set_xlim(-0.5, max(len(blocks) - 0.5, 0.5))
    ticks = [int(t) for t in MaxNLocator(integer=True, nbins=6).tick_values(0, max(len(blocks) - 1, 1)) if 0 <= t < len(blocks)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.set_xticklabels([plain(str(blocks[t])) for t in ticks])


def integer_ticks(axes: Axes) -> None:
    """Ticks of the x axis at integers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, if a value is above zero; labels at the decades, and between them if there are few."""
    if not any((np.asarray(line.get_ydata(), dtype=float) > 0).any() for line in axes.get_lines()):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter("{:g}".format))
    axes.yaxis.set_minor_formatter(NullFormatter())


def grouped(rows: Iterable[Row], field: str = "projection") -> list[tuple[str, list[Row]]]:
    """(value, rows with this value) of a field, in the order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return list(groups.items())


def blocks_of(rows: Iterable[Row]) -> list[Any]:
    """The blocks of rows, each once, in the order of the model."""
    return list(dict.fromkeys(row["block"] for row in rows))


def positive(values: Any) -> Any:
    """Values for a logarithmic axis: NaN, which leaves a gap, for those that are not positive."""
    return np.where(np.asarray(values) > 0, values, np.nan)


def plain(text: str) -> str:
    """A name escaped so that matplotlib reads no mathematics in it and gives it a legend."""
    return text.replace("$", r"\$").removeprefix("_") or " "
