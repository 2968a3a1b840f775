"""What an evidence study computes of the untouched model, once: second moments, scores, and log-probabilities that workers map."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import evaluation, holding_parts, preservation
from benchmarks.evidence import settings as declared
from benchmarks.evidence.data import Data
from benchmarks.evidence.units import Settings, Unit, preservation_settings
from benchmarks.holding_parts import Probe
from nullspace import Covariances, compute_covariances
from nullspace.reporting import study as records


def moments(out: Path, name: str) -> Covariances:
    return Covariances.load(out / "moments" / name)


def kept(out: Path, form: str, samples: int) -> Covariances:
    """Second moments of what must be kept: the components of a form, with equal trace."""
    return Covariances.merge([moments(out, f"{name}-{samples}") for name in declared.FORMS[form]], normalise=True)


def prepare(settings: Settings, out: Path, units: Iterable[Unit]) -> None:
    """OUT/moments, OUT/reference and the records of the base, where they are missing."""
    units = list(units)
    model, tokenizer = preservation.load_model(preservation_settings(settings, units[0]))
    data = Data(tokenizer, settings.sizes, settings.folder, settings.triviaqa)
    wanted = {(each.form, each.samples) for each in units if each.form} | {each.kept for each in units if each.kept[0]}
    wanted.add((declared.FORM, settings.sizes.samples))  # drift is measured on it
    components = sorted({(name, samples) for form, samples in wanted for name in declared.FORMS[form]})
    batches: dict[str, Callable[[], Any]] = {
        f"{name}-{samples}": lambda name=name, samples=samples: data.component(name, samples) for name, samples in components
    }
    tasks = sorted({each.task for each in units})
    batches |= {f"task {task}": lambda task=task: data.of_task(task) for task in tasks}
    for name, make in batches.items():
        if not (out / "moments" / name).exists():
            compute_covariances(model, make(), out / "moments" / name, strategy="resident", progress=False)
            print(f"moments of {name}", flush=True)
    lines = preservation.Lines(out / records.RESULTS)
    there = {(each["task"], each["split"]) for each in lines.read() if each["kind"] == "base"}
    for task in tasks:
        for split, probes in (("validation", data.validation(task)), ("test", data.test(task))):
            scores = {name: base_scores(model, probe, reference_file(out, task, split, name)) for name, probe in probes.items()}
            if (task, split) not in there:
                if split == "test" and settings.sizes.answered:
                    for name in data.sets:
                        scores[name]["exact_match"] = data.exact_match(model, name)
                lines.write({"kind": "base", "task": task, "split": split, "scores": scores})


def reference_file(out: Path, task: str, split: str, probe: str) -> Path:
    """Only the probe of the task differs between tasks."""
    of = f"{split} {task}" if probe == "task" or split == "validation" else split
    return out / "reference" / f"{of} {probe}.npy"


def base_scores(model: Any, probe: Probe, file: Path) -> dict[str, Any]:
    """Of the untouched model; its log-probabilities at the labelled tokens (n, vocabulary) become a file that all workers map."""
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        kept_rows = holding_parts.base_log_probabilities(model, probe)
        with file.with_suffix(".part").open("wb") as stream:
            np.save(stream, torch.cat(kept_rows).cpu().numpy())
        file.with_suffix(".part").rename(file)
    gold = golds(probe)
    own = read_reference(file, probe)
    likely = [
        float(each.gather(1, torch.tensor(row)[:, None]).sum(dtype=torch.float64)) for each, row in zip(own, gold, strict=True)
    ]
    tokens = list(map(len, gold))
    rows = {"log_likelihood": rounded(likely), "tokens": tokens}
    total = sum(tokens)
    return {"loss": -sum(likely) / total, "log_likelihood": sum(likely) / len(likely), "kl": 0.0, "tokens": total, "rows": rows}


def golds(probe: Probe) -> list[list[int]]:
    """The labelled tokens of each row."""
    return [[label for label in row["labels"] if label != evaluation.IGNORED] for row in probe.rows]


def read_reference(file: Path, probe: Probe) -> list[torch.Tensor]:
    """Of each row, the base's log-probabilities (n, vocabulary) at its labelled tokens, mapped from the file."""
    log_nv = torch.from_numpy(np.load(file, mmap_mode="c"))
    return list(log_nv.split(list(map(len, golds(probe)))))


def rounded(values: Iterable[float]) -> list[float]:
    """To 6 significant digits, which is what float32 holds."""
    return [float(f"{value:.6g}") for value in values]
