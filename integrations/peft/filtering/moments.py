"""Second moments of the task and of what must be kept, for the layers of an adapter or a checkpoint: site by site."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.identity import Weight
from nullspace.checks import POSITIVE, check_real
from nullspace.errors import DataWarning, InputError, OtherModelError
from nullspace.factors import Filter, Forecast
from nullspace.moments.directions import noise_of

# A warning lists so many names.
NAMES = 4
# An `unseen_drift` of more than so many times the drift is said.
FEW = 2.0

Moments = Covariances | str | os.PathLike[str]
"""Second moments, or the directory that `Covariances.save` wrote."""


def loaded(moments: Moments) -> Covariances:
    return moments if isinstance(moments, Covariances) else Covariances.load(moments)


def place_of(moments: Moments) -> str | None:
    """The directory, for a record; None for an object."""
    return None if isinstance(moments, Covariances) else os.path.abspath(moments)


class Group(NamedTuple):
    """Layers that have the same input in both sets of second moments."""

    site: str
    """Its name among the inputs that must be kept."""
    layers: tuple[str, ...]
    filter: Filter
    tokens: tuple[int, int]
    """Of the task, and of what must be kept."""


class Pair:
    """The second moments of the task and of what must be kept, of one model.

    Args:
        task, keep: of these.
        ridge: of `Filter`.

    Raises:
        TypeError, ValueError: for a ridge that is not positive.
    """

    def __init__(self, task: Covariances, keep: Covariances, ridge: float) -> None:
        self.task, self.keep, self.ridge = task, keep, check_real("ridge", ridge, POSITIVE)

    def check(self, layers: Mapping[str, Weight], what: str) -> None:
        """Raise `ValueError`, naming the layer, if one has no second moments, or those of another model.

        Args:
            layers: name → (d_out, d_in), and the fingerprint of its untouched weight if that is at hand.
            what: what has the layers, for messages.
        """
        for name, weight in layers.items():
            for moments, role in ((self.task, "task"), (self.keep, "keep")):
                check(moments, role, name, weight, what)
            mine, other = self.keep.weight(name), self.task.weight(name)
            if mine is not None and other is not None:
                try:
                    self.keep.check(name, None, other)
                except OtherModelError as error:
                    raise OtherModelError(f"task and keep are of different models: {error}") from None

    def groups(self, layers: Container[str]) -> Iterator[Group]:
        """The layers by their inputs, each with its filter, in the order of the model. One site is in memory at a time."""
        sites = [{name: site.name for site in each.sites for name in site.members} for each in (self.task, self.keep)]
        together: dict[tuple[str, str], list[str]] = {}
        for name in (name for name in self.keep if name in layers):
            together.setdefault((sites[0][name], sites[1][name]), []).append(name)
        for (_, site), names in together.items():
            task, keep = (each[names[0]] for each in (self.task, self.keep))
            task, keep = task.completed(task.d_in), keep.completed(keep.d_in)
            tokens = (task.tokens, keep.tokens)
            with naming(names[0]):
                made = Filter(task.matrix(), keep.matrix(), ridge=self.ridge, noise=noise_of(keep), tokens=tokens)
            yield Group(site, tuple(names), made, tokens)


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Context manager: a `ValueError` names the layer."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"layer {layer!r}: {error}") from error


def check(moments: Covariances, role: str, name: str, weight: Weight, what: str) -> None:
    """Raise `ValueError`, naming the layer, if there is no second moment for it, or that of another model."""
    if name not in moments:
        raise InputError(
            f"{what} changes {name!r}, for which there is no second moment in {role} ({len(moments)} layers: "
            f"{', '.join(list(moments)[:3])}, …): compute those of all its layers on the untouched model (nullspace covariances "
            "--targets), or train it without that layer"
        )
    try:
        moments.check(name, None, weight)
    except OtherModelError as error:
        raise OtherModelError(f"{role}: {error}") from None


class Few:
    """Sites whose data are too few for a filter, collected for one warning."""

    def __init__(self) -> None:
        self._few: dict[str, str] = {}
        self._count = 0

    def look_at(self, group: Group, forecast: Forecast) -> None:
        """Compare the tokens with the width, and the drift with what it may be on other text."""
        self._count += 1
        d_in = group.filter.d_in
        reasons = [f"{n:,} tokens of the {role}" for n, role in zip(group.tokens, ("task", "kept text"), strict=True) if n < d_in]
        if forecast.unseen_drift == float("inf"):
            reasons.append("drift on other text unknown")
        elif forecast.unseen_drift > FEW * forecast.drift:
            reasons.append(f"drift on other text {forecast.unseen_drift / forecast.drift:.1f} × as large")
        if reasons:
            self._few[group.site] = f"d_in = {d_in}, {', '.join(reasons)}"

    def warn(self, *, stacklevel: int) -> None:
        """Issue one `UserWarning`, if there are any."""
        if self._few:
            named = "; ".join(f"{name} ({why})" for name, why in list(self._few.items())[:NAMES])
            more = "; …" if len(self._few) > NAMES else ""
            warnings.warn(
                f"the second moments of {len(self._few)} of {self._count} sites are of few tokens, and the filter may hold less "
                f"on other text than it forecasts: {named}{more}. Use more data, or a smaller strength",
                DataWarning,
                stacklevel=stacklevel + 1,
            )
