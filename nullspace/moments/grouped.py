"""`GroupedCovariance`: the second moments of several groups of tokens that arrive together, as those of experts do.

On a CUDA device with Triton, rows of all groups are staged together and summed by grouped launches
(`nullspace.moments.sums_grouped`). Elsewhere each group has sums of its own. Norms, the check for NaN and Inf, and the decision
whether float32 chains suffice (`nullspace.moments.sums_torch.Probe`) are made once for all groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nullspace.checks import check_integer
from nullspace.devices import upload
from nullspace.errors import InputError, InputTypeError
from nullspace.moments.covariance import Covariance, check_arguments
from nullspace.moments.pool import Pool
from nullspace.moments.precision import new_group
from nullspace.moments.sums import GramSums
from nullspace.moments.sums_grouped import GroupedTritonSums
from nullspace.moments.sums_torch import TorchSums, finite_norms
from nullspace.moments.triangle import LowerTriangle


class GroupedCovariance:
    """One `Covariance` for each of several groups.

    Args:
        groups: their number.
        d_in: width of the inputs.
        device: where the sums live.
        precision: as of `Covariance`. Under `"auto"` on a CPU, the group that first has 1.25 · d_in tokens decides for all whether
            float32 chains suffice.

    Attributes:
        members: the groups' covariances. They are read, merged and kept like any other. On a CUDA device the sums of all share one
            piece of memory, which is free when no member is left.

    Raises:
        ValueError: as `Covariance`, or if there is no group.
    """

    def __init__(self, groups: int, d_in: int, *, device: torch.device | str = "cpu", precision: str = "auto") -> None:
        check_integer("groups", groups)
        check_arguments(d_in, precision)
        self.d_in = d_in
        device = torch.device(device)
        sums = new_group(groups, d_in, device, precision)
        self._kernels = sums if isinstance(sums, GroupedTritonSums) else None
        self._sums = sums.members if isinstance(sums, GroupedTritonSums) else sums
        self.members = [Covariance.of_sums(each, device, precision) for each in self._sums]
        self._samples = torch.zeros(groups, 2, dtype=torch.float64, device=self._sums[0].device)
        for member, own in zip(self.members, self._samples, strict=True):
            member.share_samples(own)

    @torch.no_grad()
    def update(self, rows: torch.Tensor, counts: Sequence[int]) -> None:
        """Add tokens to all groups. If it raises, nothing was added.

        Args:
            rows: (n, d_in), any floating dtype: the first `counts[0]` of them belong to the first group, and so on. They may be
                overwritten afterwards.
            counts: rows of each group; n in all.

        Raises:
            ValueError, TypeError: as `Covariance.update`, or if the counts are not those of the groups.
        """
        if not rows.is_floating_point():
            raise InputTypeError(f"activations must be floating point, not {rows.dtype}")
        if rows.ndim != 2 or rows.shape[1] != self.d_in:
            raise InputError(f"expected rows of width {self.d_in}, got shape {tuple(rows.shape)}")
        if len(counts) != len(self.members) or sum(counts) != len(rows) or min(counts) < 0:
            raise InputError(f"{len(rows)} rows of {len(self.members)} groups, but counts of {sum(counts)} in {len(counts)}")
        rows = rows.detach().to(self._samples.device)
        if self._kernels is not None:
            self._kernels.add(rows, counts)
        elif all(isinstance(each, TorchSums) for each in self._sums):
            norms = finite_norms(rows)
            for each, own, own_norms in zip(self._sums, rows.split(list(counts)), norms.split(list(counts)), strict=True):
                if len(own):
                    each.add_rows(own, own_norms, borrowed=True)  # type: ignore[attr-defined]
        else:
            for each, own in zip(self._sums, rows.split(list(counts)), strict=True):
                if len(own):
                    each.add(own, None)
        self._add_samples(rows, counts)
        for member, count in zip(self.members, counts, strict=True):
            member.count(count)

    def _add_samples(self, rows: torch.Tensor, counts: Sequence[int]) -> None:
        """Add, for every group with rows, Σ ‖x‖² / (max X)² and a sample; without waiting for the device."""
        if len(rows) == 0:
            return
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        rows = rows.to(wide) if rows.dtype.itemsize == 1 else rows
        norms, peaks = torch.linalg.vector_norm(rows, dim=1, dtype=wide), rows.amax(dim=1).to(wide)
        count = upload(torch.tensor(counts), rows.device)
        of = torch.arange(len(counts), device=rows.device).repeat_interleave(count, output_size=len(rows))
        peak = peaks.new_full((len(counts),), -math.inf).scatter_reduce_(0, of, peaks, "amax").abs()
        is_sample = (peak > 0) & (peak < math.inf)
        ratios = torch.where(is_sample[of], norms / peak[of], 0.0).double().square()  # a NaN would reach all groups behind it
        energy = torch.cat([ratios.new_zeros(1), ratios.cumsum(0)])
        ends = count.cumsum(0)
        energy = energy[ends] - energy[ends - count]
        self._samples += torch.stack([torch.where(is_sample, energy, 0.0), is_sample.double()], dim=1)


def pool_of(parts: Sequence[Covariance]) -> Pool:
    """The sum of some covariances of one width."""
    d, device = parts[0].d_in, parts[0].device
    total = torch.zeros(d, dtype=torch.float64, device=device)
    triangle, roots = LowerTriangle(d, device=device), torch.zeros(d, d, dtype=torch.float64, device=device)
    mixed_energy = lost = 0.0
    for part in parts:
        if part.tokens:
            sums = part._flushed()
            total += sums.total.to(device)
            if isinstance(sums, GramSums):
                triangle.add_(sums.triangle)
                mixed_energy, lost = mixed_energy + sums.mixed_energy, lost + sums.error_norm
            else:
                roots += sums.square().to(device)
    return Pool(triangle.square() + roots, total, sum(part.tokens for part in parts), mixed_energy, lost)
