"""Fronts on the validation split: the least KL with which a way learns a share of what LoRA learns, over rates, strengths and t."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from benchmarks.evidence import choice
from benchmarks.evidence.choice import Curve
from benchmarks.evidence.statistics import LORA, Cell, Evidence, Point, Way

Curves = Mapping[Hashable, Curve]


def fronts(found: Evidence, cell: Cell, shares: Sequence[float]) -> dict[Way, np.ndarray]:
    """Way → KL (nats a token of the answers) at each share of LoRA's learning: the geometric mean over seeds; NaN where a seed does
    not learn as much."""
    begin, by_way = base_loss(found, cell), curves(found, cell)
    lines = {}
    for way, seeds in by_way.items():
        rows = []
        for seed, own in seeds.items():
            if seed in by_way[LORA]:
                targets = [choice.target(begin, list(by_way[LORA][seed].values()), share) for share in shares]
                points = [choice.chosen(own, loss) for loss in targets]
                rows.append([np.nan if point is None else point.kl for point in points])
        if rows:
            lines[way] = np.exp(np.log(np.array(rows)).mean(axis=0))
    return lines


def base_loss(found: Evidence, cell: Cell) -> float:
    """Of the task, nats a token."""
    return float(found.bases[cell.task, "validation"]["task"]["loss"])


def learned(found: Evidence, cell: Cell) -> float:
    """By how much plain LoRA lowers the task loss at best, nats a token: the mean over seeds."""
    begin = base_loss(found, cell)
    return float(np.mean([begin - choice.target(begin, list(own.values()), 1.0) for own in curves(found, cell)[LORA].values()]))


def most_learned(found: Evidence, cell: Cell) -> dict[Way, list[float]]:
    """Way → the largest share of what plain LoRA learns at best that it reaches, of each seed."""
    begin, by_way = base_loss(found, cell), curves(found, cell)
    plain = {seed: list(own.values()) for seed, own in by_way[LORA].items()}
    return {
        way: [choice.share(begin, plain[seed], own.values()) for seed, own in seeds.items() if seed in plain]
        for way, seeds in by_way.items()
    }


def curves(found: Evidence, cell: Cell) -> dict[Way, dict[int, Curves]]:
    """Way → seed → (rate, strength) → task loss and KL over the scale."""
    points: dict[Way, dict[int, dict[Hashable, list[Point]]]] = {}
    for point in found.within(cell, "validation"):
        points.setdefault(point.way, {}).setdefault(point.seed, {}).setdefault((point.rate, point.strength), []).append(point)
    begin = base_loss(found, cell)
    return {
        way: {seed: {key: _curve(begin, run) for key, run in runs.items()} for seed, runs in seeds.items()}
        for way, seeds in points.items()
    }


def _curve(begin: float, points: Sequence[Point]) -> Curve:
    scored = (choice.Point(each.t, each.scores["task"]["loss"], each.scores["nq"]["kl"]) for each in points)
    return choice.curve(begin, scored)
