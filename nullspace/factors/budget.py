"""One budget of trained parameters over all layers: ranks go where they buy most of what a method is after.

A method's objective is a sum over the directions of all layers, and every further rank of a layer buys no more than the one before.
There are two kinds, both in shares of a layer's own total, so that layers of different scale compare:

    caught    directions of which a method wants the largest: the share of the variance (EVA), of ‖W₀‖² (PiSSA), of ‖W₀ X‖² (CorDA)
    spared    directions of which it wants the smallest: a trained parameter counts by what its direction leaves, 1 − share
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from nullspace.checks import check_integer
from nullspace.errors import InputError
from nullspace.factors.low_rank import LowRank


class Offer(NamedTuple):
    """What the ranks of a layer buy, and what one of them costs."""

    gains: torch.Tensor
    """(k,) of the first rank, of the second, …, k the largest rank: not negative, not increasing."""
    cost: int
    """Parameters that a rank trains: d_in + d_out, or d_out where A is frozen."""


class Allocation(NamedTuple):
    """Ranks, and what they buy."""

    ranks: dict[str, int]
    """Layer → rank."""
    parameters: int
    """That these ranks train."""
    gain: float
    """The objective: the sum of the gains of all these ranks."""
    uniform_gain: float
    """The same of the largest uniform rank within the budget, which `gain` is never below."""


def caught(shares: torch.Tensor, cost: int) -> Offer:
    """The offer of a layer whose leading directions count by their shares, in any order; negative ones as zero."""
    return Offer(shares.to("cpu", torch.float64).clamp(min=0).sort(descending=True).values, cost)


def spared(shares: torch.Tensor, cost: int) -> Offer:
    """The offer of a layer whose trained parameters count by what their directions leave alone: cost · (1 − share).

    For a frozen A, rows of B with entries of equal variance change the outputs on the inputs X by ‖ΔW X‖² ∝ d_out · Σ share. At
    equal parameters the sum over layers is largest where this is least. So a rank goes to the directions of the smallest shares,
    whatever its layer costs.
    """
    return Offer(cost * (1.0 - shares.to("cpu", torch.float64).clamp(0, 1).sort().values), cost)


def together(offers: list[Offer]) -> Offer:
    """The offer of layers that have one rank, such as the experts of one tensor; of the length of the shortest."""
    shortest = min(len(each.gains) for each in offers)
    return Offer(torch.stack([each.gains[:shortest] for each in offers]).sum(0), sum(each.cost for each in offers))


def allocated(offers: Mapping[str, Offer], budget: int, *, least: int = 1) -> Allocation:
    """The ranks that buy most within a budget: from `least` on, always the rank of the largest gain / cost that is left.

    With equal costs this is an optimum, as gains do not increase within a layer (EVA's redistribution, arXiv 2410.07170, is this
    case with costs of 1 and `least` 0). With unequal ones it falls short of the optimum by at most the gain of one rank, the first
    that did not fit (the bound of the fractional knapsack). It is repeated from every uniform rank that the budget pays for, and
    the best is returned, which therefore never buys less than uniform ranks. Of equal gains for the cost, the first layer's is
    taken.

    Args:
        offers: layer → gains and cost. A layer's rank is at most the number of its gains.
        budget: trained parameters, at most.
        least: the rank that every layer gets, or all that it offers if that is fewer; 0 for layers without adapter.

    Raises:
        TypeError, ValueError: naming the layer, for gains that are negative, increase, or hold NaN or Inf, or a cost below 1; for a
            budget that does not pay for `least` in all layers, or no layer.
    """
    check_integer("budget", budget, least=0)
    check_integer("least", least, least=0)
    if not offers:
        raise InputError("there is no layer to give ranks to")
    gains = {name: _checked(name, offer) for name, offer in offers.items()}
    needed = _parameters(offers, _uniform(gains, least))
    if needed > budget:
        raise InputError(
            f"{len(offers)} layers of rank {least} train {needed} parameters, and the budget is {budget}: use a larger one"
        )
    every = [(gain / offers[name].cost, name, rank) for name, each in gains.items() for rank, gain in enumerate(each)]
    every.sort(key=lambda each: -each[0])  # stable
    order = [(name, rank) for _, name, rank in every]
    ranks, uniform = _greedy(offers, _uniform(gains, least), order, budget), _uniform(gains, least)
    bought, is_optimum = _bought(gains, ranks), len({each.cost for each in offers.values()}) == 1
    for rank in range(least + 1, max(map(len, gains.values())) + 1):
        more = _uniform(gains, rank)
        if _parameters(offers, more) > budget:
            break
        uniform, other = more, ranks if is_optimum else _greedy(offers, more, order, budget)
        if _bought(gains, other) > bought:
            ranks, bought = other, _bought(gains, other)
    return Allocation(ranks, _parameters(offers, ranks), bought, _bought(gains, uniform))


def _checked(name: str, offer: Offer) -> list[float]:
    gains = offer.gains.detach().to("cpu", torch.float64)
    check_integer(f"the cost of {name!r}", offer.cost)
    if gains.ndim != 1 or not bool(gains.isfinite().all()) or bool((gains < 0).any()) or bool((gains.diff() > 0).any()):
        raise InputError(f"the gains of {name!r} should be a vector of finite numbers, not negative and not increasing")
    values: list[float] = gains.tolist()
    return values


def _uniform(gains: Mapping[str, list[float]], rank: int) -> dict[str, int]:
    return {name: min(rank, len(each)) for name, each in gains.items()}


def _parameters(offers: Mapping[str, Offer], ranks: Mapping[str, int]) -> int:
    return sum(offers[name].cost * rank for name, rank in ranks.items())


def _bought(gains: Mapping[str, list[float]], ranks: Mapping[str, int]) -> float:
    """Rounded once, so that equal sets of gains have equal sums."""
    return math.fsum(gain for name, rank in ranks.items() for gain in gains[name][:rank])


def _greedy(offers: Mapping[str, Offer], first: Mapping[str, int], order: Sequence[tuple[str, int]], budget: int) -> dict[str, int]:
    """The ranks `first`, and what is left of the budget spent in an order of (layer, rank − 1)."""
    ranks = dict(first)
    left = budget - _parameters(offers, ranks)
    for name, rank in order:
        # What costs too much once does so for all further ranks of its layer, as what is left does not grow.
        if rank >= first[name] and offers[name].cost <= left:
            ranks[name] += 1
            left -= offers[name].cost
    return ranks


@torch.no_grad()
def output_shares(
    update: LowRank, weight: torch.Tensor, c: torch.Tensor | None = None, *, total: torch.Tensor | None = None
) -> torch.Tensor:
    """uᵀ W₀ C W₀ᵀ u / tr(W₀ C W₀ᵀ) for the direction u of every column of B: shares of ‖W₀ X‖², (r,) float64.

    For starts with B A = U Uᵀ W₀ that are nested in r: PiSSA and MiLoRA (C = I), `corda_exact` (C), `corda` (the square of its
    damped C). A column of zeros has no share.

    Args:
        update: the start of the largest rank.
        weight: (d_out, d_in) W₀.
        c: (d_in, d_in), in any scale; None for the identity.
        total: whose trace divides, where that is not C.
    """
    b, weight = update.B.to(torch.float64), weight.to(update.B.device, torch.float64)
    u = b / torch.where(b.any(0), torch.linalg.vector_norm(b, dim=0), 1.0)
    rows = u.mT @ weight

    def seen(of: torch.Tensor, by: torch.Tensor | None) -> torch.Tensor:
        return ((of if by is None else of @ by.to(of)) * of).sum(1)

    return _divided(seen(rows, c), seen(weight, c if total is None else total).sum())


@torch.no_grad()
def input_shares(update: LowRank, c: torch.Tensor) -> torch.Tensor:
    """a C aᵀ / (‖a‖² tr C) for every row a of A, (r,) float64: with the centred C, the variance that EVA's components explain."""
    a, c = update.A.to(torch.float64), c.to(update.A.device, torch.float64)
    return _divided(((a @ c) * a).sum(1) / a.square().sum(1), c.trace())


@torch.no_grad()
def input_ratios(update: LowRank, c_task: torch.Tensor, c_keep: torch.Tensor, *, damping: float) -> torch.Tensor:
    """a C_t aᵀ / (a C_k aᵀ + ε ‖a‖²) for every row a of A, both of trace 1: the generalised eigenvalues of `factors.contrast`."""
    a = update.A.to(torch.float64)
    task, keep = (((a @ c.to(a)) * a).sum(1) / c.trace().to(a) for c in (c_task, c_keep))
    return task / (keep + damping / a.shape[1] * a.square().sum(1))


def _divided(parts: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return parts / total if bool(total > 0) else torch.zeros_like(parts)
