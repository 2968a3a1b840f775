"""A forecast of memory and time for every way to run a calibration, before anything is loaded.

`forecast` takes a model, which may be on the meta device (shapes, no weights), and a `Workload`, and returns one `Plan` for each
strategy and each place where weights and hidden states can be.

Memory is counted: sums from `LowerTriangle` itself, activations from a forward pass on the meta device
(`nullspace.planning.survey`), the workspace of the solvers as they allocate it. Time is flops and bytes over throughputs (`Rates`);
with their defaults, which are estimates, it ranks plans and predicts no run time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nullspace.model.experts import ExpertMatrix
from nullspace.model.sites import find_targets
from nullspace.model.weights import PINNED_AT_ONCE
from nullspace.planning.experts import should_pool
from nullspace.planning.memory import pinned_bytes, power_of_two
from nullspace.planning.plan import PLACES, Plan, Rates, Workload
from nullspace.planning.survey import SiteShape, Survey
from nullspace.solvers import decomposition_cost
from nullspace.solvers.lanes import LANES
from nullspace.solvers.together import TOGETHER_BYTES

# Memory that libraries keep. On a GPU, buffers: 32 MiB of cuBLAS on Hopper for each stream that takes products, and less of
# cuSOLVER (an estimate). On a CPU also freed pieces below 32 MiB that the C library keeps, for every thread: 30 to 250 MB were
# measured (`benchmarks.plan_check`).
LIBRARIES = {"cuda": (48 + 32 * LANES) * 2**20, "cpu": 160 * 2**20}

Parts = dict[str, int]
"""Bytes of one memory by name."""


def forecast(model: nn.Module, workload: Workload | None = None, *, batch: Any = None, survey: Survey | None = None) -> list[Plan]:
    """One plan for each strategy, place of the weights and place of the hidden states.

    Args:
        model: any module, on any device, the meta device included. It is not changed, and nothing is computed.
        workload: the data and the device.
        batch: an example of a batch (a mapping, a tensor or a tuple, as for `stream_covariances`), for models that take something
            else than `input_ids`; only its shapes and dtypes count.
        survey: of this model for this workload, if it was made before.

    Returns:
        The fastest first. Without layerwise plans where the model has no blocks (`nullspace.model.blocks.find_blocks`), or a target
        lies behind them.

    Raises:
        ValueError: if a target matches nothing (`find_targets`).
    """
    workload = workload or Workload()
    survey = survey or survey_of(model, workload, batch=batch)
    places, between = [workload.weights] if workload.weights else list(PLACES), list(PLACES)
    if workload.device == "cpu":  # its own memory is the host's
        places = list(dict.fromkeys("host" if place == "device" else place for place in places))
        between = ["host", "disk"]
    settings = [_Setting(survey, workload, place) for place in places]
    plans = [_resident(setting) for setting in settings]
    if survey.layered:
        plans += [_layerwise(setting, hidden) for setting in settings for hidden in between]
    return sorted(plans, key=lambda plan: plan.total_seconds)


def survey_of(model: nn.Module, workload: Workload, *, batch: Any = None) -> Survey:
    """The survey of a model that a forecast for this workload needs; arguments as of `forecast`."""
    targets = find_targets(model, workload.targets, exclude=workload.exclude)
    return Survey(
        model,
        targets=targets,
        pooled=is_pooled(targets, workload),
        batch_size=workload.batch_size,
        length=workload.length,
        device=workload.device,
        batch=batch,
    )


def is_pooled(targets: Mapping[str, nn.Module], workload: Workload, free: float | None = None) -> bool:
    """Whether experts are pooled in a forecast.

    Args:
        targets: name → layer.
        workload: the data and the device.
        free: bytes that the sums could have; None if that is unknown.
    """
    matrix = next((layer for layer in targets.values() if isinstance(layer, ExpertMatrix)), None)
    if matrix is None or workload.experts != "auto":
        return workload.experts == "pooled"
    rates = workload.rates or Rates.of(workload.device, matrix.stack.dtype)
    tokens = float(workload.samples * workload.length)
    return should_pool(targets, tokens=tokens, rank=workload.rank, device=workload.device, rates=rates, free=free)


@dataclass(frozen=True, eq=False)
class _Setting:
    """What the plans of both strategies are computed from."""

    survey: Survey
    workload: Workload
    weights: str

    @functools.cached_property
    def rates(self) -> Rates:
        return self.workload.rates or Rates.of(self.workload.device, self.survey.dtype)

    @property
    def weight_rate(self) -> float:
        """Bytes a second at which weights come to the device that computes."""
        return min(self.rates.disk, self.rates.transfer) if self.weights == "disk" else self.rates.transfer

    @property
    def in_place(self) -> bool:
        """Whether the device that computes holds all weights; a CPU also computes with those of the host."""
        return self.weights == "device" or (self.workload.device == "cpu" and self.weights != "disk")

    @property
    def libraries(self) -> Parts:
        return {"libraries": LIBRARIES[self.workload.device]}

    def host_weights(self) -> Parts:
        """A GPU's weights on the host: all, or one tensor of the disk; and pinned copies on their way. None beside a CPU's own."""
        if self.workload.device == "cpu" or self.weights == "device":
            return {"weights": 0}
        tensor = self.survey.largest_tensor
        kept = self.survey.weights if self.weights == "host" else tensor
        return {"weights": kept + PINNED_AT_ONCE * power_of_two(tensor)}

    @functools.cached_property
    def costs(self) -> dict[int, tuple[int, float, float]]:
        """Of an eigenproblem by its order: bytes, flops, and flops at the rate of `torch.linalg.eigh`."""
        rank, device = self.workload.rank, "cpu" if self.workload.solved_on_host else self.workload.device
        return {d: decomposition_cost(d, rank, device, self.rates.decomposition) for d in {site.d_in for site in self.survey.sites}}

    @property
    def solving(self) -> Rates:
        """Of the machine that solves."""
        return Rates.of("cpu", self.survey.dtype) if self.workload.solved_on_host else self.rates

    def solved_later(self) -> Parts:
        """The host's memory where it solves what `nullspace covariances` has kept: one site after the other."""
        bases = sum(map(self.basis, self.survey.sites))
        return {"bases": bases, "decomposition": max((size for size, _, _ in self.costs.values()), default=0)}

    def basis(self, site: SiteShape) -> int:
        """Bytes of a site's basis."""
        return 8 * site.d_in * min(self.workload.rank, site.d_in - 1)

    def sum_flops(self, sites: Iterable[SiteShape]) -> float:
        return float(sum(site.share * site.d_in**2 for site in sites)) * self.workload.samples * self.workload.length

    def busy(self, index: int) -> float:
        """Seconds that the device computes in a block."""
        seconds = self.survey.block_flops[index] * self.workload.batches / self.rates.forward
        return seconds + self.sum_flops(self.survey.sites_of(index)) / self.rates.sums

    def read_one_by_one(self, sites: list[SiteShape], weights: Parts, held: Parts) -> Iterator[tuple[Parts, int]]:
        """The device's memory while each site in turn is decomposed, and the bytes of the bases until then.

        More sites are solved at once, and beside the next block, where there is room for it (`nullspace.solvers.lanes`).
        """
        left, bases = sum(site.triangle + site.staging for site in sites), 0
        for _, alike in itertools.groupby(sites, lambda site: (site.d_in, site.triangle, site.staging)):
            run = list(alike)
            for number, site in enumerate(run):
                left -= site.staging  # the buffer is freed when the site is read, the triangle when the next site is asked for
                bases += 0 if self.workload.solved_on_host else self.basis(site)
                # Of sites that are alike, the first takes the most of the device, and the last of the host.
                if not self.workload.solved_on_host and number in (0, len(run) - 1):
                    yield {**weights, "sums": left, "decomposition": self.costs[site.d_in][0], **held}, bases
                left -= site.triangle


