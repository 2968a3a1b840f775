"""What a plan is: the machine (`Rates`), the work (`Workload`), and what one way to do it takes (`Plan`), also as text.

`nullspace.planning.forecast` makes plans; `nullspace.planning.choice` picks one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nullspace.checks import check_integer, check_one_of
from nullspace.planning.cards import OF_DOUBLE, REFERENCE, Card
from nullspace.planning.units import duration, gigabytes
from nullspace.solvers.cost import EIGH_ON_CUDA

PLACES = ("device", "host", "disk")
EXPERTS = ("auto", "each", "pooled")
"""How experts are summed: see `nullspace.stream_covariances`."""
# What a plan may take of the memory there is. The rest is for fragments that the allocator cannot use, and on a GPU for the CUDA
# context (some 0.5 GB), which PyTorch's figures leave out.
MARGIN = 0.92


@dataclass(frozen=True)
class Rates:
    """Throughputs of a machine. The defaults of `Rates.of` are estimates, and marked so.

    Attributes:
        forward: flops a second of the model's own products.
        sums: of the second moments, n · d² flops for n tokens.
        decomposition: of `torch.linalg.eigh`, 9 d³ flops in float64; the other solvers are counted relative to it.
        transfer: bytes a second between host and device, one way.
        disk: bytes a second, read or written.
        estimated: whether they are estimates, not measurements of this machine.
    """

    forward: float
    sums: float
    decomposition: float
    transfer: float
    disk: float
    estimated: bool = True

    @classmethod
    def of(cls, device: str, dtype: torch.dtype, threads: int | None = None, card: Card = REFERENCE) -> Rates:
        """Estimates for a kind of device.

        Of an H100 in bfloat16 they are measured, on two blocks of Llama-3-8B (`benchmarks/results/first_gpu-h100`); most of the
        seconds of the sums are the host's there. Those of other cards are assumed in proportion: products of the model and sums to
        the peak of 16-bit products (of a float32 model to that of float32), eigenproblems, half of whose work waits for memory, to
        its bandwidth, and at most half of the float64 peak.

        Args:
            device: `"cuda"`, or `"cpu"`: by thread, from `benchmarks/results` (an AMD EPYC with AVX2, float32).
            dtype: of the model's weights.
            threads: of a CPU; PyTorch's number by default.
            card: the GPU; an H100 by default.
        """
        half = dtype in (torch.bfloat16, torch.float16)
        if device == "cuda":
            products, memory = card.half / REFERENCE.half, card.bandwidth / REFERENCE.bandwidth
            return cls(
                forward=380e12 * products if half else 40e12 * card.single / REFERENCE.single,
                sums=125e12 * products,
                decomposition=min(EIGH_ON_CUDA * memory, OF_DOUBLE * card.double),
                transfer=55e9 * card.link / REFERENCE.link,
                disk=2e9,
            )
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
    """The data of a calibration and the device that computes. The dtype is the model's own.

    Attributes:
        samples: sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        rank: columns of a basis.
        targets, exclude: as for `nullspace.model.sites.find_targets`.
        experts: `"each"`, `"pooled"` or `"auto"`: as for `nullspace.stream_covariances`. `"auto"` goes by tokens and time.
        device: `"cuda"` or `"cpu"`. On a CPU everything is in the host's memory.
        weights: where they are before the run: `"device"`, `"host"`, `"disk"`; None for a forecast of each.
        rates: throughputs; `Rates.of(device, dtype)` by default.
        solved_on_host: whether the sums are kept (`nullspace covariances`), and solved on the host afterwards.
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
    experts: str = "auto"
    solved_on_host: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch_size", "rank"):
            check_integer(name, getattr(self, name))
        check_one_of("experts", self.experts, EXPERTS)
        check_one_of("device", self.device, ("cuda", "cpu"))
        if self.weights is not None:
            check_one_of("weights", self.weights, PLACES)

    @property
    def batches(self) -> int:
        """Number of batches; the last one may be smaller."""
        return -(-self.samples // self.batch_size)


@dataclass(frozen=True)
class Plan:
    """Memory and time of one way to run a calibration. Sizes in bytes, times in seconds.

    Attributes:
        strategy: `"resident"` or `"layerwise"`.
        weights: where the weights are kept: `"device"`, `"host"` or `"disk"`.
        hidden_states: where `"layerwise"` keeps those between blocks; `"device"` (on a CPU `"host"`) for `"resident"`, which keeps
            none.
        batch_size: sequences a batch.
        device: `"cuda"` or `"cpu"`.
        device_parts: the device's memory at its peak, by name: weights, sums, activations (of one batch), hidden states, arguments
            (of the blocks: masks, rotary tables), decomposition, libraries. Empty on a CPU. It is what a run needs: where there is
            more, a GPU solves several sites at once.
        host_parts: the same for the host, with bases; pinned memory as PyTorch allocates it.
        disk_bytes: hidden states that are written.
        flops: of forward, sums and decomposition.
        seconds: of forward, sums, decomposition, and of the transfers of weights and hidden states that computation does not hide.
            Of decomposition as if one site were solved after the other: what a GPU gains by several at once, and beside the next
            block's forward pass, was not measured.
        tracked: whether the activations come from a forward pass on the meta device. If the model does not run there, they are
            estimated from the shapes of its layers, with a tendency to be too high.
        estimated_rates: whether `seconds` come from estimated throughputs.
        solved_on_host: as of `Workload`.
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
    solved_on_host: bool = False

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
        """Sum of `seconds`."""
        return sum(self.seconds.values())

    @property
    def name(self) -> str:
        """Strategy and places in a few words."""
        between = f", hidden states on {self.hidden_states}" if self.strategy == "layerwise" else ""
        return f"{self.strategy}, weights on {self.weights}{between}, batches of {self.batch_size}"

    def missing(self, device_memory: float | None, host_memory: float | None) -> dict[str, int]:
        """Bytes beyond `MARGIN` of the memory (None: no limit): `{"device": …, "host": …}`, empty if the plan fits."""
        wanted = {"device": (self.device_bytes, device_memory), "host": (self.host_bytes, host_memory)}
        lacks = {kind: size - MARGIN * memory for kind, (size, memory) in wanted.items() if memory is not None}
        return {kind: math.ceil(lack) for kind, lack in lacks.items() if lack > 0}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all attributes, and the totals."""
        totals = {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes, "total_seconds": self.total_seconds}
        return {**asdict(self), **totals}


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
    """The plan's name, its memory by part, and its time by part, in lines."""
    lines = [plan.name]
    if plan.device_parts:
        lines.append(f"  device {gigabytes(plan.device_bytes)}: {listed(plan.device_parts)}")
    lines.append(f"  host {gigabytes(plan.host_bytes)}: {listed(plan.host_parts)}")
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in plan.seconds.items() if seconds)
    return "\n".join([*lines, f"  about {duration(plan.total_seconds)}: {times}"])


def what_is_missing(plan: Plan, device_memory: float | None, host_memory: float | None) -> str:
    """For each memory that is too small: what the plan needs, the largest three parts, and the bytes that are missing."""
    lines = []
    for kind, lack in plan.missing(device_memory, host_memory).items():
        parts, memory = (plan.device_parts, device_memory) if kind == "device" else (plan.host_parts, host_memory)
        lines.append(
            f"{plan.name} needs {gigabytes(sum(parts.values()))} of {kind} memory ({listed(parts, 3)}), and of "
            f"{gigabytes(memory or 0)} there it may take {MARGIN:.0%}: {gigabytes(lack)} too much"
        )
    return "; ".join(lines) + "." if lines else f"{plan.name} fits."


def listed(parts: Mapping[str, int], most: int | None = None) -> str:
    """Parts of a memory as text, the largest first, without empty ones; at most `most`."""
    largest = sorted(parts.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in largest if size)
