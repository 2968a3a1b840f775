"""The records of a preservation study: what each run forgot and learned, and a comparison of methods at equal task loss.

A study is one file of JSON Lines, which `benchmarks.preservation` writes, each line an object with a `kind`:

| `kind` | what | other fields |
|---|---|---|
| `study` | what all runs have in common | `settings` |
| `base` | the model before training, without adapters | `scores` |
| `start` | with untrained adapters | `variant`, `scores` |
| `dropped` | the base of the adapters alone, BA left out (the paper's Figure 5) | `variant`, `scores` |
| `run` | after training | `variant`, `method`, `sigma_scale`, `learning_rate`, `seed`, `scores`, `layers` |

`scores` are of three groups: `knowledge` (data set → `log_likelihood` in nats an answer, `exact_match`), `text` (data set →
`perplexity`), `task` (`loss` in nats a response token, `token_accuracy`, and `exact_match` where it was measured).

Methods learn at different speeds for one learning rate, so a table at one learning rate compares speeds. A *path* is forgetting
against task loss over all learning rates of a method; paths are compared at one task loss.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nullspace.artifacts.records import check_regular
from nullspace.checks import an_object, check_fields, check_one_of, finite, map_of, optional, or_none, shown, text, whole
from nullspace.errors import InputError

# The file in a study's directory.
RESULTS = "results.jsonl"
Record = dict[str, Any]

_LARGEST = 1e9  # nats: no loss of a model comes near
_SHARE = finite(0, 1)
_TASK_FIELDS = {"loss": finite(0, _LARGEST), "token_accuracy": _SHARE, "exact_match": optional(_SHARE)}
_KNOWLEDGE_FIELDS = {"log_likelihood": finite(-_LARGEST, _LARGEST), "exact_match": optional(_SHARE)}
_TEXT_FIELDS = {"perplexity": finite(0.5, 1e100)}
_RECORD_FIELDS = {
    "study": {"settings": an_object()},
    "base": {"scores": an_object()},
    "start": {"variant": text(), "scores": an_object()},
    "dropped": {"variant": text(), "scores": an_object()},
    "run": {
        "variant": text(),
        "learning_rate": finite(0, 1e9),
        "seed": whole(),
        "scores": an_object(),
        "layers": optional(or_none(map_of(finite(-1e100, 1e100)))),
    },
}


class Study(NamedTuple):
    """The records of a file, by kind.

    Attributes:
        settings: what all runs have in common.
        base: scores of the model before training; None if they are missing so far.
        start: variant → scores with untrained adapters.
        dropped: variant → scores of the adapters' base without them.
        runs: the records of runs.
    """

    settings: dict[str, Any]
    base: dict[str, Any] | None
    start: dict[str, dict[str, Any]]
    dropped: dict[str, dict[str, Any]]
    runs: list[Record]

    @property
    def variants(self) -> list[str]:
        """Names of methods with their settings, in the order in which they were first run."""
        return list(dict.fromkeys(run["variant"] for run in self.runs))


class Spread(NamedTuple):
    """Mean and standard deviation over seeds (NaN for one seed), and their number."""

    mean: float
    deviation: float
    seeds: int


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The lines of a file of JSON Lines, without an incomplete last line (of an interrupted run).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, for any other line that is not an object with a `kind`.
    """
    records: list[Record] = []
    check_regular(Path(path))
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise InputError(f"{path}, line {number}: not a record of a preservation study")
        records.append(record)
    return records


def read_study(path: str | os.PathLike[str]) -> Study:
    """The records of a study by kind, checked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file and the record, if it is no study, or a record lacks a field or has a value out of range.
    """
    records = read_records(path)
    _check_records(records, path)
    of_kind: dict[str, list[Record]] = {kind: [r for r in records if r["kind"] == kind] for kind in _RECORD_FIELDS}
    if not of_kind["study"]:
        raise InputError(f"{path} does not begin with the settings of a preservation study")
    return Study(
        of_kind["study"][0]["settings"],
        next((record["scores"] for record in of_kind["base"]), None),
        {record["variant"]: record["scores"] for record in of_kind["start"]},
        {record["variant"]: record["scores"] for record in of_kind["dropped"]},
        of_kind["run"],
    )


