"""How the methods of the experiment `budget` distribute ranks: ours by `rank_budget`; here EVA's own rule, and AdaLoRA."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from torch import nn
from transformers import TrainerCallback

from benchmarks import holding_parts
from nullspace import Covariances, factors
from nullspace.factors import LowRank
from nullspace.factors.budget import input_shares
from nullspace.integrations.peft import inject_adapters

RHO = 2
"""EVA's largest rank of a layer, as a multiple of the rank"""
INITIAL = 1.5
"""AdaLoRA's rank at the beginning of the training, as a multiple of the rank; the ratio of PEFT's defaults"""


def start_as_eva(model: nn.Module, config: LoraConfig, task: Covariances) -> PeftModel:
    """EVA (arXiv 2410.07170) with its own redistribution: as many ranks in all, each counted as one, whatever its parameters."""
    rank = config.r
    offers = {}
    for name in config.target_modules or ():
        covariance = task[name]
        c, mean, mass = covariance.matrix(), covariance.mean(), covariance.mass
        start = factors.eva(c, mean, mass, RHO * rank, rank=RHO * rank)
        offers[name] = factors.caught(input_shares(start, factors.centred(c, mean, mass)), 1)
    ranks = factors.allocated(offers, rank * len(offers), least=0).ranks
    config.target_modules = [name for name, each in ranks.items() if each]
    config.rank_pattern = {name: each for name, each in ranks.items() if each}
    config.alpha_pattern = dict(config.rank_pattern)  # α = r, as of all methods
    return inject_adapters(model, config, method="eva", covariances=task)


def start_adalora(model: Any, config: LoraConfig) -> PeftModel:
    """AdaLoRA (arXiv 2303.10512) with PEFT's defaults: `rank` ranks a layer on average after the training, and 1.5 times as many at
    its start. α is the initial rank, so that its scaling is 1 as of all methods."""
    initial = round(INITIAL * config.r)
    own = AdaLoraConfig(
        init_r=initial,
        target_r=config.r,
        lora_alpha=initial,
        total_step=10,  # the callback knows better
        target_modules=config.target_modules,
        task_type=config.task_type,
    )
    return get_peft_model(model, own)


class Allocating(TrainerCallback):
    """AdaLoRA's steps: no allocation in the first tenth of the training, none in the last three tenths, as in its paper's runs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._model: Any = kwargs["model"].base_model
        for config in (self._model.peft_config["default"], self._model.rankallocator.peft_config):
            config.total_step, config.tinit, config.tfinal = state.max_steps, state.max_steps // 10, 3 * state.max_steps // 10

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._model.update_and_allocate(state.global_step + 1)


def factors_of(peft_model: Any) -> dict[str, LowRank]:
    """A and s·B of every layer, copies; of AdaLoRA with E in A."""
    found = {name: module for name, module in peft_model.get_base_model().named_modules() if isinstance(module, AdaLoraLayer)}
    return {name: _product(layer) for name, layer in found.items()} or holding_parts.factors_of(peft_model)


@torch.no_grad()
def _product(layer: Any) -> LowRank:
    scaling = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)  # as PEFT's forward
    return LowRank(layer.lora_A["default"] * layer.lora_E["default"], scaling * layer.lora_B["default"])


def summary(peft_model: Any) -> dict[str, Any]:
    """What an adapter trains, and keeps, and the ranks of its layers: of AdaLoRA without the triplets that are zero."""
    found = factors_of(peft_model)
    ranks = [int(each.A.any(1).sum()) for each in found.values()]
    if any(isinstance(module, AdaLoraLayer) for module in peft_model.modules()):
        parameters = sum(rank * (a.shape[1] + len(b) + 1) for rank, (a, b) in zip(ranks, found.values(), strict=True))
    else:
        parameters = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    return {"parameters": parameters, "ranks": {"least": min(ranks), "median": statistics.median(ranks), "most": max(ranks)}}
