"""What a calibration must sum, by plain hooks in float64, without a line of nullspace's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Sums = dict[str, torch.Tensor]


def input_sums(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> tuple[Sums, set[str]]:
    """X Xᵀ of the unpadded inputs of every linear layer and expert's matrix that is called, and the names of all modules called."""
    sums: Sums = {}
    called: set[str] = set()
    masks: list[torch.Tensor] = []
    handles = []

    def add(name: str, rows: torch.Tensor) -> None:
        rows = rows.detach().double()
        sums[name] = sums.get(name, 0) + rows.T @ rows

    def on_linear(name: str) -> Any:
        return lambda module, args: add(name, _unpadded(args[0], masks)) if args else None

    def on_experts(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            for key, rows in _routed(name, module, masks, *args, **kwargs):
                add(key, rows)

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
        if isinstance(module, (nn.Linear, Conv1D)):
            handles.append(module.register_forward_pre_hook(on_linear(name)))
        elif hasattr(module, "_apply_gate") and isinstance(getattr(module, "down_proj", None), nn.Parameter):
            handles.append(module.register_forward_pre_hook(on_experts(name), with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            masks[:] = [batch[name].bool() for name in ("attention_mask", "decoder_attention_mask") if name in batch]
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums, called


def _unpadded(x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """(rows, d): of an input that has a row for every token of a mask, those of unpadded tokens; all of another one."""
    x = x.reshape(*(n for n in x.shape[:-1] if n != 1), x.shape[-1])
    rows = tuple(x.shape[:-1])
    for mask in masks:
        if rows in (tuple(mask.shape), (mask.numel(),)):
            return x.reshape(-1, x.shape[-1])[mask.flatten()]
        if rows == tuple(mask.T.shape):
            return x[mask.T]
        if rows[:2] == tuple(mask.shape):
            return x[mask].reshape(-1, x.shape[-1])
    return x.reshape(-1, x.shape[-1])


def _routed(
    name: str, experts: Any, masks: list[torch.Tensor], hidden: torch.Tensor, index: torch.Tensor, *_: Any, **__: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The rows of every expert's matrices, expert by expert."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    counted = next((m.flatten() for m in masks if m.numel() == len(hidden)), torch.ones(len(hidden), dtype=torch.bool))
    tokens = counted.nonzero()[:, 0]
    has_gate = getattr(experts, "has_gate", True)
    first = "gate_up_proj" if has_gate else "up_proj"
    for number in range(len(experts.down_proj)):
        rows = hidden[tokens[(index[tokens] == number).nonzero()[:, 0]]]  # twice, if it is chosen twice
        weight = getattr(experts, first)[number]
        between = rows @ (weight if getattr(experts, "is_transposed", False) else weight.T)
        if getattr(experts, "has_bias", False):
            between = between + getattr(experts, f"{first}_bias")[number]
        yield f"{name}.{first}[{number}]", rows
        yield f"{name}.down_proj[{number}]", experts._apply_gate(between) if has_gate else experts.act_fn(between)
