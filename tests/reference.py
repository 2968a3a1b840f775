"""Independent references: what the engine must agree with, computed the slow way from the materialised activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """x.T @ x over all rows, in float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖_F / ‖expected‖_F."""
    return float((actual - expected).norm() / expected.norm())


def leak(basis_dr: torch.Tensor, x_nd: torch.Tensor) -> float:
    """‖UᵀX‖_F / ‖X‖_F, in float64."""
    x = x_nd.double()
    return float((x @ basis_dr.double()).norm() / x.norm())


def optimal_leak(x_nd: torch.Tensor, rank: int) -> float:
    """The least leak that any `rank` orthonormal directions have: from the float64 singular values of X itself."""
    d = x_nd.shape[1]
    sigma = torch.zeros(d, dtype=torch.float64)
    values = torch.linalg.svdvals(x_nd.double())
    sigma[: len(values)] = values
    return float(sigma.sort().values[:rank].norm() / sigma.norm())


def excess_leak(basis_dr: torch.Tensor, x_nd: torch.Tensor, optimum: float | None = None) -> float:
    """leak / optimum − 1: how much more the basis leaks than the best one. `optimum`: `optimal_leak`, if it is known."""
    return leak(basis_dr, x_nd) / (optimal_leak(x_nd, basis_dr.shape[1]) if optimum is None else optimum) - 1


def excess_over(basis_dr: torch.Tensor, expected_dr: torch.Tensor, c_dd: torch.Tensor) -> float:
    """leak / leak of another basis − 1, on one second moment; a leak of 1e-8 is none."""

    def heard(basis: torch.Tensor) -> float:
        return float(torch.einsum("dr,de,er->", basis, c_dd, basis)) + 1e-16 * float(c_dd.trace())

    return (heard(basis_dr) / heard(expected_dr)) ** 0.5 - 1


def recorded_inputs(
    model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Layer name → all its unpadded inputs, (tokens, d_in), by hooks of the test's own.

    Where a batch has an attention_mask, inputs must be (batch, tokens, d_in); where it has none, every row of any input counts.
    """
    modules = dict(model.named_modules())
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    mask: torch.Tensor | None = None

    def recorder(name: str):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            rows[name].append((x if mask is None else x[mask.reshape(-1).bool()]).clone())

        return hook

    handles = [modules[name].register_forward_pre_hook(recorder(name)) for name in rows]
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def entrywise_error(c: torch.Tensor, x_nd: torch.Tensor) -> float:
    """max |c_ij − (XᵀX)_ij| / √((XᵀX)_ii (XᵀX)_jj): by Cauchy–Schwarz no entry is excused for being small."""
    exact = x_nd.double().T @ x_nd.double()
    scale = exact.diagonal().sqrt()
    error = (c - exact).abs()
    return float(torch.where(error == 0, 0.0, error / (scale[:, None] * scale)).max())
