"""The picture of `docs/evidence.md`: KL to the base against the share of plain LoRA's learning, on the validation split."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.evidence.fronts import fronts
from benchmarks.evidence.names import TASKS, label
from benchmarks.evidence.statistics import LORA, Cell, Evidence, Way

SHARES = np.linspace(0.3, 1.0, 71)
# Colours of Okabe and Ito; a dashed line is filtered.
COLORS = {
    "lora": "#000000", "lora decay to start 0.3": "#999999", "corda-kpm": "#D55E00", "lora-null v1 split 8": "#E69F00",
    "lora-null v2": "#0072B2", "confine": "#CC79A7", "contrast": "#009E73",
}  # fmt: skip
WAYS = [
    *(Way(name) for name in ("lora", "corda-kpm", "lora-null v2", "contrast", "confine")),
    *(Way(name, "filter") for name in ("lora", "corda-kpm", "contrast")),
]


def draw(found: Evidence, cell: Cell, level: float) -> Figure:
    """One line a way, the geometric mean over seeds; a vertical line at the level of the tables."""
    lines = {way: line for way, line in fronts(found, cell, SHARES).items() if way in WAYS and np.isfinite(line).any()}
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.add_axes((0.1, 0.115, 0.655, 0.865))
    ends = {}
    for way, line in lines.items():
        style = "--" if way.how == "filter" else "-"
        axes.plot(100 * SHARES, line, style, color=COLORS[way.method], linewidth=2.2 if way == LORA else 1.7)
        last = int(np.flatnonzero(np.isfinite(line))[-1])
        ends[way] = (100 * SHARES[last], float(np.log10(line[last])))
    axes.set_yscale("log")
    for way, height in _spread(
        {way: end[1] for way, end in ends.items()}, 0.045 * float(np.ptp(np.log10(axes.get_ylim())))
    ).items():
        axes.plot(
            [ends[way][0], 101.5],
            10 ** np.array([ends[way][1], height]),
            ":",
            color=COLORS[way.method],
            linewidth=0.8,
            clip_on=False,
        )
        axes.text(102, 10**height, label(way), color=COLORS[way.method], va="center", fontsize=9)
    axes.axvline(100 * level, color="#999999", linewidth=0.8)
    axes.set_xlim(100 * SHARES[0], 100)
    axes.set_xlabel(f"learned of {TASKS.get(cell.task, cell.task)}: % of the most that plain LoRA learns")
    axes.set_ylabel("KL to the base on knowledge questions, nats a token")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _spread(heights: dict[Way, float], gap: float) -> dict[Way, float]:
    """Heights at least a gap apart, each as near to its own as those below it allow."""
    placed: dict[Way, float] = {}
    last = -np.inf
    for way in sorted(heights, key=heights.__getitem__):
        placed[way] = last = max(heights[way], last + gap)
    return placed


def write(found: Evidence, cell: Cell, level: float, path: Path) -> None:
    """An SVG that is the same for the same records and version of matplotlib."""
    with matplotlib.rc_context({"svg.hashsalt": "nullspace", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        FigureCanvasSVG(draw(found, cell, level)).print_svg(path, metadata={"Date": None, "Creator": None})
