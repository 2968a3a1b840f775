"""What the records of `benchmarks.evidence` say: KL and forgetting at equal learning, with intervals, and the factors between them.

A *way* is a method and what is done to its change after training. A *cell* is what is the same for all methods that are compared:
task, steps, rank, and the calibration. In a cell and at a level (the share of what plain LoRA learns), each way has one point a
seed, chosen on the validation split and scored on the test split.

The main measure is KL(base ‖ model) in nats a token of the gold answers: the mean over NQ-open and WebQuestions of each set's
Σ KL / Σ tokens. Intervals are percentiles of a bootstrap whose generator is seeded, so the same records give the same numbers. The
questions that are drawn depend on the set and on its size alone: every way, seed and cell is resampled alike, and differences and
ratios are paired.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from nullspace.errors import InputError

ASKED = ("nq", "webq")
RESAMPLES = 2000
_SEED = 21
_LEAST_KL = 1e-12  # nats a token; float32 sums of a model that hardly differs from the base may be 0 or below


class Way(NamedTuple):
    """A method, and what is done to its change after training: `none`, `filter` or `intruder`; scaling is free to all."""

    method: str
    how: str = "none"


LORA = Way("lora")


class Cell(NamedTuple):
    """What methods are compared at. Where nothing is calibrated, `form` is empty and `samples` is 0."""

    task: str
    steps: int
    rank: int
    form: str
    samples: int


class Point(NamedTuple):
    """A scored model: a run, what was done to its change, and the scale t of the change."""

    way: Way
    cell: Cell
    seed: int
    rate: float
    strength: float
    t: float
    split: str
    level: float | None
    scores: Mapping[str, Mapping[str, Any]]
    drift: Mapping[str, float]


class Missed(NamedTuple):
    """A way that does not reach the target with a seed, and the share of LoRA's learning that it does reach."""

    way: Way
    cell: Cell
    seed: int
    level: float
    reached: float


class Evidence(NamedTuple):
    """The records of a study, by kind. `bases`: (task, split) → scores of the model before training."""

    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    bases: Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]
    points: list[Point]
    missed: list[Missed]

    def cells(self, split: str = "test") -> list[Cell]:
        """Cells with points of a split, sorted; what needs no calibration belongs to every other cell."""
        found = sorted({point.cell for point in self.points if point.split == split})
        return [cell for cell in found if cell.form] or found

    def within(self, cell: Cell, split: str) -> list[Point]:
        """Points of a split in a cell, those that need no calibration too."""
        free = cell._replace(form="", samples=0)
        return [point for point in self.points if point.split == split and point.cell in (cell, free)]

    def level(self) -> float:
        """The level of most points of the test split."""
        levels = [point.level for point in self.points if point.split == "test" and point.level is not None]
        if not levels:
            raise InputError("the records have no point of the test split")
        return max(sorted(set(levels)), key=levels.count)


def evidence(records: Sequence[Mapping[str, Any]]) -> Evidence:
    """Records by kind. Of points that were chosen more than once (a rate was added, and the study went on), the last counts.

    Raises:
        InputError: if there is no record of the study's settings.
    """
    study = next((record for record in records if record["kind"] == "study"), None)
    if study is None:
        raise InputError("the records do not begin with those of a study: 'kind' is 'study' in none")
    points, missed = {}, {}
    for record in records:
        if record["kind"] == "score":
            point = _point(record)
            own = (point.rate, point.strength, point.t) if point.level is None else ()
            points[(point.way, point.cell, point.seed, point.split, point.level, own)] = point
        elif record["kind"] == "missed":
            run, post = record["run"], record["post"]
            post = post if isinstance(post, Mapping) else {"how": post}
            each = Missed(Way(run["method"], post["how"]), _cell(run, post), run["seed"], record["level"], record["reached"])
            missed[each[:4]] = each
    bases = {(record["task"], record["split"]): record["scores"] for record in records if record["kind"] == "base"}
    return Evidence(study["settings"], study.get("environment", {}), bases, list(points.values()), list(missed.values()))


def _point(record: Mapping[str, Any]) -> Point:
    run, post = record["run"], record["post"]
    return Point(
        Way(run["method"], post["how"]),
        _cell(run, post),
        run["seed"],
        run["rate"],
        post.get("strength", 0.0),
        record["t"],
        record["split"],
        record["level"],
        record["scores"],
        record.get("drift") or {},
    )


def _cell(run: Mapping[str, Any], post: Mapping[str, Any]) -> Cell:
    """The calibration is that of the run or of the filter; of both, if they differ."""
    forms = dict.fromkeys(form for form in (run.get("form"), post.get("form")) if form)
    samples = run.get("samples") or post.get("samples") or 0
    return Cell(run["task"], run["steps"], run["rank"], ", then ".join(forms), samples)


