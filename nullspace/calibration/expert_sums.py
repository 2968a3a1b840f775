"""`ExpertSums`: the second moments of what one parameter of fused experts receives, for each expert or for all together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nullspace.devices import on_host
from nullspace.errors import InputError
from nullspace.model.experts import LAST
from nullspace.model.routing import Routed
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance
from nullspace.moments.grouped import GroupedCovariance, pool_of
from nullspace.moments.pool import Pool
from nullspace.moments.sums import TokenMask


class ExpertSums:
    """The sums of one parameter of fused experts.

    Args:
        routed: what it receives first.
        names: expert → name of its matrix, of those that are targets.
        pooled: one sum of the hidden states that are routed to any expert, instead of one for each expert.
        precision: as of `Covariance`.

    Attributes:
        sites: the sites that these sums are of, each with its covariance.
    """

    def __init__(self, routed: Routed, names: Mapping[int, str], *, pooled: bool, precision: str) -> None:
        self._pooled = pooled and routed.parameter != LAST
        self._where = f"{routed.experts}.{routed.parameter}"
        there = routed.rows.device if routed.rows.device.type in ("cpu", "cuda") else torch.device("cpu")
        width = routed.rows.shape[-1]
        # Experts that are no targets are summed too: they belong to the pool.
        self._sums = GroupedCovariance(1 if self._pooled else len(routed.counts), width, device=there, precision=precision)
        members = self._sums.members
        self.sites: list[tuple[Site, Covariance]]
        if self._pooled:
            self.sites = [(Site(tuple(names.values()), width), members[0])]
        else:
            self.sites = [(Site((name,), width), members[number]) for number, name in names.items()]

    def add(self, routed: Routed, mask: TokenMask | None) -> None:
        """Add what the parameter receives in one call.

        Args:
            routed: of the call.
            mask: which rows of `routed.hidden` count.

        Raises:
            ValueError: naming the parameter, for NaN or Inf.
        """
        try:
            if self._pooled:
                rows = _reached(routed, mask)
                self._sums.update(rows, [len(rows)])
            else:
                self._sums.update(*_that_count(routed, mask))
        except ValueError as error:
            raise InputError(f"{self._where}: {error}") from error

    def pool(self) -> Pool:
        """The sums of all experts together."""
        return pool_of(self._sums.members)

    def attach_pool(self) -> None:
        """Give the sites their pool, where one of them may need it: fewer tokens than any basis asks for."""
        if not self._pooled and any(covariance.tokens < 2 * site.d_in for site, covariance in self.sites):
            pool = self.pool()
            for _, covariance in self.sites:
                covariance.pool = pool


def _reached(routed: Routed, mask: TokenMask | None) -> torch.Tensor:
    """The hidden states that count and are routed to an expert."""
    counts = torch.zeros(len(routed.hidden), dtype=torch.bool, device=routed.hidden.device).index_fill_(0, routed.tokens, True)
    if mask is not None:
        counts &= mask.keep(counts.device)
    return routed.hidden[counts]


def _that_count(routed: Routed, mask: TokenMask | None) -> tuple[torch.Tensor, list[int]]:
    """The rows that count, and how many each expert has."""
    if mask is None or mask.count == mask.rows:
        return routed.rows, routed.counts
    counts = TokenMask(on_host(mask.keep(routed.tokens.device)[routed.tokens]))  # the host waits once
    of_expert = torch.arange(len(routed.counts)).repeat_interleave(torch.tensor(routed.counts))
    kept = torch.bincount(of_expert[counts.indices(of_expert.device)], minlength=len(routed.counts))
    return routed.rows.index_select(0, counts.indices(routed.rows.device)), kept.tolist()
