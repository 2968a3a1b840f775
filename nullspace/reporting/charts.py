"""Interactive figures as Vega-Lite specifications: panels of lines, points, bars or cells, and the series that they share.

A specification is plain JSON: numbers in place, no address, no colour. The page (`page.js`) gives it its width, the colours of the
light or the dark theme, and the names of the series that are shown, through the parameter `shown`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nullspace.analysis import Row
from nullspace.checks import missing_package

try:
    import vl_convert
except ImportError as error:
    raise missing_package("a report", "report", error) from error

Spec = dict[str, Any]
# Marks by which the series of a figure differ beside their colour, in this order.
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
# A row's `kind`: how its line is drawn, as (dashes, width).
MAIN, BEFORE, HELD_OUT = "main", "before", "held out"
_KINDS: dict[str, tuple[list[float], float]] = {MAIN: ([1, 0], 2.0), BEFORE: ([1.5, 3], 1.2), HELD_OUT: ([7, 3], 1.4)}
_SHOWN = "indexof(shown, datum.series) >= 0"


@dataclass(frozen=True)
class Panel:
    """One plot of a figure: its title, and its Vega-Lite specification without width and theme."""

    title: str
    spec: Spec


@dataclass(frozen=True)
class Figure:
    """Panels with a common legend.

    Attributes:
        caption: what is drawn, and what the kinds of line mean.
        panels: in order.
        series: names in the legend, which shows and hides them; empty for a figure without legend.
        wide: panels take the whole width of the page.
    """

    caption: str
    panels: Sequence[Panel]
    series: Sequence[str] = ()
    wide: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        title: of the axis.
        log: logarithmic, if a value is above zero; what is not positive leaves a gap.
        low, high: ends of the axis; by default those of the values.
        names: of an axis of names, in their order; None for one of numbers.
        falling: from the largest value on the left to the smallest.
    """

    title: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    names: Sequence[str] | None = None
    falling: bool = False


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script without a request, which sets `vegaEmbed`. Some 0.9 MB; 2 s of CPU time."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vl_convert.get_vegalite_versions()[-1]))


def versions() -> dict[str, str]:
    """The versions of what draws the figures."""
    return {"Vega-Lite": vl_convert.get_vegalite_versions()[-1], "vl-convert": importlib.metadata.version("vl-convert-python")}


def lines(values: Sequence[Row], series: Sequence[str], x: Axis, y: Axis, *, points: bool = True, height: int = 210) -> Spec:
    """Lines with points.

    Args:
        values: rows of `x`, `y`, `series`; and, if wanted, `kind` (`MAIN`, `BEFORE`, `HELD_OUT`), `low` and `high` of a band, and
            further fields, which only the tooltip shows.
        series: all series of the figure, in the order of their colours.
        x, y: the axes.
        points: draw points; without them they are there for the tooltip alone.
        height: of the panel in pixels.
    """
    cleaned = _cleaned(values, x, y)
    # A layer for each kind that occurs: one encoding of dashes would need a legend, and would break lines at each change.
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in cleaned)]
    layers: list[Spec] = []
    if any("low" in row for row in cleaned):
        ends = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
        layers.append({"mark": {"type": "area", "opacity": 0.18, "invalid": "filter"}, "encoding": ends})
    for kind in kinds:
        dashes, width = _KINDS[kind]
        mark: Spec = {"type": "line", "strokeDash": dashes, "strokeWidth": width}
        layers.append({"transform": [{"filter": f"datum.kind === '{kind}'"}], "mark": mark})
        seen = {"filled": kind == MAIN, "size": 34 if points else 90, "opacity": 1 if points else 0}
        layers.append(
            {"transform": [{"filter": f"datum.kind === '{kind}'"}], "mark": {"type": "point", "strokeWidth": 1.2, **seen}}
        )
    return _panel(cleaned, series, x, y, layers, height)


def scatter(values: Sequence[Row], series: Sequence[str], x: Axis, y: Axis, *, height: int = 260) -> Spec:
    """Points; rows as of `lines`."""
    return _panel(_cleaned(values, x, y), series, x, y, [{"mark": {"type": "point", "filled": True, "size": 46}}], height)


def paths(values: Sequence[Row], series: Sequence[str], x: Axis, y: Axis, *, height: int = 320) -> Spec:
    """Lines through points in the order of the rows' `order`, with error bars: `x_low`, `x_high`, `low` and `high`."""
    bar = {"type": "rule", "strokeWidth": 1, "opacity": 0.7}
    across = {"x": {"field": "x_low", "type": "quantitative"}, "x2": {"field": "x_high"}}
    upright = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
    layers: list[Spec] = [
        {"mark": bar, "encoding": across},
        {"mark": bar, "encoding": upright},
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"order": {"field": "order", "type": "quantitative"}}},
        {"mark": {"type": "point", "filled": True, "size": 44}},
    ]
    return _panel(_cleaned(values, x, y), series, x, y, layers, height)


def bars(values: Sequence[Row], series: Sequence[str], x: Axis, y: Axis) -> Spec:
    """Horizontal bars: `y` is a name, `x` a number, written beside the bar."""
    label = {"type": "text", "align": "left", "dx": 4}
    layers: list[Spec] = [
        {"mark": {"type": "bar", "height": {"band": 0.65}}, "encoding": {"x2": {"datum": 0}}},
        {"mark": label, "encoding": {"text": {"field": "x", "type": "quantitative", "format": ".3f"}}},
    ]
    return _panel(_cleaned(values, x, y), series, x, y, layers, 30 + 26 * len(y.names or ()))


