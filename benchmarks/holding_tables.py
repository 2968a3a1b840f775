"""The tables of `benchmarks.holding`: every method against scaling its own change down.

Scaling has a curve: task loss, √KL and forgetting over the scale, from 0 (the base) to 1 (as trained), interpolated monotonically
between the scales that were scored (√KL since KL is quadratic in a small scale). A variant is compared with the curve of its run
at its own task loss, and at its own KL.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from nullspace.reporting import study as fronts

Record = Mapping[str, Any]
ASKED = ("nq", "webq")
TEMPLATE = ("nq, template", "webq, template")
OTHERS = ("humaneval", "wikitext")
_GRID = 2001


def key(record: Record) -> str:
    """What identifies a scored variant."""
    return json.dumps([record["part"], record["run"], record["variant"]], sort_keys=True)


def listed(path: Path) -> list[str]:
    """A line a scored variant: its task loss, and KL to the base of each probe."""
    lines = []
    for record in fronts.read_records(path):
        if record["kind"] == "score":
            numbers = [f"{name} {each['loss' if name == 'task' else 'kl']:.4f}" for name, each in record["scores"].items()]
            lines.append("  ".join([record["part"], record["run"], str(record["variant"]), *numbers]))
    return lines


class Held(NamedTuple):
    """The records of `benchmarks.holding`."""

    base: Mapping[str, Mapping[str, float]]
    scored: list[Record]

    def runs(self, part: str) -> list[str]:
        return list(dict.fromkeys(record["run"] for record in self.scored if record["part"] == part))

    def one(self, part: str, run: str, how: str, **wanted: Any) -> Record | None:
        """The record of a variant, if it has been scored."""
        defaults = {"scale": 1.0, "strength": 0.0, "form": "", "rank": 0}
        variant = {"how": how, **defaults, **wanted}
        matching = (r for r in self.scored if (r["part"], r["run"]) == (part, run) and r["variant"] == variant)
        return next(matching, None)

    def kl(self, record: Record, names: Sequence[str]) -> float:
        return statistics.fmean(record["scores"][name]["kl"] for name in names)

    def forgetting(self, record: Record, names: Sequence[str]) -> float:
        """Nats an answer."""
        return statistics.fmean(self.base[name]["log_likelihood"] - record["scores"][name]["log_likelihood"] for name in names)


def read(path: Path) -> Held:
    records = fronts.read_records(path)
    base = next(record["scores"] for record in records if record["kind"] == "base")
    return Held(base, [record for record in records if record["kind"] == "score"])


class Curve(NamedTuple):
    """What scaling a run's change down costs and brings, on a grid of scales from 0 to 1."""

    scale: np.ndarray
    loss: np.ndarray
    kl: np.ndarray
    forgetting: np.ndarray

    def at_loss(self, loss: float) -> int:
        """Where the smallest scale with this task loss is; that with the lowest loss, if none is so low."""
        reached = np.flatnonzero(self.loss <= loss)
        return int(reached[0]) if len(reached) else int(self.loss.argmin())

    def at_kl(self, kl: float) -> int:
        """Where the scale with the lowest loss of all with at most this KL is."""
        return int(self.loss[self.kl <= kl].argmin())


def curve(held: Held, part: str, run: str, names: Sequence[str]) -> Curve | None:
    scored = [
        record for record in held.scored if (record["part"], record["run"]) == (part, run)
        and record["variant"]["how"] in ("trained", "scaled") and all(name in record["scores"] for name in names)
    ]  # fmt: skip
    points = sorted((record["variant"]["scale"], record) for record in scored) if scored else []
    if not points or points[-1][0] != 1.0:
        return None
    scales = np.array([0.0, *(scale for scale, _ in points)])
    grid = np.linspace(0, 1, _GRID)

    def over(values: Iterable[float]) -> np.ndarray:
        return np.asarray(PchipInterpolator(scales, list(values))(grid))

    records = [record for _, record in points]
    return Curve(
        grid,
        over([held.base["task"]["loss"], *(record["scores"]["task"]["loss"] for record in records)]),
        over([0.0, *(held.kl(record, names) ** 0.5 for record in records)]) ** 2,
        over([0.0, *(held.forgetting(record, names) for record in records)]),
    )


