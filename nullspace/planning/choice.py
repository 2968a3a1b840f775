"""Which plan to take: the fastest that fits (`choose`, with smaller batches `fit`), that of `strategy="auto"` (`choose_strategy`),
and what to change after a run that was out of memory (`advice`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from nullspace.devices import free_on_device
from nullspace.errors import InputError, InsufficientMemoryError, ResourceUseWarning
from nullspace.model.linear import is_linear, weight_shape
from nullspace.model.sites import find_targets
from nullspace.model.weights import execution_device, offloaded_weights, size_in_bytes
from nullspace.model.wrappers import unwrap
from nullspace.moments.sums import STAGE_TOKENS
from nullspace.planning.forecast import LIBRARIES, forecast
from nullspace.planning.memory import free_on_host
from nullspace.planning.plan import Plan, Workload, listed, what_is_missing
from nullspace.planning.survey import batch_shape
from nullspace.planning.units import gigabytes

# `strategy="auto"` makes no forecast for a model that takes less than this fraction of the memory by a rough upper bound.
PLENTY = 0.25


class Choice(NamedTuple):
    """The result of `strategy="auto"`. `plan` is None where a rough upper bound was enough."""

    strategy: str
    hidden_states: str
    plan: Plan | None


def choose(plans: Iterable[Plan], device_memory: float | None = None, host_memory: float | None = None) -> Plan:
    """The fastest plan that fits; of equally fast ones, the one that takes the least memory.

    Args:
        plans: of `forecast`.
        device_memory: bytes of the device; None for no limit. A plan may take `MARGIN` of it.
        host_memory: the same for the host.

    Raises:
        MemoryError: if none fits, naming the plan that exceeds the memory least, its parts, and how much is missing.
        ValueError: if there are no plans.
    """
    plans = list(plans)
    fitting = [plan for plan in plans if not plan.missing(device_memory, host_memory)]
    if fitting:
        return min(fitting, key=lambda plan: (plan.total_seconds, plan.device_bytes + plan.host_bytes))
    nearest = closest(plans, device_memory, host_memory)
    raise InsufficientMemoryError(f"nothing fits. {what_is_missing(nearest, device_memory, host_memory)}")


def closest(plans: Iterable[Plan], device_memory: float | None = None, host_memory: float | None = None) -> Plan:
    """The plan that exceeds the memory least.

    Raises:
        ValueError: if there are no plans.
    """
    plans = list(plans)
    if not plans:
        raise InputError("there are no plans to choose from")
    return min(plans, key=lambda plan: (sum(plan.missing(device_memory, host_memory).values()), plan.total_seconds))


def fit(
    model: nn.Module,
    workload: Workload | None = None,
    *,
    device_memory: float | None = None,
    host_memory: float | None = None,
    batch: Any = None,
    plans: list[Plan] | None = None,
    usable: Callable[[Plan], bool] = lambda plan: True,
) -> Plan:
    """The fastest plan that fits with the batch size of the workload, or else with the first half of it that fits.

    Args:
        model, workload, batch: as for `forecast`; with a `batch` its own size counts, and no smaller one is tried.
        device_memory, host_memory: as for `choose`.
        plans: of `forecast` for this workload, if they were made before.
        usable: which plans may be chosen.

    Raises:
        MemoryError: as `choose`, for batches of one sequence.
    """
    workload = workload or Workload()
    while True:
        plans = plans or forecast(model, workload, batch=batch)
        try:
            return choose(filter(usable, plans), device_memory, host_memory)
        except MemoryError:
            if workload.batch_size == 1 or batch is not None:
                raise
        workload, plans = replace(workload, batch_size=workload.batch_size // 2), None


def choose_strategy(
    model: nn.Module,
    *,
    targets: str | Iterable[str] = "all-linear",
    batch: Any = None,
    batches: int | None = None,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    rank: int = 128,
    experts: str = "auto",
    device_memory: float | None = None,
    host_memory: float | None = None,
) -> Choice:
    """What `strategy="auto"` means for a model as it is loaded, with the memory that is free now.

    Resident if that fits where the weights are; layerwise if it does not, or if every batch would have to bring the weights from
    elsewhere. If no plan fits, the one that exceeds the memory least, with a warning.

    Args:
        model: with its weights where they will be: on a device, or behind accelerate's hooks.
        targets: as for `stream_covariances`.
        batch: the first one; without it, four sequences of 1024 tokens are assumed.
        batches: their number; without it, 64 is assumed.
        device: the one that computes; by default where the weights are, or where accelerate would bring them.
        hidden_states: `"auto"`, or a place.
        rank: columns of a basis.
        experts: as for `stream_covariances`.
        device_memory, host_memory: bytes that a run may fill, the model's own included; by default those that are free now and
            the model's own.

    Returns:
        `(strategy, hidden_states, plan)`. The plan is None where a rough upper bound was enough.

    Warns:
        UserWarning: if no plan fits.
    """
    model = unwrap(model)
    workload, *limits = _as_loaded(model, targets, batch, batches, device, rank, experts, device_memory, host_memory)
    cpu, weights = workload.device == "cpu", workload.weights
    memory = limits[1] if cpu else limits[0]
    in_place = weights in ("device", "host" if cpu else "device")
    if in_place and (memory is None or _upper_bound(model, workload) < PLENTY * memory):
        settled = "host" if cpu else "device"
        return Choice("resident", settled if hidden_states == "auto" else hidden_states, None)
    plans = forecast(model, workload, batch=batch)
    if hidden_states != "auto":
        wanted = "host" if cpu and hidden_states == "device" else hidden_states
        plans = [plan for plan in plans if plan.strategy == "resident" or plan.hidden_states == wanted]
    try:
        # By the estimates as fast as layerwise, and without hidden states to keep: resident where that fits.
        resident = (plan for plan in plans if in_place and plan.strategy == "resident" and not plan.missing(*limits))
        plan = next(resident, None) or choose(plans, *limits)
    except MemoryError:
        plan = closest(plans, *limits)
        warnings.warn(
            f"out of memory is to be expected: {what_is_missing(plan, *limits)} Smaller batches take less.",
            ResourceUseWarning,
            stacklevel=3,
        )
    return Choice(plan.strategy, plan.hidden_states if hidden_states == "auto" else hidden_states, plan)


def advice(
    model: nn.Module,
    *,
    targets: str | Iterable[str],
    strategy: str,
    batch: Any = None,
    batches: int | None = None,
    device: torch.device | str | None = None,
    rank: int = 128,
    experts: str = "auto",
) -> str:
    """The end of an out-of-memory error: what the run takes by the forecast, and the fastest setting that fits.

    Args: as of `choose_strategy`, and
        strategy: the one that failed.
    """
    workload, *limits = _as_loaded(unwrap(model), targets, batch, batches, device, rank, experts)
    cpu, sentences = workload.device == "cpu", []
    failed = [plan for plan in forecast(model, workload) if plan.strategy == strategy]
    if failed:
        plan = min(failed, key=lambda plan: plan.device_bytes + plan.host_bytes)
        parts = plan.host_parts if cpu else plan.device_parts
        sentences.append(f"By the forecast, {plan.name} takes {gigabytes(sum(parts.values()))} ({listed(parts)}).")
    anywhere = replace(workload, weights=None)
    try:
        plan = fit(model, anywhere, device_memory=limits[0], host_memory=limits[1])
    except MemoryError as error:
        return " ".join([*sentences, f"There is no setting that fits: {error}"])
    if (plan.strategy, plan.batch_size) == (strategy, workload.batch_size):  # the forecast was too low: take the smallest plan
        plan = min(forecast(model, anywhere), key=lambda plan: plan.device_bytes or plan.host_bytes)
    between = f", hidden_states={plan.hidden_states!r}" if plan.strategy == "layerwise" else ""
    sentences.append(
        f"What fits: strategy={plan.strategy!r}{between}, weights on the {plan.weights}, batches of {plan.batch_size}: "
        f"{gigabytes(plan.host_bytes if cpu else plan.device_bytes)}."
    )
    return " ".join(sentences)


def _as_loaded(
    model: nn.Module,
    targets: str | Iterable[str],
    batch: Any,
    batches: int | None,
    device: torch.device | str | None,
    rank: int,
    experts: str,
    device_memory: float | None = None,
    host_memory: float | None = None,
) -> tuple[Workload, float | None, float | None]:
    """The workload of a loaded model, and the memory of the device and the host: what is given, or what is free and the model's."""
    where = torch.device(device) if device is not None else execution_device(model) or torch.device("cpu")
    kind = "cuda" if where.type == "cuda" else "cpu"
    weights, on_device, on_host = _location(model, where)
    if device_memory is None and kind == "cuda":
        device_memory = free_on_device(where) + on_device
    if host_memory is None and (free := free_on_host()) is not None:
        host_memory = free + on_host
    size, length = batch_shape(batch) or (4, 1024)
    samples = size * (batches or 64)
    workload = Workload(samples, length, size, rank, targets, kind, weights, experts=experts)
    return workload, device_memory, host_memory


def _location(model: nn.Module, where: torch.device) -> tuple[str, int, int]:
    """Where the weights are, and how many bytes of them are on the device that computes, and on the host."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()

    def total(kind: str) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t.device.type == kind)

    stored = [weights for weights in map(offloaded_weights, model.modules()) if weights is not None]
    place = "device"
    if any(getattr(getattr(weights, "dataset", weights), "index", None) for weights in stored):
        place = "disk"
    elif stored or (where.type != "cpu" and total(where.type) < total("cpu") + total(where.type)):
        place = "host"
    return place, total(where.type), total("cpu")


def _upper_bound(model: nn.Module, workload: Workload) -> int:
    """More than a resident run can take: every target a site of its own, every layer's output kept several times over."""
    tokens = workload.batch_size * workload.length
    widths = [weight_shape(module)[1] for module in find_targets(model, workload.targets).values()]
    outputs = sum(sum(weight_shape(m)) for m in model.modules() if is_linear(m))
    sums = sum(8 * d * d + 16 * max(STAGE_TOKENS, 2 * d) * d for d in widths)
    return size_in_bytes(model) + sums + 32 * max(widths) ** 2 + 16 * tokens * outputs + max(LIBRARIES.values())
