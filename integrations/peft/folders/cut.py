"""An adapter's changes cut to a smaller rank, for `export_lora`, and how much of each was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nullspace.artifacts.covariances import Covariances
from nullspace.checks import check_integer
from nullspace.errors import InputError
from nullspace.factors import LowRank, truncated
from nullspace.integrations.peft.files import Adapter
from nullspace.integrations.peft.filtering.moments import Moments, check, loaded, naming, place_of


class Cut:
    """Cuts changes to a smaller rank, and records how much of each was lost.

    Args:
        rank: at least 1.
        moments: of the inputs to weigh by, if any.
        place: the directory that they are from.
    """

    def __init__(self, rank: int, moments: Covariances | None, place: str | None) -> None:
        self._rank, self._moments, self._place = rank, moments, place
        self._lost: list[tuple[float, str]] = []

    @classmethod
    def of(cls, rank: int | None, covariances: Moments | None) -> Cut | None:
        """From the arguments of `export_lora`."""
        if rank is not None:
            moments = None if covariances is None else loaded(covariances)
            return cls(check_integer("rank", rank), moments, None if covariances is None else place_of(covariances))
        if covariances is not None:
            raise InputError("covariances weigh the cut to a smaller rank: give rank= too (on the command line --rank)")
        return None

    def apply(self, factors: Mapping[str, LowRank], adapter: Adapter) -> dict[str, LowRank]:
        """The same, of at most this rank."""
        if adapter.config.get("use_dora"):
            raise InputError(f"{adapter.path} uses DoRA, whose magnitudes belong to the whole change: it cannot be cut to a rank")
        if self._moments is not None:
            for name, pair in factors.items():
                check(self._moments, "covariances", name, ((len(pair.B), pair.A.shape[1]), None), str(adapter.path))
        return {name: self._one(name, pair) for name, pair in factors.items()}

    def _one(self, name: str, pair: LowRank) -> LowRank:
        c = None if self._moments is None else self._moments[name].completed(pair.A.shape[1]).matrix()
        with naming(name):
            short = truncated(pair, c, rank=self._rank)
        gone = LowRank(torch.cat([pair.A, -short.A]), torch.cat([pair.B, short.B], dim=1))
        before = _size(pair, c)
        self._lost.append((_size(gone, c) / before if before > 0 and len(short.A) < len(pair.A) else 0.0, name))
        return short

    def record(self) -> dict[str, Any]:
        """`rank`, `by` (the directory of the covariances; None for the Frobenius norm), and the share of the norm that was lost."""
        lost = sorted(self._lost)
        worst, layer = lost[-1]
        weighted = self._moments is not None
        return {
            "rank": self._rank,
            "weighted": weighted,
            "by": self._place,
            "lost": lost[len(lost) // 2][0],
            "worst": worst,
            "worst_layer": layer,
        }


def _size(pair: LowRank, c: torch.Tensor | None) -> float:
    """‖B A X‖_F for C = X Xᵀ, or ‖B A‖_F."""
    rows = torch.linalg.qr(pair.B, mode="r").R @ pair.A
    return float(((rows if c is None else rows @ c.to(rows)) * rows).sum().clamp(min=0)) ** 0.5
