"""Figures of what `nullspace.analysis` computes and of a preservation study."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nullspace.analysis import BINS, INITIAL, Row
from nullspace.reporting.panels import (
    LOOKS,
    Look,
    blocks_of,
    grouped,
    heat_map,
    integer_ticks,
    logarithmic,
    many_looks,
    over_blocks,
    panels,
    plain,
    positive,
)
from nullspace.reporting.study import MEASURES, Study, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The lower end of the axis of `directions`: a float32 adapter reads some 1e-8 of a direction by rounding alone.
FLOOR = 1e-5
# Axis labels of `nullspace.reporting.study.MEASURES`.
LOST = {"knowledge": "knowledge: nats lost an answer", "text": "text: nats lost a token"}
MEASURE_OF = {label: measure for measure, label in LOST.items()}


def effective_ranks(inputs: Sequence[Row], weights: Sequence[Row]) -> Figure:
    """Effective ranks of X and W₀ over the blocks, as shares of the largest possible: a panel an input."""

    def draw(axes: Axes, projection: str) -> None:
        rows = [row for row in inputs if row["projection"] == projection]
        over_blocks(axes, rows, lambda row: _ratio(row["effective_rank"], row["d_in"]), blocks, LOOKS[0], "input X")
        for look, label, of_member in _weights_of(rows, weights):
            over_blocks(axes, of_member, lambda row: row["effective_rank"] / min(row["d_out"], row["d_in"]), blocks, look, label)
        axes.set_ylim(0, 1.02)
        _legend(axes)

    blocks = blocks_of([*inputs, *weights])
    return panels([name for name, _ in grouped(inputs)], draw, "effective rank / largest possible", "block", columns=2, height=3.0)


def spectra(inputs: Sequence[Row], weights: Sequence[Row]) -> Figure:
    """Singular values of X and W₀ relative to the first (Figure 2): medians over the blocks, and for X where 80 % of them lie."""

    def draw(axes: Axes, projection: str) -> None:
        rows = [row for row in inputs if row["projection"] == projection and row["spectrum"]]
        if rows:
            values = np.array([row["spectrum"] for row in rows if len(row["spectrum"]) == len(rows[0]["spectrum"])])
            at = np.linspace(0, 1, values.shape[1])
            low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0)
            axes.fill_between(at, positive(low), positive(high), color=LOOKS[0].color, alpha=0.2, linewidth=0)
            axes.plot(at, positive(middle), color=LOOKS[0].color, label="input X")
        for look, label, of_member in _weights_of(rows, weights):
            values = np.array([row["spectrum"] for row in of_member if len(row["spectrum"]) == len(of_member[0]["spectrum"])])
            middle = np.median(values, axis=0)
            at = np.linspace(0, 1, len(middle))
            axes.plot(at, positive(middle), color=look.color, linestyle=look.dashes, label=label)
        logarithmic(axes)
        axes.set_xlim(0, 1)
        _legend(axes)

    return panels([name for name, _ in grouped(inputs)], draw, "σᵢ / σ₁", "i / number of singular values", columns=2, height=3.0)


def directions(adapters: Sequence[Row]) -> Figure:
    """The share of each A in the input's directions by falling eigenvalue (Figure 4): before and after training."""
    states = [("before training", _first(adapters)), ("after training", _last(adapters))]
    trained = {row["adapter"] for row in adapters if row["state"] != INITIAL}
    titles = {title: [row for row in rows if row["read"]] for title, rows in states}
    titles["after training"] = [row for row in titles["after training"] if row["adapter"] in trained]
    looks = _looks(adapters)

    def draw(axes: Axes, title: str) -> None:
        for name, rows in grouped(titles[title], "adapter"):
            mean = np.sqrt(np.mean(np.square([row["read"] for row in rows]), axis=0))
            at = (np.arange(BINS) + 0.5) / BINS
            look = looks[name]
            axes.plot(at, positive(mean), color=look.color, linestyle=look.dashes, label=plain(name))
        axes.axhline(1.0, color="#555555", linewidth=1.0, label="an A that is random")
        logarithmic(axes)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR))
        axes.set_xlim(0, 1)

    names = [title for title, rows in titles.items() if rows]
    x = "direction uⱼ of the input, by eigenvalue: 0 the largest, 1 the smallest"
    return panels(names, draw, "‖A uⱼ‖ √d / ‖A‖", x, columns=2, height=3.4, legend=True)


