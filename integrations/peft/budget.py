"""One budget of trained parameters over all layers: `rank_budget` of `inject_adapters`, `write_init` and `prepare`."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn

from nullspace.checks import check_between
from nullspace.distributed import Job
from nullspace.errors import InputError
from nullspace.factors import Offer, allocated, caught, spared
from nullspace.factors.budget import together
from nullspace.integrations.peft.experts.layout import layers_by_parameter, parameter_name, pattern_name
from nullspace.integrations.peft.layers import check_layers, check_servable, computed_weight
from nullspace.integrations.peft.start import naming, with_spaces
from nullspace.integrations.peft.targets import chosen_layers, rank_of
from nullspace.methods import METHODS, Layer, Sources, check_method
from nullspace.model.experts import ExpertMatrix
from nullspace.model.linear import weight_of, weight_shape
from nullspace.model.weights import tensor_of
from nullspace.moments.directions import Directions


def check_rank_budget(rank_budget: int | None, config: LoraConfig, method: str, window: float | None = None) -> None:
    """Raise `TypeError` or `ValueError` for a budget that is out of range, or a method that cannot take one. Needs no model."""
    check_method(method)
    if rank_budget is None:
        return
    if METHODS[method].shares is None:
        able = [name for name, each in METHODS.items() if each.shares is not None]
        raise InputError(
            f"method {method!r} has no objective by which ranks could be distributed: leave out rank_budget, or use one of "
            f"{', '.join(able)}"
        )
    if window is not None:
        raise InputError("with a window, a smaller rank takes other directions than a larger one: leave out window, or rank_budget")
    largest = max([config.r, *(config.rank_pattern or {}).values()])
    check_between("rank_budget", rank_budget, largest, " (LoraConfig.r, the largest rank of a layer)")


def largest_ranks(layers: Mapping[str, nn.Module], config: LoraConfig, given: Sources, method: str) -> dict[str, int]:
    """The largest rank that a budget may give each layer: that of the configuration, or what the layer or its null space has."""
    most = {}
    for name, layer in layers.items():
        d_out, d_in = weight_shape(layer)
        columns = d_in - 1 if "spaces" in METHODS[method].needs else d_in
        if given.spaces is not None and name in given.spaces:
            columns = given.spaces[name].rank
        most[name] = min(rank_of(name, config), d_out, columns)
    return most


@torch.no_grad()
def within_budget(
    config: LoraConfig,
    model: nn.Module,
    given: Sources,
    method: str,
    *,
    rank_budget: int | None,
    frozen: str | None,
    residual: str = "auto",
    job: Job,
) -> tuple[LoraConfig, Sources]:
    """A configuration with the ranks that buy most, at most as many trained parameters as `rank_budget` in every layer has.

    Args:
        config: of `exact_config`; its ranks are the largest that a layer can get. Its scaling of each layer stays.
        model: the base model.
        given: checked sources of the method.
        method, residual: of `inject_adapters`.
        rank_budget: a rank; None leaves all as it is.
        frozen: the factor that does not train, `"A"` or `"B"`, if any.
        job: the processes that share the weights.

    Returns:
        A copy with `rank_pattern` and `alpha_pattern` of all layers, by names that match one layer each; and the sources with null
        spaces, if the method needs them, and with the allocation.

    Raises:
        ValueError: naming the layer, as `inject_adapters`.

    Memory: one weight at a time. Time: that of the factors once more.
    """
    if rank_budget is None:
        return config, given
    check_rank_budget(rank_budget, config, method, given.window)
    layers = chosen_layers(model, config)
    freeze: dict[str, Any] = {"freeze_a": frozen == "A", "freeze_b": frozen == "B"}
    most = largest_ranks(layers, config, given, method)
    check_layers(layers, most, method, given, job)
    check_servable(model, layers, method, residual=residual, **freeze, offloaded=True)
    given = with_spaces(method, given, min(max(most.values()), *(weight_shape(layer)[1] - 1 for layer in layers.values())))
    most = largest_ranks(layers, config, given, method)
    quiet = replace(given, directions=Directions())
    groups: dict[str, list[Offer]] = {}
    for name, weight in _weights(layers, method, job):
        d_out, d_in = weight_shape(layers[name])
        device = weight_of(layers[name]).device if weight is None else weight.device
        layer = Layer(name, weight, d_out, d_in, most[name], torch.device("cpu") if device.type == "meta" else device)
        with naming(name):
            offer = _offer(layer, quiet, method, {"A": d_out, "B": d_in}.get(frozen or "", d_out + d_in))
        groups.setdefault(pattern_name(name), []).append(offer)
    offers = {name: together(each) for name, each in groups.items()}
    budget = sum(each.cost * min(rank_budget, len(each.gains)) for each in offers.values())
    allocation = job.exchange(allocated(offers, budget))[0]  # of one process: results of several may differ by rounding
    return _with_ranks(config, layers, allocation.ranks), replace(given, allocation=allocation)


def _offer(layer: Layer, given: Sources, method: str, cost: int) -> Offer:
    entry = METHODS[method]
    assert entry.shares is not None
    return (spared if entry.spares else caught)(entry.shares(layer, given), cost)


def _weights(layers: Mapping[str, nn.Module], method: str, job: Job) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Name and weight (d_out, d_in) of all layers, None for methods that do not read it; one tensor at a time."""
    if not METHODS[method].reads_weight:
        yield from ((name, None) for name in layers)
        return
    for members in layers_by_parameter(layers).values():
        job.exchange(None)  # an error on any rank must be known before the others wait for it in a gather
        first = layers[members[0]]
        if not isinstance(first, ExpertMatrix):
            yield members[0], computed_weight(members[0], first)
            continue
        stack = tensor_of(first.experts, first.parameter)
        for name in members:
            expert: Any = layers[name]
            yield name, expert.of_stack(stack).detach()


def _with_ranks(config: LoraConfig, layers: Iterable[str], ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration with a rank and an alpha for each layer: s = α/r, or α/√r with rsLoRA, stays that of the configuration."""
    chosen: Any = copy.deepcopy(config)
    by_weight = set(config.target_parameters or ())
    names = {pattern_name(name): name for name in layers}
    chosen.rank_pattern, chosen.alpha_pattern = {}, {}
    for pattern, rank in ranks.items():
        alphas: Mapping[str, Any] = config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), pattern), config.lora_alpha)
        share = rank / rank_of(names[pattern], config)
        alpha = alpha * (math.sqrt(share) if config.use_rslora else share)
        for key in dict.fromkeys((pattern, *({parameter_name(names[pattern])} & by_weight))):
            # From its first character on: PEFT matches the ending of a name otherwise, as a regular expression.
            exact = f"^{re.escape(key)}"
            chosen.rank_pattern[exact] = rank
            chosen.alpha_pattern[exact] = int(alpha) if float(alpha).is_integer() else alpha
    return chosen


@contextlib.contextmanager
def patterns_of_parameters() -> Iterator[None]:
    """Context manager: PEFT does not warn that entries of patterns for `target_parameters` are ignored, which it reads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match any targeted module")
        yield


def budget_facts(given: Sources) -> dict[str, Any]:
    """What the record of an adapter says of its ranks; empty without a budget."""
    if given.allocation is None:
        return {}
    ranks, gain, uniform = given.allocation.ranks.values(), given.allocation.gain, given.allocation.uniform_gain
    facts = {"parameters": given.allocation.parameters, "smallest": min(ranks), "largest": max(ranks)}
    return {"rank_budget": {**facts, "gain": gain, "uniform_gain": uniform}}
