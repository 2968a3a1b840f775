"""Three tasks in a row: what each method forgets of the earlier ones, and of what the base knows, at equal learning.

    python -m benchmarks.three_tasks --out three --data FOLDER                  # SmolLM2-135M, one CPU core, about an hour a seed
    python -m benchmarks.three_tasks --out three --data FOLDER --seeds 0 1 --methods lora contrast

GSM8K, then code, then instructions; LoRA of rank 16 on all linear layers but the head. Each task gets an adapter of its own beside
the earlier ones, which are active and frozen, on the untouched base: to merge each adapter into the base before the next gives the
same model, but second moments would have to be computed again then, as they belong to the weights that they were computed with.
So they are computed once, on the untouched base, and no data of an earlier task is needed again: at task t the methods keep out of
the merged moments, with equal traces, of the questions that the base knows and of the tasks before t.

Equal learning: what training has changed is scaled by the smallest t at which the loss on validation examples of the new task is
what plain LoRA reaches after `evidence.settings.LEVEL` of what it learns; a method that does not get there keeps the scale at which
it gets nearest. After each task, test examples of all three tasks are scored, and the KL to the base on questions.

OUT/results.jsonl gets a line a task; the same command resumes, and several may work on one OUT once its base is scored, each at
other methods. `benchmarks.three_tasks_tables` makes the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks import holding_parts, preservation
from benchmarks.environment import environment
from benchmarks.evidence import choice
from benchmarks.evidence import settings as declared
from benchmarks.evidence.data import Data
from benchmarks.evidence.settings import Sizes
from benchmarks.evidence.units import Settings, Unit, preservation_settings
from benchmarks.holding_parts import Change, Filters, Judge, Probe, factors_of
from benchmarks.three_tasks_tables import KEPT, TASKS
from nullspace import Covariances, analysis, compute_covariances
from nullspace.factors import LowRank
from nullspace.integrations.peft import initialize_lora_nullspace_weights, overlap
from nullspace.model.sites import find_targets
from nullspace.reporting import study as records

SIZES = replace(Sizes(), samples=128, of_task=64, validation_examples=10, examples=16, questions=80)
SCALES = (0.5, 1.0)
"""of what training has changed; between them is interpolated"""
RANK, STEPS, RATE, NEW = 16, 10, 4e-3, "new"
_PATIENCE = 3600.0
"""seconds in which plain LoRA must have learned a task, whose learning is the measure"""


class Way(NamedTuple):
    """How a method starts, what its loss has beside the task's, and what is done to its trained change."""

    start: str | None = None
    """the `method` of nullspace; None: PEFT's own LoRA"""
    freeze_a: bool | None = None
    overlap: float = 0.0
    """λ of O-LoRA's term"""
    strength: float = 0.0
    """of a filter after training"""


WAYS = {
    "lora": Way(),
    "o-lora": Way(overlap=0.5),
    "lora-null": Way("lora-null", freeze_a=True),
    "inflora": Way("inflora"),
    "contrast": Way("contrast"),
    "filter": Way(strength=10.0),
}


def stacked(base: Any, way: Way, earlier: Sequence[Mapping[str, LowRank]], task: Covariances, keep: Covariances) -> PeftModel:
    """The base with the earlier changes as frozen adapters, and one that trains, `NEW`; all are active.

    The caller seeds PyTorch's generator.
    """
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=sorted(find_targets(base)), task_type="CAUSAL_LM")
    if earlier:
        peft_model: Any = holding_parts.with_adapters(base, {f"task{i}": change for i, change in enumerate(earlier)})
        peft_model.add_adapter(NEW, config)
    else:
        peft_model = get_peft_model(base, config, adapter_name=NEW)
    before = [name for name in peft_model.peft_config if name != NEW]
    if way.start:
        data: dict[str, Any] = {"keep": keep} if way.start == "lora-null" else {"task": task, "keep": keep}
        initialize_lora_nullspace_weights(
            peft_model, method=way.start, freeze_a=way.freeze_a, adapter_name=NEW, progress=False, **data
        )
    peft_model.base_model.set_adapter([*before, NEW])
    peft_model.set_requires_grad(before, False)
    return peft_model


def apart(peft_model: Any, rows: Mapping[str, torch.Tensor], strength: float) -> None:
    """Add O-LoRA's term to the loss that the model returns while it trains."""
    term = overlap(peft_model, rows, adapter_name=NEW)

    def add(module: Any, _arguments: Any, output: Any) -> Any:
        if module.training and output.loss is not None:
            output["loss"] = output.loss + strength * term()
        return output

    peft_model.register_forward_hook(add)


def joined(changes: Sequence[Mapping[str, LowRank]]) -> Change:
    """The sum of changes."""
    if not changes:
        return {}
    return {
        name: LowRank(torch.cat([each[name].A for each in changes]), torch.cat([each[name].B for each in changes], dim=1))
        for name in changes[0]
    }


