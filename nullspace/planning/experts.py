"""Routed experts in a forecast: how many tokens each gets, and whether one sum should serve all of a layer (`experts="auto"`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nullspace.model.experts import LAST, ExpertMatrix, stacks_of
from nullspace.model.linear import weight_shape
from nullspace.model.sharded_tensors import shape_of
from nullspace.planning.plan import Rates
from nullspace.solvers import decomposition_cost

_ROUTED = (
    *("num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "top_k_experts", "experts_per_token"),
    *("moe_topk", "moe_k", "moe_top_k", "top_k"),
)
"""Names that configurations have for the number of experts of a token."""
ROOM = 0.5
"""Part of the free memory that sums for every expert may take."""
PATIENCE = 1800.0
"""Seconds that the eigenproblems of experts may take, by estimate, before they are pooled."""


def experts_a_token(experts: nn.Module) -> int:
    """To how many experts a token is routed, by the configuration of a module of fused experts; 1 if it does not say."""
    values = (getattr(getattr(experts, "config", None), name, None) for name in _ROUTED)
    return next((value for value in values if isinstance(value, int) and value > 0), 1)


def tokens_an_expert(experts: nn.Module, tokens: float) -> float:
    """How many of `tokens` an expert gets on average."""
    return tokens * experts_a_token(experts) / shape_of(getattr(experts, stacks_of(experts)[0]))[0]


def should_pool(
    targets: Mapping[str, nn.Module],
    *,
    tokens: float | None,
    rank: int | None,
    device: str,
    rates: Rates,
    free: float | None = None,
    resident: bool = False,
) -> bool:
    """Whether one sum for what all experts of a layer receive is a better choice than a sum for each.

    That is so for any of three reasons: an expert can expect fewer than d_in + rank tokens, too few for a null space of its own;
    the sums of all experts (of one layer; of all, in a resident run) would take more than half of the free memory; or their
    eigenproblems would take over half an hour.

    Args:
        targets: name → layer.
        tokens: of all data; None if that is unknown.
        rank: of the bases; None if there are none.
        device: `"cuda"` or `"cpu"`.
        rates: of the machine.
        free: bytes that the sums could have; None if that is unknown.
        resident: whether all layers' sums are in memory at once.
    """
    layers: dict[int, list[ExpertMatrix]] = {}
    for layer in targets.values():
        if isinstance(layer, ExpertMatrix) and layer.parameter != LAST:
            layers.setdefault(id(layer.experts), []).append(layer)
    sizes, seconds = [0], 0.0
    for matrices in layers.values():
        d = weight_shape(matrices[0])[1]
        if tokens is not None and tokens_an_expert(matrices[0].experts, tokens) < d + (rank or 0):
            return True
        sizes.append(4 * d * d * len(matrices))
        if rank is not None:
            seconds += len(matrices) * decomposition_cost(d, rank, device, rates.decomposition)[2] / rates.decomposition
    needed = sum(sizes) if resident else max(sizes)
    return seconds > PATIENCE or (free is not None and needed > ROOM * free)
