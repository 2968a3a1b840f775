"""Draw `preservation.svg` from the records of the preservation study.

    python docs/images/preservation.py

Each line is one method, the mean over three seeds of `at_equal_loss` at four task losses that every run reaches; a bar is one
standard deviation.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nullspace.reporting.study import Study, at_equal_loss, read_study

HERE = Path(__file__).parent
RECORDS = HERE.parents[1] / "benchmarks" / "results" / "preservation-cpu.jsonl"
# Variant → label, colour (Okabe and Ito), and the height of its label, so that none covers another.
LOOKS = {
    "pissa": ("PiSSA", "#E69F00", 0.322),
    "milora": ("MiLoRA", "#CC79A7", 0.281),
    "lora": ("LoRA", "#000000", 0.185),
    "b-zero": ("b-zero", "#56B4E9", 0.096),
    "lora-null-v1": ("LoRA-Null v1", "#009E73", 0.068),
    "lora-null-v2": ("LoRA-Null v2", "#0072B2", 0.038),
    "corda-kpm": ("CorDA-KPM", "#D55E00", 0.010),
}


def draw(study: Study) -> Figure:
    """Knowledge lost (nats an answer) against what the task has gained (nats a token)."""
    assert study.base is not None
    begin = study.base["task"]["loss"]
    rows = at_equal_loss(study)
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.add_subplot()
    for number, (variant, (label, color, height)) in enumerate(LOOKS.items()):
        points = [(begin - row["task_loss"], row["forgetting"]) for row in rows if row["variant"] == variant]
        x, y = [0.0, *(gain for gain, _ in points)], [0.0, *(lost.mean for _, lost in points)]
        axes.plot(x, y, color=color, marker="o", markersize=3.5, linewidth=1.6)
        gain, lost = points[-1]
        axes.errorbar(gain + 0.006 * (number + 1), lost.mean, lost.deviation, color=color, capsize=2, linewidth=0.9)
        axes.text(gain + 0.055, height, label, color=color, va="center", fontsize=9.5)
    axes.set_xlim(0, 0.78)
    axes.set_xlabel("task learned: fall of the loss on GSM8K, nats a token")
    axes.set_ylabel("knowledge lost: nats an answer")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    with matplotlib.rc_context({"svg.hashsalt": "nullspace", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = draw(read_study(RECORDS))
        FigureCanvasSVG(figure).print_svg(HERE / "preservation.svg", metadata={"Date": None, "Creator": None})
