"""Figures of what `nullspace.analysis` computes and of a preservation study, as specifications for `nullspace.reporting.page`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nullspace.analysis import BINS, INITIAL, Row
from nullspace.reporting.charts import (
    BEFORE,
    HELD_OUT,
    MAIN,
    Axis,
    Figure,
    Panel,
    bars,
    blocks_of,
    grouped,
    heat_map,
    lines,
    over_blocks,
    paths,
    scatter,
)
from nullspace.reporting.study import MEASURES, Study, over_seeds

# The lower end of the axis of `directions`: a float32 adapter reads some 1e-8 of a direction by rounding alone.
FLOOR = 1e-5
INPUT = "input X"
RANDOM = "an A that is random"
# Axis labels of `nullspace.reporting.study.MEASURES`.
LOST = {"knowledge": "knowledge: nats lost an answer", "text": "text: nats lost a token"}


def effective_ranks(inputs: Sequence[Row], weights: Sequence[Row]) -> Figure:
    """Effective ranks of X and W₀ over the blocks, as shares of the largest possible: a panel an input."""
    names, panels = _input_and_weights(weights), []
    x, y = Axis("block", names=blocks_of([*inputs, *weights])), Axis("effective rank / largest possible", low=0, high=1)
    for projection, rows in grouped(inputs):
        shares = [row | {"share": row["effective_rank"] / row["d_in"]} for row in rows]
        values = over_blocks(shares, "share", INPUT)
        for label, of_member in _weights_of(rows, weights):
            shares = [row | {"share": row["effective_rank"] / min(row["d_out"], row["d_in"])} for row in of_member]
            values += over_blocks(shares, "share", label)
        panels.append(Panel(projection, lines(values, names, x, y)))
    caption = "Effective rank over the blocks, as a share of the largest possible: one panel for each input that layers share."
    return Figure(caption, panels, names)


def spectra(inputs: Sequence[Row], weights: Sequence[Row]) -> Figure:
    """Singular values of X and W₀ relative to the first (Figure 2): medians over the blocks, and for X where 80 % of them lie."""
    names, panels = _input_and_weights(weights), []
    x, y = Axis("i / number of singular values", low=0, high=1), Axis("σᵢ / σ₁", log=True)
    for projection, rows in grouped(inputs):
        values = _quantiles(rows, INPUT, band=True)
        for label, of_member in _weights_of(rows, weights):
            values += _quantiles(of_member, label, band=False)
        panels.append(Panel(projection, lines(values, names, x, y, points=False)))
    caption = "Median over the blocks; for X, 80 % of the blocks lie in the band. Below some 1e-8, σ is rounding."
    return Figure(caption, panels, names)


def directions(adapters: Sequence[Row]) -> Figure:
    """The share of each A in the input's directions by falling eigenvalue (Figure 4): before and after training."""
    trained = {row["adapter"] for row in adapters if row["state"] != INITIAL}
    states = {"before training": _first(adapters), "after training": [r for r in _last(adapters) if r["adapter"] in trained]}
    names = [*_names(adapters), RANDOM]
    x = Axis("direction uⱼ, by falling eigenvalue", low=0, high=1)
    panels = []
    for title, rows in states.items():
        values: list[Row] = [{"x": at, "y": 1.0, "series": RANDOM} for at in (0.0, 1.0)]
        for name, those in grouped(rows, "adapter"):
            mean = np.sqrt(np.mean(np.square([row["read"] for row in those]), axis=0))
            at = (np.arange(BINS) + 0.5) / BINS
            values += [{"x": float(i), "y": float(value), "series": name} for i, value in zip(at, mean, strict=True)]
        if rows:
            panels.append(Panel(title, lines(values, names, x, Axis("‖A uⱼ‖ √d / ‖A‖", log=True, low=FLOOR), points=False)))
    caption = (
        "Root mean square over layers and, in each of 100 bins, directions. 1 is the value of a random A; directions uⱼ are "
        "the eigenvectors of C, from the largest eigenvalue (0) to the smallest (1). Values below the frame are rounding."
    )
    return Figure(caption, panels, names)


def by_layer(adapters: Sequence[Row], field: str, label: str, *, caption: str, more: Mapping[str, str] | None = None) -> Figure:
    """A number of every adapter over the blocks, on a logarithmic axis: a panel a projection.

    Args:
        adapters: rows.
        field: which number of the last state.
        label: of the axis.
        caption: of the figure.
        more: further lines: `BEFORE` → a field of the first states of trained adapters, `HELD_OUT` → a field of the last states.
    """
    rows = [row for row in adapters if row[field] is not None]
    names, more = _names(adapters), more or {}
    trained = {row["adapter"] for row in rows if row["state"] != INITIAL}
    drawn = [(MAIN, field, _last(rows))]
    if BEFORE in more:
        drawn.append((BEFORE, more[BEFORE], [row for row in _first(rows) if row["adapter"] in trained]))
    if HELD_OUT in more:
        drawn.append((HELD_OUT, more[HELD_OUT], _last(rows)))
    x, panels = Axis("block", names=blocks_of(rows)), []
    for projection, of_projection in grouped(rows):
        mine = {id(row) for row in of_projection}
        values: list[Row] = []
        for kind, shown, those in drawn:
            for name, of_adapter in grouped((row for row in those if id(row) in mine), "adapter"):
                values += over_blocks(of_adapter, shown, name, kind)
        panels.append(Panel(projection, lines(values, names, x, Axis(label, log=True))))
    return Figure(caption, panels, names)


