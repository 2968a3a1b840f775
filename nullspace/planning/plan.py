"""A forecast of memory and time for every way to run a calibration, before anything is loaded.

`forecast` takes a model, which may be on the meta device (shapes, no weights), and a `Workload`, and returns one `Plan` for each
strategy and each place where weights and hidden states can be. `choose` picks the fastest that fits, `fit` looks at smaller batches
too, and `choose_strategy` is what `strategy="auto"` asks.

Memory is counted, not guessed: sums from `LowerTriangle` itself, activations from a forward pass on the meta device
(`nullspace.survey`), the solvers' workspace as they take it. Time is flops and bytes over throughputs (`Rates`), whose defaults are
estimates: good enough to rank plans, not to promise an hour.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from nullspace import solvers
from nullspace.checks import check_integer
from nullspace.model.linear import is_linear, weight_shape
from nullspace.model.sites import find_targets
from nullspace.model.weights import execution_device, offloaded_weights, size_in_bytes
from nullspace.model.wrappers import unwrap
from nullspace.moments.sums import STAGE_TOKENS
from nullspace.planning.memory import free_on_device, free_on_host
from nullspace.planning.survey import SiteShape, Survey, batch_shape
from nullspace.solvers import eigen

PLACES = ("device", "host", "disk")
# What a plan may take of the memory there is. The rest is for fragments that the allocator cannot use, and on a GPU for the CUDA
# context (some 0.5 GB), which PyTorch's figures leave out.
MARGIN = 0.92
# What libraries keep. On a GPU, buffers: cuBLAS takes 32 MiB on those of Hopper's kind, cuSOLVER less (an estimate). On a CPU also
# what the C library does not give back of freed pieces below 32 MiB, of every thread: 30 to 250 MB were measured
# (`benchmarks.plan_check`).
LIBRARIES = {"cuda": 48 * 2**20, "cpu": 160 * 2**20}
# `strategy="auto"` looks no closer at a model that takes less than this part of the memory even at a rough upper bound.
PLENTY = 0.25


@dataclass(frozen=True)
class Rates:
    """Throughputs of a machine. The defaults of `Rates.of` are estimates, and marked so.

    Attributes:
        forward: flops a second of the model's own products.
        sums: of the second moments, n · d² flops for n tokens.
        decomposition: of `torch.linalg.eigh`, 9 d³ flops in float64; the other solvers are counted relative to it.
        transfer: bytes a second between host and device, one way.
        disk: bytes a second, read or written.
        estimated: whether nobody has measured them on the machine at hand.
    """

    forward: float
    sums: float
    decomposition: float
    transfer: float
    disk: float
    estimated: bool = True

    @classmethod
    def of(cls, device: str, dtype: torch.dtype, threads: int | None = None) -> Rates:
        """Estimates for a kind of device.

        Args:
            device: `"cuda"`: a GPU of the H100's size, from data sheets at the usual part of the peak; nothing of it was measured.
                `"cpu"`: by thread, from `benchmarks/results` (an AMD EPYC with AVX2, float32).
            dtype: of the model's weights.
            threads: of a CPU; PyTorch's number by default.
        """
        half = dtype in (torch.bfloat16, torch.float16)
        if device == "cuda":
            return cls(forward=350e12 if half else 40e12, sums=200e12, decomposition=1e12, transfer=25e9, disk=2e9)
        threads = threads or torch.get_num_threads()
        return cls(
            forward=(25e9 if half else 45e9) * threads,
            sums=35e9 * threads,
            decomposition=27e9 * threads,
            transfer=math.inf,
            disk=1e9,
        )


@dataclass(frozen=True)
class Workload:
    """What is to be calibrated on, and where. The dtype is the model's own.

    Attributes:
        samples: sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        rank: columns of a basis.
        targets, exclude: as `nullspace.sites.find_targets` takes them.
        device: `"cuda"` or `"cpu"`: what computes. On a CPU everything is in the host's memory.
        weights: where they are before the run: `"device"`, `"host"`, `"disk"`; None for a forecast of each.
        rates: throughputs; `Rates.of(device, dtype)` by default.
    """

    samples: int = 256
    length: int = 1024
    batch_size: int = 4
    rank: int = 128
    targets: str | Iterable[str] = "all-linear"
    device: str = "cuda"
    weights: str | None = None
    rates: Rates | None = None
    exclude: str | Iterable[str] | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch_size", "rank"):
            check_integer(name, getattr(self, name))
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device must be 'cuda' or 'cpu', not {self.device!r}")
        if self.weights is not None and self.weights not in PLACES:
            raise ValueError(f"weights must be one of {', '.join(map(repr, PLACES))}, not {self.weights!r}")

    @property
    def batches(self) -> int:
        """How many; the last one may be smaller."""
        return -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class Plan:
    """What one way to run a calibration takes. All sizes in bytes, all times in seconds.

    Attributes:
        strategy: `"resident"` or `"layerwise"`.
        weights: where the weights are kept: `"device"`, `"host"` or `"disk"`.
        hidden_states: where `"layerwise"` keeps those between blocks; `"device"` for `"resident"`, which keeps none.
        batch_size: sequences a batch.
        device: `"cuda"` or `"cpu"`.
        device_parts: what fills the device's memory at its peak, by name: weights, sums, activations (of one batch), hidden states,
            arguments (of the blocks: masks, rotary tables), decomposition, bases, libraries. Empty on a CPU.
        host_parts: the same of the host's.
        disk_bytes: what is written: hidden states.
        flops: of forward, sums and decomposition.
        seconds: of forward, sums, decomposition, and moving weights and hidden states as far as nothing else hides it.
        tracked: whether the activations come from a forward pass on the meta device; if the model does not run there, they are
            estimated from the shapes of its layers, rather too high.
        estimated_rates: whether the throughputs behind `seconds` are estimates.
    """

    strategy: str
    weights: str
    hidden_states: str
    batch_size: int
    device: str
    device_parts: Mapping[str, int]
    host_parts: Mapping[str, int]
    disk_bytes: int
    flops: Mapping[str, float]
    seconds: Mapping[str, float]
    tracked: bool
    estimated_rates: bool

    @property
    def device_bytes(self) -> int:
        """Peak of the device's memory."""
        return sum(self.device_parts.values())

    @property
    def host_bytes(self) -> int:
        """Peak of the host's memory, above what the process holds without a model."""
        return sum(self.host_parts.values())

    @property
    def total_seconds(self) -> float:
        """Of everything."""
        return sum(self.seconds.values())

    @property
    def name(self) -> str:
        """Strategy and places in a few words."""
        between = f", hidden states on {self.hidden_states}" if self.strategy == "layerwise" else ""
        return f"{self.strategy}, weights on {self.weights}{between}, batches of {self.batch_size}"

    def missing(self, device_memory: float | None, host_memory: float | None) -> dict[str, int]:
        """How many bytes it wants beyond `MARGIN` of the memory there is: `{"device": …, "host": …}`, empty if it fits."""
        lacks = {
            "device": self.device_bytes - MARGIN * (math.inf if device_memory is None else device_memory),
            "host": self.host_bytes - MARGIN * (math.inf if host_memory is None else host_memory),
        }
        return {name: math.ceil(lack) for name, lack in lacks.items() if lack > 0}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all attributes, and the totals."""
        totals = {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes, "total_seconds": self.total_seconds}
        return {**asdict(self), **totals}


class Choice(NamedTuple):
    """What `strategy="auto"` comes to. `plan` is None where there was no need to look closely."""

    strategy: str
    hidden_states: str
    plan: Plan | None


def forecast(model: nn.Module, workload: Workload | None = None, *, batch: Any = None, survey: Survey | None = None) -> list[Plan]:
    """One plan for each strategy, place of the weights and place of the hidden states.

    Args:
        model: any module, on any device; one on the meta device will do. It is not changed, and nothing is computed.
        workload: what to calibrate on, and where.
        batch: an example of a batch (a mapping, a tensor or a tuple, as `stream_covariances` takes it), for models that take
            something else than `input_ids`; only its shapes and dtypes count.
        survey: of this model for this workload, if there is one already.

    Returns:
        The fastest first. Without layerwise plans where the blocks are no chain (`nullspace.blocks.find_blocks`), or a target lies
        outside of them.

    Raises:
        ValueError: if a target matches nothing (`find_targets`).
    """
    workload = workload or Workload()
    survey = survey or Survey(
        model,
        targets=find_targets(model, workload.targets, exclude=workload.exclude),
        batch_size=workload.batch_size,
        length=workload.length,
        device=workload.device,
        batch=batch,
    )
    places = [workload.weights] if workload.weights else list(PLACES)
    between = list(PLACES)
    if workload.device == "cpu":
        places = ["disk" if workload.weights == "disk" else "host"] if workload.weights else ["host", "disk"]
        between = ["host", "disk"]
    plans = [_resident(survey, workload, place) for place in places]
    if survey.layered:
        plans += [_layerwise(survey, workload, place, hidden) for place in places for hidden in between]
    return sorted(plans, key=lambda plan: plan.total_seconds)


def choose(plans: Iterable[Plan], device_memory: float | None = None, host_memory: float | None = None) -> Plan:
    """The fastest plan that fits; of equally fast ones, the one that takes least of the device.

    Args:
        plans: of `forecast`.
        device_memory: bytes there are; None for no limit. `MARGIN` of it is used.
        host_memory: the same.

    Raises:
        MemoryError: if none fits, naming the one that lacks least, its parts, and how much it lacks.
        ValueError: if there are no plans.
    """
    plans = list(plans)
    fitting = [plan for plan in plans if not plan.missing(device_memory, host_memory)]
    if fitting:
        return min(fitting, key=lambda plan: (plan.total_seconds, plan.device_bytes + plan.host_bytes))
    nearest = closest(plans, device_memory, host_memory)
    raise MemoryError(f"nothing fits. {what_is_missing(nearest, device_memory, host_memory)}")


def closest(plans: Iterable[Plan], device_memory: float | None = None, host_memory: float | None = None) -> Plan:
    """The plan that lacks least.

    Raises:
        ValueError: if there are no plans.
    """
    plans = list(plans)
    if not plans:
        raise ValueError("there are no plans to choose from")
    return min(plans, key=lambda plan: (sum(plan.missing(device_memory, host_memory).values()), plan.total_seconds))


def fit(
    model: nn.Module,
    workload: Workload | None = None,
    *,
    device_memory: float | None = None,
    host_memory: float | None = None,
    batch: Any = None,
) -> Plan:
    """The cheapest setting that fits: the fastest plan with the batch size given, or with the first half of it that fits.

    Args:
        model, workload, batch: as for `forecast`; with a `batch` its own size counts, and no smaller one is tried.
        device_memory, host_memory: as for `choose`.

    Raises:
        MemoryError: as `choose`, for batches of one sequence.
    """
    workload = workload or Workload()
    while True:
        plans = forecast(model, workload, batch=batch)
        try:
            return choose(plans, device_memory, host_memory)
        except MemoryError:
            if workload.batch_size == 1 or batch is not None:
                raise
        workload = replace(workload, batch_size=workload.batch_size // 2)


def what_is_missing(plan: Plan, device_memory: float | None, host_memory: float | None) -> str:
    """A sentence or two: what the plan needs, of what there is, and the largest of its parts."""
    lines = []
    for kind, lack in plan.missing(device_memory, host_memory).items():
        parts, there = (plan.device_parts, device_memory) if kind == "device" else (plan.host_parts, host_memory)
        largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in largest if size)
        lines.append(
            f"{plan.name} needs {gigabytes(sum(parts.values()))} of {kind} memory ({listed}), and of {gigabytes(there or 0)} there "
            f"it may take {MARGIN:.0%}: {gigabytes(lack)} too much"
        )
    return "; ".join(lines) + "." if lines else f"{plan.name} fits."


def gigabytes(size: float) -> str:
    """`1.2 GB` (10⁹ bytes); smaller sizes in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def parse_size(text: str) -> int:
    """Bytes of `"24GB"` (10⁹), `"24GiB"` (2³⁰), `"800 MB"` or a bare number.

    Raises:
        ValueError: if it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size: write 24GB, 24GiB or a number of bytes")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def cells(plan: Plan, *, fits: bool = True) -> dict[str, str]:
    """A row of a table: column title → text."""
    return {
        "strategy": plan.strategy,
        "weights": plan.weights,
        "hidden states": plan.hidden_states if plan.strategy == "layerwise" else "–",
        "device": gigabytes(plan.device_bytes) if plan.device == "cuda" else "–",
        "host": gigabytes(plan.host_bytes),
        "disk": gigabytes(plan.disk_bytes) if plan.disk_bytes else "–",
        "time": duration(plan.total_seconds),
        "fits": "yes" if fits else "no",
    }


def describe(plan: Plan) -> str:
    """Its name, what fills the memory, and where the time goes."""

    def listed(parts: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size)

    lines = [plan.name]
    if plan.device_parts:
        lines.append(f"  device {gigabytes(plan.device_bytes)}: {listed(plan.device_parts)}")
    lines.append(f"  host {gigabytes(plan.host_bytes)}: {listed(plan.host_parts)}")
    lines.append(
        f"  about {duration(plan.total_seconds)}: " + ", ".join(f"{n} {duration(s)}" for n, s in plan.seconds.items() if s)
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`12 s`, `3.4 min` or `1.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def choose_strategy(
    model: nn.Module,
    *,
    targets: str | Iterable[str] = "all-linear",
    batch: Any = None,
    batches: int | None = None,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    rank: int = 128,
    device_memory: float | None = None,
    host_memory: float | None = None,
) -> Choice:
    """What `strategy="auto"` comes to for a model as it is loaded, on this machine as it is now.

    Resident if that fits where the weights are; layerwise if it does not, or if the weights would have to come from elsewhere for
    every batch. If nothing fits, what lacks least, with a warning.

    Args:
        model: with its weights where they will be: on a device, or behind accelerate's hooks.
        targets: as for `stream_covariances`.
        batch: the first one; four sequences of 1024 tokens if it is not known.
        batches: how many; 64 if that is not known.
        device: what computes; where the weights are, or where accelerate would bring them, by default.
        hidden_states: `"auto"`, or the place that is asked for.
        rank: columns of a basis.
        device_memory, host_memory: bytes that a run may fill, the model's own included; what is free now, and the model's own, by
            default.

    Returns:
        `(strategy, hidden_states, plan)`. The plan is None where a rough upper bound was enough.

    Warns:
        UserWarning: if no plan fits.
    """
    model = unwrap(model)
    where = torch.device(device) if device is not None else execution_device(model) or torch.device("cpu")
    kind = "cuda" if where.type == "cuda" else "cpu"
    weights, on_device, on_host = _whereabouts(model, where)
    if device_memory is None and kind == "cuda":
        device_memory = free_on_device(where) + on_device
    if host_memory is None:
        free = free_on_host()
        host_memory = None if free is None else free + on_host
    size, length = batch_shape(batch) or (4, 1024)
    memory = device_memory if kind == "cuda" else host_memory
    settled = "host" if kind == "cpu" else "device"
    if weights in (settled, "device") and (memory is None or _upper_bound(model, targets, size * length) < PLENTY * memory):
        return Choice("resident", settled if hidden_states == "auto" else hidden_states, None)
    workload = Workload(
        samples=size * (batches or 64), length=length, batch_size=size, rank=rank, targets=targets, device=kind, weights=weights
    )
    plans = forecast(model, workload, batch=batch)
    if hidden_states != "auto":
        wanted = "host" if kind == "cpu" and hidden_states == "device" else hidden_states
        plans = [plan for plan in plans if plan.strategy == "resident" or plan.hidden_states == wanted]
    at_once = [plan for plan in plans if plan.strategy == "resident" and weights in (settled, "device")]
    try:
        # Equally fast as far as the estimates go, and without hidden states to keep: resident where that fits.
        plan = next((p for p in at_once if not p.missing(device_memory, host_memory)), None)
        plan = plan or choose(plans, device_memory, host_memory)
    except MemoryError:
        plan = closest(plans, device_memory, host_memory)
        warnings.warn(
            f"out of memory is to be expected: {what_is_missing(plan, device_memory, host_memory)} Smaller batches take less.",
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
) -> str:
    """What to say to somebody whose run was out of memory: what it was going to take, and the cheapest setting that fits.

    Args: as of `choose_strategy`, and
        strategy: the one that failed.
    """
    where = torch.device(device) if device is not None else execution_device(model) or torch.device("cpu")
    kind = "cuda" if where.type == "cuda" else "cpu"
    weights, on_device, on_host = _whereabouts(model, where)
    device_memory = free_on_device(where) + on_device if kind == "cuda" else None
    free = free_on_host()
    host_memory = None if free is None else free + on_host
    size, length = batch_shape(batch) or (4, 1024)
    workload = Workload(
        samples=size * (batches or 64), length=length, batch_size=size, rank=rank, targets=targets, device=kind, weights=weights
    )
    said = []
    failed = [plan for plan in forecast(model, workload) if plan.strategy == strategy]
    if failed:
        plan = min(failed, key=lambda plan: plan.device_bytes + plan.host_bytes)
        parts = plan.device_parts if kind == "cuda" else plan.host_parts
        listed = ", ".join(f"{name} {gigabytes(n)}" for name, n in sorted(parts.items(), key=lambda item: -item[1]) if n)
        said.append(f"By the forecast, {plan.name} takes {gigabytes(sum(parts.values()))} ({listed}).")
    try:
        plan = fit(model, replace(workload, weights=None), device_memory=device_memory, host_memory=host_memory)
    except MemoryError as error:
        said.append(f"There is no setting that fits: {error}")
    else:
        if (plan.strategy, plan.batch_size) == (strategy, size):  # so the forecast was wrong: what takes least, then
            plan = min(forecast(model, replace(workload, weights=None)), key=lambda plan: plan.device_bytes or plan.host_bytes)
        between = f", hidden_states={plan.hidden_states!r}" if plan.strategy == "layerwise" else ""
        said.append(
            f"What fits: strategy={plan.strategy!r}{between}, weights on the {plan.weights}, batches of {plan.batch_size}: "
            f"{gigabytes(plan.device_bytes if kind == 'cuda' else plan.host_bytes)}."
        )
    return " ".join(said)


def decomposition_cost(d: int, rank: int, device: str) -> tuple[int, float, float]:
    """What the bottom of one (d, d) second moment takes, by the method that `solvers.partial_eigh` chooses by itself.

    Returns:
        Bytes at the peak, the square itself included and the triangle not; flops; and the same flops at the rate of
        `torch.linalg.eigh`: half of a tridiagonal reduction is bound by memory, and triangular solves are no matrix products
        (`benchmarks/results/solvers-cpu.json`).
    """
    k, square = min(rank, d - 1), 8 * d * d
    if device == "cpu" and d >= eigen.INVERT_MIN_D and k <= d * eigen.INVERT_FRACTION:
        columns = eigen.MAX_COLUMNS * (k + eigen.GUARD)
        # A copy for the Cholesky factor, and PyTorch's own while it is made; later, the factor and the Krylov basis.
        size = max(3 * square, 2 * square + 8 * (columns * d + columns**2 + 4 * d * (k + eigen.GUARD)))
        flops = d**3 / 3 + 20 * d * d * (k + eigen.GUARD)
        return size, flops, flops / 0.45
    if device == "cpu" and d >= eigen.SUBSET_MIN_D and k <= d * eigen.SUBSET_FRACTION:
        # The reflectors lie in the square, and LAPACK works on them there; several small ones are at work at once.
        flops = 4 / 3 * d**3 + 4 * d * d * k
        return solvers.side_by_side(d) * (square + 64 * 8 * d + 32 * d * k), flops, 3 * flops
    return 4 * square + 16 * d * k, 9.0 * d**3, 9.0 * d**3  # vectors, and a workspace of two squares


def _resident(survey: Survey, workload: Workload, weights: str) -> Plan:
    # Where the weights are elsewhere, accelerate brings them layer by layer, for every batch.
    base = {"weights": survey.weights if weights == "device" or _at_home(workload, weights) else survey.largest_layer}
    libraries = {"libraries": LIBRARIES[workload.device]}
    every = {"sums": sum(site.triangle + site.staging for site in survey.sites)}
    device = [{**base, **every, "activations": survey.activations, **libraries}]
    host = [_host_weights(survey, workload, weights)]
    left, bases = every["sums"], 0
    for site in survey.sites:
        left -= site.staging  # its buffer goes when it is read, its triangle when the next site is asked for
        device.append({**base, "sums": left, "decomposition": decomposition_cost(site.d_in, workload.rank, workload.device)[0]})
        bases += _basis_bytes(site, workload)
        device[-1].update(libraries)
        host.append({**host[0], "bases": bases})
        left -= site.triangle
    moved = workload.batches * survey.weights * (0 if weights == "device" else 1)
    return _plan(
        survey,
        workload,
        strategy="resident",
        weights=weights,
        hidden_states="host" if workload.device == "cpu" else "device",
        phases=list(zip(device, host, strict=True)),
        forward=survey.flops * workload.batches,
        weight_seconds=moved / _weight_rate(survey, workload, weights),
    )


def _layerwise(survey: Survey, workload: Workload, weights: str, hidden_states: str) -> Plan:
    batches, count = workload.batches, len(survey.block_weights)
    whole = weights == "device" or _at_home(workload, weights)
    kept = survey.hidden * batches
    on_device, on_host = (kept if hidden_states == place else 0 for place in ("device", "host"))
    # Hidden states that are kept elsewhere: one batch's at hand, the next one's and the last one's on their way.
    if workload.device == "cpu":
        passing = 2 * survey.hidden if hidden_states == "disk" else 0
    else:
        passing = 0 if hidden_states == "device" else 3 * survey.hidden
    staged = 2 * survey.hidden if hidden_states == "disk" and workload.device == "cuda" else 0
    held = {"arguments": survey.arguments * batches, "hidden states": on_device + passing, "libraries": LIBRARIES[workload.device]}
    host_held = {**_host_weights(survey, workload, weights), "hidden states": on_host + staged}
    outside = survey.weights if whole else survey.outside
    phases = [({"weights": outside, "activations": survey.prologue, **held}, {**host_held})]
    # The rehearsal of the first batch: a block beside the first one and what is outside of them; of the hidden states those of the
    # embeddings and a copy, a block's input and a copy, and its first output; of the other arguments two copies.
    rehearsal = {
        "weights": survey.weights if whole else survey.outside + survey.block_weights[0] + max(survey.block_weights),
        "activations": max(survey.block_activations),
        "arguments": 3 * survey.arguments,
        "hidden states": 5 * survey.hidden,
        "libraries": LIBRARIES[workload.device],
    }
    phases.append((rehearsal, host_held))
    seconds, bases = 0.0, 0
    rates, rate = _rates(survey, workload), _weight_rate(survey, workload, weights)
    for index in range(count):
        here = survey.block_weights[index]
        following = survey.block_weights[index + 1] if index + 1 < count else 0
        loaded = {"weights": survey.weights if whole else here + following}
        sites = [site for site in survey.sites if site.block == index]
        left = sum(site.triangle + site.staging for site in sites)
        host = {**host_held, "bases": bases}
        # On a CPU, small sites of the block before may still wait for others to be decomposed with.
        before = sum(site.triangle for site in survey.sites if site.block == index - 1)
        waiting = min(eigen.TOGETHER_BYTES, before) if workload.device == "cpu" else 0
        phases.append(({**loaded, "sums": left + waiting, "activations": survey.block_activations[index], **held}, host))
        for site in sites:
            left -= site.staging
            workspace = decomposition_cost(site.d_in, workload.rank, workload.device)[0]
            bases += _basis_bytes(site, workload)
            phases.append(({**loaded, "sums": left, "decomposition": workspace, **held}, {**host, "bases": bases}))
            left -= site.triangle
        if not whole:
            # The next block's weights come while this one computes.
            busy = survey.block_flops[index] * batches / rates.forward + _sum_flops(sites, workload) / rates.sums
            seconds += max(0.0, following / rate - busy) + (here / rate if index == 0 else 0.0)
    slow = {"device": math.inf, "host": rates.transfer, "disk": rates.disk}[hidden_states]
    return _plan(
        survey,
        workload,
        strategy="layerwise",
        weights=weights,
        hidden_states=hidden_states,
        phases=phases,
        forward=sum(survey.block_flops) * batches,
        weight_seconds=seconds,
        hidden_seconds=2 * count * kept / slow,
        disk_bytes=kept if hidden_states == "disk" else 0,
    )


def _plan(
    survey: Survey,
    workload: Workload,
    *,
    strategy: str,
    weights: str,
    hidden_states: str,
    phases: list[tuple[dict[str, int], dict[str, int]]],
    forward: float,
    weight_seconds: float,
    hidden_seconds: float = 0.0,
    disk_bytes: int = 0,
) -> Plan:
    if workload.device == "cpu":  # one memory
        phases = [({}, {name: device.get(name, 0) + host.get(name, 0) for name in device | host}) for device, host in phases]
    rates = _rates(survey, workload)
    costs = [decomposition_cost(site.d_in, workload.rank, workload.device) for site in survey.sites]
    flops = {
        "forward": float(forward),
        "sums": _sum_flops(survey.sites, workload),
        "decomposition": sum(cost[1] for cost in costs),
    }
    return Plan(
        strategy=strategy,
        weights=weights,
        hidden_states=hidden_states,
        batch_size=workload.batch_size,
        device=workload.device,
        device_parts=max((device for device, _ in phases), key=lambda parts: sum(parts.values())),
        host_parts=max((host for _, host in phases), key=lambda parts: sum(parts.values())),
        disk_bytes=disk_bytes,
        flops=flops,
        seconds={
            "forward": flops["forward"] / rates.forward,
            "sums": flops["sums"] / rates.sums,
            "decomposition": sum(cost[2] for cost in costs) / rates.decomposition,
            "weights": weight_seconds,
            "hidden states": hidden_seconds,
        },
        tracked=survey.tracked,
        estimated_rates=rates.estimated,
    )


def _rates(survey: Survey, workload: Workload) -> Rates:
    return workload.rates or Rates.of(workload.device, survey.dtype)


def _at_home(workload: Workload, weights: str) -> bool:
    """On a CPU, weights on the host need no loading."""
    return workload.device == "cpu" and weights != "disk"


def _weight_rate(survey: Survey, workload: Workload, weights: str) -> float:
    rates = _rates(survey, workload)
    if weights == "disk":
        return min(rates.disk, rates.transfer)
    return math.inf if _at_home(workload, weights) else rates.transfer


def _host_weights(survey: Survey, workload: Workload, weights: str) -> dict[str, int]:
    """Of a GPU's weights, what the host keeps: all, or one tensor on its way and its pinned copy. A CPU's are its own."""
    if workload.device == "cpu" or weights == "device":
        return {"weights": 0}
    return {"weights": survey.weights + survey.largest_tensor if weights == "host" else 2 * survey.largest_tensor}


def _sum_flops(sites: Iterable[SiteShape], workload: Workload) -> float:
    return float(sum(site.d_in**2 for site in sites)) * workload.samples * workload.length


def _basis_bytes(site: SiteShape, workload: Workload) -> int:
    return 8 * site.d_in * min(workload.rank, site.d_in - 1)


def _whereabouts(model: nn.Module, where: torch.device) -> tuple[str, int, int]:
    """Where the weights are, and how many bytes of them are on the device that computes, and on the host."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()

    def total(kind: str) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t.device.type == kind)

    stored = [weights for weights in map(offloaded_weights, model.modules()) if weights is not None]
    on_disk = any(getattr(getattr(weights, "dataset", weights), "index", None) for weights in stored)
    if on_disk:
        place = "disk"
    elif stored or total(where.type) < total("cpu") + total(where.type):
        place = "host" if where.type != "cpu" or stored else "device"
    else:
        place = "device"
    return place, total(where.type), total("cpu")


def _upper_bound(model: nn.Module, targets: str | Iterable[str], tokens: int) -> int:
    """More than a resident run can take: every target a site of its own, every layer's output kept several times over."""
    widths = [weight_shape(module)[1] for module in find_targets(model, targets).values()]
    outputs = sum(sum(weight_shape(m)) for m in model.modules() if is_linear(m))
    sums = sum(8 * d * d + 16 * max(STAGE_TOKENS, 2 * d) * d for d in widths)
    return size_in_bytes(model) + sums + 32 * max(widths) ** 2 + 16 * tokens * outputs + max(LIBRARIES.values())
