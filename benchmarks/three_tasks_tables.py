"""The tables of `benchmarks.three_tasks`: the forgetting matrix of each method, and what it comes to.

python -m benchmarks.three_tasks_tables benchmarks/results/three-tasks-cpu.jsonl
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.holding_tables import Table, markdown, spread
from nullspace.reporting import study as records

TASKS = ("gsm8k", "code", "instructions")
KEPT = "nq"
NAMES = {"gsm8k": "GSM8K", "code": "code", "instructions": "instructions"}
LABELS = {
    "lora": "plain LoRA",
    "o-lora": "O-LoRA",
    "lora-null": "LoRA-Null v2, merged null spaces",
    "inflora": "InfLoRA",
    "contrast": "contrast",
    "filter": "LoRA, filtered",
}
Record = Mapping[str, Any]


class Row(NamedTuple):
    """One method in a row of tasks with one seed: R[i][j], the loss on task j after task i, and the KL to the base after each."""

    loss: list[list[float]]
    kl: list[float]

    def forgotten(self, task: int) -> float:
        """R[last][j] − R[j][j], to the digits that are shown, so that nothing is −0."""
        return round(self.loss[-1][task] - self.loss[task][task], 3) + 0.0


class Rows(NamedTuple):
    """The records of `benchmarks.three_tasks`."""

    base: list[float]
    """Losses on the tasks."""
    of: dict[str, list[Row]]
    """Method → one a seed, with the tasks that it has learned so far."""

    @property
    def whole(self) -> dict[str, list[Row]]:
        """Of the seeds that have all tasks."""
        whole = {method: [row for row in each if len(row.kl) == len(TASKS)] for method, each in self.of.items()}
        return {method: each for method, each in whole.items() if each}


def read(path: Path) -> Rows:
    lines = records.read_records(path)
    base = next(each["scores"] for each in lines if each["kind"] == "base")
    found: dict[str, list[Row]] = {}
    for method in LABELS:
        own = [each for each in lines if each["kind"] == "task" and each["method"] == method]
        for seed in sorted({each["seed"] for each in own}):
            scores = {each["task"]: each["scores"] for each in own if each["seed"] == seed}
            done = [task for task in TASKS if task in scores]
            row = Row([[scores[i][j]["loss"] for j in TASKS] for i in done], [scores[i][KEPT]["kl"] for i in done])
            found.setdefault(method, []).append(row)
    return Rows([base[task]["loss"] for task in TASKS], found)


def matrix(rows: Rows) -> Table:
    """Loss on every task after each, in nats a token, and the KL to the base on what must be kept."""
    table = [["", "after", *(f"loss, {NAMES[task]}" for task in TASKS), "KL to the base, NQ-open"]]
    table.append(["base", "", *(f"{loss:.3f}" for loss in rows.base), "0"])
    for method, each in rows.of.items():
        for i, task in enumerate(TASKS):
            done = [row for row in each if len(row.kl) > i]
            if done:
                losses = [spread([row.loss[i][j] for row in done], 3) for j in range(len(TASKS))]
                table.append([LABELS[method], NAMES[task], *losses, _kl([row.kl[i] for row in done])])
    return table


def summary(rows: Rows) -> Table:
    """What each method learns of a task when it trains on it, forgets of it until the end, and moves the base's answers."""
    earlier = range(len(TASKS) - 1)
    forgotten = (f"forgotten, {NAMES[TASKS[j]]}" for j in earlier)
    table = [["", "learned, mean of the tasks", *forgotten, "mean", "KL to the base, NQ-open", "÷ LoRA's"]]
    plain = [row.kl[-1] for row in rows.whole["lora"]]
    for method, each in rows.whole.items():
        learned = [statistics.fmean(rows.base[j] - row.loss[j][j] for j in range(len(TASKS))) for row in each]
        lost = [spread([row.forgotten(j) for row in each], 3) for j in earlier]
        mean = spread([round(statistics.fmean(row.forgotten(j) for j in earlier), 3) + 0.0 for row in each], 3)
        kl = [row.kl[-1] for row in each]
        ratio = f"{statistics.fmean(kl) / statistics.fmean(plain):.2g}"
        table.append([LABELS[method], spread(learned, 3), *lost, mean, _kl(kl), ratio])
    return table


def _kl(values: Sequence[float]) -> str:
    return spread(values, 4 if min(values) >= 1e-3 else 5)


TABLES: dict[str, Callable[[Rows], Table]] = {"summary": summary, "matrix": matrix}

if __name__ == "__main__":
    print("\n\n".join(markdown(table(read(Path(sys.argv[1])))) for table in TABLES.values()))