class Against(NamedTuple):
    """A variant against scaling."""

    ratio: float
    """Its KL over that of scaling at equal task loss."""
    saved: float
    """How much less it forgets than scaling does at equal task loss, nats an answer."""
    cheaper: float
    """By how much its task loss is lower than that of scaling at equal KL, nats a token."""
    reached: bool
    """Whether scaling comes to its task loss at all."""


def against(held: Held, record: Record, names: Sequence[str]) -> Against | None:
    line = curve(held, record["part"], record["run"], names)
    if line is None:
        return None
    loss, kl = record["scores"]["task"]["loss"], held.kl(record, names)
    here = line.at_loss(loss)
    return Against(
        kl / float(line.kl[here]),
        float(line.forgetting[here]) - held.forgetting(record, names),
        float(line.loss[line.at_kl(kl)]) - loss,
        bool(line.loss.min() <= loss),
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, the latter of several values."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    text = mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
    return text.replace("-", "−")


Table = list[list[str]]


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def _records(held: Held, part: str, runs: Sequence[str], how: str, **wanted: Any) -> list[Record]:
    return [record for run in runs if (record := held.one(part, run, how, **wanted)) is not None]


def _pair(held: Held, records: Sequence[Record], names: Sequence[str], what: Callable[..., float], digits: int) -> str:
    return ", ".join(spread([what(record, (name,)) for record in records], digits) for name in names)


def _kl(held: Held, records: Sequence[Record], names: Sequence[str]) -> str:
    smallest = min(held.kl(record, (name,)) for record in records for name in names)
    return _pair(held, records, names, held.kl, 4 if smallest >= 1e-3 else 5)


def _losses(records: Sequence[Record], name: str = "task") -> str:
    return spread([record["scores"][name]["loss"] for record in records], 3)


def _against_scaling(held: Held, records: Sequence[Record]) -> list[str]:
    """KL over scaling's on both sets of questions and on each of the others, how much less is forgotten, how much lower the task
    loss is, and in how many pairs of a run and a set both KL and task loss are lower."""
    sets = [ASKED, *((name,) for name in OTHERS)]
    found = [[against(held, record, names) for record in records] for names in sets]
    first = [each for each in found[0] if each is not None]
    if not first:
        return [""] * len(AGAINST)
    ratios = [spread([each.ratio for each in column if each is not None], 2) for column in found]
    pairs = [against(held, record, (name,)) for record in records for name in (*ASKED, *OTHERS)]
    ahead = sum(each.ratio < 1 and each.cheaper > 0 for each in pairs if each is not None)
    saved, cheaper = ([getattr(each, what) for each in first] for what in ("saved", "cheaper"))
    return [*ratios, spread(saved, 2), spread(cheaper, 3), f"{ahead} of {len(pairs)}"]


def of_runs(held: Held, part: str, runs: Sequence[str], rows: Sequence[tuple[str, str, dict[str, Any]]]) -> Table:
    """Rows of (label, how, what the variant depends on), each over all runs that have it."""
    table = []
    for label, how, wanted in rows:
        records = _records(held, part, runs, how, **wanted)
        if records:
            more = _against_scaling(held, records) if how == "filtered" else [""] * len(AGAINST)
            table.append([label, *_scores(held, records), *more])
    return table


def _scores(held: Held, records: Sequence[Record]) -> list[str]:
    return [_losses(records), _pair(held, records, ASKED, held.forgetting, 2), _kl(held, records, ASKED)]


SCORES = ["task loss", "forgotten, NQ, WebQ", "KL, NQ, WebQ"]
AGAINST = ["KL ÷ scaling's, questions", "HumanEval", "WikiText", "forgotten less", "loss below scaling's", "ahead"]
SCALED = [(f"× {scale:g}", "scaled", {"scale": scale}) for scale in (0.75, 0.5, 0.3)]
FILTERED = [(f"filter μ = {mu:g}", "filtered", {"strength": mu, "form": "shots"}) for mu in (0.1, 1.0, 10.0)]
BOTH = [("filter μ = 1, × 0.6", "filtered", {"strength": 1.0, "form": "shots", "scale": 0.6})]


def plain(held: Held) -> Table:
    """A: plain LoRA, over seeds."""
    runs = held.runs("A")
    rates = sorted({run.split()[1] for run in runs}, key=lambda rate: float(rate[2:]))
    table = [["plain LoRA", *SCORES, *AGAINST]]
    for rate in rates:
        rows = [(f"LoRA at {rate[2:]}", "trained", {}), *SCALED, *FILTERED, *BOTH]
        table += of_runs(held, "A", [run for run in runs if run.split()[1] == rate], rows)
    return table


def forms(held: Held) -> Table:
    """A: questions in two forms, by what C_k was calibrated on."""
    rows = [
        ("LoRA", "trained", {}), ("× 0.5", "scaled", {"scale": 0.5}), ("filter μ = 1, plain text", "filtered", {"form": "plain"}),
        ("filter μ = 1, half in the few-shot form", "filtered", {"form": "shots"}),
        ("filter μ = 1, half in the task's template", "filtered", {"form": "template"}),
    ]  # fmt: skip
    table = [
        [
            "plain LoRA, by form",
            "task loss",
            "KL, NQ, WebQ, few-shot",
            "the same, task's template",
            "forgotten, NQ, WebQ, task's template",
        ]
    ]
    for rate in ("lr0.002", "lr0.008"):
        runs = [run for run in held.runs("A") if rate in run]
        for label, how, wanted in rows:
            records = _records(held, "A", runs, how, **({"strength": 1.0, **wanted} if how == "filtered" else wanted))
            if records:
                cells = [_losses(records), _kl(held, records, ASKED), _kl(held, records, TEMPLATE)]
                cells.append(_pair(held, records, TEMPLATE, held.forgetting, 2))
                table.append([f"{label}, {rate[2:]}", *cells])
    return table


def whole(held: Held) -> Table:
    """B: a model trained whole."""
    table = [["trained whole", *SCORES, *AGAINST]]
    for run in held.runs("B"):
        more = [("embedding and norms alone", "rest", {}), ("linear layers alone", "linear alone", {})]
        table += of_runs(held, "B", [run], [(f"whole at {run.split()[1][2:]}", "trained", {}), *SCALED, *FILTERED, *more])
    return table


def merges(held: Held) -> Table:
    """C: two adapters in one."""
    table = [["two adapters in one", "task loss, GSM8K", "task loss, MBPP", "forgotten, NQ, WebQ", "KL, NQ, WebQ", "KL, WikiText"]]
    for record in held.scored:
        if record["part"] == "C":
            variant = record["variant"]
            name = record["run"].split(" lr")[0] if variant["how"] == "trained" else variant["how"]
            name += f" μ = {variant['strength']:g}, rank {variant['rank']}" if variant["rank"] else ""
            name += f", × {variant['scale']:g}" if variant["scale"] != 1 else ""
            cells = [_losses([record]), _losses([record], "mbpp"), _pair(held, [record], ASKED, held.forgetting, 2)]
            table.append([name, *cells, _kl(held, [record], ASKED), _kl(held, [record], ["wikitext"])])
    return table


TABLES: dict[str, Callable[[Held], Table]] = {"plain": plain, "forms": forms, "whole": whole, "merges": merges}


def page(path: Path) -> str:
    """All tables, in Markdown."""
    held = read(path)
    base = ", ".join(f"{name} {scores['loss']:.3f}" for name, scores in held.base.items())
    return "\n\n".join([f"Base, loss a token: {base}", *(f"{name}\n{markdown(table(held))}" for name, table in TABLES.items())])
