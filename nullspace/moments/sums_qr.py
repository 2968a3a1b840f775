"""`QrSums`: second moments as a triangular factor, without squares.

R of X = QR determines C = RᵀR, with the condition number of X instead of its square: where a few massive tokens have 1e5 times the
norm of the others, float64 sums have lost the directions of small energy, and R has not. A chunk of tokens is added by the QR
decomposition of [R; X_chunk], as in COALA (arXiv 2507.07580). It costs some ten times the product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nullspace.moments.sums import STAGE_TOKENS, Sums, TokenMask, find_outliers, narrowed, refuse_nonfinite

# ‖E‖_F / ‖X‖_F, where R is that of X + E: Householder QR is backward stable.
QR_RESOLUTION = 1e-15


class QrSums(Sums):
    """R with RᵀR = Σ x xᵀ, in float64.

    Args:
        d_in: width of the inputs.
        device: where R lives; inputs are moved there.
    """

    LOSSES = ("storage_loss",)

    def __init__(self, d_in: int, device: torch.device) -> None:
        super().__init__(d_in, device)
        self.root = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        # As many tokens as there are columns: the decomposition of R's own rows then costs no more than that of the new ones.
        self._chunk = max(STAGE_TOKENS, d_in)
        self._staged: list[torch.Tensor] = []
        self._storage_loss = 0.0  # ‖·‖_F of the rounding to a narrower dtype in a file

    def add(self, x_nd: torch.Tensor, mask: TokenMask | None) -> None:
        """Add rows; if it raises (`ValueError`, for NaN or Inf), nothing was added."""
        x_nd = x_nd.to(self.device)
        rows = (x_nd if mask is None else x_nd.index_select(0, mask.indices(self.device))).double()
        refuse_nonfinite([torch.linalg.vector_norm(rows, dim=1)])
        self.total += rows.sum(0)
        self._staged.append(rows.clone() if rows.data_ptr() == x_nd.data_ptr() else rows)
        if sum(map(len, self._staged)) >= self._chunk:
            self.flush()

    def flush(self) -> None:
        if not self._staged:
            return
        rows, self._staged = torch.cat(self._staged), []
        self.outliers += int(find_outliers(torch.linalg.vector_norm(rows, dim=1))[0].sum())
        for chunk in rows.split(self._chunk):
            self._absorb(chunk)

    def merge(self, other: Sums) -> None:
        assert isinstance(other, QrSums)  # `Covariance.merge` compares the precisions
        super().merge(other)
        self._storage_loss += other._storage_loss
        self._absorb(other.root.to(self.device))

    def scale(self, weight: float) -> None:
        super().scale(weight)
        self.root *= weight**0.5
        self._storage_loss *= weight**0.5

    def state(self, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        rows, lost = narrowed(torch.cat([self.root[: i + 1, i] for i in range(self.d_in)]), dtype)  # column by column
        return {"storage_loss": self._storage_loss + lost}, {"root": rows, "total": self.total.clone()}

    def load_state(self, numbers: Mapping[str, float], tensors: Mapping[str, torch.Tensor]) -> None:
        rows, at = tensors["root"], 0
        for i in range(self.d_in):
            self.root[: i + 1, i] = rows[at : at + i + 1].to(self.root)
            at += i + 1
        self.total.copy_(tensors["total"])
        self._storage_loss = numbers["storage_loss"]

    def square(self) -> torch.Tensor:
        c = self.root.mT @ self.root
        return (c + c.mT) / 2

    @property
    def trace(self) -> float:
        return float(self.root.square().sum())

    @property
    def products(self) -> str:
        return "qr"

    @property
    def error_norm(self) -> float:
        return QR_RESOLUTION * self.trace**0.5 + self._storage_loss

    def _absorb(self, rows_nd: torch.Tensor) -> None:
        self.root = torch.linalg.qr(torch.cat([self.root, rows_nd]), mode="r").R
