"""`confine`: while an adapter trains, its A changes only in directions in which the inputs to be kept are small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel

from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.spaces import NullSpaces
from nullspace.checks import FRACTION, check_real
from nullspace.integrations.peft.guard.adapted import Adapted, adapted_layers, check_known, start_of
from nullspace.integrations.peft.guard.constraints.confinement import Confinement, trained_in
from nullspace.integrations.peft.guard.constraints.directions import (
    Allowed,
    Damping,
    Projection,
    check_enough,
    damping_of,
    projection_of,
)
from nullspace.integrations.peft.guard.constraints.held import Held
from nullspace.integrations.peft.origin import freeze_recorded
from nullspace.model.sites import Site
from nullspace.model.wrappers import unwrap
from nullspace.progress import Progress, reporter
from nullspace.solvers import decompose


def confine(
    peft_model: PeftModel,
    directions: Covariances | NullSpaces,
    leak: float = 0.02,
    *,
    damping: float | None = None,
    adapter_name: str | None = None,
    optimizer: Any = None,
    progress: bool | Progress = False,
) -> Confinement:
    """Keep the changes of an adapter's A, while it trains, in directions in which the inputs to be kept are small.

    After every optimizer step A ← A_ref + (A − A_ref) P with P = U_k U_kᵀ, U_k the k directions of the smallest inputs: as many as
    have a joint leak √(Σ λ / tr C) within the budget, and at least as many as the rank. Whatever the optimizer does,
    ‖(A − A_ref) X‖ ≤ ‖A − A_ref‖ · leak · ‖X‖. B trains freely. The result is a plain adapter.

    - Where B is zero (plain LoRA), A itself is projected at once, and its rows get their norms back: the model is unchanged, as
      B A = 0, and all that A ever reads is in these directions.
    - Where B is not zero, only the change of A is confined: A_ref is A now, and what A_ref reads remains (choose a start whose A
      reads little, such as `"lora-null"`).
    - An A that does not train (`freeze_a`, or so recorded in the adapter's configuration) is left as it is.

    Three ways to use it, which may be combined, as projecting twice is projecting once:

        confine(model, covariances, optimizer=optimizer)                   # a hook of this optimizer
        Trainer(model, args, callbacks=[confine(model, covariances)])      # a callback
        with confine(model, covariances):                                  # whatever optimizer steps inside
            ...

    Args:
        peft_model: with the adapter, after `fully_shard` or `DistributedDataParallel` if these are used without a Trainer. If it is
            sharded (FSDP2, ZeRO), all ranks have to call this. Rows of a DTensor are projected where they are; under DeepSpeed's
            ZeRO 1–3 the float32 copy is gathered and written (use the callback, or call `project` after `engine.step()`).
        directions: second moments of the inputs to be kept, or null spaces, whose bases are used as far as they are within the
            budget (`rank=` of `compute_null_spaces` then limits k).
        leak: the budget, between 0 and 1.
        damping: τ > 0, in place of a budget: each step's change of A is multiplied by (I + C / (τ · tr C / d_in))⁻¹, so that
            directions of inputs far above τ times the mean are hardly changed. `leak` is then ignored. Needs covariances.
        adapter_name: of the adapter; by default the active one.
        optimizer: to hook into. Its own weight decay is confined too.
        progress: True for a bar over the sites while directions are computed, or a callable (`nullspace.progress.Progress`).

    Returns:
        The `Confinement`.

    Cost: a step, 4 · r · d_in · min(k, d_in − k) flops a layer (`damping`: 2 · r · d_in²). In memory, on the device of A,
    d_in · min(k, d_in − k) float32 numbers a site (`damping`: d_in²); q, k and v are one site. At first, 4/3 · d_in³ flops a site
    for covariances (9 · d_in³ more where k > d_in / 4).

    Raises:
        TypeError: if the model is no `PeftModel`; for numbers of another type.
        ValueError: naming the layer, if there is no second moment of its inputs, or that of another model, if it is not linear or
            uses DoRA; naming a site, if null spaces have fewer than r directions.

    Warns:
        UserWarning: if r directions are not within the budget at some sites, whose A is then confined to the r of the smallest
            inputs, with the leak that these have; if A does not train in some or all layers; if A is in 16 bits, whose rounding
            reads all directions.
    """
    leak = check_real("leak", leak, FRACTION)
    if damping is not None:
        damping = check_real("damping", damping)
    layers = adapted_layers(peft_model, adapter_name)
    freeze_recorded(peft_model, [layers[0].adapter])
    start = start_of(peft_model, layers)
    groups = check_known(directions, tuple(trained_in(layers, "lora_A")), start)
    ranks = {site: max(each.layer.r[each.adapter] for each in members) for site, members in groups.items()}
    report, sites = reporter(progress), {}
    for site, held in _directions_of(directions, groups, ranks, leak, damping):
        sites[site] = Held(groups[site], "lora_A", *held, lengths=True, remedy="allow more (leak)")
        report("directions", len(sites), len(groups), 0)
    if damping is None:
        check_enough({site: made.allowed for site, made in sites.items()}, ranks, leak)
    confinement = Confinement(unwrap(peft_model), list(sites.values()))
    return confinement if optimizer is None else confinement.attach(optimizer)


def _directions_of(
    directions: Covariances | NullSpaces,
    groups: Mapping[Site, list[Adapted]],
    ranks: Mapping[Site, int],
    leak: float,
    damping: float | None,
) -> Iterator[tuple[Site, tuple[Projection | Damping, Allowed]]]:
    """Site by site, in the order of `groups`."""

    def solve(site: Site, known: Any) -> tuple[Projection | Damping, Allowed]:
        like = groups[site][0].a
        if damping is not None:
            return damping_of(site, known, damping, like)
        return projection_of(known, leak, ranks[site], like)

    pairs = ((site, directions[members[0].name]) for site, members in groups.items())
    if isinstance(directions, Covariances):
        yield from zip(groups, decompose(pairs, solve), strict=True)  # type: ignore[type-var]
    else:
        yield from ((site, solve(site, space)) for site, space in pairs)
