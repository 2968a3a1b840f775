"""Result files of PEFT's comparison as a table, and whether the target is met."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.method_comparison.checkout import RESULTS
from benchmarks.method_comparison.experiments import MODEL
from nullspace.errors import DamagedFileError, MissingFileError

ACCURACY = 0.478
"""What their LoRA of rank 32 reaches on the test examples."""
FORGETTING = 0.0165
"""Nats a token on Wikipedia, of OSF: the least of their results with an accuracy above 0.4."""
QUESTIONS = 1319
"""Test examples of GSM8K."""
SETTING = {"dtype": "bfloat16", "max_seq_length": 768, "batch_size": 4, "max_steps": 5000}
"""Their training, beside the model. Results of another one are not compared."""


@dataclass(frozen=True)
class Result:
    """One file. What it lacks is None.

    Attributes:
        status: `"success"`, `"canceled"`, `"failed"`.
        accuracy: share of test questions.
        forgetting: nats a token, after minus before.
        memory: largest, bytes.
        train_seconds, total_seconds: total includes loading, calibration, evaluation.
        error: what their run logged.
        differs: what of `SETTING`, or the model, is another.
    """

    name: str
    status: str
    accuracy: float | None
    forgetting: float | None
    memory: float | None
    train_seconds: float | None
    total_seconds: float | None
    trainable: float | None
    accelerator: str
    peft: str
    error: str
    differs: tuple[str, ...]

    @property
    def meets(self) -> bool | None:
        """Whether the target is met; None where that cannot be said."""
        if self.status != "success" or self.accuracy is None or self.forgetting is None or self.differs:
            return None
        return self.accuracy >= ACCURACY and self.forgetting < FORGETTING


def read(path: Path) -> Result:
    """A result file, of any version of their format.

    Raises:
        ValueError: naming the file, if it is not a JSON object with `run_info` and `train_info`.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DamagedFileError(f"{path} is not JSON: {error}") from error
    run, trained = (_part(content, name) for name in ("run_info", "train_info"))
    if not run or not trained:
        raise DamagedFileError(f"{path} is no result of the comparison: it has no run_info and train_info")
    metrics = trained.get("metrics")
    last = _part({"last": metrics[-1]}, "last") if isinstance(metrics, list) and metrics else {}
    about = _part(content, "meta_info")
    return Result(
        name=str(run.get("experiment_name") or path.stem),
        status=str(trained.get("status", "unknown")),
        accuracy=_number(last.get("test accuracy")),
        forgetting=_number(last.get("forgetting")),
        memory=_number(trained.get("accelerator_memory_max")),
        train_seconds=_number(trained.get("train_time")),
        total_seconds=_number(run.get("total_time")),
        trainable=_number(trained.get("num_trainable_params")),
        accelerator=str(_part(about, "system_info").get("accelerator", "unknown")),
        peft=str(_part(about, "package_info").get("peft-version", "unknown")),
        error=str(run.get("error_msg") or ""),
        differs=_differences(_part(run, "train_config")),
    )


def _part(content: Any, name: str) -> dict[str, Any]:
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


def _differences(config: dict[str, Any]) -> tuple[str, ...]:
    """What of the training is not theirs. A local copy of the model has the name of its folder."""
    model = str(config.get("model_id"))
    own = [] if Path(model).name == Path(MODEL).name else [f"model_id {model}"]
    return (*own, *(f"{name} {config.get(name)}" for name, wanted in SETTING.items() if config.get(name) != wanted))


def read_all(folders: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """The results in folders, and what is wrong with the files that cannot be read.

    Of an experiment the most recent success, or else the most recent file.
    """
    read_ones: list[Result] = []
    wrong = []
    for path in sorted((path for folder in folders for path in folder.glob("*.json")), key=lambda path: path.stat().st_mtime_ns):
        try:
            read_ones.append(read(path))
        except DamagedFileError as error:
            wrong.append(str(error))
    latest = {each.name: each for each in sorted(read_ones, key=lambda each: each.status == "success")}
    return list(latest.values()), wrong


def table(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """Both as aligned text, the least forgetting first; results without a figure stand last."""
    lines = [("experiment", "", "accuracy", "forgetting", "GB", "train s", "total s", "trained", "target")]
    marked = [("ours", each) for each in ours] + [("published", each) for each in theirs]
    for whose, each in sorted(marked, key=lambda pair: math.inf if pair[1].forgetting is None else pair[1].forgetting):
        target = {True: "met", False: "-", None: "?"}[each.meets]
        figures = (
            _cell(each.accuracy, ".3f"),
            _cell(each.forgetting, ".4f"),
            _cell(each.memory and each.memory / 1e9, ".1f"),
            _cell(each.train_seconds, ".0f"),
            _cell(each.total_seconds, ".0f"),
            _cell(each.trainable, ",.0f"),
        )
        lines.append((each.name, whose, *figures, target if each.status == "success" else each.status))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def verdict(ours: Sequence[Result]) -> str:
    """One sentence on the target, and why results could not be compared with it."""
    error = math.sqrt(ACCURACY * (1 - ACCURACY) / QUESTIONS)
    judged = [each for each in ours if each.meets is not None]
    met = [each.name for each in judged if each.meets]
    target = f"Target, accuracy of at least {ACCURACY} (standard error {error:.3f}) at a forgetting below {FORGETTING}: "
    lines = [target + (f"met by {', '.join(met)}" if met else f"met by none of {len(judged)} comparable results")]
    for each in ours:
        if each.status != "success":
            lines.append(f"{each.name}: {each.status}{f': {each.error}' if each.error else ''}")
        elif each.differs:
            lines.append(f"{each.name}: not comparable: {', '.join(each.differs)}")
        elif each.meets is None:
            lines.append(f"{each.name}: the file has no test accuracy or no forgetting")
    return "\n".join(lines)


def show(out: Path, published: Path | None) -> str:
    """All results in OUT beside those of the checkout, and the verdict.

    Raises:
        FileNotFoundError: if OUT has no result.
    """
    ours, wrong = read_all([out, *(out / folder for folder in RESULTS.values())])
    if not ours and not wrong:
        raise MissingFileError(f"{out} holds no result file, nor do {', '.join(RESULTS.values())} in it")
    theirs, theirs_wrong = read_all([published]) if published else ([], [])
    machines = sorted({f"{each.accelerator}, PEFT {each.peft}" for each in ours if each.status == "success"})
    notes = [f"ours: {'; '.join(machines)}"] if machines else []
    notes += [f"published: {'; '.join(sorted({each.accelerator for each in theirs}))}"] if theirs else []
    return "\n".join([table(ours, theirs), "", *notes, verdict(ours), *wrong, *theirs_wrong])
