"""Figures of what `nullspace.analysis` finds and of a preservation study, by matplotlib: `Figure`s, and SVG text of them.

Nothing here touches pyplot, so that no window opens and no state is left. Colours are those of Okabe and Ito, which colour-blind
readers tell apart, each with a marker and a dash pattern of its own; maps are in cividis.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise ImportError(f"figures need matplotlib: pip install 'nullspace-lora[report]' ({error})") from None

import numpy as np

from nullspace.analysis import BINS, INITIAL, Row
from nullspace.reporting.study import MEASURES, Study, over_seeds

# A page of 1280 pixels leaves 1152 for a figure, of which an inch is 96: 10.5 points are 14 pixels.
WIDTH, PANEL_HEIGHT, COLUMNS = 12.0, 2.35, 4
# What a float32 adapter reads by rounding alone is some 1e-8: where its figure ends.
FLOOR = 1e-5
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
    """Of one line among several."""

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
# What is drawn of a row; None where it is not known.
Value = Callable[[Row], float | None]


def svg(figure: Figure) -> str:
    """The figure as SVG text, letters as outlines; the same text for the same figure."""
    FigureCanvasSVG(figure)
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        # Without a date, and without the metadata block, which is nothing but addresses.
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def effective_ranks(inputs: Sequence[Row], weights: Sequence[Row]) -> Figure:
    """Effective ranks of X and W₀ over the blocks, as shares of the largest possible: a panel an input."""

    def draw(axes: Axes, projection: str) -> None:
        rows = [row for row in inputs if row["projection"] == projection]
        _over_blocks(axes, rows, lambda row: _ratio(row["effective_rank"], row["d_in"]), blocks, LOOKS[0], "input X")
        for look, (member, of_member) in zip(itertools.cycle(LOOKS[1:]), _grouped(_heard_by(rows, weights)), strict=False):
            label = f"weight W₀ ({member})"
            _over_blocks(axes, of_member, lambda row: row["effective_rank"] / min(row["d_out"], row["d_in"]), blocks, look, label)
        axes.set_ylim(0, 1.02)
        axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", handlelength=2.6, labelspacing=0.25)

    blocks = _blocks([*inputs, *weights])
    return _panels(
        [name for name, _ in _grouped(inputs)], draw, "effective rank / largest possible", "block", columns=2, height=3.0
    )


def spectra(inputs: Sequence[Row], weights: Sequence[Row]) -> Figure:
    """Singular values of X and W₀ relative to the first (Figure 2): medians over the blocks, and for X where 80 % of them lie."""

    def draw(axes: Axes, projection: str) -> None:
        rows = [row for row in inputs if row["projection"] == projection and row["spectrum"]]
        if rows:
            values = np.array([row["spectrum"] for row in rows if len(row["spectrum"]) == len(rows[0]["spectrum"])])
            at = np.linspace(0, 1, values.shape[1])
            low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0)
            axes.fill_between(at, _positive(low), _positive(high), color=LOOKS[0].color, alpha=0.2, linewidth=0)
            axes.plot(at, _positive(middle), color=LOOKS[0].color, label="input X")
        for look, (member, of_member) in zip(itertools.cycle(LOOKS[1:]), _grouped(_heard_by(rows, weights)), strict=False):
            values = np.array([row["spectrum"] for row in of_member if len(row["spectrum"]) == len(of_member[0]["spectrum"])])
            middle = np.median(values, axis=0)
            at = np.linspace(0, 1, len(middle))
            axes.plot(at, _positive(middle), color=look.color, linestyle=look.dashes, label=f"weight W₀ ({member})")
        _logarithmic(axes)
        axes.set_xlim(0, 1)
        axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", handlelength=2.6, labelspacing=0.25)

    return _panels([name for name, _ in _grouped(inputs)], draw, "σᵢ / σ₁", "i / number of singular values", columns=2, height=3.0)


def directions(adapters: Sequence[Row]) -> Figure:
    """How loudly each A reads the input's directions, from the loudest to the quietest (Figure 4): at the start, and in the end."""
    states = [("before training", _first(adapters)), ("after training", _last(adapters))]
    trained = {row["adapter"] for row in adapters if row["state"] != INITIAL}
    titles = {title: [row for row in rows if row["read"]] for title, rows in states}
    titles["after training"] = [row for row in titles["after training"] if row["adapter"] in trained]
    looks = _looks(adapters)

    def draw(axes: Axes, title: str) -> None:
        for name, rows in _grouped(titles[title], "adapter"):
            mean = np.sqrt(np.mean(np.square([row["read"] for row in rows]), axis=0))
            at = (np.arange(BINS) + 0.5) / BINS
            look = looks[name]
            axes.plot(at, _positive(mean), color=look.color, linestyle=look.dashes, label=_plain(name))
        axes.axhline(1.0, color="#555555", linewidth=1.0, label="an A that is random")
        _logarithmic(axes)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR))
        axes.set_xlim(0, 1)

    names = [title for title, rows in titles.items() if rows]
    label = "‖A uⱼ‖ √d / ‖A‖"
    return _panels(
        names, draw, label, "direction uⱼ of the input: 0 the loudest, 1 the quietest", columns=2, height=3.4, legend=True
    )