class Study:
    """Model, data, calibration and records of one process."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.lines = preservation.Lines(out / records.RESULTS)
        self.training = preservation_settings(settings, Unit("lora", TASKS[0], STEPS, RANK, "", 0, ()))
        model, self.tokenizer = preservation.load_model(self.training)
        self.data = Data(self.tokenizer, settings.sizes, settings.folder)
        self._calibrate(model)
        probes = {f"{split} {task}": self._of_task(task, split) for task in TASKS for split in ("validation", "test")}
        asked = self.data.asked(declared.Part(KEPT, range(settings.sizes.questions)))
        probes[f"test {KEPT}"] = self.data.in_shots(asked)
        # Log-probabilities of the base take 50,000 numbers a token: they are kept where the KL is asked for.
        reference = {f"test {KEPT}": holding_parts.base_log_probabilities(model, probes[f"test {KEPT}"])}
        self.judge = Judge(model, probes, list(find_targets(model)), Covariances(()), reference)

    def _of_task(self, task: str, split: str) -> Probe:
        sizes = self.settings.sizes
        parts, count = {
            "validation": (declared.TASKS[task].validation, sizes.validation_examples),
            "test": (declared.TASKS[task].test, sizes.examples),
        }[split]
        return Probe(self.data.examples(parts, count), [])

    def _calibrate(self, model: Any) -> None:
        sizes = self.settings.sizes
        sources = {name: lambda name=name: self.data.component(name, sizes.samples) for name in declared.FORMS[declared.FORM]}
        sources |= {task: lambda task=task: self.data.of_task(task) for task in TASKS}
        for name, batches in sources.items():
            if not (self.out / "moments" / name).exists():
                compute_covariances(model, batches(), self.out / "moments" / name, strategy="resident", progress=False)
                print(f"moments of {name}", flush=True)

    def moments(self, name: str) -> Covariances:
        return Covariances.load(self.out / "moments" / name)

    def kept(self, earlier: Sequence[str]) -> Covariances:
        """What must be kept: the questions that the base knows, and the tasks that it has learned, with equal traces."""
        return Covariances.merge([self.moments(name) for name in (*declared.FORMS[declared.FORM], *earlier)], normalise=True)

    def run(self, method: str, seed: int) -> None:
        """The tasks that are not in the records yet, one after the other."""
        changes: list[Mapping[str, LowRank]] = []
        for number, task in enumerate(TASKS):
            path = self.out / "changes" / f"{method}-{seed}-{task}.safetensors"
            if not path.exists() and method == "o-lora" and not changes:  # with nothing to be orthogonal to, it is LoRA
                self._as_lora(method, seed, task, path)
            if not path.exists():
                change, record = self._learn(method, seed, number, changes)
                record["scores"] = self._scores(joined([*changes, change]))
                holding_parts.write_change(path, change, {})
                self.lines.write(record)
                print(_in_short(record), flush=True)
            changes.append(holding_parts.read_change(path)[0])  # type: ignore[arg-type]

    def _as_lora(self, method: str, seed: int, task: str, path: Path) -> None:
        """Take over a task that plain LoRA has learned."""
        record = self._of_lora(seed, task)
        shutil.copy(self.out / "changes" / f"lora-{seed}-{task}.safetensors", path)
        self.lines.write({**record, "method": method, "seconds": {}})

    def _of_lora(self, seed: int, task: str) -> dict[str, Any]:
        """The record of plain LoRA, as soon as it is there: another process may be at it."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            for each in self.lines.read():
                if each["kind"] == "task" and (each["method"], each["seed"], each["task"]) == ("lora", seed, task):
                    return dict(each)
            time.sleep(2)
        raise TimeoutError(f"waited {_PATIENCE:.0f} s for plain LoRA on {task}, seed {seed}: run --methods lora")

    def _learn(
        self, method: str, seed: int, number: int, changes: Sequence[Mapping[str, LowRank]]
    ) -> tuple[Mapping[str, LowRank], dict[str, Any]]:
        """A task's change at the scale of equal learning, and its record without scores."""
        way, task, began = WAYS[method], TASKS[number], time.perf_counter()
        base, _ = preservation.load_model(self.training)
        torch.manual_seed(seed)
        keep, own = self.kept(TASKS[:number]), self.moments(task)
        peft_model = stacked(base, way, changes, own, keep)
        rows = {name: torch.cat([each[name].A for each in changes]) for name in changes[0]} if changes else {}
        if way.overlap and changes:
            apart(peft_model, rows, way.overlap)
        before, started = factors_of(peft_model, NEW), time.perf_counter()
        losses = preservation.train(
            peft_model,
            self.tokenizer,
            preservation.Data([], {}, {}, self.data.examples(declared.TASKS[task].train), [], []),
            self.training,
            RATE,
            seed,
        )
        trained = time.perf_counter()
        change: Mapping[str, LowRank] = {
            name: analysis.update(before[name], after) for name, after in factors_of(peft_model, NEW).items()
        }
        if way.strength:
            change = Filters(own, keep).of(change, way.strength)  # type: ignore[assignment]
        change = {name: LowRank(each.A.float(), each.B.float()) for name, each in change.items()}
        t, reached, wanted = self._scale(method, seed, task, changes, change)
        record = {
            "kind": "task",
            "method": method,
            "seed": seed,
            "task": task,
            "number": number,
            "t": t,
            "validation_loss": reached,
            "target": wanted,
            "train_losses": losses,
            "cosine": _largest_cosine(change, rows),
            "seconds": {"start": started - began, "train": trained - started, "scale": time.perf_counter() - trained},
            "commit": environment()["commit"],
        }
        return {name: LowRank(each.A, t * each.B) for name, each in change.items()}, record

    def _scale(
        self, method: str, seed: int, task: str, changes: Sequence[Mapping[str, LowRank]], change: Mapping[str, LowRank]
    ) -> tuple[float, float, float]:
        """The smallest scale that reaches the target, the loss there by interpolation, and the target."""
        first = self._validation(task, changes)
        points = [
            choice.Point(t, self._validation(task, [*changes, {n: LowRank(c.A, t * c.B) for n, c in change.items()}]), t * t)
            for t in SCALES
        ]
        curve = choice.curve(first, points)
        if method == "lora":
            wanted = choice.target(self._base_loss(task), [curve], declared.LEVEL)
        else:
            wanted = self._of_lora(seed, task)["target"]
        chosen = choice.chosen({method: curve}, wanted)
        t = chosen.t if chosen else float(curve.t[curve.loss.argmin()])
        return t, float(curve.loss[round(t / choice.STEP)]), wanted

    def _validation(self, task: str, changes: Sequence[Mapping[str, LowRank]]) -> float:
        self.judge.take(joined(changes))
        return self.judge.scores([f"validation {task}"])[f"validation {task}"]["loss"]

    def _base_loss(self, task: str) -> float:
        base = next(each for each in self.lines.read() if each["kind"] == "base")
        return float(base["validation"][task])

    def _scores(self, change: Change) -> dict[str, dict[str, float]]:
        """Loss on test examples of every task; loss and KL to the base on questions."""
        self.judge.take(change)
        scored = self.judge.scores([name for name in self.judge.probes if name.startswith("test ")])
        return {name.removeprefix("test "): each for name, each in scored.items()}

    def base(self) -> None:
        """The scores of the untouched base, once."""
        if not any(each["kind"] == "base" for each in self.lines.read()):
            losses = {task: self._validation(task, []) for task in TASKS}
            self.lines.write({"kind": "base", "validation": losses, "scores": self._scores({})})


