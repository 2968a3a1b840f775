"""`GroupedCovariance`: the second moments of several groups of tokens that arrive together, as those of experts do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nullspace.moments.covariance import Covariance


class GroupedCovariance:
    """One `Covariance` for each of several groups.

    Args:
        groups: their number.
        d_in: width of the inputs.
        device: where the sums live.
        precision: as of `Covariance`.

    Attributes:
        members: the groups' covariances. They are read, merged and kept like any other.
    """

    def __init__(self, groups: int, d_in: int, *, device: torch.device | str = "cpu", precision: str = "auto") -> None:
        self.d_in = d_in
        self.members = [Covariance(d_in, device=device, precision=precision) for _ in range(groups)]

    def update(self, rows: torch.Tensor, counts: Sequence[int]) -> None:
        """Add tokens to all groups.

        Args:
            rows: (n, d_in), any floating dtype: the first `counts[0]` of them belong to the first group, and so on.
            counts: rows of each group; n in all.

        Raises:
            ValueError, TypeError: as `Covariance.update`.
        """
        for member, own in zip(self.members, rows.split(list(counts)), strict=True):
            if len(own):
                member.update(own)
