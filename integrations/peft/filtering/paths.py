"""What filters of all strengths do to an adapter or a checkpoint, and the strength that meets a budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nullspace.checks import NOT_NEGATIVE, POSITIVE, Range, check_real
from nullspace.errors import InputError
from nullspace.factors import Curve, Filter, Forecast, LowRank
from nullspace.integrations.peft.filtering.moments import Few, Pair, naming
from nullspace.progress import Progress

# The strengths that a path shows.
STRENGTHS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
# Between these a strength is looked for.
LEAST, MOST = 1e-6, 1e6
_SHARE = Range("above 0 and at most 1", lambda value: 0.0 < value <= 1.0)

Change = LowRank | torch.Tensor
"""ΔW of a layer: its factors, or (d_out, d_in) itself."""


class LayerPath(NamedTuple):
    """One layer under filters of all strengths of a path."""

    layer: str
    site: str
    """The site of its inputs; layers of one site share a filter."""
    drift: float | None
    """‖ΔW X_k‖ / ‖W₀ X_k‖ before filtering; None if W₀ is not known."""
    changed: bool
    """Whether ΔW is anything but zero."""
    forecasts: tuple[Forecast, ...]
    """One a strength, without the scale."""


class Step(NamedTuple):
    """One strength: what is left of the change, over all layers. The scale is in all figures."""

    strength: float
    drift: float | None
    """Median over layers of ‖ΔW′ X_k‖ / ‖W₀ X_k‖; None if W₀ is not known."""
    worst_drift: float | None
    worst_layer: str
    """The layer of the worst drift; without W₀, that of which most is left."""
    left: float
    """Median over changed layers of ‖ΔW′ X_k‖ / ‖ΔW X_k‖."""
    response: float
    """Median over changed layers of ‖ΔW′ X_t‖ / ‖ΔW X_t‖."""


class FilterPath(NamedTuple):
    """An adapter, or a checkpoint, under filters of several strengths, as the second moments forecast it."""

    strengths: tuple[float, ...]
    """Ascending."""
    scale: float
    layers: tuple[LayerPath, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """One a strength."""
        return tuple(self._step(at) for at in range(len(self.strengths)))

    def at(self, strength: float) -> Step:
        """The step of a strength, which must be one of the path's."""
        return self._step(self.strengths.index(strength))

    def as_json(self) -> dict[str, Any]:
        """Values that JSON can hold; infinite ones are None."""
        layers = [
            {**each._asdict(), "forecasts": [_finite(forecast._asdict()) for forecast in each.forecasts]} for each in self.layers
        ]
        return {"scale": self.scale, "path": [step._asdict() for step in self.steps], "layers": layers}

    def _step(self, at: int) -> Step:
        left = {each.layer: self.scale * each.forecasts[at].drift for each in self.layers if each.changed}
        answers = [self.scale * each.forecasts[at].response for each in self.layers if each.changed]
        drifts = {each.layer: self.scale * each.drift * each.forecasts[at].drift for each in self.layers if each.drift is not None}
        worst = max(drifts or left, key=(drifts or left).__getitem__, default=self.layers[0].layer)
        return Step(
            self.strengths[at],
            statistics.median(drifts.values()) if drifts else None,
            drifts.get(worst),
            worst,
            statistics.median(left.values()) if left else self.scale,
            statistics.median(answers) if answers else self.scale,
        )


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if abs(value) < float("inf") else None for name, value in values.items()}


class Budget(NamedTuple):
    """How strong a filter is to be: exactly one of the first three."""

    strength: float | None
    drift: float | None
    retain: float | None
    scale: float

    @classmethod
    def checked(cls, strength: float | None, drift: float | None, retain: float | None, scale: float) -> Budget:
        """The same after checks.

        Raises:
            TypeError, ValueError: unless exactly one is given, and all are numbers in range.
        """
        given = {"strength": strength, "drift": drift, "retain": retain}
        if sum(value is not None for value in given.values()) != 1:
            names = ", ".join(name for name, value in given.items() if value is not None) or "none"
            raise InputError(f"give exactly one of strength, drift and retain, not {names}")
        check_real("scale", scale)
        for name, allowed in (("strength", NOT_NEGATIVE), ("drift", POSITIVE), ("retain", _SHARE)):
            if given[name] is not None:
                check_real(name, given[name], allowed)
        return cls(strength, drift, retain, float(scale))


