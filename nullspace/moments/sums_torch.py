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
# The first tokens, at least PROBE_TOKENS · d_in, show whether float32 chains would resolve the bottom of the spectrum: see
# `_resolves_float32`. Where one input has as many, PROBE_MOST · d_in of its rows are summed in float32, and in float64 instead if
# that is too coarse; otherwise the first ones are summed in float64. On a GPU that would cost as much as all others: there a second
# pass has to suffice. Seven of SmolLM2's 120 inputs are above PROBE_LIMIT; below it no excess leak of 4 to 128 vectors is estimated
# at more than 1e-8.
PROBE_TOKENS, PROBE_MOST = 1.25, 4
PROBE_LIMIT = 0.1
# Norms between these are as good in float32 as in float64, and so are their squares.
PLAIN_NORMS = (1e-15, 1e15)


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
        probe: decide by the first tokens whether float32 suffices; or the decision that these sums share with others: the first
            that has enough tokens makes it for all.
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
            head = self._probe_by(rows_nd, norms_n, outlier, self._product_dtype(rows_nd, median))
            rows_nd, norms_n, outlier = rows_nd[head:], norms_n[head:], outlier[head:]
        self._add_products(rows_nd, norms_n, outlier, self._product_dtype(rows_nd, median))

    def _probe_by(self, rows_nd: torch.Tensor, norms_n: torch.Tensor, outlier: torch.Tensor, dtype: torch.dtype) -> int:
        """Sum the first rows, and decide by them and those before, if that is enough. Returns how many were summed."""
        wanted = math.ceil(PROBE_TOKENS * self.d_in)
        is_whole = self._absorbed == 0 and len(rows_nd) >= wanted
        head = PROBE_MOST * self.d_in if is_whole else max(wanted - self._absorbed, 0)
        rows_nd, norms_n, outlier = rows_nd[:head], norms_n[:head], outlier[:head]
        dtype = dtype if is_whole else torch.float64
        self._probe_energy += float(norms_n[~outlier].square().sum())
        self._add_products(rows_nd, norms_n, outlier, dtype)
        if self._absorbed >= wanted:
            self._add_outlier_rows()
            self._probe.float32 = self._resolves_float32()
            if dtype != torch.float64 and not self._probe.float32:  # there was nothing before these rows
                self._absorbed, self._mixed_energy, self._independent_loss = 0, 0.0, 0.0
                self.total.zero_()
                self.triangle.packed.zero_()
                self._add_rows(rows_nd, norms_n, torch.float64)
        return len(rows_nd)

    def _add_products(self, rows_nd: torch.Tensor, norms_n: torch.Tensor, outlier: torch.Tensor, dtype: torch.dtype) -> None:
        if dtype != torch.float64 and bool(outlier.any()):
            self._outlier_rows.append(rows_nd[outlier].double())
            self._absorbed += len(self._outlier_rows[-1])
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
        """Whether few eigenvalues of the first tokens lie as low as what float32 chains would lose.

        With e the entry size of the loss, 2 e √d is the spectral norm of a random loss, the noise. Σ noise / (λ + noise) is about
        the number of eigenvalues below the noise, and small if most of the others are far above it; it is estimated from a Cholesky
        factor and a few random signs (Hutchinson 1990), d³ / 3 flops. A basis tolerates a few such directions, whose energy is
        nothing beside that of the others. With as few tokens the estimate is high, so that a sum of many tokens is safe.
        `NullSpace.excess_estimate` shows where True was wrong; a wrong False costs time.
        """
        norm = self.triangle.norm()
        if norm == 0.0:
            return False
        entry = FLOAT32_RESOLUTION * min(norm, self._probe_energy) / norm / self.d_in
        # Rounding in float32 is about as large as the noise, and rarely too large for the first attempt.
        for dtype in (torch.float32, torch.float64):
            c = self.triangle.lower(norm, dtype)
            c.diagonal().add_(2 * entry * self.d_in**0.5)
            factor, failed = torch.linalg.cholesky_ex(c)
            if not bool(failed):
                generator = torch.Generator().manual_seed(0)
                signs = torch.randint(0, 2, (self.d_in, 8), generator=generator).to(factor) * 2 - 1
                inverse_trace = float(torch.linalg.solve_triangular(factor, signs, upper=False).square().sum(0).mean())
                return entry * inverse_trace < PROBE_LIMIT
        return False

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
        if self._float32 is False or rows_nd.dtype == torch.float64 or few or not fits:
            return torch.float64
        return torch.float32


def finite_norms(rows: torch.Tensor) -> torch.Tensor:
    """The norms of rows, (n,) float64; raises `ValueError`, naming the first row, if one is NaN or Inf."""
    if rows.dtype != torch.float64:
        # A norm in float64 copies its rows to float64, which takes four times as long.
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        least, most = torch.aminmax(norms)
        if bool((least > PLAIN_NORMS[0]) & (most < PLAIN_NORMS[1])):
            return norms.double()
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
