"""`nullspace plan`: whether a calibration and the training after it fit, by which command, and what they would take."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from nullspace.cli import console, data, options
from nullspace.cli.calibrate import check_length
from nullspace.cli.options import Loading, needed, one_of, option, parsed

if TYPE_CHECKING:
    from torch import nn

    from nullspace.model.sites import Targets
    from nullspace.planning.answer import Answer, Offer
    from nullspace.planning.plan import Plan, Workload
    from nullspace.planning.survey import Survey
    from nullspace.planning.training import Training

DATA = "data.jsonl"
"""The file that printed commands read."""


def _parse_size(text: str) -> int:
    from nullspace.planning.units import parse_size

    return parse_size(text)


def _card(name: str) -> Any:
    from nullspace.planning.cards import card

    return card(name)


_ON_GPU = needed("a plan for a GPU", lambda values: values["device"] != "cpu")


@dataclass(frozen=True)
class Work:
    """The calibration."""

    PANEL: ClassVar[str] = "Calibration"

    samples: int = data.SAMPLES
    length: int = data.LENGTH
    batch_size: int = data.BATCH_SIZE
    rank: int = options.RANK
    targets: str = options.TARGETS
    exclude: str | None = options.EXCLUDE
    experts: str = options.EXPERTS._replace(needs=None)
    dtype: str = options.DTYPE
    load_in_4bit: bool = options.LOAD_IN_4BIT
    load_in_8bit: bool = options.LOAD_IN_8BIT
    attn: str | None = options.ATTN
    freeze_a: bool = option("Plan a training of B alone.", False)
    freeze_b: bool = option(
        "Plan a training of A alone.", False, needs=needed("a training of both", lambda values: not values["freeze_a"])
    )


@dataclass(frozen=True)
class Machine:
    """Where it would run."""

    PANEL: ClassVar[str] = "Machine"

    device: str | None = option(
        "cuda or cpu; cuda by default if there is one, or if --gpu or --device-memory is given.", None, one_of("cuda", "cpu")
    )
    gpu: str | None = option(
        "Name of a card (T4, L4, A10G, 'RTX 4090', A100-80GB, H100, …): its memory, and rates from its data sheet.",
        None,
        parsed(_card),
        _ON_GPU,
    )
    weights: str | None = option(
        "Only plans with the weights on 'device', 'host' or 'disk'.", None, one_of("device", "host", "disk")
    )
    device_memory: str | None = option(
        "Of the GPU: 24 (GB), 24GB, 80GiB, …; without it and --gpu, no limit.", None, parsed(_parse_size), _ON_GPU
    )
    host_memory: str | None = option("Of the host, in the same form; without, no limit.", None, parsed(_parse_size))

    def limits(self) -> tuple[float | None, float | None]:
        """Bytes of the device and of the host."""
        device = _parse_size(self.device_memory) if self.device_memory else _card(self.gpu)[1].memory if self.gpu else None
        return device, _parse_size(self.host_memory) if self.host_memory else None

    def kind(self) -> str:
        """The device."""
        import torch

        return self.device or ("cuda" if self.gpu or self.device_memory or torch.cuda.is_available() else "cpu")

    def described(self) -> str:
        """The device's memory in words."""
        from nullspace.planning.units import gigabytes

        device, host = self.limits()
        if self.kind() == "cpu":
            return "on a CPU" if host is None else f"on a CPU with {gigabytes(host)}"
        on = f"on the {_card(self.gpu)[0]}" if self.gpu else "on a GPU"
        return on if device is None else f"{on} with {gigabytes(device)}"


def plan(
    *,
    model: str = option("Hub name, or folder with a config.json. No weights are read.", typed=()),
    loading: Loading,
    work: Work,
    machine: Machine,
    as_json: bool = options.JSON,
) -> dict[str, Any] | None:
    """Whether a calibration fits and with which command, and what it and the training take, from the configuration alone."""
    from nullspace.integrations.transformers import empty_model
    from nullspace.model.coverage import covered_share
    from nullspace.model.experts import fused_of
    from nullspace.model.sites import find_targets
    from nullspace.planning.answer import answer, is_typed
    from nullspace.planning.forecast import is_pooled, survey_of

    bits = {"load_in_4bit": work.load_in_4bit, "load_in_8bit": work.load_in_8bit}
    empty = empty_model(loading.of(model), dtype=work.dtype, attn_implementation=work.attn, **bits)
    check_length(empty.config, model, work.length)
    exclude = options.parse_exclude(work.exclude)
    targets = find_targets(empty, options.parse_targets(work.targets), exclude=exclude, rank=work.rank)
    targets.settle(empty)
    limits, workload = machine.limits(), _workload(empty, targets, work, machine)
    has_experts = bool(fused_of(targets.values()))
    workload = replace(workload, experts="pooled" if is_pooled(targets, workload, limits[0]) else "each")
    survey = survey_of(empty, workload)

    usable = functools.partial(is_typed, quantised=_is_quantised(empty), asked=machine.weights)
    says = answer(empty, targets, workload, survey, device_memory=limits[0], host_memory=limits[1], usable=usable)
    command = _Command(model, loading, work, workload.experts if has_experts else None)
    trained = trainings(empty, targets, survey, workload, freeze_a=work.freeze_a, freeze_b=work.freeze_b)
    share = covered_share(empty, survey.reached)
    if as_json:
        return _document(model, machine, says, command, trained, share)
    _print(says, command, machine, trained)
    console.print_line(f"\nTexts reach {len(survey.reached)} targets, with {share:.1%} of the parameters in the model's matrices.")
    if has_experts:
        console.print_line("Experts: " + ("one sum for all of a layer." if workload.experts == "pooled" else "a sum for each."))
    if not survey.tracked:
        console.print_line("The model does not run without data: its activations are estimated from its layers.")
    return None