def choose(budget: Budget, changes: Mapping[str, Change], pair: Pair, drifts: Mapping[str, float], report: Progress) -> float:
    """The weakest filter whose median drift is within the budget, or the strongest one that retains enough of the response.

    Args:
        budget: with a `drift` or a `retain`.
        changes: layer → ΔW.
        pair: of their second moments, checked.
        drifts: layer → its drift before filtering, for a budget of `drift`.
        report: progress.

    Raises:
        ValueError: saying what is reachable, if no strength meets it.
    """
    curves: dict[str, Curve] = {}
    for group in pair.groups(changes):
        for name in group.layers:
            with naming(name):
                curves[name] = group.filter.curve(changes[name])
        report("choice", len(curves), len(changes), 0)
    changed = [name for name, curve in curves.items() if curve.size > 0]

    def drift(strength: float) -> float:
        return budget.scale * statistics.median(drifts[name] * curve.drift(strength) for name, curve in curves.items())

    def response(strength: float) -> float:
        return budget.scale * statistics.median(curves[name].response(strength) for name in changed) if changed else 1.0

    if budget.drift is not None:
        wanted = budget.drift
        if drift(MOST) > wanted:
            raise InputError(
                f"no filter brings the median drift to {wanted:g}: it is {drift(0):.3g} without one and {drift(MOST):.3g} at most "
                "strength. Allow more, or scale the change down too (scale=, --scale)"
            )
        return _first(lambda strength: drift(strength) <= wanted)
    assert budget.retain is not None
    least = budget.retain
    if response(0) < least:
        raise InputError(f"no filter retains {least:g} of the task's response: with scale {budget.scale:g} it is {response(0):.3g}")
    if response(MOST) >= least:
        return MOST
    return _last(lambda strength: response(strength) >= least)


def _first(holds: Callable[[float], bool]) -> float:
    """The smallest strength for which a condition holds that holds for all larger ones, and for `MOST`."""
    for each in (0.0, LEAST):
        if holds(each):
            return each
    return _between(holds)[1]


def _last(holds: Callable[[float], bool]) -> float:
    """The largest strength for which a condition holds that holds for all smaller ones, and not for `MOST`."""
    return _between(lambda strength: not holds(strength))[0] if holds(LEAST) else 0.0


def _between(holds: Callable[[float], bool]) -> tuple[float, float]:
    """Two strengths as close as float64 tells them apart, for the larger of which a condition holds; bisection in log μ."""
    low, high = LEAST, MOST
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def forecast(
    changes: Mapping[str, Change],
    pair: Pair,
    drifts: Mapping[str, float],
    strengths: Sequence[float],
    scale: float,
    report: Progress,
    *,
    done: Callable[[str, Filter], None] | None = None,
) -> tuple[FilterPath, Few]:
    """The path of all layers.

    Args:
        changes: layer → ΔW.
        pair: of their second moments, checked.
        drifts: layer → its drift before filtering, as far as known.
        strengths: of the path; the last one is that which is used.
        scale: of the path.
        report: progress.
        done: called with every layer and its filter, to use it.

    Returns:
        The path, and the sites with few tokens at the last strength.
    """
    rows: dict[str, LayerPath] = {}
    few, chosen = Few(), float(strengths[-1])
    strengths = tuple(sorted({float(each) for each in strengths}))
    for group in pair.groups(changes):
        for name in group.layers:
            change = changes[name]
            thin = not isinstance(change, torch.Tensor)  # of a whole ΔW, the bound of rounding costs as much as the filter
            with naming(name):
                path = tuple(group.filter.path(change, strengths, rounding=thin))
            rows[name] = LayerPath(name, group.site, drifts.get(name), _is_changed(change), path)
            if done is not None:
                done(name, group.filter)
        few.look_at(group, rows[group.layers[0]].forecasts[strengths.index(chosen)])
        report("filter", len(rows), len(changes), 0)
    return FilterPath(strengths, scale, tuple(rows.values())), few


def _is_changed(change: Change) -> bool:
    return bool(change.any()) if isinstance(change, torch.Tensor) else all(bool(each.any()) for each in change)
