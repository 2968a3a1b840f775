"""The parts of `benchmarks.holding`: calibration, filters, the model that is scored with a change, training, merging.

A *change* is what training has added to a model: layer name → ΔW, as `LowRank` factors or as a (d_out, d_in) matrix.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks import evaluation, preservation
from benchmarks.evaluation import Question
from nullspace import Covariances, analysis, compute_covariances, factors
from nullspace.factors import Filter, LowRank
from nullspace.integrations.peft import lora_layers, penalty
from nullspace.integrations.transformers import PackedBatches, load_rows, load_texts, prompt_and_response

Change = Mapping[str, LowRank | torch.Tensor]
# Forms of the kept inputs: plain text alone, and half of the trace in a form in which questions are asked.
FORMS = {"plain": (), "shots": ("questions in shots",), "template": ("questions in template",)}
FORM = "shots"


class Sizes(NamedTuple):
    """How much calibrates and measures, beside `preservation.Settings`."""

    in_shots: int = 40
    """questions in the few-shot form, of NQ-open's train part, behind the shots themselves"""
    in_template: int = 256
    """the same in the template of the task"""
    of_task: int = 16
    """training examples of a task"""
    template: int = 30
    """questions a set that are asked in the task's template"""
    solutions: int = 6
    """of HumanEval"""
    length: int = 128
    """tokens of a solution with its prompt, at most"""


class Probe(NamedTuple):
    """Rows to score, of `evaluation.tokenized`, and what stands before each of them."""

    rows: list[dict[str, list[int]]]
    context: list[int]
    batch_size: int = 8


def bare(question: Question) -> str:
    """A question without the words of the few-shot form."""
    return question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


def in_template(tokenizer: Any, question: Question) -> dict[str, list[int]]:
    """A question and its first answer in the template of the task."""
    return evaluation.tokenized(tokenizer, preservation.PROMPT.format(bare(question)), question.answers[0])


def code_examples(file: Path, tokenizer: Any, longest: int, numbers: range, limit: int) -> list[dict[str, list[int]]]:
    """Tasks of MBPP with these numbers, in the template of the task."""
    examples = []
    for row in load_rows(file):
        prompt, response = prompt_and_response(row)
        ids = evaluation.tokenized(
            tokenizer, preservation.PROMPT.format(prompt), response.replace("\r\n", "\n") + tokenizer.eos_token
        )
        if row["task_id"] in numbers and len(ids["input_ids"]) <= longest:
            examples.append(ids)
    return examples[:limit]


def probes_of(data: preservation.Data, tokenizer: Any, folder: Path, sizes: Sizes) -> dict[str, Probe]:
    """What is scored: the task, questions in two forms, and texts that nothing was calibrated on."""
    probes = {"task": Probe(data.test, [])}
    for name, asked in data.knowledge.items():
        probes[name] = Probe(*evaluation.asked_after(tokenizer, asked, data.shots))
        probes[f"{name}, template"] = Probe([in_template(tokenizer, each) for each in asked[: sizes.template]], [])
    solved = [evaluation.tokenized(tokenizer, *prompt_and_response(row)) for row in load_rows(folder / "humaneval.jsonl")]
    short = [row for row in solved if len(row["input_ids"]) <= sizes.length]
    probes["humaneval"] = Probe(short[: sizes.solutions], [])
    for name, batches in data.text.items():
        probes[name] = Probe(evaluation.running_text(batches), [], 4)
    return probes


def calibrate(model: Any, tokenizer: Any, data: preservation.Data, settings: Any, sizes: Sizes, code: list, out: Path) -> None:
    """OUT/moments: of what the forms are made of, and of the tasks."""
    asked = evaluation.questions(load_rows(settings.calibrate))[settings.shots :]
    rows, context = evaluation.asked_after(tokenizer, asked[: sizes.in_shots], data.shots)
    sources: dict[str, Any] = {
        "text": PackedBatches(load_texts(settings.calibrate), tokenizer, samples=settings.samples, length=settings.length),
        "questions in shots": [{"input_ids": torch.tensor([context + row["input_ids"]])} for row in rows],
        "questions in template": [
            {"input_ids": torch.tensor([in_template(tokenizer, each)["input_ids"]])} for each in asked[: sizes.in_template]
        ],
        "task": [{"input_ids": torch.tensor([row["input_ids"]])} for row in data.train[: sizes.of_task]],
        "code": [{"input_ids": torch.tensor([row["input_ids"]])} for row in code[: sizes.of_task]],
    }
    for name, batches in sources.items():
        if not (out / "moments" / name).exists():
            compute_covariances(model, batches, out / "moments" / name, strategy="resident", progress=False)