def by_layer(adapters: Sequence[Row], field: str, label: str, *, start: bool = False) -> Figure:
    """A number of every adapter over the blocks, on a logarithmic axis: a panel a projection.

    Args:
        adapters: rows.
        field: which number of the last state.
        label: of the axis.
        start: show that of the first state too. What is not trained has thin lines and open markers.
    """
    rows = [row for row in adapters if row[field] is not None]
    blocks, looks = blocks_of(rows), _looks(adapters)
    last, first = _last(rows), _first(rows)
    trained = {row["adapter"] for row in rows if row["state"] != INITIAL}

    def draw(axes: Axes, projection: str) -> None:
        for name, look in looks.items():
            mine = [row for row in last if (row["adapter"], row["projection"]) == (name, projection)]
            begun = [row for row in first if (row["adapter"], row["projection"]) == (name, projection)]
            frozen = bool(mine) and all(row[field] == 0 for row in last if row["adapter"] == name)
            label = f"{name} (0 throughout)" if frozen else name
            if start and name in trained:
                over_blocks(axes, begun, lambda row: row[field], blocks, look, "", open_=True)
            over_blocks(axes, mine, lambda row: row[field], blocks, look, label, open_=name not in trained)
        logarithmic(axes)

    return panels([name for name, _ in grouped(rows)], draw, label, "block", legend=True)


def over_steps(adapters: Sequence[Row], fields: Mapping[str, str]) -> Figure:
    """Numbers of every adapter through its training: medians over the layers, and where 80 % of them lie.

    Args:
        adapters: rows of several states.
        fields: title of a panel → field.
    """
    looks = _looks(adapters)
    known = all(row["step"] is not None for row in adapters)

    def draw(axes: Axes, title: str) -> None:
        for name, rows in grouped(adapters, "adapter"):
            states = [(state, [row[fields[title]] for row in of_state]) for state, of_state in grouped(rows, "state")]
            values = [np.quantile([v for v in each if v is not None], (0.1, 0.5, 0.9)) for _, each in states]
            at = [next(row["step"] for row in rows if row["state"] == state) if known else i for i, (state, _) in enumerate(states)]
            low, middle, high = np.array(values).T
            look = looks[name]
            axes.fill_between(at, low, high, color=look.color, alpha=0.15, linewidth=0)
            axes.plot(at, middle, color=look.color, linestyle=look.dashes, marker=look.marker, label=plain(name))
        axes.set_ylim(bottom=0)
        integer_ticks(axes)

    return panels(list(fields), draw, "", "optimiser step" if known else "state", columns=3, height=2.9, legend=True, share=False)


def null_spaces(inputs: Sequence[Row]) -> Figure:
    """Leak and gap of the null spaces over the blocks: a line an input."""
    fields = {"leak: ‖UᵀX‖ / ‖X‖": "leak", "gap: (λᵣ₊₁ − λᵣ) / λᵣ₊₁": "gap"}
    blocks = blocks_of(inputs)

    def draw(axes: Axes, title: str) -> None:
        for look, (projection, rows) in zip(itertools.cycle(LOOKS), grouped(inputs), strict=False):
            over_blocks(axes, rows, lambda row: row[fields[title]], blocks, look, projection)
        if fields[title] == "leak":
            logarithmic(axes)
        else:
            axes.set_ylim(bottom=0)

    return panels(list(fields), draw, "", "block", columns=2, height=3.0, legend=True, share=False)


def outliers(inputs: Sequence[Row]) -> Figure:
    """The share of tokens that are outliers, as a map of inputs and blocks; grey where there is none."""
    blocks = blocks_of(inputs)
    projections = [name for name, _ in grouped(inputs)]
    shares = np.full((len(projections), len(blocks)), np.nan)
    for (i, projection), (j, block) in ((a, b) for a in enumerate(projections) for b in enumerate(blocks)):
        values = [row["outlier_share"] for row in inputs if (row["projection"], row["block"]) == (projection, block)]
        shares[i, j] = np.nan if None in values or not values else 100 * float(np.mean(values))
    return heat_map(shares, projections, [str(block) for block in blocks], "block", "% of tokens")


