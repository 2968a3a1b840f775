"""`TorchSums`: second moments by PyTorch's matrix products, over blocks of the triangle.

The host reads every norm before the tokens are summed, and decides what is an outlier. On a CPU that costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nullspace.moments.sums import FLOAT32_NORMS, OUTLIER_RATIO, STAGE_TOKENS, GramSums, Sums, TokenMask, refuse_nonfinite

# Tokens in one float32 chain. The error of a chain grows like the square root of its length; below about 1024 tokens the
# traffic of the float64 sum (8 d² bytes a chain, whatever its length) begins to show in the time.
CHAIN_TOKENS = 1024
# Outlier rows are kept until this many make a product worth it.
OUTLIER_ROWS = 64
# ‖E‖_F / ‖C‖_F of one float32 chain: an upper end of what was measured over the inputs of seven families of models and of SmolLM2.
# The errors of several chains are independent, and partly cancel.
FLOAT32_RESOLUTION = 2e-7
# The first tokens, this many times d_in, are summed in float64, and show whether float32 chains would resolve the bottom of the
# spectrum: see `_resolves_float32`. On a GPU they would cost as much as all others: there a second pass has to suffice.
PROBE_TOKENS = 1.25
PROBE_LIMIT = 0.1


class Probe:
    """Whether float32 chains suffice; sums of similar inputs can share one.

    Attributes:
        float32: the decision; None as long as none was made.
    """

    def __init__(self, float32: bool | None = None) -> None:
        self.float32 = float32


class TorchSums(GramSums):
    """Sums by PyTorch's GEMM.

    Args:
        d_in: width of the inputs.
        device: where the sums live; inputs are moved there.
        mixed: take products in float32; False: all in float64.
        probe: sum the first tokens in float64, and decide by them whether float32 suffices; or the decision that these sums share
            with others: the first that has enough tokens makes it for all.
    """

    def __init__(self, d_in: int, device: torch.device, *, mixed: bool, probe: bool | Probe) -> None:
        super().__init__(d_in, device)
        self._absorbed = 0
        self._probe_energy = 0.0
        self._probe = probe if mixed and isinstance(probe, Probe) else Probe(None if mixed and probe else mixed)
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._outlier_rows: list[torch.Tensor] = []

    def add(self, x_nd: torch.Tensor, mask: TokenMask | None) -> None:
        """Add rows; if it raises (`ValueError`, for NaN or Inf), nothing was added."""
        x_nd = x_nd.to(self.device)
        rows = x_nd if mask is None else x_nd.index_select(0, mask.indices(self.device))
        self.add_rows(rows, finite_norms(rows), borrowed=mask is None)

    def add_rows(self, rows: torch.Tensor, norms: torch.Tensor, *, borrowed: bool) -> None:
        """Add rows (n, d_in) on the device, whose norms (n,) float64 are known to be finite.

        Args:
            borrowed: the rows may be overwritten, or belong to a larger tensor.
        """
        if rows.shape[0] >= STAGE_TOKENS:
            self._absorb(rows, norms)
            return
        # The model may overwrite its activation after the hook returns, and a view would keep the whole batch alive.
        self._staged.append((rows.clone() if borrowed else rows, norms))
        if sum(len(staged) for staged, _ in self._staged) >= STAGE_TOKENS:
            self._absorb_staged()

    def flush(self) -> None:
        self._absorb_staged()
        self._add_outlier_rows()

    def merge(self, other: Sums) -> None:
        super().merge(other)
        if isinstance(other, TorchSums):
            self._absorbed += other._absorbed
            self._probe_energy += other._probe_energy
            float32 = other._float32 if self._float32 is None else self._float32
        else:
            float32 = bool(self._float32)  # if undecided: the sum is not of the first tokens alone any more
        self._probe = Probe(float32)

    def _load_losses(self, numbers: Mapping[str, float]) -> None:
        super()._load_losses(numbers)
        self._probe = Probe(bool(self._float32))  # if undecided: which of the tokens were the first ones is unknown

    def scale(self, weight: float) -> None:
        super().scale(weight)
        self._probe_energy *= weight

    @property
    def _float32(self) -> bool | None:
        return self._probe.float32

    def _absorb_staged(self) -> None:
        if self._staged:
            staged, self._staged = self._staged, []
            dtype = functools.reduce(torch.promote_types, (rows.dtype for rows, _ in staged))
            self._absorb(torch.cat([rows.to(dtype) for rows, _ in staged]), torch.cat([norms for _, norms in staged]))

    def _absorb(self, rows_nd: torch.Tensor, norms_n: torch.Tensor) -> None:
        nonzero = norms_n[norms_n > 0]
        median = float(nonzero.median()) if len(nonzero) else 0.0
        outlier = norms_n > OUTLIER_RATIO * median
        self.outliers += int(outlier.sum())
        if self._float32 is None:
            wanted = math.ceil(PROBE_TOKENS * self.d_in)
            head = max(wanted - self._absorbed, 0)
            self._add_rows(rows_nd[:head], norms_n[:head], torch.float64)
            self._probe_energy += float(norms_n[:head][~outlier[:head]].square().sum())
            if self._absorbed >= wanted:
                self._probe.float32 = self._resolves_float32()
            rows_nd, norms_n, outlier = rows_nd[head:], norms_n[head:], outlier[head:]
        dtype = self._product_dtype(rows_nd, median)
        if dtype != torch.float64 and bool(outlier.any()):
            self._outlier_rows.append(rows_nd[outlier].double())
            rows_nd, norms_n = rows_nd[~outlier], norms_n[~outlier]
            if sum(map(len, self._outlier_rows)) >= OUTLIER_ROWS:
                self._add_outlier_rows()
        self._add_rows(rows_nd, norms_n, dtype)

    def _add_rows(self, rows_nd: torch.Tensor, norms_n: torch.Tensor, dtype: torch.dtype) -> None:
        self._absorbed += len(rows_nd)
        with full_precision_matmul(self.device.type):
            for chain, norms in zip(rows_nd.split(CHAIN_TOKENS), norms_n.split(CHAIN_TOKENS), strict=True):
                chain = chain.to(dtype).contiguous()
                if dtype != torch.float64:
                    energy = float(norms.square().sum())
                    self._mixed_energy += energy
                    self._independent_loss += (FLOAT32_RESOLUTION * energy) ** 2
                self.total += chain.sum(0, dtype=torch.float64)
                self.triangle.add_gram(chain)

    def _resolves_float32(self) -> bool:
        """Whether the bottom of the spectrum of the first tokens lies above what float32 chains would lose.

        With e the entry size of the loss and S = tr C⁻¹ = Σ 1/λ, dominated by the smallest λ: e S is about e over the smallest λ,
        and e² S² / r bounds the energy that a basis of r vectors picks up by rounding, relative to its own. S is estimated from a
        Cholesky factor and a few random signs (Hutchinson 1990), d³ / 3 flops. `NullSpace.excess_estimate` shows where True was
        wrong; a wrong False costs time.
        """
        c = self.triangle.square()
        entry = FLOAT32_RESOLUTION * min(self.triangle.norm(), self._probe_energy) / self.d_in
        factor, failed = torch.linalg.cholesky_ex(c)
        if bool(failed):
            return False
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (self.d_in, 8), generator=generator).to(c) * 2 - 1
        inverse_trace = float(torch.linalg.solve_triangular(factor, signs, upper=False).square().sum(0).mean())
        return entry * inverse_trace < PROBE_LIMIT

    def _add_outlier_rows(self) -> None:
        if self._outlier_rows:
            rows = torch.cat(self._outlier_rows)
            self._outlier_rows = []
            self.total += rows.sum(0)
            self.triangle.add_gram(rows)

    def _product_dtype(self, rows_nd: torch.Tensor, median_norm: float) -> torch.dtype:
        low, high = FLOAT32_NORMS
        fits = median_norm == 0.0 or low < median_norm < high
        # A flush can leave fewer than STAGE_TOKENS rows. The median of so few may be that of outliers: these are summed in float64.
        few = len(rows_nd) < STAGE_TOKENS
        if not self._float32 or rows_nd.dtype == torch.float64 or few or not fits:
            return torch.float64
        return torch.float32


def finite_norms(rows: torch.Tensor) -> torch.Tensor:
    """The norms of rows, (n,) float64; raises `ValueError`, naming the first row, if one is NaN or Inf."""
    # Chain by chain: a norm in float64 copies its rows to float64.
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in rows.split(CHAIN_TOKENS)])
    refuse_nonfinite([norms])
    return norms


@contextlib.contextmanager
def full_precision_matmul(device_type: str) -> Iterator[None]:
    """float32 products in float32, whatever the surrounding code allows: no TF32, no bf16 shortcut, no autocast."""
    # Since torch 2.9 every backend has a setting of its own, and the older functions raise once anybody has used one.
    matmul: Any = getattr(torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn, "matmul", None)
    own_setting = hasattr(matmul, "fp32_precision")
    before = matmul.fp32_precision if own_setting else torch.get_float32_matmul_precision()
    if own_setting:
        matmul.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if own_setting:
            matmul.fp32_precision = "none"  # inherits; a setting that was inherited before must follow later changes too
            if matmul.fp32_precision != before:
                matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision(before)