def by_layer(adapters: Sequence[Row], field: str, label: str, *, start: bool = False) -> Figure:
    """A number of every adapter over the blocks, on a logarithmic axis: a panel a projection.

    Args:
        adapters: rows.
        field: which number of the last state.
        label: of the axis.
        start: show that of the first state too. What is not trained has thin lines and open markers.
    """
    rows = [row for row in adapters if row[field] is not None]
    blocks, looks = _blocks(rows), _looks(adapters)
    last, first = _last(rows), _first(rows)
    trained = {row["adapter"] for row in rows if row["state"] != INITIAL}

    def draw(axes: Axes, projection: str) -> None:
        for name, look in looks.items():
            mine = [row for row in last if (row["adapter"], row["projection"]) == (name, projection)]
            begun = [row for row in first if (row["adapter"], row["projection"]) == (name, projection)]
            frozen = bool(mine) and all(row[field] == 0 for row in last if row["adapter"] == name)
            label = f"{name} (0 throughout)" if frozen else name
            if start and name in trained:
                _over_blocks(axes, begun, lambda row: row[field], blocks, look, "", open_=True)
            _over_blocks(axes, mine, lambda row: row[field], blocks, look, label, open_=name not in trained)
        _logarithmic(axes)

    return _panels([name for name, _ in _grouped(rows)], draw, label, "block", legend=True)


def over_steps(adapters: Sequence[Row], fields: Mapping[str, str]) -> Figure:
    """Numbers of every adapter through its training: medians over the layers, and where 80 % of them lie.

    Args:
        adapters: rows of several states.
        fields: title of a panel → field.
    """
    looks = _looks(adapters)
    known = all(row["step"] is not None for row in adapters)

    def draw(axes: Axes, title: str) -> None:
        for name, rows in _grouped(adapters, "adapter"):
            states = [(state, [row[fields[title]] for row in of_state]) for state, of_state in _grouped(rows, "state")]
            values = [np.quantile([v for v in each if v is not None], (0.1, 0.5, 0.9)) for _, each in states]
            at = [next(row["step"] for row in rows if row["state"] == state) if known else i for i, (state, _) in enumerate(states)]
            low, middle, high = np.array(values).T
            look = looks[name]
            axes.fill_between(at, low, high, color=look.color, alpha=0.15, linewidth=0)
            axes.plot(at, middle, color=look.color, linestyle=look.dashes, marker=look.marker, label=_plain(name))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    return _panels(list(fields), draw, "", "optimiser step" if known else "state", columns=3, height=2.9, legend=True, share=False)


def null_spaces(inputs: Sequence[Row]) -> Figure:
    """Leak and gap of the null spaces over the blocks: a line an input."""
    fields = {"leak: ‖UᵀX‖ / ‖X‖": "leak", "gap: (λᵣ₊₁ − λᵣ) / λᵣ₊₁": "gap"}
    blocks = _blocks(inputs)

    def draw(axes: Axes, title: str) -> None:
        for look, (projection, rows) in zip(itertools.cycle(LOOKS), _grouped(inputs), strict=False):
            _over_blocks(axes, rows, lambda row: row[fields[title]], blocks, look, projection)
        if fields[title] == "leak":
            _logarithmic(axes)
        else:
            axes.set_ylim(bottom=0)

    return _panels(list(fields), draw, "", "block", columns=2, height=3.0, legend=True, share=False)