def forgetting(study: Study) -> Figure:
    """Forgetting against task loss: a line a variant through its learning rates; bars are standard deviations over seeds.

    A line ends at the rate with the lowest task loss: higher rates forget more and learn less.
    """
    assert study.base is not None
    begin = study.base["task"]["loss"]
    looks = dict(zip(study.variants, many_looks(), strict=False))
    fronts = {name: _front(rows, begin) for name, rows in grouped(over_seeds(study), "variant")}

    def draw(axes: Axes, title: str) -> None:
        field = f"{MEASURE_OF[title]}_lost"
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
                label=plain(name),
            )
        axes.axhline(0.0, color="#555555", linewidth=1.0)
        axes.invert_xaxis()

    label = "task loss, nats a response token: the further to the right, the more was learned"
    return panels([LOST[name] for name in MEASURES], draw, "", label, columns=2, height=4.2, legend=True, share=False)


def _front(rows: Sequence[Row], begin: float) -> list[Row]:
    """The rows by rising rate up to the lowest task loss; none if that is not below the base's."""
    lowest = min(range(len(rows)), key=lambda i: rows[i]["task_loss"].mean)
    return list(rows[: lowest + 1]) if rows[lowest]["task_loss"].mean < begin else []


def without_adapters(study: Study) -> Figure:
    """What the bases of the adapters have lost without them: a bar a variant (Figure 5)."""
    assert study.base is not None
    base, looks = study.base, dict(zip(study.variants, many_looks(), strict=False))
    names = list(study.dropped)

    def draw(axes: Axes, title: str) -> None:
        measure = MEASURE_OF[title]
        values = [MEASURES[measure](study.dropped[name], base) for name in names]
        colors = [looks[name].color if name in looks else "#555555" for name in names]
        bars = axes.barh(range(len(names)), values, color=colors, height=0.6)
        axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=4)
        axes.set_yticks(range(len(names)), [plain(name) for name in names])
        axes.invert_yaxis()
        axes.axvline(0.0, color="#555555", linewidth=1.0)
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)

    height = 1.0 + 0.34 * len(names)
    return panels([LOST[name] for name in MEASURES], draw, "", "", columns=2, height=height, share=False)


def against_drift(study: Study) -> Figure:
    """What each run forgot against the drift of the layers' outputs; runs that forgot nothing are left out."""
    assert study.base is not None
    base, looks = study.base, dict(zip(study.variants, many_looks(), strict=False))

    def draw(axes: Axes, title: str) -> None:
        measure = MEASURE_OF[title]
        for name in study.variants:
            runs = [run for run in study.runs if run["variant"] == name and run.get("layers")]
            points = [(run["layers"]["drift"], MEASURES[measure](run["scores"], base)) for run in runs]
            shown = [(drift, lost) for drift, lost in points if drift > 0 and lost > 0]
            look = looks[name]
            axes.plot(*np.array(shown).reshape(-1, 2).T, color=look.color, marker=look.marker, linestyle="", label=plain(name))
        logarithmic(axes)
        if axes.get_yscale() == "log":
            axes.set_xscale("log")

    label = "drift ‖ΔW X‖ / ‖W₀X‖, mean over the layers"
    return panels([LOST[name] for name in MEASURES], draw, "", label, columns=2, height=3.6, legend=True, share=False)


def _weights_of(rows: Sequence[Row], weights: Sequence[Row]) -> Iterator[tuple[Look, str, list[Row]]]:
    """The weights of the sites in `rows` by projection, each with a look and a label."""
    sites = {row["site"] for row in rows}
    members = grouped(row for row in weights if row["site"] in sites)
    for look, (member, of_member) in zip(itertools.cycle(LOOKS[1:]), members, strict=False):
        yield look, f"weight W₀ ({member})", of_member


def _legend(axes: Axes) -> None:
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", handlelength=2.6, labelspacing=0.25)


def _first(adapters: Sequence[Row]) -> list[Row]:
    return [row for row in adapters if row["state"] == INITIAL]


def _last(adapters: Sequence[Row]) -> list[Row]:
    state = {row["adapter"]: row["state"] for row in adapters}
    return [row for row in adapters if row["state"] == state[row["adapter"]]]


def _looks(adapters: Sequence[Row]) -> dict[str, Look]:
    """Adapter → look, the same in every figure."""
    return dict(zip((name for name, _ in grouped(adapters, "adapter")), itertools.cycle(LOOKS), strict=False))


def _ratio(a: float | None, b: float) -> float | None:
    return None if a is None else a / b