def _resident(setting: _Setting) -> Plan:
    survey, workload = setting.survey, setting.workload
    # Weights that are elsewhere are brought by accelerate layer by layer, for every batch.
    weights = {"weights": survey.weights if setting.in_place else survey.largest_layer}
    sums = sum(site.triangle + site.staging for site in survey.sites)
    host = setting.host_weights()
    phases = [({**weights, "sums": sums, "activations": survey.activations, **setting.libraries}, host)]
    for device, bases in setting.read_one_by_one(survey.sites, weights, setting.libraries):
        phases.append((device, {**host, "bases": bases}))
    return _plan(
        setting,
        strategy="resident",
        hidden_states="host" if workload.device == "cpu" else "device",
        phases=phases,
        forward=survey.flops * workload.batches,
        weight_seconds=0.0 if setting.in_place else workload.batches * survey.weights / setting.weight_rate,
    )


def _layerwise(setting: _Setting, hidden_states: str) -> Plan:
    survey, workload = setting.survey, setting.workload
    kept = (survey.hidden + survey.arguments) * workload.batches
    held, host_held = _held_between_blocks(setting, hidden_states)
    weights, ahead = {"weights": survey.weights if setting.in_place else survey.outside}, survey.sites_of(None)
    sums = sum(site.triangle + site.staging for site in ahead)
    phases = [
        ({**weights, "sums": sums, "activations": survey.prologue, **held}, host_held),
        (_first_batch(setting), host_held),
    ]
    count, bases = len(survey.block_weights), 0
    for device, bases in setting.read_one_by_one(ahead, weights, held):
        phases.append((device, {**host_held, "bases": bases}))
    for index in range(count):
        made = 0
        for device, made in _block(setting, index, held):
            phases.append((device, {**host_held, "bases": bases + made}))
        bases += made
    return _plan(
        setting,
        strategy="layerwise",
        hidden_states=hidden_states,
        phases=phases,
        forward=(survey.prologue_flops + sum(survey.block_flops)) * workload.batches,
        weight_seconds=0.0 if setting.in_place else _loading_seconds(setting),
        hidden_seconds=_hidden_seconds(setting, hidden_states, kept),
        disk_bytes=kept if hidden_states == "disk" else 0,
    )