def _largest_cosine(change: Mapping[str, LowRank], rows: Mapping[str, torch.Tensor]) -> float | None:
    """Of the row spaces of A and of the earlier ones, the median over layers; None for the first task."""
    if not rows:
        return None
    spaces = [[torch.linalg.qr(each.double().mT).Q for each in (change[name].A, rows[name])] for name in rows]
    return float(torch.tensor([float(torch.linalg.matrix_norm(a.mT @ b, 2)) for a, b in spaces]).median())


def _in_short(record: Mapping[str, Any]) -> str:
    losses = " ".join(f"{task} {record['scores'][task]['loss']:.3f}" for task in TASKS)
    kl, seconds = record["scores"][KEPT]["kl"], sum(record["seconds"].values())
    return (
        f"{record['method']} seed {record['seed']} after {record['task']}: t {record['t']:.2f}, "
        f"{record['validation_loss']:.3f} for {record['target']:.3f}; {losses}; KL {kl:.5f} ({seconds:.0f} s)"
    )


def begin(settings: Settings, out: Path) -> None:
    """The first line, or a check that the one that is there says the same."""
    out.mkdir(parents=True, exist_ok=True)
    lines = preservation.Lines(out / records.RESULTS)
    lines.mend()
    mine = {
        "model": Path(settings.model).name if Path(settings.model).exists() else settings.model,
        "rank": RANK, "steps": STEPS, "rate": RATE, "level": declared.LEVEL, "sizes": asdict(settings.sizes),
    }  # fmt: skip
    there = lines.read()
    if not there:
        lines.write({"kind": "study", "settings": mine, "environment": environment()})
    elif there[0]["settings"] != mine:
        raise SystemExit(f"{lines.path} is of other settings: {there[0]['settings']}, now {mine}. Choose another --out.")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.three_tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("three-tasks"))
    parser.add_argument("--data", type=Path, help="folder of files; the hub's data sets are read where it has none")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name or folder")
    parser.add_argument("--methods", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    settings = Settings(options.model, options.data, sizes=SIZES)
    begin(settings, options.out)
    study = Study(settings, options.out)
    study.base()
    for seed in options.seeds:
        for method in sorted(options.methods, key=lambda method: method != "lora"):  # its learning is the measure
            study.run(method, seed)


if __name__ == "__main__":
    main()