@lru_cache(maxsize=32)
def weights(name: str, questions: int) -> np.ndarray:
    """How often each question of a set is drawn: (1 + RESAMPLES, questions), float64. The first row is the set itself."""
    generator = np.random.default_rng([_SEED, zlib.crc32(name.encode()), questions])
    drawn = generator.integers(0, questions, (RESAMPLES, questions)) + questions * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * questions).reshape(RESAMPLES, questions)
    return np.vstack([np.ones(questions), counts])


@lru_cache(maxsize=8)
def _seeds_drawn(seeds: int) -> np.ndarray:
    """Which seeds are drawn: (1 + RESAMPLES, seeds). The first row is all of them."""
    drawn = np.random.default_rng([_SEED, seeds]).integers(0, seeds, (RESAMPLES, seeds))
    return np.vstack([np.arange(seeds), drawn])


class Estimate(NamedTuple):
    """A number, its intervals, and its value with each seed.

    Attributes:
        value: the mean over seeds (of ratios: the geometric mean).
        questions: 95 % interval over resampled questions. It contains what another draw of as many questions from the same sets
            would change for *these* trained models. It does not contain other seeds, other examples of the task, the choice of
            rate, strength and t on the validation split, other sets of questions, or other models.
        both: the same with the seeds resampled too. Of three seeds a bootstrap sees little: the interval is too narrow for what
            new seeds would do, so `seeds` has them all.
        seeds: the value with each seed; their spread contains training noise and the choices on the validation split.
    """

    value: float
    questions: tuple[float, float]
    both: tuple[float, float]
    seeds: tuple[float, ...]

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; NaN for one seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else math.nan