def _held_between_blocks(setting: _Setting, hidden_states: str) -> tuple[Parts, Parts]:
    """What a layerwise run holds in every block but the weights: of the device, and of the host."""
    survey, batches = setting.survey, setting.workload.batches
    sizes = {"hidden states": survey.hidden, "arguments": survey.arguments}
    if setting.workload.device == "cpu":
        device = {name: (2 if hidden_states == "disk" else batches) * size for name, size in sizes.items()}
        return {**device, **setting.libraries}, setting.host_weights()
    # Of what is kept elsewhere, one batch's is in use, and those of the next and the last are in transfer.
    device = {name: (batches if hidden_states == "device" else 3) * size for name, size in sizes.items()}
    pinned = {
        "device": 0,
        "host": pinned_bytes(survey.hidden + survey.arguments, batches),
        "disk": 2 * sum(map(power_of_two, sizes.values())),
    }
    return {**device, **setting.libraries}, {**setting.host_weights(), "hidden states": pinned[hidden_states]}


def _first_batch(setting: _Setting) -> Parts:
    """The device's memory while the first batch is run to check that the blocks are a chain.

    Weights: those outside of the blocks, the first block and one more. Hidden states: those of the embeddings and a copy, a block's
    input and a copy, and the first output. Other arguments: themselves and two copies.
    """
    survey = setting.survey
    two_blocks = survey.outside + survey.block_weights[0] + max(survey.block_weights)
    return {
        "weights": survey.weights if setting.in_place else two_blocks,
        "activations": max(survey.block_activations),
        "arguments": 3 * survey.arguments,
        "hidden states": 5 * survey.hidden,
        **setting.libraries,
    }


def _block(setting: _Setting, index: int, held: Parts) -> Iterator[tuple[Parts, int]]:
    """The device's memory in a block's forward passes and at each decomposition, and the bytes of the block's bases until then."""
    survey = setting.survey
    two_blocks = sum(survey.block_weights[index : index + 2])  # the next one is loaded while this one computes
    weights = {"weights": survey.weights if setting.in_place else two_blocks}
    sites = survey.sites_of(index)
    sums = sum(site.triangle + site.staging for site in sites)
    if setting.workload.device == "cpu":  # small sites of the block before may still wait, to be decomposed together with others
        sums += min(TOGETHER_BYTES, sum(site.triangle for site in survey.sites_of(index - 1)))
    yield {**weights, "sums": sums, "activations": survey.block_activations[index], **held}, 0
    yield from setting.read_one_by_one(sites, weights, held)


def _loading_seconds(setting: _Setting) -> float:
    """The first block's loading, and of each other's what exceeds the computation in the block before."""
    survey = setting.survey
    seconds = 0.0
    for index, here in enumerate(survey.block_weights):
        following = sum(survey.block_weights[index + 1 : index + 2])
        first = here / setting.weight_rate if index == 0 else 0.0
        seconds += max(0.0, following / setting.weight_rate - setting.busy(index)) + first
    return seconds


def _hidden_seconds(setting: _Setting, place: str, size: int) -> float:
    """The writing and reading of what is kept between blocks. A GPU's copies run in both directions beside the computation."""
    blocks = range(len(setting.survey.block_weights))
    if place == "disk":
        return 2 * len(blocks) * size / setting.rates.disk
    each = size / setting.rates.transfer if place == "host" else 0.0
    return sum(max(0.0, each - setting.busy(index)) for index in blocks)


def _plan(
    setting: _Setting,
    *,
    strategy: str,
    hidden_states: str,
    phases: list[tuple[Parts, Parts]],
    forward: float,
    weight_seconds: float,
    hidden_seconds: float = 0.0,
    disk_bytes: int = 0,
) -> Plan:
    """A plan whose memory is that of the largest of its phases, (device, host) each."""
    survey, workload, rates = setting.survey, setting.workload, setting.rates
    if workload.device == "cpu":  # one memory
        phases = [({}, {name: device.get(name, 0) + host.get(name, 0) for name in device | host}) for device, host in phases]
    if workload.solved_on_host:
        phases = [*phases, ({}, setting.solved_later())]
    costs = [setting.costs[site.d_in] for site in survey.sites]
    flops = {
        "forward": float(forward),
        "sums": setting.sum_flops(survey.sites),
        "decomposition": sum(flops for _, flops, _ in costs),
    }
    return Plan(
        strategy=strategy,
        weights=setting.weights,
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
            "decomposition": sum(at_eigh_rate for _, _, at_eigh_rate in costs) / setting.solving.decomposition,
            "weights": weight_seconds,
            "hidden states": hidden_seconds,
        },
        tracked=survey.tracked,
        solved_on_host=workload.solved_on_host,
        estimated_rates=rates.estimated,
    )
