"""`GroupedTritonSums`: second moments of several groups of tokens on a GPU, by one launch for all groups.

The experts of a layer get few tokens each in a batch. Their rows are staged in one buffer, in the order of arrival, and a list of
rows sorted by group is what the grouped kernels of `csrc_triton` read. As in `nullspace.moments.sums_triton`, the host never waits
for the device while adding: the device finds the outliers of each group, and the two lists of rows that are summed by the fast
kernel and in float64. Σ x is summed row by row in float64, so that equal inputs give equal bits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

import nullspace.csrc_triton as csrc_triton
from nullspace.csrc_triton.resolution import resolution_of
from nullspace.csrc_triton.tiles import tiling_for
from nullspace.devices import upload
from nullspace.errors import InputError
from nullspace.moments.sums import FLOAT32_NORMS, OUTLIER_RATIO, STAGE_TOKENS, GramSums, Norms, TokenMask, find_outliers
from nullspace.moments.sums_triton import launch_tokens, new_buffer
from nullspace.moments.triangle import PANEL_ROWS, memory_size


class GroupedTritonSums:
    """Sums of several groups by the grouped Triton kernels.

    Args:
        groups: their number.
        d_in: width of the inputs.
        device: a CUDA device (any, where Triton interprets).

    Attributes:
        members: the sums of each group.
        unchecked: norms of tokens of all groups that were not yet checked for NaN and Inf.
    """

    def __init__(self, groups: int, d_in: int, device: torch.device) -> None:
        self.d_in, self.device = d_in, device
        # Rows of whole 256 bytes, as memory of their own would have.
        memory = torch.zeros(groups, -(-memory_size(d_in) // 32) * 32, dtype=torch.float64, device=device)
        self._totals = torch.zeros(groups, d_in, dtype=torch.float64, device=device)
        self._group = torch.arange(groups, device=device)
        self.launch_tokens = groups * launch_tokens(d_in)
        self._buffer: torch.Tensor | None = None
        self._filled = 0
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []  # group and norm of each row in the buffer
        self.unchecked = Norms()
        # Of each group: outliers, energy of what the fast kernel summed, what it may have lost, and the square of what it may have
        # lost independently of other launches.
        self._counters = torch.zeros(4, groups, dtype=torch.float64, device=device)
        self._is_read = True
        self._reading = threading.Lock()  # members may be read in several threads
        self._failures: dict[int, str] = {}
        self.members = [GroupSums(self, number, memory[number], self._totals[number]) for number in range(groups)]
        self._packed = memory[:, : len(self.members[0].triangle.packed)]

    def add(self, rows_nd: torch.Tensor, counts: Sequence[int]) -> None:
        """Add rows, without waiting for the device.

        Args:
            rows_nd: (n, d), sorted by group. They may be overwritten as soon as this returns.
            counts: rows of each group, n in all.
        """
        known = rows_nd.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        rows_nd = rows_nd.to(self.device, rows_nd.dtype if known else torch.float32)
        if len(rows_nd) == 0:
            return
        self._is_read = False
        of = upload(torch.tensor(counts), self.device)
        of = self._group.repeat_interleave(of, output_size=len(rows_nd))
        if rows_nd.dtype == torch.float64:
            self._add_float64(rows_nd, of, counts)
            return
        if rows_nd.shape[1] > 1 and rows_nd.stride(1) != 1:
            rows_nd = rows_nd.contiguous()
        if self._buffer is None or self._buffer.dtype != rows_nd.dtype:
            self._absorb()
            self._buffer = new_buffer(self.launch_tokens, rows_nd)
        done = 0
        while done < len(rows_nd):
            part = min(len(rows_nd) - done, self.launch_tokens - self._filled)
            out = self._buffer[self._filled : self._filled + part]
            norms, _ = csrc_triton.stage_rows(rows_nd[done : done + part], out)
            self._staged.append((of[done : done + part], norms))
            self.unchecked.add(norms, of[done : done + part])
            self._filled += part
            done += part
            if self._filled == self.launch_tokens:
                self._absorb()

    def launch(self) -> None:
        """Begin to sum all staged rows, without waiting for the device."""
        with self._reading:
            self._launch()

    def _launch(self) -> None:
        self._absorb()
        self._buffer = None

    def flush(self) -> None:
        """Sum all staged rows, and bring the counters to the host: one wait for all groups."""
        with self._reading:
            if not self._is_read:
                self._read()

    def _read(self) -> None:
        unchecked = self.unchecked.take()
        # The stream of a reader may be another one than that on which these were allocated: they are freed behind the wait.
        staged = self._buffer, self._staged
        self._launch()
        excess = unchecked.excess()
        counters = self._counters.flatten()
        numbers = (counters if excess is None else torch.cat([counters, excess[None]])).tolist()
        del staged
        self._counters.zero_()
        groups = len(self.members)
        if not all(map(math.isfinite, numbers[4 * groups :])):
            texts = {number: unchecked.failure(number) for number in range(groups)}
            self._failures |= {number: text for number, text in texts.items() if text is not None}
        by_counter = [numbers[i * groups : (i + 1) * groups] for i in range(4)]
        for member, outliers, energy, common, independent in zip(self.members, *by_counter, strict=True):
            member.count(int(outliers), energy, common, independent)
        self._is_read = True

    def failure_of(self, number: int) -> str | None:
        """A message about NaN or Inf in a group, found by `flush`."""
        return self._failures.get(number)

    def _absorb(self) -> None:
        if self._buffer is None or self._filled == 0:
            return
        rows = self._buffer[: self._filled]
        of, norms = (torch.cat(parts) for parts in zip(*self._staged, strict=True))
        self._filled, self._staged = 0, []
        groups = len(self.members)
        outlier, in_float64 = self._apart(of, norms)
        # First the rows of the fast kernel, group by group, then those of the float64 one.
        key = of + groups * in_float64
        order = key.argsort(stable=True)
        offsets = torch.searchsorted(key[order], torch.arange(2 * groups + 1, device=self.device))
        fast, wide = offsets[: groups + 1], offsets[groups:]
        csrc_triton.syrk_accumulate_rows_grouped(self._packed, rows, order, wide, panel_rows=PANEL_ROWS)
        csrc_triton.syrk_accumulate_grouped(self._packed, rows, fast, rows=order, panel_rows=PANEL_ROWS)
        for part in (fast, wide):
            csrc_triton.sum_rows_grouped(self._totals, rows, order, part)
        energy = torch.where(in_float64, 0.0, norms).square()
        self._counters[0] += outlier.new_zeros(groups, dtype=torch.int64).index_add_(0, of, outlier.long())
        own = _ranges(energy[order], fast)
        self._counters[1] += own
        lost = resolution_of(tiling_for(rows.dtype, rows.device, self.d_in), rows.dtype, rows.device, grouped=True)
        self._counters[2] += lost.common * own
        self._counters[3] += lost.independent_square(fast.diff().clamp(min=1)) * own.square()

    def _apart(self, of: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows are outliers of their group, and which must be summed in float64."""
        by_norm = norms.argsort()
        order = by_norm[of[by_norm].argsort(stable=True)]
        ascending = norms[order]
        bounds = torch.searchsorted(of[order], torch.arange(len(self.members) + 1, device=self.device))
        first, count = bounds[:-1], bounds.diff()
        zeros = _ranges((ascending == 0).double(), bounds).long()
        # The lower median of the norms that are not zero, as `find_outliers` takes it; 0 if all are.
        middle = first + zeros + (count - zeros - 1).div(2, rounding_mode="floor")
        median = ascending[middle.clamp(0, len(norms) - 1)]
        outlier = norms > OUTLIER_RATIO * median[of]
        low, high = FLOAT32_NORMS
        # The median of few rows may be that of outliers: these are summed in float64.
        wide = (median <= low) | (median >= high) | (count < STAGE_TOKENS)
        return outlier, outlier | wide[of]

    def _add_float64(self, rows_nd: torch.Tensor, of: torch.Tensor, counts: Sequence[int]) -> None:
        self._absorb()
        self.unchecked.add(torch.linalg.vector_norm(rows_nd, dim=1), of)
        for number, own in enumerate(rows_nd.split(list(counts))):
            if len(own):
                self._counters[0, number] += find_outliers(torch.linalg.vector_norm(own, dim=1))[0].sum()
                self._totals[number] += own.sum(0)
                self.members[number].triangle.add_gram(own)