def _workload(empty: nn.Module, targets: Targets, work: Work, machine: Machine) -> Workload:
    from nullspace.planning.plan import Rates, Workload

    dtype = next(p.dtype for p in empty.parameters() if p.is_floating_point())
    return Workload(
        samples=work.samples,
        length=work.length,
        batch_size=work.batch_size,
        rank=work.rank,
        targets=targets,
        device=machine.kind(),
        weights=machine.weights,
        experts=work.experts,
        rates=Rates.of("cuda", dtype, card=_card(machine.gpu)[1]) if machine.gpu else None,
    )


def _is_quantised(empty: Any) -> bool:
    from nullspace.model.weights import stored_bytes

    return any(stored_bytes(p) != p.nbytes for p in empty.parameters())


# ---- commands


@dataclass(frozen=True)
class _Command:
    """Commands that run a plan of this model, in lines that can be pasted."""

    model: str
    loading: Loading
    work: Work
    experts: str | None

    def of(self, plan: Plan, exclude: tuple[str, ...] = ()) -> list[str]:
        """The lines of a plan that leaves these layers out."""
        loads, rank = self._loads(), self._changed("rank", "freeze_a", "freeze_b")
        layers = [*self._changed("targets"), *self._excluded(exclude), *(["--experts", self.experts] if self.experts else [])]
        placed = [*(["--device", "cpu"] if plan.device == "cpu" else []), *(["--offload"] if plan.weights == "disk" else [])]
        run = [*self._changed("samples", "length"), *self._batch(plan), "--strategy", plan.strategy, *placed]
        if plan.strategy == "layerwise":
            run += ["--hidden-states", plan.hidden_states]
        start = ["nullspace", "init", self.model]
        if not plan.solved_on_host:
            return [shlex.join([*start, "--data", DATA, *rank, *layers, *run, *loads, "--out", "out"])]
        keep = ["nullspace", "covariances", self.model, "--data", DATA, "--precision", "auto"]
        solve = [*start, "--covariances", "moments", *rank, *self._changed("targets"), *self._excluded(exclude), "--device", "cpu"]
        return [shlex.join([*keep, *layers, *run, *loads, "--out", "moments"]), shlex.join([*solve, *loads, "--out", "out"])]

    def _changed(self, *names: str) -> list[str]:
        """The options of these names that are not as they are by default."""
        given, usual = vars(self.work), options.defaults(Work)
        return [word for name in names if given[name] != usual[name] for word in _typed(name, given[name])]

    def _batch(self, plan: Plan) -> list[str]:
        return [] if plan.batch_size == options.defaults(Work)["batch_size"] else _typed("batch_size", plan.batch_size)

    def _excluded(self, more: tuple[str, ...]) -> list[str]:
        own = self.work.exclude or ""
        if own.startswith("re:") and more:
            own, more = f"{own}|.*\\.(?:{'|'.join(more)})", ()
        names = ",".join([*([own] if own else []), *more])
        return ["--exclude", names] if names else []

    def _loads(self) -> list[str]:
        hub = [word for name, value in vars(self.loading).items() if value for word in _typed(name, value)]
        return [*self._changed("dtype", "load_in_4bit", "load_in_8bit", "attn"), *hub]


