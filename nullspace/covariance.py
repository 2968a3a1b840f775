"""`Covariance`: one running second moment. The only place where activations become numbers.

"Covariance" is the field's word for the *uncentred* second moment C = Σ_t x_t x_tᵀ; Σ_t x_t is kept beside it for the methods
that centre.

The sum has two precisions. `"fp64"` takes every product in float64. `"auto"` takes them in float32 over short chains of tokens,
each chain added to a float64 master, and takes *outlier tokens* (norm above 8 × the median) out of the chains and adds them by
a float64 product: a single massive activation in a float32 partial sum rounds away everything that the quiet directions had
put there, and no wider master brings it back. Some spectra are too steep for float32 chains without any outlier; the first
tokens are therefore summed in float64, and where they show that the bottom of the spectrum would be lost, so are all others.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from nullspace.triangle import LowerTriangle

PRECISIONS = ("auto", "fp64")

# Tokens in one float32 chain. The error of a chain grows like the square root of its length; below about 1024 tokens the
# float64 master's own traffic (8 d² bytes a chain, whatever its length) begins to show in the time.
CHAIN_TOKENS = 1024
# Fewer rows than this are kept until there are enough for a product to be worth it and for a median norm to mean something.
STAGE_TOKENS = 512
# A token is an outlier if its norm exceeds this many times the median norm of those around it.
OUTLIER_RATIO = 8.0
# Outlier rows are kept until this many make a product worth it.
OUTLIER_ROWS = 64
# ‖E‖_F / ‖C‖_F of a sum, where C + E is what the sum comes to. One float32 chain: an upper end of what was measured over the
# inputs of seven families of models and of SmolLM2; the errors of several chains are independent, and partly cancel. float64: an
# upper end too.
FLOAT32_RESOLUTION = 2e-7
FLOAT64_RESOLUTION = 1e-15
# The first tokens, this many times d_in, are summed in float64, and show whether float32 chains could see the bottom of the
# spectrum: see `_resolves_float32`.
PROBE_TOKENS = 1.25
PROBE_LIMIT = 0.1
# Median norms outside this range would under- or overflow in float32 products: such rows are summed in float64.
FLOAT32_NORMS = (1e-12, 1e14)


class Covariance:
    """The running second moment C = Σ_t x_t x_tᵀ of the inputs of one site (arXiv 2503.02659, X_pre X_preᵀ of eq. 6).

    Args:
        d_in: width of the inputs, at least 1.
        device: where the sums live; inputs are moved there.
        precision: `"auto"` (float32 chains into a float64 master, outlier tokens in float64) or `"fp64"` (every product in
            float64). float64 inputs are always summed in float64.

    Cost: n · d_in² flops for n tokens; 4 · d_in² bytes for the triangle, and at most `STAGE_TOKENS` rows of input.

    Raises:
        ValueError: if `d_in` is smaller than 1, or `precision` is unknown.

    Example:
        >>> import torch
        >>> from nullspace import Covariance
        >>> covariance = Covariance(3)
        >>> covariance.update(torch.tensor([[1.0, 2.0, 0.0], [9.0, 9.0, 9.0]]), mask=torch.tensor([1, 0]))
        >>> covariance.tokens, covariance.matrix()[0].tolist()
        (1, [1.0, 2.0, 0.0])
    """

    def __init__(self, d_in: int, *, device: torch.device | str = "cpu", precision: str = "auto") -> None:
        if d_in < 1:
            raise ValueError(f"d_in must be at least 1, not {d_in}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, not {precision!r}")
        self.d_in = d_in
        self.device = torch.device(device)
        self.precision = precision
        self._triangle = LowerTriangle(d_in, device=self.device)
        self._sum = torch.zeros(d_in, dtype=torch.float64, device=self.device)
        self._tokens = 0
        self._outliers = 0
        self._absorbed = 0
        self._probe_energy = 0.0
        self._float32: bool | None = None if precision == "auto" else False  # not known yet, until the first tokens are in
        # Over the float32 chains: the sum of their energies Σ‖x‖², and of the squares of these.
        self._chain_energy = self._chain_energy_squared = 0.0
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._outlier_rows: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add the tokens of one batch. If it raises, nothing was added.

        Args:
            x: (..., d_in), any floating dtype and device.
            mask: as many entries as `x` has rows (tokens); zero or False leaves the row out (padding). None keeps all.

        Raises:
            ValueError: on a wrong width, a mask of another size, or NaN or Inf in a row that counts.
            TypeError: if `x` is not floating point.
        """
        if not x.is_floating_point():
            raise TypeError(f"activations must be floating point, not {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"expected inputs of width {self.d_in}, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.d_in).to(self.device)
        borrowed = True
        if mask is not None:
            keep = mask.to(self.device).reshape(-1).bool()
            if keep.numel() != rows.shape[0]:
                raise ValueError(f"the mask has {keep.numel()} entries for {rows.shape[0]} rows (input {tuple(x.shape)})")
            if not keep.all():
                rows, borrowed = rows[keep], False
        if rows.shape[0] == 0:
            return
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if not torch.isfinite(norms).all():
            bad = torch.nonzero(~torch.isfinite(norms)).flatten()
            raise ValueError(f"NaN or Inf in {len(bad)} of {len(norms)} tokens (the first one is token {int(bad[0])})")
        self._tokens += rows.shape[0]
        if rows.shape[0] >= STAGE_TOKENS:
            self._absorb(rows, norms)
            return
        # The model may overwrite its activation after the hook returns, and a view would keep the whole batch alive.
        self._staged.append((rows.clone() if borrowed else rows, norms))
        if sum(len(staged) for staged, _ in self._staged) >= STAGE_TOKENS:
            self._absorb_staged()

    def merge(self, other: Covariance) -> None:
        """Add another covariance of the same width: the result is that of all tokens together. `other` keeps its sums.

        Raises:
            ValueError: if the widths or the precisions differ.
        """
        if other.d_in != self.d_in or other.precision != self.precision:
            raise ValueError(
                f"cannot merge a covariance of width {other.d_in} and precision {other.precision!r} "
                f"into one of width {self.d_in} and precision {self.precision!r}"
            )
        self._flush()
        other._flush()
        self._triangle.add_(other._triangle)
        self._sum += other._sum.to(self.device)
        self._tokens += other._tokens
        self._outliers += other._outliers
        self._absorbed += other._absorbed
        self._probe_energy += other._probe_energy
        self._float32 = other._float32 if self._float32 is None else self._float32
        self._chain_energy += other._chain_energy
        self._chain_energy_squared += other._chain_energy_squared

    def matrix(self) -> torch.Tensor:
        """C as a new (d_in, d_in) float64 tensor, symmetric to the bit. 8 · d_in² bytes."""
        self._flush()
        return self._triangle.square()

    def mean(self) -> torch.Tensor:
        """Σ x / n: (d_in,) float64. NaN without tokens."""
        self._flush()
        return self._sum / self._tokens if self._tokens else torch.full_like(self._sum, float("nan"))

    @property
    def tokens(self) -> int:
        """Tokens that were added: padding is not counted."""
        return self._tokens

    @property
    def outliers(self) -> int:
        """Tokens whose norm exceeded 8 × the median norm of those that were summed with them."""
        self._flush()
        return self._outliers

    @property
    def trace(self) -> float:
        """tr C = Σ_t ‖x_t‖²."""
        self._flush()
        return float(self._triangle.diagonal().sum())

    @property
    def products(self) -> str:
        """`"mixed"` if float32 chains took part in the sum, `"fp64"` if every product was taken in float64."""
        self._flush()
        return "mixed" if self._chain_energy > 0 else "fp64"

    @property
    def error_norm(self) -> float:
        """About how far `matrix()` is from the true C, ‖E‖_F: what float32 chains and float64 sums lose to rounding.

        m equal chains lose δ‖C‖_F / √m. Outlier tokens never pass through one, so ‖C‖_F is at most the trace of what did.
        """
        self._flush()
        norm = self._triangle.norm()
        lost = FLOAT64_RESOLUTION * norm
        if self._chain_energy > 0:
            share = self._chain_energy_squared**0.5 / self._chain_energy
            lost += FLOAT32_RESOLUTION * share * min(norm, self._chain_energy)
        return lost

    def _flush(self) -> None:
        self._absorb_staged()
        self._add_outlier_rows()

    def _absorb_staged(self) -> None:
        if self._staged:
            staged, self._staged = self._staged, []
            dtype = functools.reduce(torch.promote_types, (rows.dtype for rows, _ in staged))
            self._absorb(torch.cat([rows.to(dtype) for rows, _ in staged]), torch.cat([norms for _, norms in staged]))

    def _absorb(self, rows_nd: torch.Tensor, norms_n: torch.Tensor) -> None:
        nonzero = norms_n[norms_n > 0]
        median = float(nonzero.median()) if len(nonzero) else 0.0
        outlier = norms_n > OUTLIER_RATIO * median
        self._outliers += int(outlier.sum())
        if self._float32 is None:
            wanted = math.ceil(PROBE_TOKENS * self.d_in)
            head = max(wanted - self._absorbed, 0)
            self._add_rows(rows_nd[:head], norms_n[:head], torch.float64)
            self._probe_energy += float(norms_n[:head][~outlier[:head]].square().sum())
            if self._absorbed >= wanted:
                self._float32 = self._resolves_float32()
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
                    self._chain_energy += energy
                    self._chain_energy_squared += energy**2
                self._sum += chain.sum(0, dtype=torch.float64)
                self._triangle.add_gram(chain)

    def _resolves_float32(self) -> bool:
        """Whether the bottom of the spectrum, as the first tokens show it, lies above what float32 chains would lose.

        With e the entry size of the loss and S = tr C⁻¹ = Σ 1/λ, dominated by the smallest λ: e S is about e over the smallest λ,
        and e² S² / r bounds the energy that a basis of r vectors picks up by rounding, relative to its own. S is estimated from a
        Cholesky factor and a few random signs (Hutchinson 1990), d³ / 3 flops. A wrong yes is found out by
        `NullSpace.excess_estimate`, a wrong no costs time.
        """
        c = self._triangle.square()
        entry = FLOAT32_RESOLUTION * min(self._triangle.norm(), self._probe_energy) / self.d_in
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
            self._sum += rows.sum(0)
            self._triangle.add_gram(rows)

    def _product_dtype(self, rows_nd: torch.Tensor, median_norm: float) -> torch.dtype:
        low, high = FLOAT32_NORMS
        fits = median_norm == 0.0 or low < median_norm < high
        # Whoever reads the sums early leaves a few rows, whose median may be that of massive tokens.
        few = len(rows_nd) < STAGE_TOKENS
        if not self._float32 or rows_nd.dtype == torch.float64 or few or not fits:
            return torch.float64
        return torch.float32


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
