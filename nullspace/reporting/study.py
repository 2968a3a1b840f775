"""The records of a preservation study: what each run forgot and what it learned, and methods compared where they learned the same.

A study is one file of JSON Lines, which `benchmarks.preservation` writes, each line an object with a `kind`:

| `kind` | what | beside it |
|---|---|---|
| `study` | what all runs have in common | `settings` |
| `base` | the model before anything was done to it | `scores` |
| `start` | with untrained adapters | `variant`, `scores` |
| `dropped` | the base of the adapters alone, BA left out (the paper's Figure 5) | `variant`, `scores` |
| `run` | after training | `variant`, `method`, `sigma_scale`, `learning_rate`, `seed`, `scores`, `layers` |

`scores` are of three groups: `knowledge` (data set → `log_likelihood` in nats an answer, `exact_match`), `text` (data set →
`perplexity`), `task` (`loss` in nats a response token, `token_accuracy`, and `exact_match` where it was measured).

Methods move at different speeds for one learning rate, so that a table at one learning rate compares speeds. A *front* is
forgetting against task loss over all learning rates of a method; fronts are compared at one task loss.
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
from nullspace.checks import an_object, check_fields, finite, map_of, optional, or_none, shown, text, whole

# What the file is called in a study's directory.
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
    """What a file of records holds.

    Attributes:
        settings: what all runs have in common.
        base: scores of the model before anything was done to it; None if they are not there yet.
        start: variant → scores with untrained adapters.
        dropped: variant → scores of the base of the adapters alone.
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
    """Of several seeds: mean, standard deviation (nan of one), and how many."""

    mean: float
    deviation: float
    seeds: int


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The lines of a file of JSON Lines; a last one that was cut off while it was written is left out.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming file and line, for any other line that is not an object with a `kind`.
    """
    found: list[Record] = []
    check_regular(Path(path))
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(content.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise ValueError(f"{path}, line {number}: not a record of a preservation study")
        found.append(record)
    return found


def read_study(path: str | os.PathLike[str]) -> Study:
    """A study's records, sorted by what they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming it and the record, if it is not of a study, or a record lacks what its kind has or says what it cannot.
    """
    records = read_records(path)
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
                raise ValueError(f"{where}: its scores are of {_data_sets(record)}, and the base's of {_data_sets(base)}")
        if record["kind"] == "run" and record.get("layers") and set(record["layers"]) != measured:
            raise ValueError(f"{where}: its 'layers' have {sorted(record['layers'])}, and the first run's {sorted(measured)}")
    settings = next((record["settings"] for record in records if record["kind"] == "study"), None)
    if settings is None:
        raise ValueError(f"{path} does not begin with the settings of a preservation study")
    return Study(
        settings,
        next((record["scores"] for record in records if record["kind"] == "base"), None),
        {record["variant"]: record["scores"] for record in records if record["kind"] == "start"},
        {record["variant"]: record["scores"] for record in records if record["kind"] == "dropped"},
        [record for record in records if record["kind"] == "run"],
    )


def _check_scores(scores: Mapping[str, Any], where: str, *, task_alone: bool = False) -> None:
    check_fields(scores, {"task": an_object()}, f"{where}, scores")
    check_fields(scores["task"], _TASK_FIELDS, f"{where}, scores, task")
    if task_alone:
        return
    check_fields(scores, {"knowledge": an_object(), "text": an_object()}, f"{where}, scores")
    for group, fields in (("knowledge", _KNOWLEDGE_FIELDS), ("text", _TEXT_FIELDS)):
        for name, found in scores[group].items():
            check_fields(found, fields, f"{where}, scores, {group}, {name!r}")


def _data_sets(record: Record) -> list[str]:
    scores = record["scores"]
    if not isinstance(scores, dict) or not all(isinstance(scores.get(group), dict) for group in ("knowledge", "text")):
        return []
    return sorted([*scores["knowledge"], *scores["text"]])


def knowledge_lost(scores: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """How much less likely the gold answers became: nats an answer, the mean over the knowledge sets."""
    return statistics.fmean(
        base["knowledge"][name]["log_likelihood"] - found["log_likelihood"] for name, found in scores["knowledge"].items()
    )


def text_lost(scores: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """How much worse text is predicted: growth of the log-perplexity, nats a token, the mean over the texts."""
    return statistics.fmean(
        math.log(found["perplexity"] / base["text"][name]["perplexity"]) for name, found in scores["text"].items()
    )


Measure = Callable[[Mapping[str, Any], Mapping[str, Any]], float]
MEASURES: dict[str, Measure] = {"knowledge": knowledge_lost, "text": text_lost}


def paper_columns(scores: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float | None]:
    """The columns of the paper's tables, in per cent.

    Avg1: the mean exact match over the knowledge sets. Avg1(Per): the mean of what is left of each, after / before. Avg2: the task,
    exact match where it was measured and the accuracy of response tokens otherwise. GM: √(Avg1 · Avg2). None where the model
    knew no answer to begin with, or none was written.
    """
    matches = {name: found.get("exact_match") for name, found in scores["knowledge"].items()}
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
    """Forgetting where a path of (task loss, forgetting) first comes down to a task loss, linear between its points.

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
    """Task losses that every variant reaches with every seed: these parts of the way from the base's to the hardest to reach."""
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
        none does), `reached` (how many seeds do) and `seeds`.

    Raises:
        ValueError: if the study has no base or no runs, or for an unknown measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, not {measure!r}")
    if study.base is None or not study.runs:
        raise ValueError("the study has no run to compare yet")
    by_path = _paths(study)
    rows = []
    for loss in common_losses(study) if losses is None else losses:
        for variant in study.variants:
            found = [at_task_loss(path(runs, study.base, measure), loss) for (name, _), runs in by_path.items() if name == variant]
            reached = [value for value in found if value is not None]
            rows.append(
                {
                    "variant": variant,
                    "task_loss": loss,
                    "forgetting": spread(reached) if reached else None,
                    "reached": len(reached),
                    "seeds": len(found),
                }
            )
    return rows


def over_seeds(study: Study) -> list[Record]:
    """One row a variant and learning rate: `variant`, `learning_rate`, and a `Spread` of `task_loss`, of what was forgotten, of the
    paper's columns, and of what the records say of the `layers`."""
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
        values.update({name: [found[name] for found in columns] for name in columns[0]})
        if all(run.get("layers") for run in runs):
            values.update({name: [run["layers"][name] for run in runs] for name in runs[0]["layers"]})
        known = {name: spread([v for v in found if v is not None]) for name, found in values.items() if None not in found}
        rows.append({"variant": variant, "learning_rate": rate, **known})
    return rows


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def as_json(rows: Iterable[Record]) -> list[Record]:
    """Rows with every `Spread` as an object; a deviation that there is not is null."""
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
    found: dict[tuple[str, int], list[Record]] = {}
    for run in study.runs:
        found.setdefault((run["variant"], run["seed"]), []).append(run)
    return found
