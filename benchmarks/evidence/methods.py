"""The methods of the study: how each one starts, what holds it while it trains, and at which learning rates it runs.

All have adapters on all linear layers but the head, α = r, unless a method names other targets, and all are trained by AdamW. A
start that is random is drawn after `torch.manual_seed(seed)`; the others depend on the weights and on second moments alone.

Two or three learning rates a method. The study chooses between them, and t, on its validation split. The first two come from the
records of earlier studies (`benchmarks/results/preservation-cpu.jsonl`, and `holding-cpu.jsonl` at commit 5a38986: 10 steps on
GSM8K, rank 16, scored on the first 16 test examples of at most 128 tokens), or lie about those of LoRA or of the most similar
start. Where they left the least KL at one end in most seeds, or did not reach the target, the third lies beyond or between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from benchmarks.evidence import allocations
from benchmarks.evidence.allocations import factors_of
from benchmarks.holding_parts import penalise
from nullspace import Covariances, analysis
from nullspace.factors import LowRank
from nullspace.integrations.peft import confine, decay_to_start, freeze_a, inject_adapters, lora_layers, oplora
from nullspace.model.sites import find_targets


class Method(NamedTuple):
    """How a method starts and what holds it while it trains."""

    rates: tuple[float, ...]
    """learning rates"""
    needs: tuple[str, ...] = ()
    """of "keep" and "task": whose second moments it takes"""
    filtered: bool = False
    """whether the study also filters its trained change"""
    intruder: bool = False
    """whether the study also applies PEFT's `reduce_intruder_dimension` to it"""
    start: str | None = None
    """the `method` of `inject_adapters`; None: PEFT's own LoRA, started by `init`"""
    init: bool | str = True
    """PEFT's `init_lora_weights`"""
    freeze_a: bool | None = None
    """train B alone; None: as the start does it"""
    split: float = 1.0
    """of `inject_adapters`"""
    targets: str = "all-linear"
    """of `find_targets`"""
    weight_decay: float = 0.0
    """AdamW's, towards A = 0 and B = 0"""
    start_decay: float = 0.0
    """the rate of `decay_to_start`"""
    leak: float = 0.0
    """of `confine`"""
    penalty: float = 0.0
    """the factor of `penalty` in the loss"""
    spared: int = 0
    """k of OPLoRA"""
    corrected: bool = False
    """LoRA-FA's gradient of B"""
    largest: int = 0
    """of `rank_budget`: the largest rank of a layer, as a multiple of the rank; 0 for uniform ranks"""
    allocation: str = ""
    """"eva" or "adalora": `allocations`"""


METHODS: dict[str, Method] = {
    "lora": Method((2e-3, 4e-3, 8e-3), filtered=True, intruder=True),
    "contrast": Method((4e-3, 8e-3), ("keep", "task"), filtered=True, start="contrast"),
    "corda-kpm": Method((2.5e-4, 1.25e-4, 5e-4), ("keep",), filtered=True, start="corda-kpm"),
    "lora-null v2": Method((2e-3, 4e-3, 8e-3), ("keep",), filtered=True, start="lora-null", freeze_a=True),
    "confine": Method((4e-3, 8e-3, 1.6e-2), ("keep",), leak=0.05),
    "lora-null v1 split 8": Method((2.5e-4, 1.25e-4, 5e-4), ("keep",), start="lora-null", split=8.0),
    # LoRA-FA (arXiv 2308.03303): A is random and frozen.
    "lora-fa": Method((4e-3, 8e-3, 1.6e-2), freeze_a=True, corrected=True),
    # MiCA (arXiv 2604.01694): B = the left singular vectors of the r smallest singular values, frozen; A starts at zero.
    "mica": Method((2e-3, 4e-3, 8e-3), init="mica"),
    "sc-lora": Method((2.5e-4, 1.25e-4, 1e-3), ("keep", "task"), start="sc-lora"),
    "lora-mlp": Method((2e-3, 4e-3, 8e-3), targets="mlp"),
    # OPLoRA (arXiv 2510.13003): the change has no part in the spaces of the k largest singular values of W₀.
    "oplora": Method((2e-3, 4e-3), spared=128),
    "penalty": Method((2e-3, 4e-3), ("keep",), penalty=30.0),
    "b-zero": Method((2e-3, 4e-3), ("keep",), start="b-zero"),
    "lora-null v1": Method((5e-4, 1e-3), ("keep",), start="lora-null"),
    "lora decay 0.3": Method((2e-3, 4e-3, 8e-3), weight_decay=0.3),
    "lora decay to start 0.3": Method((2e-3, 4e-3, 8e-3), start_decay=0.3),
    "milora": Method((5e-4, 1e-3), start="milora"),
    "pissa": Method((2.5e-4, 5e-4), start="pissa"),
}

