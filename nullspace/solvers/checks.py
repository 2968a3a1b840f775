"""The checks that all solvers share, and the rule for the signs of vectors."""

from __future__ import annotations

import torch

from nullspace.errors import InputError


def check_symmetric(c: torch.Tensor) -> int:
    """The order d of a square matrix with finite entries. Symmetry is not checked: solvers may read one triangle alone.

    Raises:
        ValueError: if `c` is not square, is empty, or holds NaN or Inf.
    """
    if c.ndim != 2 or c.shape[0] != c.shape[1] or c.shape[0] == 0:
        raise InputError(f"expected a square matrix, got shape {tuple(c.shape)}")
    check_finite(c)
    return c.shape[0]


def check_finite(m: torch.Tensor) -> None:
    """Raise `ValueError` if a matrix holds NaN or Inf."""
    if not is_finite(m):
        raise InputError("the matrix holds NaN or Inf")


def is_finite(m: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf."""
    # On a CPU, `isfinite` takes ten times as long: it writes a tensor of truth values, without vector instructions.
    return m.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(m))).all())


def column_signs(m_dk: torch.Tensor) -> torch.Tensor:
    """(k,), ±1 in the dtype of the columns: the sign of the entry of largest magnitude in each column; +1 for a column of zeros.

    An eigenvector or a singular vector is unique but for its sign. Multiplied by these, equal inputs give equal vectors, whatever
    solver found them.
    """
    peak = torch.gather(m_dk, 0, m_dk.abs().argmax(0, keepdim=True))[0]
    return torch.where(peak < 0, -1.0, 1.0).to(m_dk.dtype)


def with_fixed_signs(vectors_dk: torch.Tensor) -> torch.Tensor:
    """The vectors, each with its entry of largest magnitude positive."""
    return vectors_dk * column_signs(vectors_dk)
