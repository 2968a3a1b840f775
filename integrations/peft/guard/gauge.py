"""How far an adapter in training has moved the outputs on the inputs to be kept: from second moments, without a forward pass."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel

from nullspace.artifacts.covariances import Covariances
from nullspace.errors import InputError
from nullspace.factors import LowRank
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
from nullspace.model.sharded import reshard_model
from nullspace.model.sharded_tensors import is_dtensor, is_sharded, version_of, whole
from nullspace.model.sites import Site
from nullspace.model.wrappers import unwrap
from nullspace.moments.covariance import Covariance
from nullspace.progress import Progress, reporter

# Relative to the trace: shifts of the diagonal, of which the first that makes a second moment positive definite is taken. float32
# files need the last ones.
_SHIFTS = (1e-15, 1e-14, 1e-13, 1e-12, 1e-10, 1e-8, 1e-6)


class Drift(NamedTuple):
    """Drift ‖ΔW X‖ / ‖W₀ X‖ of an adapter on the inputs to be kept."""

    median: float
    """Over layers: the adapter's drift."""
    worst: float
    worst_layer: str
    layers: dict[str, float]
    """Layer → drift."""


def drift_of(peft_model: PeftModel, covariances: Covariances, *, adapter_name: str | None = None, initial: Initial = None) -> Drift:
    """The drift of a live adapter, once. For several times make a `Gauge`, which keeps what does not change.

    Args, errors: as `Gauge`.
    """
    return Gauge(peft_model, covariances, adapter_name=adapter_name, initial=initial)()