def outliers(inputs: Sequence[Row]) -> Figure:
    """The share of tokens that are outliers, as a map of inputs and blocks; grey where there is none."""
    blocks = _blocks(inputs)
    projections = [name for name, _ in _grouped(inputs)]
    shares = np.full((len(projections), len(blocks)), np.nan)
    for (i, projection), (j, block) in ((a, b) for a in enumerate(projections) for b in enumerate(blocks)):
        values = [row["outlier_share"] for row in inputs if (row["projection"], row["block"]) == (projection, block)]
        shares[i, j] = np.nan if None in values or not values else 100 * float(np.mean(values))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 1.5 + 0.34 * len(projections)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("#e4e4e4")
        found = shares[shares > 0]
        norm = LogNorm(found.min(), max(found.max(), 1.001 * found.min())) if len(found) else None
        image = axes.pcolormesh(_positive(shares), norm=norm, cmap="cividis", edgecolors="white", linewidth=0.6)
        axes.set_yticks(np.arange(len(projections)) + 0.5, [_plain(name) for name in projections])
        axes.invert_yaxis()
        every = math.ceil(len(blocks) / 32)
        axes.set_xticks(np.arange(0, len(blocks), every) + 0.5, [_plain(str(block)) for block in blocks[::every]])
        axes.tick_params(length=0)
        axes.set_xlabel("block")
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(found):
            bar = figure.colorbar(image, ax=axes, label="% of tokens", pad=0.01)
            bar.ax.yaxis.set_major_formatter(FuncFormatter("{:g}".format))
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


# What `nullspace.reporting.study.MEASURES` measure, for an axis.
LOST = {"knowledge": "knowledge: nats lost an answer", "text": "text: nats lost a token"}


def forgetting(study: Study) -> Figure:
    """What was forgotten against the task loss: a line a variant through its learning rates; bars: standard deviations over seeds.

    A line ends where the variant learned most: a higher rate forgets more for less.
    """
    assert study.base is not None
    begin = study.base["task"]["loss"]
    looks = dict(zip(study.variants, _many_looks(), strict=False))
    fronts = {name: _front(rows, begin) for name, rows in _grouped(over_seeds(study), "variant")}

    def draw(axes: Axes, title: str) -> None:
        field = f"{next(name for name, label in LOST.items() if label == title)}_lost"
        for name, rows in fronts.items():
            spreads = [(row["task_loss"], row[field]) for row in rows]
            look = looks[name]
            axes.errorbar(
                [begin, *(loss.mean for loss, _ in spreads)],
                [0.0, *(lost.mean for _, lost in spreads)],
                xerr=[0.0, *(np.nan_to_num(loss.deviation) for loss, _ in spreads)],
                yerr=[0.0, *(np.nan_to_num(lost.deviation) for _, lost in spreads)],
                color=look.color,
                linestyle=look.dashes,
                marker=look.marker,
                elinewidth=0.8,
                label=_plain(name),
            )
        axes.axhline(0.0, color="#555555", linewidth=1.0)
        axes.invert_xaxis()

    label = "task loss, nats a response token: the further to the right, the more was learned"
    return _panels([LOST[name] for name in MEASURES], draw, "", label, columns=2, height=4.2, legend=True, share=False)


def _front(rows: Sequence[Row], begin: float) -> list[Row]:
    """By rising rate, up to the lowest task loss; none if no rate comes below the base's."""
    lowest = min(range(len(rows)), key=lambda i: rows[i]["task_loss"].mean)
    return list(rows[: lowest + 1]) if rows[lowest]["task_loss"].mean < begin else []


def without_adapters(study: Study) -> Figure:
    """What the bases of the adapters alone have lost: a bar a variant (Figure 5)."""
    assert study.base is not None
    base, looks = study.base, dict(zip(study.variants, _many_looks(), strict=False))
    names = list(study.dropped)

    def draw(axes: Axes, title: str) -> None:
        measure = next(name for name, label in LOST.items() if label == title)
        values = [MEASURES[measure](study.dropped[name], base) for name in names]
        colors = [looks[name].color if name in looks else "#555555" for name in names]
        bars = axes.barh(range(len(names)), values, color=colors, height=0.6)
        axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=4)
        axes.set_yticks(range(len(names)), [_plain(name) for name in names])
        axes.invert_yaxis()
        axes.axvline(0.0, color="#555555", linewidth=1.0)
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)

    height = 1.0 + 0.34 * len(names)
    return _panels([LOST[name] for name in MEASURES], draw, "", "", columns=2, height=height, share=False)