def moments(out: Path, name: str) -> Covariances:
    return Covariances.load(out / "moments" / name)


def kept_moments(out: Path, form: str) -> Covariances:
    """Second moments of what must be kept: those of plain text, and, with equal trace, those of a form of asking."""
    return Covariances.merge([moments(out, "text"), *(moments(out, name) for name in FORMS[form])], normalise=True)


class Filters:
    """Filters, site by site, made when the first change needs them."""

    def __init__(self, task: Covariances, keep: Covariances) -> None:
        self._task, self._keep = task, keep
        self._site = {name: site.name for site in self._keep.sites for name in site.members}
        self._made: dict[str, Filter] = {}

    def of(self, change: Change, strength: float) -> Change:
        return {name: self._filtered(name, delta, strength) for name, delta in change.items()}

    def _filtered(self, name: str, delta: LowRank | torch.Tensor, strength: float) -> LowRank | torch.Tensor:
        site = self._site[name]
        if site not in self._made:
            task, keep = self._task[site], self._keep[site]
            self._made[site] = Filter(task.matrix(), keep.matrix(), noise=keep.error_norm, tokens=(task.mass, keep.mass))
        if isinstance(delta, LowRank):
            return LowRank(self._made[site].apply(delta.A, strength), delta.B)
        return self._made[site].apply(delta, strength).float()


def base_log_probabilities(model: Any, probe: Probe) -> list[torch.Tensor]:
    """Of each row of a probe, what `Judge` takes as a reference."""
    return evaluation.log_probabilities(model, probe.rows, probe.batch_size, context=probe.context)


def in_short(scored: evaluation.Scored) -> dict[str, float]:
    """`log_likelihood` in nats a row, `loss` and `kl` to the reference in nats a token."""
    tokens = sum(scored.tokens)
    return {
        "log_likelihood": statistics.fmean(scored.log_likelihood),
        "loss": -sum(scored.log_likelihood) / tokens,
        "kl": sum(scored.divergence) / tokens,
    }