# The experiment `budget`: the same parameters as of uniform ranks, elsewhere. Not in the table of all methods.
BUDGETED: dict[str, Method] = {
    "contrast budget": Method((4e-3, 8e-3), ("keep", "task"), start="contrast", largest=4),
    "lora-null v2 budget": Method((4e-3, 8e-3), ("keep",), start="lora-null", freeze_a=True, largest=4),
    "eva": Method((2e-3, 4e-3), ("task",), start="eva"),
    "eva budget": Method((2e-3, 4e-3), ("task",), start="eva", largest=2),
    "eva rho 2": Method((2e-3, 4e-3), ("task",), start="eva", allocation="eva"),
    "adalora": Method((3e-2, 6e-2), allocation="adalora"),
}
EVERY = METHODS | BUDGETED


class Prepared(NamedTuple):
    """A model with adapters that are ready to be trained."""

    model: PeftModel
    callbacks: list[TrainerCallback]
    """for transformers' `Trainer`"""
    weight_decay: float
    """for AdamW"""
    before: Mapping[str, LowRank]
    """layer → A and s·B before training, against which the change is measured"""


def prepare(
    model: nn.Module, method: str, *, rank: int, seed: int, keep: Covariances | None = None, task: Covariances | None = None
) -> Prepared:
    """Add a method's adapters to a base model, in place. Its outputs stay what they were, but for the rounding of a residual base.

    Args:
        model: the base, whose weights no change was added to.
        method: a key of `EVERY`.
        rank: r of the adapters.
        seed: of a random start.
        keep: second moments of what must be kept; for methods that need "keep".
        task: second moments of the task; for methods that need "task".

    Raises:
        KeyError: for another method.
        ValueError: if second moments that the method needs are missing.
    """
    how = EVERY[method]
    missing = [name for name, given in (("keep", keep), ("task", task)) if name in how.needs and given is None]
    if missing:
        raise ValueError(f"method {method!r} needs second moments: {' and '.join(missing)}")
    torch.manual_seed(seed)
    peft_model = _started(model, how, rank, keep, task)
    callbacks: list[TrainerCallback] = []
    if how.spared:
        callbacks.append(oplora(peft_model, how.spared))
    if how.corrected:
        _correct_gradients(peft_model)
    if how.leak:
        assert keep is not None
        callbacks.append(confine(peft_model, keep, how.leak))  # changes A, so it stands before what remembers the start
    if how.start_decay:
        callbacks.append(decay_to_start(peft_model, how.start_decay))
    if how.allocation == "adalora":
        callbacks.append(allocations.Allocating())
    if how.penalty:
        assert keep is not None
        penalise(peft_model, keep, how.penalty)
    return Prepared(peft_model, callbacks, how.weight_decay, factors_of(peft_model))


def change_of(prepared: Prepared) -> dict[str, LowRank | torch.Tensor]:
    """What training has added to the weights of the base as it was before `prepare`: layer → ΔW, copies in float64."""
    return {name: analysis.update(prepared.before[name], after) for name, after in factors_of(prepared.model).items()}


def _started(model: Any, how: Method, rank: int, keep: Covariances | None, task: Covariances | None) -> PeftModel:
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(find_targets(model, how.targets)),
        task_type="CAUSAL_LM",
        init_lora_weights=how.init,  # type: ignore[arg-type]
    )
    if how.allocation == "adalora":
        return allocations.start_adalora(model, config)
    if how.start is None:
        peft_model: Any = get_peft_model(model, config)
        if how.freeze_a:
            freeze_a(peft_model)
        return peft_model
    # A method of two sets of data takes those of the task as its covariances; a method of one takes those that it needs.
    sources: dict[str, Any] = {"covariances": keep} if "keep" in how.needs else {}
    if "task" in how.needs:
        sources = {"covariances": task} | ({"preserve": keep} if "keep" in how.needs else {})
    if how.allocation == "eva":
        assert task is not None
        return allocations.start_as_eva(model, config, task)
    if how.largest:
        config.r = config.lora_alpha = how.largest * rank
        sources["rank_budget"] = rank
    return inject_adapters(model, config, method=how.start, freeze_a=how.freeze_a, split=how.split, **sources)  # type: ignore[arg-type]


def _correct_gradients(peft_model: PeftModel) -> None:
    """LoRA-FA's gradient of B: G (A Aᵀ)⁻¹ / s², with which a step of SGD changes s·BA as the gradient of W₀ would, in A's rows.

    PEFT's `create_lorafa_optimizer` computes the same inside of a copy of Adam, with the product in bfloat16 and ε = 1e-6. As a
    hook of B it serves the `Trainer`'s own AdamW, in float32, with ε and clipping as for all methods.
    """
    for layer in lora_layers(peft_model, "default").values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rows = a.detach().double()
        inverse = (torch.linalg.inv(rows @ rows.mT) / layer.scaling["default"] ** 2).to(b.dtype)
        b.register_hook(lambda gradient, inverse=inverse: gradient @ inverse)
