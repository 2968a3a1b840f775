"""What fused experts receive while the model runs: the rows of each of their matrices.

transformers lets a function take the place of the forward pass of every class of fused experts (`ALL_EXPERTS_FUNCTIONS`, chosen by
`config._experts_implementation`). The one registered here computes what transformers' `grouped_mm_experts_forward` computes, expert
by expert, and hands over the rows that go into each parameter, sorted by expert. Modules of the few other classes that compute the
same get it as their `forward`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nullspace.errors import InputError
from nullspace.model.experts import LAST, is_decorated, is_transposed, stacks_of

NAME = "nullspace"
"""Of the function among transformers' implementations of experts."""
_INTERNAL = "_experts_implementation_internal"


class Routed(NamedTuple):
    """What one parameter of fused experts receives in one call.

    Attributes:
        experts: name of the module.
        parameter: name of its parameter.
        rows: (n, d_in), sorted by expert; a token that is routed to k experts has k rows.
        counts: rows of each expert; n in all.
        tokens: (n,) int64: for each row, the row of `hidden` that it comes from.
        hidden: (tokens, d): the experts' input, padding included.
    """

    experts: str
    parameter: str
    rows: torch.Tensor
    counts: list[int]
    tokens: torch.Tensor
    hidden: torch.Tensor


BIAS = "{}_bias"

Receive = Callable[[Routed], None]

_RECEIVERS: MutableMapping[nn.Module, tuple[str, Receive]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def routing(modules: Mapping[str, nn.Module], receive: Receive) -> Iterator[None]:
    """Context manager: what some modules of fused experts receive is handed to `receive`, before they compute with it.

    Args:
        modules: name → module of fused experts (`nullspace.model.experts.is_fused`).
        receive: called for each parameter in each call.

    Raises:
        ValueError: naming the module, if its class takes no other implementation.
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in modules.values() if is_decorated(m)}
    replaced = [m for m in modules.values() if not is_decorated(m)]
    before = {key: vars(config).get(_INTERNAL) for key, config in configs.items()}
    if configs:
        sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    try:
        for key, config in configs.items():
            # Not by the property, whose setter writes to the configurations of other parts of the model too.
            vars(config)[_INTERNAL] = NAME
            if getattr(config, "_experts_implementation", None) != NAME:
                name, module = next((name, m) for name, m in modules.items() if id(getattr(m, "config", None)) == key)
                raise InputError(f"{name!r} ({type(module).__name__}) takes no other implementation of experts: exclude='experts'")
        for module in replaced:
            module.__dict__["forward"] = functools.partial(forward, module)
        for name, module in modules.items():
            _RECEIVERS[module] = name, receive
        yield
    finally:
        for module in modules.values():
            _RECEIVERS.pop(module, None)
        for module in replaced:
            module.__dict__.pop("forward", None)
        for key, config in configs.items():
            vars(config)[_INTERNAL] = before[key]


def forward(experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The output of fused experts, (tokens, d), as transformers' own functions compute it.

    Args:
        experts: the module.
        hidden_states: (tokens, d).
        top_k_index: (tokens, k): the experts of each token. Pairs with an index of E or more belong to other processes.
        top_k_weights: (tokens, k): the weights of their outputs.
    """
    name, receive = _RECEIVERS.get(experts, ("", None))
    first, last = stacks_of(experts)
    order, counts = _sorted(top_k_index, len(getattr(experts, first)))
    tokens = order // top_k_index.shape[-1]
    rows = hidden_states[tokens]
    if receive is not None:
        receive(Routed(name, first, rows, counts, tokens, hidden_states))
    rows = _product(experts, first, rows, counts)
    rows = experts._apply_gate(rows) if getattr(experts, "has_gate", True) else experts.act_fn(rows)
    if receive is not None:
        receive(Routed(name, last, rows, counts, tokens, hidden_states))
    rows = _product(experts, LAST, rows, counts)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    weighted = rows * top_k_weights.reshape(-1)[order][:, None]
    if len(order) == top_k_index.numel():
        every = weighted[torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))]
    else:  # foreign pairs contribute nothing
        every = weighted.new_zeros(top_k_index.numel(), hidden_states.shape[-1]).index_copy(0, order, weighted)
    return every.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _sorted(index: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[int]]:
    """The pairs of tokens and experts, sorted by expert, without foreign ones; and how many each expert has."""
    pairs = index.reshape(-1)
    if pairs.device.type == "meta":  # a forecast: tokens are routed evenly
        share, rest = divmod(len(pairs), experts)
        return torch.empty_like(pairs), [share + (number < rest) for number in range(experts)]
    order = torch.argsort(pairs, stable=True)
    # Not `bincount`: on a GPU it waits for the largest number, and reading the counts is a second wait.
    bounds = torch.searchsorted(pairs[order], torch.arange(experts + 1, dtype=pairs.dtype, device=pairs.device))
    counts: list[int] = bounds.diff().tolist()
    return order[: sum(counts)], counts


def _product(experts: Any, parameter: str, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(n, d_out): each row times its expert's matrix, and its bias."""
    stack, bias = (
        getattr(experts, parameter),
        getattr(experts, BIAS.format(parameter)) if getattr(experts, "has_bias", False) else None,
    )
    if not is_transposed(experts):
        stack = stack.mT
    if rows.device.type == "meta":  # one product is as large as all
        return rows @ stack[0] if bias is None else torch.addmm(bias[0], rows, stack[0])
    parts = [(number, own) for number, own in enumerate(rows.split(counts)) if len(own)]
    # A result that is written in parts has no gradient, and no autocast.
    if torch.is_grad_enabled() or torch.is_autocast_enabled(rows.device.type):
        products = [own @ stack[e] if bias is None else torch.addmm(bias[e], own, stack[e]) for e, own in parts]
        return torch.cat(products) if products else rows.new_zeros(0, stack.shape[-1])
    out = rows.new_empty(len(rows), stack.shape[-1])
    for (e, own), into in zip(parts, out.split([len(own) for _, own in parts]), strict=True):
        torch.mm(own, stack[e], out=into) if bias is None else torch.addmm(bias[e], own, stack[e], out=into)
    return out
