"""`oplora`: while an adapter trains, what it adds stays out of the leading directions of a layer's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel

from nullspace.artifacts.covariances import Covariances
from nullspace.checks import check_one_of
from nullspace.errors import InputError
from nullspace.factors import Leading, leading_inputs, leading_outputs, leading_singular
from nullspace.integrations.peft.guard.adapted import (
    FACTORS,
    Adapted,
    Start,
    adapted_layers,
    check_known,
    inputs_of,
    original_weight,
    start_of,
)
from nullspace.integrations.peft.guard.constraints.confinement import Confinement, trained_in
from nullspace.integrations.peft.guard.constraints.directions import (
    Allowed,
    Projection,
    check_directions,
    directions_of,
    kept_as,
)
from nullspace.integrations.peft.guard.constraints.held import Held
from nullspace.integrations.peft.origin import freeze_recorded
from nullspace.model.linear import weight_shape
from nullspace.model.sites import Site
from nullspace.model.wrappers import unwrap
from nullspace.progress import Progress, reporter
from nullspace.solvers import decompose

_Trained = Mapping[str, list[Adapted]]  # by factor
SIDES = {"both": FACTORS, "inputs": ("lora_A",), "outputs": ("lora_B",)}


def oplora(
    peft_model: PeftModel,
    k: float = 128,
    covariances: Covariances | None = None,
    *,
    sides: str = "both",
    adapter_name: str | None = None,
    optimizer: Any = None,
    progress: bool | Progress = False,
) -> Confinement:
    """OPLoRA (arXiv 2510.13003): what an adapter adds stays (I − U_k U_kᵀ) ΔW (I − V_k V_kᵀ), whatever the optimizer does.

    U_k and V_k are the k leading singular vectors of W₀, whose triples W₀ + ΔW then keeps. With `covariances`, leading eigenvectors
    take their place: V_k of C, U_k of W₀ C W₀ᵀ. Then ΔW X = 0 for what the inputs X have in their k leading directions, and nothing
    is written along the k leading directions of the layer's outputs.

    The paper projects inside of every forward pass. Here the gradients of A and B are projected, and after the step what A and B
    have changed by: the same products, from a plain LoRA that stays one. OSF (arXiv 2504.07097; PEFT's `osf`) projects gradients
    alone; Adam divides them element by element, which leaves the space.

    - Where B is zero (plain LoRA), A is projected at once, and the model is unchanged: as in the paper, its rows get shorter. So is
      B where A is zero.
    - Where neither is zero, the changes of A and B are held. ΔW = s·(B A − B₀A₀) then is as above if A₀ and B₀ are (`"milora"` for
      the singular vectors of W₀, up to k = min(d_out, d_in) − r).
    - An A or a B that does not train is left as it is.

    It is used in the three ways of `confine`. Where an optimizer takes no hooks (DeepSpeed), give it to the Trainer; or call
    `project()` after each step, by which ΔW is held but gradients are not projected.

    Args:
        peft_model: as for `confine`. If it is sharded (FSDP2, ZeRO), all ranks have to call this, and B is gathered at each step.
        k: directions that are spared: a number, of which a layer spares at most half of its side (d_in for C, min(d_out, d_in) for
            W₀ and W₀ C W₀ᵀ); or a share of that side, between 0 and 1.
        covariances: second moments of the inputs to be kept; None: the singular vectors of W₀, as in the paper.
        sides: `"both"`; `"inputs"` (A alone) or `"outputs"` (B alone).
        adapter_name: of the adapter; by default the active one.
        optimizer: to hook into. Its own weight decay is confined too.
        progress: True for a bar over the layers while directions are computed, or a callable (`nullspace.progress.Progress`).

    Returns:
        The `Confinement`. Its `allowed` and `allowed_outputs` say how many directions are left, and their leak.

    Cost: a step, 8 · r · k · (d_in + d_out) flops a layer. In memory, on the device of A, k · (d_in + d_out) float32 numbers a
    layer; with covariances, q, k and v share those of d_in. At first `nullspace.factors.leading_singular` of each layer, or
    `leading_inputs` of each site and `leading_outputs` of each layer.

    Raises:
        TypeError: if the model is no `PeftModel`, covariances are something else, or k is no number.
        ValueError: as `confine`, naming the layer; if k leaves fewer directions than the adapter's rank.

    Warns:
        UserWarning: as `confine`, if A or B does not train in some or all layers, or is in 16 bits.
    """
    k = check_directions(k)
    check_one_of("sides", sides, SIDES)
    layers = adapted_layers(peft_model, adapter_name)
    freeze_recorded(peft_model, [layers[0].adapter])
    start = start_of(peft_model, layers)
    trained = {factor: trained_in(layers, factor) if factor in SIDES[sides] else [] for factor in FACTORS}
    parts = _of_weights(trained, k, start) if covariances is None else _of_moments(trained, k, start, covariances)
    report, total = reporter(progress), sum(map(len, trained.values()))
    held: list[Held] = []
    for part in parts:
        held.append(part)
        report("directions", sum(len(each.layers) for each in held), total, 0)
    confinement = Confinement(unwrap(peft_model), held, gradients=True)
    return confinement if optimizer is None else confinement.attach(optimizer)


def _numbers(trained: _Trained, k: float, *, of_weights: bool) -> dict[tuple[str, str], int]:
    """(factor, layer) → how many directions it spares.

    Raises:
        ValueError: naming the layer, if fewer than its adapter's rank are left.
    """
    numbers = {}
    for factor, layers in trained.items():
        for each in layers:
            d_out, d_in = weight_shape(each.layer.get_base_layer())
            d, side = (d_in, "inputs") if factor == "lora_A" else (d_out, "outputs")
            taken = directions_of(k, d_in if factor == "lora_A" and not of_weights else min(d_out, d_in))
            rank = each.layer.r[each.adapter]
            if d - taken < rank:
                raise InputError(
                    f"k leaves {d - taken} of the {d} directions of the {side} of {each.name!r}, whose adapter has rank {rank}: "
                    "spare fewer"
                )
            numbers[factor, each.name] = taken
    return numbers


def _of_weights(trained: _Trained, k: float, start: Start) -> Iterator[Held]:
    """Layer by layer, from the singular vectors of its own weight."""
    numbers = _numbers(trained, k, of_weights=True)
    for each in {each.name: each for layers in trained.values() for each in layers}.values():
        trains = [factor for factor in FACTORS if (factor, each.name) in numbers]
        spaces = leading_singular(original_weight(each, start), k=numbers[trains[0], each.name])
        for factor, leading in zip(FACTORS, spaces, strict=True):
            if factor in trains:
                yield _held([each], factor, leading)


def _of_moments(trained: _Trained, k: float, start: Start, covariances: Covariances) -> Iterator[Held]:
    """A of the layers of a site together, from its second moment; B layer by layer, from that of its outputs."""
    numbers = _numbers(trained, k, of_weights=False)
    every = {each.name: each for layers in trained.values() for each in layers}
    groups = check_known(covariances, tuple(every.values()), start)
    moments = {each.name: inputs_of(covariances, site) for site, members in groups.items() for each in members}
    sites = {site: [each for each in members if ("lora_A", each.name) in numbers] for site, members in groups.items()}
    sites = {site: members for site, members in sites.items() if members}

    def solve(site: Site, known: Any) -> Leading:
        first = sites[site][0]
        return leading_inputs(known.matrix().to(first.a.device), k=numbers["lora_A", first.name])

    pairs = ((site, moments[members[0].name]) for site, members in sites.items())
    for members, leading in zip(sites.values(), decompose(pairs, solve), strict=True):
        yield _held(members, "lora_A", leading)
    for each in trained["lora_B"]:
        weight = original_weight(each, start)
        c = moments[each.name].matrix().to(weight.device)
        yield _held([each], "lora_B", leading_outputs(weight, c, k=numbers["lora_B", each.name]))


def _held(layers: list[Adapted], factor: str, leading: Leading) -> Held:
    d, k = leading.basis.shape
    change = Projection(kept_as(leading.basis, layers[0].factor(factor)), inside=False)
    return Held(layers, factor, change, Allowed(d - k, d, leading.leak), lengths=False, remedy="spare fewer (k)")