def estimate(values_rs: np.ndarray, after: Callable[[Any], Any] = np.asarray) -> Estimate:
    """From values (1 + RESAMPLES, seeds) whose first row is the sample itself; `after` is applied to every mean over seeds, and
    increases."""

    def interval(means: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(means[1:], [2.5, 97.5])
        return float(after(low)), float(after(high))

    drawn = np.take_along_axis(values_rs, _seeds_drawn(values_rs.shape[1]), axis=1)
    means = values_rs.mean(axis=1)
    return Estimate(
        float(after(means[0])), interval(means), interval(drawn.mean(axis=1)), tuple(float(after(value)) for value in values_rs[0])
    )


class Comparison:
    """The ways of one cell at one level, on the test split.

    Attributes:
        points: way → seed → point.
        missed: way → seed → the share of LoRA's learning that it reaches, below the level.
        questions: of each set of `ASKED` that every point has been asked, question by question: how many (the first ones).
    """

    def __init__(self, found: Evidence, cell: Cell, level: float) -> None:
        self.cell, self.level = cell, level
        self.points: dict[Way, dict[int, Point]] = {}
        for point in sorted(found.within(cell, "test"), key=lambda point: (point.way, point.seed)):
            if point.level == level:
                self.points.setdefault(point.way, {})[point.seed] = point
        self.missed: dict[Way, dict[int, float]] = {}
        for each in found.missed:
            here = each.level == level and each.cell in (cell, cell._replace(form="", samples=0))
            if here and each.seed not in self.points.get(each.way, {}):
                self.missed.setdefault(each.way, {})[each.seed] = each.reached
        self.base = found.bases.get((cell.task, "test"), {})
        self._found = found  # keeps alive the scores whose ids are keys below
        self._known: dict[tuple[int, str, int], np.ndarray] = {}
        scores = [point.scores for seeds in self.points.values() for point in seeds.values()]
        self.questions = {
            name: min(len(each[name]["rows"]["kl"]) for each in scores)
            for name in ASKED
            if scores and all("rows" in each.get(name, {}) for each in scores)
        }

    def ranked(self) -> list[Way]:
        """Ways by rising KL."""
        return sorted(self.points, key=lambda way: (self.kl(way).value, way))

    def whole(self) -> list[Way]:
        """The ways that have all of LoRA's seeds, by rising KL: one that was lucky with some of them does not lead."""
        wanted = set(self.points.get(LORA, ()))
        return [way for way in self.ranked() if wanted <= set(self.points[way])]

    def kl(self, way: Way) -> Estimate:
        """Nats a token, the mean over sets."""
        return estimate(self._kl(list(self.points[way].values()), self.questions))

    def forgotten(self, way: Way, names: Sequence[str] = ()) -> Estimate:
        """Base log-likelihood − the model's, nats an answer, the mean over sets."""
        return estimate(self._forgotten(list(self.points[way].values()), names))

    def ratio(self, way: Way, to: Way = LORA, other: Comparison | None = None) -> Estimate | None:
        """KL over that of another way, or over that of a way in another cell: the geometric mean over the seeds that both have, on
        the questions that both were asked. None without such a seed."""
        own, others = self._paired(way, to, other)
        asked = self._asked(other)
        return estimate(np.log(self._kl(own, asked)) - np.log(self._kl(others, asked)), np.exp) if own and asked else None

    def difference(self, way: Way, of: Way = LORA) -> Estimate | None:
        """How much lower KL is than that of another way, nats a token, over the seeds that both have."""
        own, others = self._paired(way, of)
        return estimate(self._kl(others, self.questions) - self._kl(own, self.questions)) if own else None

    def forgotten_less(self, way: Way, of: Way = LORA) -> Estimate | None:
        """How much less is forgotten than by another way, nats an answer, over the seeds that both have."""
        own, others = self._paired(way, of)
        return estimate(self._forgotten(others) - self._forgotten(own)) if own else None

    def probe_ratio(self, way: Way, probe: str, to: Way = LORA) -> list[float]:
        """KL on a probe over that of another way, of every seed that both have."""
        pairs = [pair for pair in zip(*self._paired(way, to), strict=True) if all(probe in point.scores for point in pair)]
        if probe in self.questions:
            asked = {probe: self.questions[probe]}
            return [float(self._kl([own], asked)[0, 0] / self._kl([other], asked)[0, 0]) for own, other in pairs]
        return [max(own.scores[probe]["kl"], _LEAST_KL) / max(other.scores[probe]["kl"], _LEAST_KL) for own, other in pairs]

    def values(self, way: Way, probe: str, field: str) -> list[float]:
        """A field of a probe's scores, of every seed that has it."""
        scores = [point.scores[probe] for point in self.points[way].values() if probe in point.scores]
        return [float(each[field]) for each in scores if field in each]

    def _paired(self, way: Way, to: Way, other: Comparison | None = None) -> tuple[list[Point], list[Point]]:
        own, others = self.points.get(way, {}), (other or self).points.get(to, {})
        seeds = [seed for seed in own if seed in others]
        return [own[seed] for seed in seeds], [others[seed] for seed in seeds]

    def _asked(self, other: Comparison | None) -> dict[str, int]:
        theirs = (other or self).questions
        return {name: min(number, theirs[name]) for name, number in self.questions.items() if name in theirs}

    def _kl(self, points: Sequence[Point], asked: Mapping[str, int]) -> np.ndarray:
        """Of the first questions of each set: (1 + RESAMPLES, points), not below a least positive number."""
        means = [[self._kl_of(point, *each) for point in points] for each in asked.items()]
        return np.maximum(np.mean(means, axis=0).T, _LEAST_KL)

    def _kl_of(self, point: Point, name: str, number: int) -> np.ndarray:
        key = (id(point.scores), name, number)
        if key not in self._known:
            drawn = weights(name, number)
            kl_n, tokens_n = (
                np.array(rows[:number], dtype=float)
                for rows in (point.scores[name]["rows"]["kl"], self.base[name]["rows"]["tokens"])
            )
            self._known[key] = drawn @ kl_n / (drawn @ tokens_n)
        return self._known[key]

    def _forgotten(self, points: Sequence[Point], names: Sequence[str] = ()) -> np.ndarray:
        means = []
        for name in names or self.questions:
            number = self.questions[name]
            after_ns = np.array([point.scores[name]["rows"]["log_likelihood"][:number] for point in points], dtype=float).T
            before_n = np.array(self.base[name]["rows"]["log_likelihood"][:number], dtype=float)
            means.append(weights(name, number) @ (before_n[:, None] - after_ns) / number)
        return np.mean(means, axis=0)


class Resolution(NamedTuple):
    """How finely the main measure tells LoRA from the best way.

    Attributes:
        best: the way with the least KL, of those that have all seeds.
        difference: KL of LoRA − KL of the best.
        questions: the width of the 95 % interval over questions, over the difference.
        both: the same with seeds resampled too.
    """

    best: Way
    difference: Estimate
    questions: float
    both: float


def resolution(compared: Comparison) -> Resolution | None:
    """None where LoRA has no point, or no other way has a seed in common with it."""
    for best in compared.whole():
        difference = compared.difference(best) if best != LORA else None
        if difference is not None:
            low, high = (abs(b - a) / abs(difference.value) for a, b in (difference.questions, difference.both))
            return Resolution(best, difference, low, high)
    return None


def geometric_mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return float(np.exp(np.mean(np.log(values)))) if len(values) else math.nan


def drift_correlation(points: Sequence[Point], probe: str) -> tuple[float, int]:
    """Spearman's rank correlation of the median drift with KL on a probe, over points, and their number."""
    pairs = [(p.drift["median"], p.scores[probe]["kl"]) for p in points if "median" in p.drift and probe in p.scores]
    return (float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)) if len(pairs) > 2 else (math.nan, len(pairs))