def over_steps(adapters: Sequence[Row], fields: Mapping[str, str]) -> Figure:
    """Numbers of every adapter through its training: medians over the layers, and where 80 % of them lie.

    Args:
        adapters: rows of several states.
        fields: title of a panel → field.
    """
    names, panels = _names(adapters), []
    known = all(row["step"] is not None for row in adapters)
    for title, field in fields.items():
        values: list[Row] = []
        for name, rows in grouped(adapters, "adapter"):
            for i, (state, of_state) in enumerate(grouped(rows, "state")):
                numbers = [row[field] for row in of_state if row[field] is not None]
                if numbers:
                    low, middle, high = (float(value) for value in np.quantile(numbers, (0.1, 0.5, 0.9)))
                    at = of_state[0]["step"] if known else i
                    values.append({"state": state, "x": at, "y": middle, "low": low, "high": high, "series": name})
        x = Axis("optimiser step" if known else "state")
        panels.append(Panel(title, lines(values, names, x, Axis("", low=0))))
    return Figure("Through training: medians over the layers; 80 % of them lie in the bands.", panels, names)


def null_spaces(inputs: Sequence[Row]) -> Figure:
    """Leak and gap of the null spaces over the blocks: a line an input, and a second one of its leak on held-out text."""
    names, x = [name for name, _ in grouped(inputs)], Axis("block", names=blocks_of(inputs))
    leaks: list[Row] = []
    gaps: list[Row] = []
    for name, rows in grouped(inputs):
        leaks += over_blocks(rows, "leak", name) + over_blocks(rows, "held_out_leak", name, HELD_OUT)
        gaps += over_blocks(rows, "gap", name)
    rank = ", ".join(map(str, sorted({row["rank"] for row in inputs})))
    caption = f"The null spaces themselves (rank {rank}): their leak, and the gap behind them."
    if any(row["kind"] == HELD_OUT for row in leaks):
        caption += " Dashed: the leak on held-out text."
    panels = [
        Panel("leak: ‖UᵀX‖ / ‖X‖", lines(leaks, names, x, Axis("", log=True), height=260)),
        Panel("gap: (λᵣ₊₁ − λᵣ) / λᵣ₊₁", lines(gaps, names, x, Axis("", low=0), height=260)),
    ]
    return Figure(caption, panels, names)


def outliers(inputs: Sequence[Row]) -> Figure:
    """The share of tokens that are outliers, as a map of inputs and blocks; empty where there is none."""
    values = []
    for projection, rows in grouped(inputs):
        for block, those in grouped(({**row, "block": str(row["block"])} for row in rows), "block"):
            shares = [row["outlier_share"] for row in those if row["outlier_share"] is not None]
            if shares:
                values.append({"x": block, "y": projection, "value": 100 * float(np.mean(shares))})
    names = [name for name, _ in grouped(inputs)]
    spec = heat_map(values, Axis("block", names=blocks_of(inputs)), Axis("", names=names), "% of tokens")
    return Figure("Share of tokens that are outliers; empty: none.", [Panel("", spec)], wide=True)


def filters(steps: Mapping[str, Sequence[Row]]) -> Figure:
    """What filters of rising strength leave of the drift, and of the task's response: a line an adapter.

    Args:
        steps: adapter → rows of `strength`, `left` and `response` (`nullspace.integrations.peft.filter_path`).
    """
    names = list(steps)
    values = [
        {"strength": row["strength"], "x": row["response"], "y": row["left"], "order": i, "series": name}
        for name, rows in steps.items()
        for i, row in enumerate(rows)
    ]
    x = Axis("task's response that is kept", falling=True)
    spec = paths(values, names, x, Axis("drift that is left, relative", log=True))
    caption = "Each line begins without a filter, at the upper left; down and far to the left is good. Medians over the layers."
    return Figure(caption, [Panel("", spec)], names, wide=True)


