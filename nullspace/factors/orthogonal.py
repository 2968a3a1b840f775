"""A random start whose product is zero."""

from __future__ import annotations

import torch

from nullspace.checks import check_integer
from nullspace.errors import InputError
from nullspace.factors.low_rank import LowRank


@torch.no_grad()
def orthogonal(
    d_in: int, d_out: int, *, rank: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> LowRank:
    """Random A and B, both different from zero, with B A = 0 (PEFT's `init_lora_weights="orthogonal"`, after an idea of D. Bhatta).

    Q is a random orthogonal r × r matrix; A combines its odd rows and B its even ones, with normal coefficients of standard
    deviation 1/10, so that every row of B is orthogonal to every column of A. W₀ stays.

    Args:
        d_in: columns of the weight.
        d_out: its rows.
        rank: r, even.
        generator: of the random numbers; PyTorch's default one otherwise. They are drawn on the CPU for every device.
        device: of the factors.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64.

    Raises:
        ValueError: if r is odd or smaller than 2.
    """
    if check_integer("rank", rank, least=None) < 2 or rank % 2:
        raise InputError(f"the rank of an orthogonal start must be even, not {rank}")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = torch.linalg.qr(normal(rank, rank)).Q
    a, b = (normal(d_in, rank // 2) @ q[0::2]).mT / 10, normal(d_out, rank // 2) @ q[1::2] / 10
    return LowRank(A=a.contiguous().to(device), B=b.to(device))