def _ranges(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The sums of values[offsets[e]:offsets[e + 1]], to the rounding of a sum of all; the same bits each time."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return sums[offsets[1:]] - sums[offsets[:-1]]


class GroupSums(GramSums):
    """The sums of one group, in the memory of all.

    Args:
        group: all groups' sums.
        number: of this one.
        memory: of its triangle.
        total: (d,), its Σ x.
    """

    def __init__(self, group: GroupedTritonSums, number: int, memory: torch.Tensor, total: torch.Tensor) -> None:
        super().__init__(group.d_in, group.device, memory=memory)
        self.total = total
        self.unchecked = group.unchecked
        self._group, self.group = group, number

    def add(self, x_nd: torch.Tensor, mask: TokenMask | None) -> None:
        """Add rows to this group alone, without waiting for the device."""
        x_nd = x_nd.to(self.device)
        rows = x_nd if mask is None else x_nd.index_select(0, mask.indices(self.device))
        self._group.add(rows, [len(rows) if number == self.group else 0 for number in range(len(self._group.members))])

    def launch(self) -> None:
        self._group.launch()

    def flush(self) -> None:
        self._group.flush()
        assert self.group is not None
        failure = self._group.failure_of(self.group)
        if failure:
            raise InputError(failure)

    def count(self, outliers: int, energy: float, common: float, independent: float) -> None:
        """Add to what is known of the tokens: outliers, and energy and losses of what the fast kernel summed."""
        self.outliers += outliers
        self._mixed_energy += energy
        self._common_loss += common
        self._independent_loss += independent
