"""`Pool`: the second moment of all experts of a layer, which completes that of an expert with few tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Pool(NamedTuple):
    """The second moment of a larger set of tokens, which completes that of a part with too few tokens.

    Attributes:
        matrix: (d, d) float64, Σ x xᵀ.
        total: (d,) float64, Σ x.
        tokens: their number.
        mixed_energy: Σ ‖x‖² over the tokens whose products were not taken in float64.
        lost: an estimate of the rounding error of `matrix`, a Frobenius norm.
    """

    matrix: torch.Tensor
    total: torch.Tensor
    tokens: int
    mixed_energy: float = 0.0
    lost: float = 0.0
