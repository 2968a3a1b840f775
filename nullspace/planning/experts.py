"""Routed experts in a forecast: how many tokens each gets, and whether one sum should serve all of a layer (`experts="auto"`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nullspace.model.experts import LAST, ExpertMatrix, fused_of, stacks_of
from nullspace.model.linear import weight_shape
from nullspace.model.sharded_tensors import device_of, shape_of
from nullspace.planning.memory import free_on_device, free_on_host
from nullspace.planning.survey import batch_shape

_ROUTED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k",
    "num_selected_experts",
)
"""Names that configurations have for the number of experts of a token."""
ROOM = 0.5
"""Part of the free memory that sums for every expert may take."""


def experts_a_token(experts: nn.Module) -> int:
    """To how many experts a token is routed, by the configuration of a module of fused experts; 1 if it does not say."""
    values = (getattr(experts.config, name, None) for name in _ROUTED)
    return next((value for value in values if isinstance(value, int) and value > 0), 1)


def tokens_an_expert(experts: nn.Module, tokens: float) -> float:
    """How many of `tokens` an expert gets on average."""
    return tokens * experts_a_token(experts) / shape_of(getattr(experts, stacks_of(experts)[0]))[0]


def should_pool(targets: Mapping[str, nn.Module], batch: Any, batches: int | None, rank: int | None) -> bool:
    """Whether one sum for all experts of a layer is the better choice.

    That is so if an expert can expect fewer than d_in + rank tokens, which are too few for a null space of its own and would cost
    more in its eigenproblem than in its sum; or if the sums of all experts would take more than half of the free memory. If the
    number of tokens is unknown, only the memory counts.

    Args:
        targets: name → layer.
        batch: the first one of the data.
        batches: how many there are; None if that is unknown.
        rank: of the bases; None if there are none.
    """
    shape = batch_shape(batch)
    tokens = None if batches is None or shape is None else float(batches * math.prod(shape))
    first = [m for m in targets.values() if isinstance(m, ExpertMatrix) and m.parameter != LAST]
    for matrix in {id(m.experts): m for m in first}.values():
        if tokens is not None and tokens_an_expert(matrix.experts, tokens) < weight_shape(matrix)[1] + (rank or 0):
            return True
    free = _free(next(iter(fused_of(targets.values()).values())))
    return free is not None and sum(4 * weight_shape(m)[1] ** 2 for m in first) > ROOM * free


def _free(experts: nn.Module) -> int | None:
    device = device_of(getattr(experts, stacks_of(experts)[0]))
    return free_on_device(torch.device(device)) if device.type == "cuda" else free_on_host()
