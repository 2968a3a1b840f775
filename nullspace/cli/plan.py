"""`nullspace plan`: what a calibration would take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nullspace.cli import console, data, options
from nullspace.cli.calibrate import check_length
from nullspace.cli.options import Loading, needed, one_of, option, parsed


def _parse_size(text: str) -> int:
    from nullspace.planning.units import parse_size

    return parse_size(text)


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


@dataclass(frozen=True)
class Machine:
    """Where it would run."""

    PANEL: ClassVar[str] = "Machine"

    device: str | None = option(
        "cuda or cpu; cuda by default if there is one, or if --device-memory is given.", None, one_of("cuda", "cpu")
    )
    weights: str | None = option(
        "Only plans with the weights on 'device', 'host' or 'disk'.", None, one_of("device", "host", "disk")
    )
    device_memory: str | None = option(
        "Of the GPU: 24GB, 80GiB, …; without, no limit.",
        None,
        parsed(_parse_size),
        needed("a plan for a GPU", lambda values: values["device"] != "cpu"),
    )
    host_memory: str | None = option("Of the host; without, no limit.", None, parsed(_parse_size))


def plan(
    *,
    model: str = option("Hub name, or folder with a config.json. No weights are read.", typed=()),
    loading: Loading,
    work: Work,
    machine: Machine,
    as_json: bool = options.JSON,
) -> dict[str, Any] | None:
    """What a calibration would take in memory and time, from the model's configuration alone."""
    import torch

    from nullspace.integrations.transformers import empty_model
    from nullspace.model.coverage import covered_share
    from nullspace.model.experts import fused_of
    from nullspace.model.sites import find_targets
    from nullspace.planning.choice import fit
    from nullspace.planning.forecast import forecast, is_pooled, survey_of
    from nullspace.planning.plan import Workload, cells, describe

    bits = {"load_in_4bit": work.load_in_4bit, "load_in_8bit": work.load_in_8bit}
    empty = empty_model(loading.of(model), dtype=work.dtype, attn_implementation=work.attn, **bits)
    check_length(empty.config, model, work.length)
    exclude = options.parse_exclude(work.exclude)
    targets = find_targets(empty, options.parse_targets(work.targets), exclude=exclude, rank=work.rank)
    targets.settle(empty)
    limits = tuple(_parse_size(text) if text else None for text in (machine.device_memory, machine.host_memory))
    workload = Workload(
        samples=work.samples,
        length=work.length,
        batch_size=work.batch_size,
        rank=work.rank,
        targets=targets,
        device=machine.device or ("cuda" if machine.device_memory or torch.cuda.is_available() else "cpu"),
        weights=machine.weights,
        experts=work.experts,
    )
    has_experts = bool(fused_of(targets.values()))
    workload = replace(workload, experts="pooled" if is_pooled(targets, workload, limits[0]) else "each")
    survey = survey_of(empty, workload)
    plans, share = forecast(empty, workload, survey=survey), covered_share(empty, survey.reached)
    chosen, lack = None, None
    try:
        chosen = fit(empty, workload, device_memory=limits[0], host_memory=limits[1], plans=plans)
    except MemoryError as error:
        lack = str(error)
    if as_json:
        facts: dict[str, Any] = {"covered_share": share}
        if has_experts:
            facts["experts"] = workload.experts
        facts |= {"model": model, "device_memory": limits[0], "host_memory": limits[1], "plans": [p.as_dict() for p in plans]}
        return {**facts, "choice": chosen.as_dict() if chosen else None, "missing": lack}
    console.print_line(f"Texts reach {len(survey.reached)} targets, with {share:.1%} of the parameters in the model's matrices.")
    if has_experts:
        console.print_line("Experts: " + ("one sum for all of a layer." if workload.experts == "pooled" else "a sum for each."))
    console.print_table([cells(p, fits=not p.missing(*limits)) for p in plans])
    console.print_line(f"\nThe fastest that fits: {describe(chosen)}" if chosen else f"\n{lack}")
    if plans[0].estimated_rates:
        console.print_line("Times rest on estimated throughputs: they rank the plans, and promise nothing.")
    if not plans[0].tracked:
        console.print_line("The model does not run without data: its activations are estimated from its layers.")
    return None
