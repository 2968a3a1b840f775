"""`penalty` and `clora`: terms of a loss that keep an adapter away from the inputs to be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from peft import PeftModel

from nullspace import factors
from nullspace.artifacts.covariances import Covariances
from nullspace.checks import check_integer
from nullspace.factors import LowRank, leading_inputs, leading_outputs
from nullspace.integrations.peft.guard.adapted import (
    Adapted,
    Initial,
    Start,
    adapted_layers,
    check_known,
    inputs_of,
    original_weight,
    start_of,
)
from nullspace.integrations.peft.guard.constraints.directions import check_directions, directions_of
from nullspace.integrations.peft.guard.gauge import Gauge, values_of
from nullspace.model.linear import weight_shape
from nullspace.progress import Progress, reporter

_Spaces = tuple[torch.Tensor, torch.Tensor]


def penalty(
    peft_model: PeftModel,
    covariances: Covariances,
    *,
    adapter_name: str | None = None,
    initial: Initial = None,
    progress: bool | Progress = False,
) -> Callable[[], torch.Tensor]:
    """A function that returns Σ ‖ΔW X‖² / ‖W₀ X‖² over the adapter's layers, for a loss: `loss + strength * hold()`.

    A sum and not a mean, as in the objective of `nullspace.factors.filtered`: a drift of 0.01 in each of 210 layers is 0.021.

    Args, errors: as `Gauge`.

    Returns:
        A function without arguments. Its value is a float32 scalar on the device of the first layer, with the gradients of A and B;
        it is collective if the adapter is sharded.

    Cost: that of a reading of `Gauge`, and twice as much for the gradient. An A that does not train is multiplied by the second
    moment once.
    """
    gauge = Gauge(peft_model, covariances, adapter_name=adapter_name, initial=initial, progress=progress)
    return lambda: gauge.squares().sum()


def clora(
    peft_model: PeftModel,
    k: float = 128,
    covariances: Covariances | None = None,
    *,
    seed: int = 0,
    adapter_name: str | None = None,
    initial: Initial = None,
    progress: bool | Progress = False,
) -> Callable[[], torch.Tensor]:
    """A function that returns Σ ‖A P‖² + ‖Bᵀ Q‖² over the adapter's layers, for a loss: `loss + strength * hold()`.

    This is CLoRA's penalty (arXiv 2410.16801). P (d_in, k) and Q (d_out, k) have orthonormal columns, which training pushes into
    the null spaces of ΔW = s·B A and of its transpose. In the paper they are random. With `covariances` they are V_k and U_k, the
    leading eigenvectors of C and W₀ C W₀ᵀ.

    `penalty` is s² tr(BᵀB · A C Aᵀ) / tr(W₀ C W₀ᵀ). Here ‖A P‖² = tr(A · P Pᵀ · Aᵀ): P Pᵀ is C cut to its k leading directions, all
    weighed alike, and BᵀB is left out. So A is pushed out of these directions whatever B is, from B = 0 on. The value is not
    relative to what a layer outputs, so its strength is another.

    Args:
        peft_model: with the adapter. If it is sharded, all ranks have to call this, and the function that it returns.
        k: columns of P and Q: a number, of which a layer takes at most half of d_in for P and of min(d_out, d_in) for Q; or a
            share of these, between 0 and 1.
        covariances: second moments of the inputs to be kept; None: random P and Q, as in the paper.
        seed: of random P and Q, at least 0.
        adapter_name: of the adapter; by default the active one.
        initial: as in `Gauge`: A and B of a start that is not zero count from A₀ and B₀.
        progress: True for a bar over the layers while P and Q are computed, or a callable (`nullspace.progress.Progress`).

    Returns:
        As `penalty`. A public implementation halves it: its λ is a strength of λ / 2.

    Cost: a call, 2 · r · k · (d_in + d_out) flops a layer, and twice as much for the gradient. In memory, k · (d_in + d_out)
    float32 numbers a layer on the device of A; with covariances, q, k and v share those of d_in.

    Raises:
        TypeError: if the model is no `PeftModel`, or a number is of another type.
        ValueError: as `Gauge`; for a number that is out of range.
    """
    k, seed = check_directions(k), check_integer("seed", seed, least=0)
    layers = adapted_layers(peft_model, adapter_name, experts=True)
    start = start_of(peft_model, layers, initial)
    spaces: dict[Adapted, _Spaces] = {}
    report = reporter(progress)
    for each, made in _random(layers, k, seed) if covariances is None else _leading(layers, k, start, covariances):
        spaces[each] = made
        report("directions", len(spaces), len(layers), 0)

    def value() -> torch.Tensor:
        with torch.autocast(layers[0].a.device.type, enabled=False):
            terms = [factors.clora(_changed(each, start), *made) for each, made in spaces.items()]
            return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    return value


def _changed(each: Adapted, start: Start) -> LowRank:
    a, b, first = values_of(each.a), values_of(each.b), start.of(each)
    return LowRank(a, b) if first is None else LowRank(a - first.A, b - first.B)


def _random(layers: tuple[Adapted, ...], k: float, seed: int) -> Iterator[tuple[Adapted, _Spaces]]:
    generator = torch.Generator().manual_seed(seed)
    for each in layers:
        d_out, d_in = weight_shape(each.layer.get_base_layer())
        p, q = (
            torch.linalg.qr(torch.randn(d, columns, generator=generator)).Q.to(each.a.device)
            for d, columns in ((d_in, directions_of(k, d_in)), (d_out, directions_of(k, min(d_out, d_in))))
        )
        yield each, (p, q)


def _leading(layers: tuple[Adapted, ...], k: float, start: Start, covariances: Covariances) -> Iterator[tuple[Adapted, _Spaces]]:
    groups = check_known(covariances, layers, start)
    moments = {site: inputs_of(covariances, site) for site in groups}
    for site, members in groups.items():
        c = moments[site].matrix().to(members[0].a.device)
        p = leading_inputs(c, k=directions_of(k, site.d_in)).basis.to(torch.float32)
        for each in members:
            weight = original_weight(each, start)
            q = leading_outputs(weight, c, k=directions_of(k, min(weight.shape))).basis.to(torch.float32)
            yield each, (p, q)
