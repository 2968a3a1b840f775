"""Three tasks in a row: the model that trains, what is added up, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import covariances_for
from steps import logits

pytest.importorskip("benchmarks.three_tasks", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import three_tasks, three_tasks_tables
from models import random_batches, tiny
from nullspace.factors import LowRank
from nullspace.integrations.peft import lora_layers
from nullspace.model.sites import find_targets


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_tasks, "RANK", 4)


def changed(seed: int) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(*(torch.randn(*shape, generator=generator) / 20 for shape in ((4, m.in_features), (m.out_features, 4))))
        for name, m in find_targets(tiny("llama")).items()
    }


@pytest.mark.parametrize("method", ["o-lora", "inflora"])
def test_a_new_adapter_starts_where_the_earlier_ones_end_and_trains_alone(method: str) -> None:
    earlier, way = [changed(1), changed(2)], three_tasks.WAYS[method]
    torch.manual_seed(0)
    model: Any = three_tasks.stacked(tiny("llama"), way, earlier, covariances_for("llama"), covariances_for("llama", seed=2))
    merged = tiny("llama")
    for name, (a, b) in three_tasks.joined(earlier).items():
        merged.get_submodule(name).weight.data.add_(b @ a)
    torch.testing.assert_close(logits(model), logits(merged), atol=1e-4, rtol=1e-4)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("lora_A.new", "lora_B.new") if method == "o-lora" else ("lora_B.new",)
    assert trains == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    if way.overlap:
        rows = {name: torch.cat([each[name].A for each in earlier]) for name in earlier[0]}
        batch = random_batches(1, 1, 8)[0]
        model.train()
        plain = model(**batch, labels=batch["input_ids"]).loss
        three_tasks.apart(model, rows, way.overlap)
        added = model(**batch, labels=batch["input_ids"]).loss - plain
        layers = lora_layers(model, "new")
        wanted = sum((layers[name].lora_A["new"].weight @ each.mT).abs().sum() for name, each in rows.items())
        torch.testing.assert_close(added, 0.5 * wanted, rtol=1e-4, atol=0)


def test_tables(tmp_path: Path) -> None:
    def scores(losses: list[float], kl: float) -> dict[str, dict[str, float]]:
        tasks = {task: {"loss": loss} for task, loss in zip(three_tasks_tables.TASKS, losses, strict=True)}
        return {**tasks, "nq": {"kl": kl}}

    lines: list[dict[str, Any]] = [{"kind": "base", "scores": scores([2.0, 3.0, 4.0], 0.0)}]
    rows = {
        "lora": [([1.0, 3.0, 4.0], 0.1), ([1.5, 2.0, 4.0], 0.2), ([1.6, 2.3, 3.0], 0.4)],
        "contrast": [([1.0, 3.0, 4.0], 0.001), ([1.0, 2.0, 4.0], 0.002), ([0.9, 2.1, 3.0], 0.02)],
        "filter": [([1.0, 3.0, 4.0], 0.1)],  # is not finished
    }
    for method, each in rows.items():
        for task, (losses, kl) in zip(three_tasks_tables.TASKS, each, strict=False):
            lines.append({"kind": "task", "method": method, "seed": 0, "task": task, "scores": scores(losses, kl)})
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = three_tasks_tables.read(path)
    assert three_tasks_tables.summary(read)[1:] == [
        ["plain LoRA", "1.000", "0.600", "0.300", "0.450", "0.4000", "1"],
        ["contrast", "1.000", "−0.100", "0.100", "0.000", "0.0200", "0.05"],
    ]
    matrix = three_tasks_tables.matrix(read)
    assert matrix[1] == ["base", "", "2.000", "3.000", "4.000", "0"]
    assert matrix[3] == ["plain LoRA", "code", "1.500", "2.000", "4.000", "0.2000"]
    assert len(matrix) == 2 + 2 * 3 + 1
    assert matrix[-1][:3] == ["LoRA, filtered", "GSM8K", "1.000"]
