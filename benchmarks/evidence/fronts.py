"""Fronts on the validation split: the least KL with which a way learns a share of what LoRA learns, over its rates.

A run with what was done to its change has a curve over the scale t of the change, from 0 (the base) to the largest that was scored:
task loss and √KL are interpolated monotonically in t (KL is quadratic in a small change).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from benchmarks.evidence.statistics import ASKED, LORA, Cell, Evidence, Point, Way

_GRID = 481
Scores = Mapping[str, Mapping[str, Any]]


class Curve(NamedTuple):
    """Task loss (nats a token) and KL (nats a token of the answers, the mean over sets) on a grid of scales."""

    loss: np.ndarray
    kl: np.ndarray


def curves(points: Sequence[Point], base: Scores) -> list[Curve]:
    """One a rate and strength, of points of one way and seed."""
    runs: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        runs.setdefault((point.rate, point.strength), []).append(point)
    return [_curve(sorted(run, key=lambda point: point.t), base) for run in runs.values()]


def _curve(points: Sequence[Point], base: Scores) -> Curve:
    names = [name for name in ASKED if all(name in point.scores for point in points)]
    scales = np.array([0.0, *(point.t for point in points)])
    grid = np.linspace(0.0, scales[-1], _GRID)
    losses = [base["task"]["loss"], *(point.scores["task"]["loss"] for point in points)]
    moved = [0.0, *(max(float(np.mean([point.scores[name]["kl"] for name in names])), 0.0) ** 0.5 for point in points)]
    return Curve(PchipInterpolator(scales, losses)(grid), PchipInterpolator(scales, moved)(grid) ** 2)


def fronts(found: Evidence, cell: Cell, shares: Sequence[float]) -> dict[Way, np.ndarray]:
    """Way → KL at each share of LoRA's learning: the geometric mean over seeds; NaN where a seed does not learn as much."""
    base = found.bases[cell.task, "validation"]
    of_seed = _by_way(found, cell)
    best = lowest_losses(found, cell)
    begin = base["task"]["loss"]
    lines = {}
    for way, seeds in of_seed.items():
        rows = [
            [least(curves(points, base), begin - share * (begin - best[seed])) for share in shares]
            for seed, points in seeds.items()
            if seed in best
        ]
        if rows:
            lines[way] = np.exp(np.log(np.array(rows)).mean(axis=0))
    return lines


def lowest_losses(found: Evidence, cell: Cell) -> dict[int, float]:
    """Seed → the lowest task loss of plain LoRA over its rates and scales, nats a token."""
    base = found.bases[cell.task, "validation"]
    return {seed: min(each.loss.min() for each in curves(points, base)) for seed, points in _by_way(found, cell)[LORA].items()}


def _by_way(found: Evidence, cell: Cell) -> dict[Way, dict[int, list[Point]]]:
    of_seed: dict[Way, dict[int, list[Point]]] = {}
    for point in found.within(cell, "validation"):
        of_seed.setdefault(point.way, {}).setdefault(point.seed, []).append(point)
    return of_seed


def least(lines: Sequence[Curve], loss: float) -> float:
    """The least KL of those curves at the smallest scale with this task loss; NaN if none comes so low."""
    reached = [float(each.kl[np.argmax(each.loss <= loss)]) for each in lines if (each.loss <= loss).any()]
    return min(reached, default=np.nan)