class Gauge:
    """The drift of a live adapter at any time: ‖ΔW X‖ / ‖W₀ X‖ of every layer, from A, B and the second moments.

    ΔW = s·B A, or s·(B A − B₀A₀) where the base or a second adapter subtracts the initial product. With C = L Lᵀ,
    ‖ΔW X‖² = s² tr((A L)(A L)ᵀ BᵀB): L in place of C, so that rounding in float32 is relative to ‖A‖ ‖X‖ and not to its square.

    Args:
        peft_model: with the adapter. If it is sharded, all ranks have to call this, and each reading gathers A and B.
        covariances: second moments of the inputs to be kept, of this very model.
        adapter_name: of the adapter; by default the active one.
        initial: what the adapter started as (a directory of PEFT or of `save_init`, or what `read_factors` returns). Needed only
            for a trained adapter on a residual base that was moved from its place. By default, if nothing subtracts the initial
            product, ΔW = s·B A, also for an adapter that is trained on; else A₀ and B₀ are those of the second adapter that
            subtracts them, of `OUT/adapter` beside the base (`save_init`), or the present ones.
        progress: True for a bar over the sites, or a callable (`nullspace.progress.Progress`).

    Cost: at first d_in³ / 3 flops a site, and 2 · d_out · d_in² a layer for ‖W₀ X‖. A reading, 2 · r · d_in² flops a layer (4 in
    place of 2 for a start that is not zero); nothing for an A that does not train. In memory d_in² float32
    numbers a site on the device of A.

    Raises:
        TypeError: if the model is no `PeftModel`.
        ValueError: naming the layer, if there is no second moment of its inputs, or that of another model; if it is not linear or
            uses DoRA; if its output on the inputs is zero.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        covariances: Covariances,
        *,
        adapter_name: str | None = None,
        initial: Initial = None,
        progress: bool | Progress = False,
    ) -> None:
        self._model = unwrap(peft_model)
        _reshard(self._model)
        layers = adapted_layers(self._model, adapter_name, experts=True)
        self.start = start_of(self._model, layers, initial)
        groups, report = check_known(covariances, layers, self.start), reporter(progress)
        self._sites: list[_Site] = []
        for site, members in groups.items():
            self._sites.append(_Site(site, inputs_of(covariances, site), members, self.start))
            report("gauge", len(self._sites), len(groups), 0)
        self.layers = tuple(each.name for site in self._sites for each in site.layers)

    def squares(self) -> torch.Tensor:
        """(layers,): (‖ΔW X‖ / ‖W₀ X‖)², in the order of `layers`; differentiable where A and B need gradients.

        Collective if the adapter is sharded.
        """
        if not torch.is_grad_enabled():
            _reshard(self._model)
        with torch.autocast(self._sites[0].layers[0].a.device.type, enabled=False):
            squares = [square for site in self._sites for square in site.squares()]
        return torch.stack([square.to(squares[0].device) for square in squares])

    @torch.no_grad()
    def __call__(self) -> Drift:
        """The drift now. Collective if the adapter is sharded."""
        values = self.squares().clamp(min=0).sqrt().tolist()
        worst = max(range(len(values)), key=values.__getitem__)
        return Drift(statistics.median(values), values[worst], self.layers[worst], dict(zip(self.layers, values, strict=True)))


class _Site:
    """The layers of one site, and L with L Lᵀ = C / tr C."""

    def __init__(self, site: Site, covariance: Covariance, layers: list[Adapted], start: Start) -> None:
        self.layers = layers
        self._root = root_of(covariance, layers[0].a.device, site.name)
        self._starts = [start.of(each) for each in layers]
        self._weights = [self._scale(each, start) for each in layers]
        # By layer: A, its version, and A L.
        self._kept: dict[str, tuple[torch.Tensor, int | None, torch.Tensor]] = {}

    @torch.no_grad()
    def _scale(self, each: Adapted, start: Start) -> float:
        """s² / ‖W₀ X‖²."""
        output = float((original_weight(each, start) @ self._root.to(each.a.device)).square().sum())
        if not output > 0:
            raise InputError(
                f"the output of {each.name!r} on the calibration input is zero: there is nothing to measure its drift by"
            )
        return each.scaling**2 / output

    def squares(self) -> Iterable[torch.Tensor]:
        for each, start, weight, seen in zip(self.layers, self._starts, self._weights, self._seen(), strict=True):
            b = values_of(each.b)
            if start is not None:
                b = torch.cat([b - start.B, b], dim=1)
            yield weight * ((seen @ seen.mT) * (b.mT @ b)).sum()

    def _seen(self) -> list[torch.Tensor]:
        """A L (r, d_in) of every layer; (2 r, d_in) of a start that is not zero. One product for all, as L is read once then."""
        rows = {
            each.name: _rows(each, start)
            for each, start in zip(self.layers, self._starts, strict=True)
            if start is not None or not self._is_kept(each)
        }
        seen = {name: kept[2] for name, kept in self._kept.items()}
        if rows:
            products = (torch.cat(list(rows.values())) @ self._root).split([len(each) for each in rows.values()])
            seen.update(zip(rows, products, strict=True))
        for each, start in zip(self.layers, self._starts, strict=True):
            # Fused optimizers do not count as writing: an A that trains is always multiplied.
            if start is None and not each.a.requires_grad and not is_sharded(each.a):
                self._kept[each.name] = each.a, version_of(each.a), seen[each.name]
        return [seen[each.name] for each in self.layers]

    def _is_kept(self, each: Adapted) -> bool:
        a, kept = each.a, self._kept.get(each.name)
        return kept is not None and kept[0] is a and kept[1] == version_of(a) and not a.requires_grad


def _rows(each: Adapted, start: LowRank | None) -> torch.Tensor:
    """A; or [A₀; A − A₀], as ΔW = (B − B₀) A₀ + B (A − A₀)."""
    return values_of(each.a) if start is None else torch.cat([start.A, values_of(each.a) - start.A])


def root_of(covariance: Covariance, device: torch.device, name: str) -> torch.Tensor:
    """L (d_in, d_in) float32 with L Lᵀ = C / tr C, up to a shift of rounding's size.

    Raises:
        ValueError: naming the site, if this is no second moment.
    """
    trace = covariance.trace
    if covariance.products == "qr":
        return (covariance.root().mT / trace**0.5).to(device, torch.float32).contiguous()
    c = covariance.matrix().to(device) / trace
    for shift in _SHIFTS:
        lower, info = torch.linalg.cholesky_ex(c + shift * torch.eye(len(c), dtype=c.dtype, device=c.device))
        if int(info) == 0:
            return lower.to(torch.float32)
    raise InputError(f"site {name!r}: its second moment is not positive semi-definite. Compute it again")


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter in float32, with its gradient if it needs one."""
    if is_dtensor(parameter) and parameter.requires_grad and torch.is_grad_enabled():
        return parameter.full_tensor().to(torch.float32)  # type: ignore[attr-defined]
    return (whole(parameter) if is_sharded(parameter) else parameter).to(torch.float32)


def _reshard(model: torch.nn.Module) -> None:
    if torch.distributed.is_initialized():
        reshard_model(model)
