"""What is scored is the model with a change, and how tables compare it with scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

pytest.importorskip("benchmarks.holding", reason="needs the repository's root on the path: python -m pytest")
from benchmarks import evaluation, holding_parts, holding_tables
from benchmarks.holding_parts import Judge, Probe
from nullspace import compute_covariances
from nullspace.factors import LowRank

TARGETS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows(tiny_checkpoint: Path) -> list[dict[str, list[int]]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    return [evaluation.tokenized(tokenizer, f"{n} and {n} are", f" {2 * n}") for n in (3, 17, 400)]


@pytest.fixture(scope="module")
def judge(model: Any, rows: list[dict[str, list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Judge:
    out = tmp_path_factory.mktemp("held")
    batches = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]
    for name in ("text", "questions in shots"):
        compute_covariances(model, batches, out / "moments" / name, targets=TARGETS, progress=False)
    return Judge(model, {"asked": Probe(rows, [])}, TARGETS, holding_parts.kept_moments(out, holding_parts.FORM))


def changes(model: Any, number: int) -> list[dict[str, LowRank]]:
    torch.manual_seed(0)
    shapes = {name: model.get_submodule(name).weight.shape for name in TARGETS}
    return [{name: LowRank(torch.randn(4, d), torch.randn(o, 4) / 9) for name, (o, d) in shapes.items()} for _ in range(number)]


def test_what_is_scored_is_what_the_adapter_computes(tiny_checkpoint: Path, model: Any, judge: Judge, rows: Any) -> None:
    (change,) = changes(model, 1)
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")).eval()
    for name, delta in change.items():
        layer = adapted.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(delta.A)
        layer.lora_B["default"].weight.data.copy_(delta.B / 2)
    judge.take(change)
    found, wanted = judge.scores(["asked"])["asked"], evaluation.score(adapted, rows)
    assert found["log_likelihood"] == pytest.approx(sum(wanted.log_likelihood) / 3, rel=1e-5)
    kl, tokens = 0.0, 0
    for row in rows:
        ids, first = torch.tensor([row["input_ids"]]), row["labels"].count(evaluation.IGNORED)
        with torch.no_grad():
            after = adapted(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
            with adapted.disable_adapter():
                before = adapted(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
        kl += float(torch.nn.functional.kl_div(after, before, reduction="sum", log_target=True))
        tokens += len(after)
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    torch.testing.assert_close(holding_parts.factors_of(adapted)[TARGETS[0]].B, change[TARGETS[0]].B)
    assert judge.drift(change, 0.5)["largest"] == pytest.approx(judge.drift(change)["largest"] / 2)


def test_the_base_comes_back(model: Any, judge: Judge) -> None:
    (change,) = changes(model, 1)
    judge.take(change, others={"model.norm.weight": torch.zeros_like(model.model.norm.weight)})
    assert judge.scores(["asked"])["asked"]["kl"] > 0
    judge.take({})
    assert judge.scores(["asked"])["asked"]["kl"] == 0


def test_two_adapters_in_one(tiny_checkpoint: Path, model: Any) -> None:
    both = changes(model, 2)
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    merged = holding_parts.merged_by_peft(base, both, "cat", (1.0, 1.0), 0)
    for name, found in merged.items():
        wanted = sum(change[name].B @ change[name].A for change in both)
        torch.testing.assert_close(found.B @ found.A, wanted)


def records(path: Path) -> holding_tables.Held:
    """A task loss of 1 + (1 − s)², a KL of s² and 2 s nats forgotten at a scale s."""

    def scores(loss: float, kl: float, forgotten: float) -> dict[str, Any]:
        return {"task": {"loss": loss, "kl": 0.0, "log_likelihood": 0.0}} | {
            name: {"loss": 0.0, "kl": kl, "log_likelihood": -forgotten} for name in ("nq", "webq", "humaneval", "wikitext")
        }

    def scored(how: str, scores: dict[str, Any], **variant: Any) -> dict[str, Any]:
        whole = {"how": how, "scale": 1.0, "strength": 0.0, "form": "", "rank": 0, **variant}
        return {"kind": "score", "part": "A", "run": "lora lr0.002 seed0", "variant": whole, "scores": scores}

    lines = [{"kind": "base", "scores": scores(2.0, 0.0, 0.0)}]
    for scale in (1.0, 0.75, 0.5, 0.25):
        lines.append(scored("trained" if scale == 1 else "scaled", scores(1 + (1 - scale) ** 2, scale**2, 2 * scale), scale=scale))
    lines.append(scored("filtered", scores(1.04, 0.16, 0.5), strength=1.0, form="shots"))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return holding_tables.read(path)


def test_a_variant_is_compared_with_scaling(tmp_path: Path) -> None:
    held = records(tmp_path / "results.jsonl")
    filtered = held.one("A", "lora lr0.002 seed0", "filtered", strength=1.0, form="shots")
    assert filtered is not None
    found = holding_tables.against(held, filtered, ("nq", "webq"))
    assert found is not None
    assert found.ratio == pytest.approx(0.16 / 0.64, abs=0.01)  # a scale of 0.8 has this task loss
    assert found.saved == pytest.approx(1.6 - 0.5, abs=0.03)
    assert found.cheaper == pytest.approx(1.36 - 1.04, abs=0.01)  # a scale of 0.4 has this KL
    assert found.reached
    assert "| filter μ = 1 |" in holding_tables.markdown(holding_tables.plain(held))
