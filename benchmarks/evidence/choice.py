"""Which learning rate, strength and scale of a method is reported: the one that reaches the target with the least KL."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

STEP = 1e-3
"""of the scales among which is chosen"""


class Point(NamedTuple):
    """What a change scaled by `t` scores: task loss and KL to the base, nats a token."""

    t: float
    loss: float
    kl: float


class Curve(NamedTuple):
    """Task loss and KL over the scale from 0, the base, to the largest that was scored; arrays of one length."""

    t: np.ndarray
    loss: np.ndarray
    kl: np.ndarray


class Chosen(NamedTuple):
    """Of several curves, the point that is reported."""

    key: Hashable
    t: float
    kl: float


def curve(base_loss: float, points: Iterable[Point]) -> Curve:
    """Through the base and the scored points, interpolated monotonically: √KL, since KL is quadratic in a small scale."""
    scored = sorted({point.t: point for point in points}.values())
    knots = [Point(0.0, base_loss, 0.0), *scored]
    grid = np.arange(0, round(scored[-1].t / STEP) + 1) * STEP
    t = [point.t for point in knots]
    loss = PchipInterpolator(t, [point.loss for point in knots])(grid)
    root = PchipInterpolator(t, [max(point.kl, 0.0) ** 0.5 for point in knots])(grid)
    return Curve(grid, np.asarray(loss), np.asarray(root) ** 2)


def target(base_loss: float, plain: Sequence[Curve], level: float) -> float:
    """The task loss after `level` of what plain LoRA learns at best, over rates (`plain`) and scales."""
    best = min(float(each.loss.min()) for each in plain)
    return base_loss - level * (base_loss - best)


def chosen(curves: Mapping[Hashable, Curve], loss: float) -> Chosen | None:
    """The curve and scale with the least KL of all whose task loss is at most `loss`; None if none is."""
    candidates = []
    for key, each in curves.items():
        reached = np.flatnonzero(each.loss <= loss)
        if len(reached):
            least = reached[each.kl[reached].argmin()]
            candidates.append(Chosen(key, float(each.t[least]), float(each.kl[least])))
    return min(candidates, key=lambda each: each.kl, default=None)


def share(base_loss: float, plain: Sequence[Curve], curves: Iterable[Curve]) -> float:
    """The largest share of what plain LoRA learns at best that some curves reach."""
    full = base_loss - target(base_loss, plain, 1.0)
    return max((base_loss - float(each.loss.min())) / full for each in curves)