def forgetting(study: Study) -> Figure:
    """Forgetting against task loss: a line a variant through its learning rates; bars are standard deviations over seeds.

    A line ends at the rate with the lowest task loss: higher rates forget more and learn less.
    """
    assert study.base is not None
    begin = study.base["task"]["loss"]
    fronts = {name: _front(rows, begin) for name, rows in grouped(over_seeds(study), "variant")}
    x = Axis("task loss, nats a response token", falling=True)
    panels = []
    for measure, title in LOST.items():
        values: list[Row] = []
        for name, rows in fronts.items():
            values.append({"rate": 0.0, "x": begin, "y": 0.0, "order": 0, "series": name})
            for i, row in enumerate(rows):
                (at, by), (lost, spread) = ((each.mean, np.nan_to_num(each.deviation)) for each in _pair(row, measure))
                ends = {"x_low": at - by, "x_high": at + by, "low": lost - spread, "high": lost + spread}
                ends = {field: float(value) for field, value in ends.items()}
                values.append({"rate": row["learning_rate"], "x": at, "y": lost, "order": i + 1, "series": name, **ends})
        panels.append(Panel(title, paths(values, study.variants, x, Axis(""))))
    caption = (
        "Each line begins at the base model, where nothing is learned and nothing forgotten, goes through the learning rates, and "
        "ends at the lowest task loss, at the right: higher rates forget more and learn less, and are in the table alone."
    )
    return Figure(caption, panels, study.variants)


def _pair(row: Row, measure: str) -> tuple[Any, Any]:
    return row["task_loss"], row[f"{measure}_lost"]


def _front(rows: Sequence[Row], begin: float) -> list[Row]:
    """The rows by rising rate up to the lowest task loss; none if that is not below the base's."""
    lowest = min(range(len(rows)), key=lambda i: rows[i]["task_loss"].mean)
    return list(rows[: lowest + 1]) if rows[lowest]["task_loss"].mean < begin else []


def without_adapters(study: Study) -> Figure:
    """What the bases of the adapters have lost without them: a bar a variant (Figure 5)."""
    assert study.base is not None
    names = list(study.dropped)
    series = list(dict.fromkeys([*study.variants, *names]))  # the colours of the other figures
    panels = []
    for measure, title in LOST.items():
        lost = {name: MEASURES[measure](study.dropped[name], study.base) for name in names}
        values = [{"y": name, "x": value, "series": name} for name, value in lost.items()]
        panels.append(Panel(title, bars(values, series, Axis("", low=0), Axis("", names=names))))
    return Figure("What the base of the adapters has lost against the original model, before any training.", panels)


def against_drift(study: Study) -> Figure:
    """What each run forgot against the drift of the layers' outputs; runs that forgot nothing are left out."""
    assert study.base is not None
    x, panels = Axis("drift ‖ΔW X‖ / ‖W₀X‖, mean over the layers", log=True), []
    for measure, title in LOST.items():
        values = []
        for run in (run for run in study.runs if (run.get("layers") or {}).get("drift") is not None):
            drift, lost = run["layers"]["drift"], MEASURES[measure](run["scores"], study.base)
            if drift > 0 and lost > 0:
                place = {"rate": run["learning_rate"], "seed": run["seed"]}
                values.append({**place, "x": drift, "y": lost, "series": run["variant"]})
        panels.append(Panel(title, scatter(values, study.variants, x, Axis("", log=True))))
    caption = "A point a run: every variant, learning rate and seed. Runs that forgot nothing have no place on a logarithmic axis."
    return Figure(caption, panels, study.variants)


def _input_and_weights(weights: Sequence[Row]) -> list[str]:
    return [INPUT, *(_of_weight(name) for name, _ in grouped(weights))]


def _of_weight(projection: str) -> str:
    return f"weight W₀ ({projection})"


def _weights_of(rows: Sequence[Row], weights: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The weights of the sites in `rows` by projection, each with its label."""
    sites = {row["site"] for row in rows}
    for member, of_member in grouped(row for row in weights if row["site"] in sites):
        yield _of_weight(member), of_member


def _quantiles(rows: Iterable[Row], series: str, *, band: bool) -> list[Row]:
    """The median of spectra of one length, the first one's, and if wanted their 10 % and 90 % quantiles."""
    spectra = [row["spectrum"] for row in rows if row["spectrum"]]
    if not spectra:
        return []
    low, middle, high = np.quantile([each for each in spectra if len(each) == len(spectra[0])], (0.1, 0.5, 0.9), axis=0).tolist()
    values: list[Row] = []
    for i, at in enumerate(np.linspace(0, 1, len(middle)).tolist()):
        values.append({"x": at, "y": middle[i], "series": series} | ({"low": low[i], "high": high[i]} if band else {}))
    return values


def _first(adapters: Sequence[Row]) -> list[Row]:
    return [row for row in adapters if row["state"] == INITIAL]


def _last(adapters: Sequence[Row]) -> list[Row]:
    state = {row["adapter"]: row["state"] for row in adapters}
    return [row for row in adapters if row["state"] == state[row["adapter"]]]


def _names(adapters: Sequence[Row]) -> list[str]:
    """Adapters in their order: each has the same colour in every figure."""
    return [name for name, _ in grouped(adapters, "adapter")]