class Judge:
    """The base model, which takes changes and is scored, against itself without one.

    `keep`: second moments by which drift is measured. `reference`: probe → log-probabilities of the base at its labelled tokens, as
    `evaluation.log_probabilities` gives them; computed now where it is None. A probe that it lacks is scored with a KL of 0.
    """

    def __init__(
        self,
        model: Any,
        probes: Mapping[str, Probe],
        targets: Sequence[str],
        keep: Covariances,
        reference: Mapping[str, Sequence[torch.Tensor]] | None = None,
    ) -> None:
        self._model, self._probes = model, probes
        self._layers = {name: model.get_submodule(name) for name in targets}
        self._base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._keep = [(site, keep[site.name].matrix()) for site in keep.sites]
        self._norms: dict[str, float] = {}
        self._reference = reference or {name: base_log_probabilities(model, probe) for name, probe in probes.items()}

    @property
    def probes(self) -> Mapping[str, Probe]:
        return self._probes

    @property
    def base(self) -> Mapping[str, torch.Tensor]:
        return self._base

    def scored(self, name: str, limit: int | None = None) -> evaluation.Scored:
        """A probe row by row, or its first rows."""
        probe, reference = self._probes[name], self._reference.get(name)
        given = None if reference is None else reference[:limit]
        return evaluation.score(self._model, probe.rows[:limit], probe.batch_size, context=probe.context, reference=given)

    def scores(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Probe → `log_likelihood` (nats a row), `loss` and `kl` to the base (nats a token)."""
        return {name: in_short(self.scored(name)) for name in names}

    @torch.no_grad()
    def take(self, change: Change, scale: float = 1.0, others: Mapping[str, torch.Tensor] | None = None) -> None:
        """The base's weights plus a change; `others`: values of parameters that are not of linear layers."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_((others or {}).get(name, self._base[name]))
        for name, delta in change.items():
            added = delta.B.float() @ delta.A.float() if isinstance(delta, LowRank) else delta
            self._layers[name].weight.add_(added, alpha=scale)

    def drift(self, change: Change, scale: float = 1.0) -> dict[str, float]:
        """‖ΔW X_k‖ / ‖W₀ X_k‖ on the kept inputs of `FORM`: the median over the layers, and the worst of them."""
        drifts = []
        for site, c in self._keep:
            for name in (name for name in site.members if name in change):
                if name not in self._norms:
                    self._norms[name] = analysis.output_norm(self._base[f"{name}.weight"], c)
                delta = change[name]
                moved = analysis.update_norm(delta, c) if isinstance(delta, LowRank) else analysis.output_norm(delta, c)
                drifts.append(scale * moved / self._norms[name])
        return {"median": statistics.median(drifts), "largest": max(drifts)} if drifts else {}


def write_change(path: Path, change: Change, others: Mapping[str, torch.Tensor]) -> None:
    tensors = {f"other:{name}": value for name, value in others.items()}
    for name, delta in change.items():
        named = {f"A:{name}": delta.A, f"B:{name}": delta.B} if isinstance(delta, LowRank) else {f"W:{name}": delta}
        tensors |= {key: value.float().contiguous() for key, value in named.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def read_change(path: Path) -> tuple[Change, dict[str, torch.Tensor]]:
    tensors = load_file(path)
    change: dict[str, LowRank | torch.Tensor] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        if kind == "A":
            change[name] = LowRank(value, tensors[f"B:{name}"])
        elif kind == "W":
            change[name] = value
    return change, {key.partition(":")[2]: value for key, value in tensors.items() if key.startswith("other:")}


def factors_of(peft_model: Any, adapter: str = "default") -> dict[str, LowRank]:
    """A and s B of every layer, copies."""
    return {
        name: LowRank(layer.lora_A[adapter].weight.detach().clone(), layer.scaling[adapter] * layer.lora_B[adapter].weight.detach())
        for name, layer in lora_layers(peft_model, adapter).items()
    }


def with_adapters(model: Any, changes: Mapping[str, Mapping[str, LowRank]]) -> Any:
    """A model with changes as adapters of PEFT: adapter name → change, all of one rank and of the same layers."""
    one = next(iter(changes.values()))
    rank = len(next(iter(one.values())).A)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(one), task_type="CAUSAL_LM")
    first, *others = changes
    peft_model = get_peft_model(model, config, adapter_name=first)
    for name in others:
        peft_model.add_adapter(name, config)
    for name, change in changes.items():
        for layer_name, layer in lora_layers(peft_model, name).items():
            layer.lora_A[name].weight.data.copy_(change[layer_name].A)
            layer.lora_B[name].weight.data.copy_(change[layer_name].B)
    return peft_model


def penalise(peft_model: Any, keep: Covariances, strength: float) -> None:
    """Add `penalty` to the loss that the model returns while it trains."""
    hold = penalty(peft_model, keep)

    def add(module: Any, _arguments: Any, output: Any) -> Any:
        if module.training and output.loss is not None:
            output["loss"] = output.loss + strength * hold()
        return output

    peft_model.register_forward_hook(add)


def merged_by_peft(model: Any, changes: Sequence[Mapping[str, LowRank]], how: str, weights: Sequence[float], seed: int) -> Change:
    """PEFT's `add_weighted_adapter` of several adapters of one rank, densities of 0.5."""
    rank = len(next(iter(changes[0].values())).A)
    adapters = {f"task{number}": change for number, change in enumerate(changes)}
    peft_model = with_adapters(model, adapters)
    density = 0.5 if how.startswith(("dare", "ties")) else None
    torch.manual_seed(seed)
    peft_model.add_weighted_adapter(
        list(adapters), list(weights), "merged", combination_type=how, density=density, svd_rank=rank, svd_full_matrices=False
    )
    merged = factors_of(peft_model, "merged")
    peft_model.unload()
    return merged


def combined(out: Path, changes: Sequence[Mapping[str, LowRank]], tasks: Sequence[str], strength: float, rank: int) -> Change:
    """`factors.combined` of several adapters, layer by layer."""
    keep, of_tasks = kept_moments(out, FORM), [moments(out, task) for task in tasks]
    one: dict[str, LowRank] = {}
    for site in keep.sites:
        c_keep, c_tasks = keep[site.name].matrix(), [each[site.name].matrix() for each in of_tasks]
        for name in site.members:
            updates = [change[name] for change in changes]
            one[name] = factors.combined(updates, c_tasks, c_keep, strength=strength, rank=rank)
    return one
