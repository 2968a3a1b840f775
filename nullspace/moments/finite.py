"""`FiniteCheck`: NaN and Inf in what was summed on a GPU, looked for when the host need not wait for the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from nullspace.devices import Fetched
from nullspace.moments.covariance import Covariance
from nullspace.moments.sums import Norms


class FiniteCheck:
    """A check for NaN and Inf of what covariances were given since the last one.

    The device begins it now, and `failure` reads the answer. If that is a batch later, the answer is there, and the device is busy
    with the next batch while the host reads.

    Args:
        covariances: name → covariance.
    """

    def __init__(self, covariances: Mapping[str, Covariance]) -> None:
        taken: dict[int, Norms] = {}  # sums of one group share them
        self._norms: list[tuple[str, int | None, Norms]] = []
        for name, covariance in covariances.items():
            sums = covariance._sums
            norms = taken[id(sums.unchecked)] if id(sums.unchecked) in taken else sums.unchecked.take()
            taken[id(sums.unchecked)] = norms
            if norms.parts:
                self._norms.append((name, sums.group, norms))
        excesses: dict[torch.device, list[torch.Tensor]] = {}
        for norms in taken.values():
            excess = norms.excess()
            if excess is not None:
                excesses.setdefault(excess.device, []).append(excess)
        self._excesses = [Fetched(torch.stack(each).sum()) for each in excesses.values()]

    def failure(self) -> tuple[str, str] | None:
        """The name of the first covariance that was given NaN or Inf, and a message about it; None if there is none.

        Where `update` itself raises, there is none.
        """
        if all(math.isfinite(float(each.read())) for each in self._excesses):
            return None
        return next(((name, text) for name, group, norms in self._norms if (text := norms.failure(group)) is not None), None)