def _check_records(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    base = next((record for record in records if record["kind"] == "base"), None)
    measured = next(
        (set(record["layers"]) for record in records if isinstance(record.get("layers"), dict) and record["layers"]), set()
    )
    for number, record in enumerate(records, start=1):
        where = f"{path}, record {number} ({shown(record['kind'])})"
        fields = _RECORD_FIELDS.get(record["kind"], {})
        check_fields(record, fields, where)
        if "scores" in fields:
            _check_scores(record["scores"], where, task_alone=record["kind"] == "start")
            if record["kind"] != "start" and base is not None and _data_sets(record) != _data_sets(base):
                raise InputError(f"{where}: its scores are of {_data_sets(record)}, and the base's of {_data_sets(base)}")
        if record["kind"] == "run" and record.get("layers") and set(record["layers"]) != measured:
            raise InputError(f"{where}: its 'layers' have {sorted(record['layers'])}, and the first run's {sorted(measured)}")


def _check_scores(scores: Mapping[str, Any], where: str, *, task_alone: bool = False) -> None:
    check_fields(scores, {"task": an_object()}, f"{where}, scores")
    check_fields(scores["task"], _TASK_FIELDS, f"{where}, scores, task")
    if task_alone:
        return
    check_fields(scores, {"knowledge": an_object(), "text": an_object()}, f"{where}, scores")
    for group, fields in (("knowledge", _KNOWLEDGE_FIELDS), ("text", _TEXT_FIELDS)):
        for name, values in scores[group].items():
            check_fields(values, fields, f"{where}, scores, {group}, {name!r}")


def _data_sets(record: Record) -> list[str]:
    scores = record["scores"]
    if not isinstance(scores, dict) or not all(isinstance(scores.get(group), dict) for group in ("knowledge", "text")):
        return []
    return sorted([*scores["knowledge"], *scores["text"]])


def knowledge_lost(scores: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """The decrease of the gold answers' log-likelihood: nats an answer, the mean over the knowledge sets."""
    return statistics.fmean(
        base["knowledge"][name]["log_likelihood"] - after["log_likelihood"] for name, after in scores["knowledge"].items()
    )


def text_lost(scores: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """The increase of the log-perplexity: nats a token, the mean over the texts."""
    return statistics.fmean(
        math.log(after["perplexity"] / base["text"][name]["perplexity"]) for name, after in scores["text"].items()
    )


Measure = Callable[[Mapping[str, Any], Mapping[str, Any]], float]
MEASURES: dict[str, Measure] = {"knowledge": knowledge_lost, "text": text_lost}


def paper_columns(scores: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns of the paper's tables, in per cent.

    Avg1: the mean exact match over the knowledge sets. Avg1(Per): the mean ratio after / before. Avg2: the task,
    exact match where it was measured and the accuracy of response tokens otherwise. GM: √(Avg1 · Avg2). None where the model
    knew no answer before, or no answer was generated.
    """
    matches = {name: after.get("exact_match") for name, after in scores["knowledge"].items()}
    avg2 = 100 * scores["task"].get("exact_match", scores["task"]["token_accuracy"])
    if any(match is None for match in matches.values()):
        return {"Avg1": None, "Avg1(Per)": None, "Avg2": avg2, "GM": None}
    avg1 = 100 * statistics.fmean(matches.values())
    before = {name: base["knowledge"][name]["exact_match"] for name in matches}
    kept = 100 * statistics.fmean(matches[name] / before[name] for name in matches) if all(before.values()) else None
    return {"Avg1": avg1, "Avg1(Per)": kept, "Avg2": avg2, "GM": math.sqrt(avg1 * avg2)}


def path(runs: Iterable[Record], base: Mapping[str, Any], measure: str) -> list[tuple[float, float]]:
    """(task loss, forgetting) of one variant and seed: the base model, then its runs by rising learning rate."""
    ordered = sorted(runs, key=lambda run: run["learning_rate"])
    lost = MEASURES[measure]
    return [(base["task"]["loss"], 0.0), *((run["scores"]["task"]["loss"], lost(run["scores"], base)) for run in ordered)]


def at_task_loss(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Forgetting where a path of (task loss, forgetting) first reaches a task loss from above, linear between points; or None.

    Example:
        >>> at_task_loss([(2.0, 0.0), (1.5, 0.25), (1.0, 0.75)], 1.25)
        0.5
        >>> at_task_loss([(2.0, 0.0), (1.5, 0.1)], 1.25) is None
        True
    """
    for (loss, forgotten), (next_loss, next_forgotten) in itertools.pairwise(points):
        if next_loss <= target <= loss:
            part = 0.0 if loss == next_loss else (loss - target) / (loss - next_loss)
            return forgotten + part * (next_forgotten - forgotten)
    return None


def common_losses(study: Study, parts: Sequence[float] = (0.25, 0.5, 0.75, 1.0)) -> list[float]:
    """Task losses that every variant reaches with every seed: at these fractions between the base's and the lowest of them."""
    assert study.base is not None
    begin = study.base["task"]["loss"]
    hardest = max(min(run["scores"]["task"]["loss"] for run in runs) for runs in _paths(study).values())
    return [begin - part * (begin - hardest) for part in parts]


def at_equal_loss(study: Study, measure: str = "knowledge", losses: Sequence[float] | None = None) -> list[Record]:
    """Forgetting of each variant at one task loss.

    Args:
        study: with its base's scores and at least one run of each variant.
        measure: `"knowledge"` (`knowledge_lost`) or `"text"` (`text_lost`).
        losses: nats a response token; by default `common_losses`.

    Returns:
        One row a variant and loss: `variant`, `task_loss`, `forgetting` (a `Spread` over the seeds that reach the loss; None if
        none does), `reached` (the number of those seeds) and `seeds`.

    Raises:
        ValueError: if the study has no base or no runs, or for an unknown measure.
    """
    check_one_of("measure", measure, MEASURES)
    if study.base is None or not study.runs:
        raise InputError("the study has no run to compare yet")
    by_path = _paths(study)
    rows = []
    for loss in common_losses(study) if losses is None else losses:
        for variant in study.variants:
            lost = [at_task_loss(path(runs, study.base, measure), loss) for (name, _), runs in by_path.items() if name == variant]
            reached = [value for value in lost if value is not None]
            rows.append(
                {
                    "variant": variant,
                    "task_loss": loss,
                    "forgetting": spread(reached) if reached else None,
                    "reached": len(reached),
                    "seeds": len(lost),
                }
            )
    return rows


def over_seeds(study: Study) -> list[Record]:
    """One row a variant and learning rate: `variant`, `learning_rate`, and a `Spread` of `task_loss`, of each `…_lost`,
    of the paper's columns, and of the numbers in `layers`."""
    assert study.base is not None
    groups: dict[tuple[str, float], list[Record]] = {}
    for run in study.runs:
        groups.setdefault((run["variant"], run["learning_rate"]), []).append(run)
    rows = []
    for (variant, rate), runs in sorted(groups.items(), key=lambda item: (study.variants.index(item[0][0]), item[0][1])):
        values: dict[str, list[float | None]] = {"task_loss": [run["scores"]["task"]["loss"] for run in runs]}
        for name, lost in MEASURES.items():
            values[f"{name}_lost"] = [lost(run["scores"], study.base) for run in runs]
        columns = [paper_columns(run["scores"], study.base) for run in runs]
        values.update({name: [row[name] for row in columns] for name in columns[0]})
        if all(run.get("layers") for run in runs):
            values.update({name: [run["layers"][name] for run in runs] for name in runs[0]["layers"]})
        known = {name: spread([v for v in each if v is not None]) for name, each in values.items() if None not in each}
        rows.append({"variant": variant, "learning_rate": rate, **known})
    return rows


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def as_json(rows: Iterable[Record]) -> list[Record]:
    """Rows with every `Spread` as an object; the deviation of a single seed is null."""
    return [
        {
            name: {**value._asdict(), "deviation": None if math.isnan(value.deviation) else value.deviation}
            if isinstance(value, Spread)
            else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _paths(study: Study) -> dict[tuple[str, int], list[Record]]:
    """The runs by variant and seed."""
    paths: dict[tuple[str, int], list[Record]] = {}
    for run in study.runs:
        paths.setdefault((run["variant"], run["seed"]), []).append(run)
    return paths
