"""Whether a calibration fits a machine, how, and what would help where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nullspace.errors import InsufficientMemoryError
from nullspace.model.experts import ExpertMatrix
from nullspace.model.linear import weight_shape
from nullspace.planning.cards import CARDS
from nullspace.planning.choice import choose, closest, fit
from nullspace.planning.forecast import forecast
from nullspace.planning.plan import MARGIN, Plan, Workload, what_is_missing
from nullspace.planning.survey import Survey

OF_BATCHES = ("activations", "arguments", "hidden states")
"""Parts of a memory that smaller batches may shrink."""


@dataclass(frozen=True)
class Offer:
    """What fits where the calibration as it was asked for does not.

    Attributes:
        plan: with `solved_on_host`, of `nullspace covariances` and of the solves afterwards.
        exclude: the layers that it leaves out, by endings of names; empty for none.
    """

    plan: Plan
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What `nullspace plan` says.

    Attributes:
        plans: every way to run the calibration with batches of the size that was asked for, the fastest first.
        chosen: the fastest that fits, perhaps with smaller batches; None if none does.
        missing: what is too large for which memory, if none fits.
        offers: what fits then: the solves on the host; fewer targets.
        cards: names of the cards of `nullspace.planning.cards` whose memory is enough, if none fits.
    """

    plans: list[Plan]
    chosen: Plan | None
    missing: str | None = None
    offers: tuple[Offer, ...] = ()
    cards: tuple[str, ...] = ()


def is_typed(plan: Plan, *, quantised: bool = False, asked: str | None = None) -> bool:
    """Whether the command line can run a plan: weights on the device, or with --offload on the disk; quantised ones only whole.

    For weights on the host and a GPU there is `compute_null_spaces(..., device="cuda")`: such a plan must be `asked` for.
    """
    if plan.weights == "disk":
        return not quantised
    return plan.weights == "device" or plan.device == "cpu" or asked == "host"


def answer(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    workload: Workload,
    survey: Survey,
    *,
    device_memory: float | None = None,
    host_memory: float | None = None,
    usable: Callable[[Plan], bool] = lambda plan: True,
) -> Answer:
    """Whether and how a calibration fits.

    Args:
        model: as for `forecast`.
        targets: name → layer.
        workload: whose `targets` these are.
        survey: of the model for this workload.
        device_memory, host_memory: bytes; None for no limit.
        usable: which plans may be chosen.
    """
    limits = device_memory, host_memory
    plans = forecast(model, workload, survey=survey)
    some = [plan for plan in plans if usable(plan)]
    try:
        if all(_is_hopeless(plan, *limits) for plan in some):
            raise InsufficientMemoryError
        return Answer(plans, fit(model, workload, device_memory=device_memory, host_memory=host_memory, plans=plans, usable=usable))
    except InsufficientMemoryError as error:
        missing = str(error) or f"nothing fits. {what_is_missing(closest(some, *limits), *limits)}"
    offers: list[Offer] = []
    if workload.device == "cuda":
        on_host = _fitting(model, replace(workload, solved_on_host=True), survey, usable, *limits)
        offers += [Offer(on_host)] if on_host is not None else []
    fewer = _fewer_targets(model, targets, workload, survey, usable, *limits)
    offers += [fewer] if fewer is not None else []
    needed = min((plan.device_bytes for plan in some if not plan.missing(None, host_memory)), default=float("inf"))
    cards = (name for name, card in CARDS.items() if workload.device == "cuda" and needed <= MARGIN * card.memory)
    return Answer(plans, None, missing, tuple(offers), tuple(cards))


def _fitting(
    model: nn.Module, workload: Workload, survey: Survey, usable: Callable[[Plan], bool], *limits: float | None
) -> Plan | None:
    try:
        return choose(filter(usable, forecast(model, workload, survey=survey)), *limits)
    except InsufficientMemoryError:
        return None


def _fewer_targets(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    workload: Workload,
    survey: Survey,
    usable: Callable[[Plan], bool],
    *limits: float | None,
) -> Offer | None:
    """The first that fits of: without the widest layers, without the two widest kinds, … A kind is all layers of one d_in."""
    kinds: dict[int, list[str]] = {}
    for name, layer in targets.items():
        ending = "experts" if isinstance(layer, ExpertMatrix) else name.rpartition(".")[2]
        kinds.setdefault(weight_shape(layer)[1], []).append(ending)
    left_out: dict[int, list[str]] = {}
    for width in sorted(kinds, reverse=True)[:-1]:
        left_out[width] = kinds[width]
        endings = tuple(dict.fromkeys(ending for each in left_out.values() for ending in each))
        rest = [ending for each, own in kinds.items() if each not in left_out for ending in own]
        if set(endings) & set(rest):  # layers of the same name have another width elsewhere
            continue
        plan = _fitting(model, workload, survey.without(left_out), usable, *limits)
        if plan is not None:
            return Offer(plan, endings)
    return None


def _is_hopeless(plan: Plan, device_memory: float | None, host_memory: float | None) -> bool:
    """Whether smaller batches cannot make a plan fit: the other parts of its largest phase are too large by themselves."""

    def exceeds(parts: Mapping[str, int], memory: float | None) -> bool:
        fixed: Any = sum(size for name, size in parts.items() if name not in OF_BATCHES)
        return memory is not None and fixed > MARGIN * memory

    return exceeds(plan.device_parts, device_memory) or exceeds(plan.host_parts, host_memory)