def against_drift(study: Study) -> Figure:
    """What each run forgot against how far it moved the layers' outputs; runs that forgot nothing are left out."""
    assert study.base is not None
    base, looks = study.base, dict(zip(study.variants, _many_looks(), strict=False))

    def draw(axes: Axes, title: str) -> None:
        measure = next(name for name, label in LOST.items() if label == title)
        for name in study.variants:
            runs = [run for run in study.runs if run["variant"] == name and run.get("layers")]
            points = [(run["layers"]["drift"], MEASURES[measure](run["scores"], base)) for run in runs]
            shown = [(drift, lost) for drift, lost in points if drift > 0 and lost > 0]
            look = looks[name]
            axes.plot(*np.array(shown).reshape(-1, 2).T, color=look.color, marker=look.marker, linestyle="", label=_plain(name))
        _logarithmic(axes)
        if axes.get_yscale() == "log":
            axes.set_xscale("log")

    label = "drift ‖ΔW X‖ / ‖W₀X‖, mean over the layers"
    return _panels([LOST[name] for name in MEASURES], draw, "", label, columns=2, height=3.6, legend=True, share=False)


def _many_looks() -> Iterable[Look]:
    """The looks, and then their colours with other markers and dashes."""
    turned = LOOKS[3:] + LOOKS[:3]
    return itertools.cycle([*LOOKS, *(Look(a.color, b.marker, b.dashes) for a, b in zip(LOOKS, turned, strict=True))])


def _panels(
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
    """A grid of panels, one a name; axes are labelled at the edges, and one legend above serves all."""
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
            axes.set_title(_plain(names[index]), loc="left", fontweight="bold")
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


def _over_blocks(
    axes: Axes, rows: Iterable[Row], value: Value, blocks: Sequence[Any], look: Look, label: str, *, open_: bool = False
) -> None:
    """A line over the blocks; of several layers at one place, such as experts, the mean."""
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
        label=_plain(label),
    )
    axes.set_xlim(-0.5, max(len(blocks) - 0.5, 0.5))
    ticks = [int(t) for t in MaxNLocator(integer=True, nbins=6).tick_values(0, max(len(blocks) - 1, 1)) if 0 <= t < len(blocks)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.set_xticklabels([_plain(str(blocks[t])) for t in ticks])


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis, labelled at the decades, or in between too where there are few of them; if anything is above zero."""
    if not any((np.asarray(line.get_ydata(), dtype=float) > 0).any() for line in axes.get_lines()):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter("{:g}".format))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _grouped(rows: Iterable[Row], field: str = "projection") -> list[tuple[str, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[field], []).append(row)
    return list(found.items())


def _heard_by(rows: Sequence[Row], weights: Sequence[Row]) -> list[Row]:
    sites = {row["site"] for row in rows}
    return [row for row in weights if row["site"] in sites]


def _first(adapters: Sequence[Row]) -> list[Row]:
    return [row for row in adapters if row["state"] == INITIAL]


def _last(adapters: Sequence[Row]) -> list[Row]:
    state = {row["adapter"]: row["state"] for row in adapters}
    return [row for row in adapters if row["state"] == state[row["adapter"]]]


def _looks(adapters: Sequence[Row]) -> dict[str, Look]:
    """Adapter → its look, the same in every figure."""
    return dict(zip((name for name, _ in _grouped(adapters, "adapter")), itertools.cycle(LOOKS), strict=False))


def _blocks(rows: Iterable[Row]) -> list[Any]:
    """In the model's order, each once."""
    return list(dict.fromkeys(row["block"] for row in rows))


def _ratio(a: float | None, b: float) -> float | None:
    return None if a is None else a / b


def _positive(values: Any) -> Any:
    """For logarithmic axes: a gap where there is nothing."""
    return np.where(np.asarray(values) > 0, values, np.nan)


def _plain(text: str) -> str:
    """A name that matplotlib takes neither for mathematics nor for a line without a legend."""
    return text.replace("$", r"\$").removeprefix("_") or " "