def heat_map(values: Sequence[Row], x: Axis, y: Axis, title: str) -> Spec:
    """Cells of `value` at names `x` and `y` on a logarithmic scale of colour; cells of zero or of no value stay empty."""
    shown = [row | {"value": _positive(row["value"])} for row in values]
    color: Spec = {"field": "value", "type": "quantitative", "title": title, "scale": {"scheme": "viridis"}}
    if any(row["value"] is not None for row in shown):
        color["scale"]["type"] = "log"
    return {
        "data": {"values": [row for row in shown if row["value"] is not None]},
        "height": {"step": 24} if len(y.names or ()) > 1 else 40,
        "mark": {"type": "rect"},
        "encoding": {
            "x": _channel("x", x, []) | {"scale": {"domain": list(x.names or ())}},
            "y": _channel("y", y, []) | {"scale": {"domain": list(y.names or ())}},
            "color": color,
            "tooltip": _tooltip(shown),
        },
    }


def _panel(values: list[Row], series: Sequence[str], x: Axis, y: Axis, layers: list[Spec], height: int) -> Spec:
    names = list(series)
    # The ninth series has the colour of the first, and the mark of the second.
    shapes = [SHAPES[(i + i // len(SHAPES)) % len(SHAPES)] for i in range(len(names))]
    common: Spec = {
        "x": _channel("x", x, values),
        "y": _channel("y", y, values),
        "color": {"field": "series", "type": "nominal", "scale": {"domain": names}, "legend": None},
        "tooltip": _tooltip(values),
    }
    for layer in layers:
        kind = layer["mark"]["type"]
        if kind == "point":
            shape = {"field": "series", "type": "nominal", "scale": {"domain": names, "range": shapes}, "legend": None}
            layer["encoding"] = layer.get("encoding", {}) | {"shape": shape}
    return {
        "data": {"values": values},
        "height": height,
        "params": [{"name": "shown", "value": names}],
        "transform": [{"filter": _SHOWN}],
        "encoding": common,
        "layer": layers,
    }


def _channel(name: str, axis: Axis, values: Sequence[Row]) -> Spec:
    """The encoding of x or y."""
    channel: Spec = {"field": name, "title": axis.title or None}
    if axis.names is not None:
        placed = {"labelOverlap": "parity" if name == "x" else False, "labelAngle": 0, "labelLimit": 240}
        return {**channel, "type": "ordinal", "sort": list(axis.names), "axis": placed}
    scale: Spec = {"zero": axis.low == 0}
    if axis.log and any(row[name] is not None for row in values):
        scale = {"type": "log"}
    # What an end of the axis would hide is drawn at that end.
    scale |= {end: value for end, value in (("domainMin", axis.low), ("domainMax", axis.high)) if value is not None and value != 0}
    scale |= {"clamp": True} if axis.log and axis.low else {}
    scale |= {"reverse": True} if axis.falling else {}
    ticks: Spec = {"labelOverlap": True, "tickCount": 5} | ({"format": ".0e"} if scale.get("type") == "log" else {})
    return {**channel, "type": "quantitative", "scale": scale, "axis": ticks}


def _tooltip(values: Sequence[Row]) -> list[Spec]:
    """One line a field: what a row is of, then its numbers."""
    hidden = ("kind", "order", "x_low", "x_high", "low", "high")
    fields = list(dict.fromkeys(name for row in values for name in row if name not in hidden))
    kinds = {name: {type(row[name]) for row in values if row.get(name) is not None} for name in fields}
    return [
        {"field": name, "type": "quantitative", "format": ".4~g"}
        if kinds[name] <= {int, float}
        else {"field": name, "type": "nominal"}
        for name in fields
    ]


def _cleaned(values: Iterable[Row], x: Axis, y: Axis) -> list[Row]:
    """Rows of JSON's values: no NaN, and nothing on a logarithmic axis that is not positive."""
    rows = []
    for row in values:
        row = {"kind": MAIN} | {name: finite(value) if isinstance(value, float) else value for name, value in row.items()}
        for axis, fields in ((x, ("x", "x_low", "x_high")), (y, ("y", "low", "high"))):
            if axis.log and axis.names is None:
                row |= {field: _positive(row[field]) for field in fields if field in row}
        rows.append(row)
    return rows


def finite(value: float | None) -> float | None:
    """The number with seven digits; None for NaN, infinity and None."""
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None


def _positive(value: float | None) -> float | None:
    value = finite(value)
    return value if value is not None and value > 0 else None


def grouped(rows: Iterable[Row], field: str = "projection") -> list[tuple[str, list[Row]]]:
    """(value, rows with this value) of a field, in the order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return list(groups.items())


def blocks_of(rows: Iterable[Row]) -> list[str]:
    """The blocks of rows, each once, in the order of the model."""
    return list(dict.fromkeys(str(row["block"]) for row in rows))


def over_blocks(rows: Iterable[Row], field: str, series: str, kind: str = MAIN) -> list[Row]:
    """Rows of a line over the blocks; of several layers in a block, such as experts, the mean."""
    values: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(field) is not None:
            values.setdefault(str(row["block"]), []).append(row)
    drawn = []
    for block, those in values.items():
        name = those[0].get("layer") or those[0]["site"]
        place = name if len(those) == 1 else f"{name} and {len(those) - 1} more"
        mean = float(np.mean([row[field] for row in those]))
        shown = series if kind == MAIN else f"{series}, {'before training' if kind == BEFORE else 'held-out text'}"
        drawn.append({"layer": place, "line": shown, "x": block, "y": mean, "series": series, "kind": kind})
    return drawn
