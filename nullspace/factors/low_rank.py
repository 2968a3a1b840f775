"""`LowRank`: the two factors of a matrix of low rank."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LowRank(NamedTuple):
    """The factors of a rank-r matrix B A."""

    A: torch.Tensor
    """(r, d_in)"""
    B: torch.Tensor
    """(d_out, r)"""