def _typed(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


# ---- the training afterwards


def trainings(
    empty: Any, targets: Mapping[str, nn.Module], survey: Survey, workload: Workload, **freeze: bool
) -> dict[str, list[Training]]:
    """Memory for training on a model without weights, which is left with weights of 4 bits.

    Returns:
        Form of the weights, as they are and in 4 bits where they are not quantised → without and with checkpointing.
    """
    from nullspace.integrations.transformers.quantisation import set_planned_bytes
    from nullspace.planning.training import training

    name = "quantised" if _is_quantised(empty) else str(survey.dtype).removeprefix("torch.")
    known = {name: training(empty, targets, survey, workload, **freeze)}
    if name != "quantised":
        set_planned_bytes(empty, empty.config, load_in_4bit=True)
        known["4-bit"] = training(empty, targets, survey, workload, **freeze)
    return known


# ---- what is printed


def _document(
    model: str, machine: Machine, says: Answer, command: _Command, trained: Mapping[str, list[Training]], share: float
) -> dict[str, Any]:
    limits = machine.limits()
    facts: dict[str, Any] = {"covered_share": share, "fits": says.chosen is not None}
    if command.experts:
        facts["experts"] = command.experts
    return {
        **facts,
        "commands": command.of(says.chosen) if says.chosen else [],
        "offers": [
            {"exclude": list(offer.exclude), "commands": command.of(offer.plan, offer.exclude), **offer.plan.as_dict()}
            for offer in says.offers
        ],
        "cards": list(says.cards),
        "model": model,
        "gpu": _card(machine.gpu)[0] if machine.gpu else None,
        "device_memory": limits[0],
        "host_memory": limits[1],
        "plans": [plan.as_dict() for plan in says.plans],
        "choice": says.chosen.as_dict() if says.chosen else None,
        "missing": says.missing,
        "training": [
            {"weights": name, "checkpointing": each.checkpointing, "parts": dict(each.parts), "bytes": each.bytes}
            | {"fits": each.fits(limits[0] if machine.kind() == "cuda" else limits[1]), "counted": each.counted}
            for name, several in trained.items()
            for each in several
        ],
    }


def _print(says: Answer, command: _Command, machine: Machine, trained: Mapping[str, list[Training]]) -> None:
    """The verdict, then the tables."""
    from nullspace.planning.plan import cells, describe

    limits = machine.limits()
    memory = limits[0] if machine.kind() == "cuda" else limits[1]
    for line in (*_verdict(says, command, machine), *_verdict_of_training(trained, memory)):
        console.print_line(line)
    console.print_line("\nEvery way to run it:")
    console.print_table([cells(plan, fits=not plan.missing(*limits)) for plan in says.plans])
    if says.chosen:
        console.print_line(f"\nThe fastest that fits: {describe(says.chosen)}")
    if says.plans[0].estimated_rates:
        console.print_line("Times rest on estimated throughputs: they rank the plans, and promise nothing.")
    size, length = command.work.batch_size, command.work.length
    console.print_line(f"\nTraining the adapter afterwards: PEFT, AdamW, batches of {size} × {length} tokens:")
    rows = [{"base": name, **each.cells(), "fits": _yes(each.fits(memory))} for name, both in trained.items() for each in both]
    console.print_table(rows)
    if not all(each.counted for both in trained.values() for each in both):
        console.print_line("The activations of this model's training could not be counted: they are estimated, rather too high.")


def _verdict(says: Answer, command: _Command, machine: Machine) -> Iterator[str]:
    limited = any(limit is not None for limit in machine.limits())
    if says.chosen is not None:
        words = "Fits" if limited else "No memory is named (--gpu, --device-memory, --host-memory). At its fastest it would run"
        yield f"{words} {machine.described()}: {_takes(says.chosen)}."
        yield from _pasted(command, says.chosen)
    else:
        yield f"Does not fit {machine.described()}: {says.missing}"
        for offer in says.offers:
            yield f"\n{_offered(offer)} it fits: {_takes(offer.plan)}."
            yield from _pasted(command, offer.plan, offer.exclude)
        if says.cards:
            yield f"\nCards on which it fits: {', '.join(says.cards)}."
    note = _card(machine.gpu)[1].note if machine.gpu else ""
    if note:
        yield f"\n{note}"


def _verdict_of_training(trained: Mapping[str, list[Training]], memory: float | None) -> Iterator[str]:
    """The first that fits: without checkpointing before with it, the weights as they are before those in 4 bits."""
    from nullspace.planning.units import gigabytes

    if memory is None:
        return
    several = [(name, each) for name, both in trained.items() for each in both]
    name, chosen = next(((name, each) for name, each in several if each.fits(memory)), several[-1])
    how = f"{name} weights {'and' if chosen.checkpointing else 'without'} gradient checkpointing: {gigabytes(chosen.bytes)}"
    fits = "fits there with" if chosen.fits(memory) else "does not fit there even with"
    yield f"\nTraining the adapter afterwards {fits} {how}."


def _offered(offer: Offer) -> str:
    if offer.exclude:
        return f"Without {', '.join(offer.exclude)}"
    return "With the second moments kept and solved on the host"


def _pasted(command: _Command, plan: Plan, exclude: tuple[str, ...] = ()) -> Iterator[str]:
    if plan.weights == "host" and plan.device == "cuda":
        yield (
            "\nIn Python: load_model(..., device='cpu'), then compute_null_spaces(..., "
            f"strategy={plan.strategy!r}, device='cuda') with batches of {plan.batch_size}."
        )
        return
    yield ""
    yield from (f"  {line}" for line in command.of(plan, exclude))


def _takes(plan: Plan) -> str:
    from nullspace.planning.units import duration, gigabytes

    host = f"{gigabytes(plan.host_bytes)} of {'the host' if plan.device == 'cuda' else 'memory'}"
    device = f"{gigabytes(plan.device_bytes)} of the GPU, " if plan.device == "cuda" else ""
    return f"{device}{host}, about {duration(plan.total_seconds)} by estimate"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
