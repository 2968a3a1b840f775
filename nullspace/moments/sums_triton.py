"""`TritonSums`: second moments on a GPU, by the kernels of `csrc_triton`; the host never waits for the device while adding.

Tokens without padding are copied into a buffer, and their norms and Σ x computed in the same pass, until a launch is worth the
traffic of the float64 triangle. The device decides which tokens are outliers: it keeps their list and count in its memory, the
float64 kernel reads both, and the buffer's outlier rows are zeroed before the fast kernel runs. NaN and Inf are therefore reported
later: when the sums are read, or at the end of a batch.
"""

from __future__ import annotations

import math

import torch

import nullspace.csrc_triton as csrc_triton
from nullspace.csrc_triton.resolution import resolution_of
from nullspace.csrc_triton.tiles import tiling_for
from nullspace.errors import InputError
from nullspace.moments.sums import FLOAT32_NORMS, STAGE_TOKENS, GramSums, TokenMask, find_outliers
from nullspace.moments.sums_torch import CHAIN_TOKENS
from nullspace.moments.triangle import PANEL_ROWS

# Reading and writing the triangle takes about 1300 / tokens of a launch's arithmetic on a GPU of Hopper's balance.
LAUNCH_TOKENS = 8192


def launch_tokens(d_in: int) -> int:
    """Rows that are staged for a launch: in 16 bits, no more memory than the triangle's own, unless that is tiny."""
    return min(LAUNCH_TOKENS, max(STAGE_TOKENS, 2 * d_in))


def new_buffer(rows: int, like_nd: torch.Tensor) -> torch.Tensor:
    """(rows, d) of another tensor's dtype and device; rows begin at multiples of 16 bytes, as tensor descriptors want."""
    d, step = like_nd.shape[1], 16 // like_nd.dtype.itemsize
    return like_nd.new_empty(rows, -(-d // step) * step)[:, :d]


class TritonSums(GramSums):
    """Sums by the Triton kernels.

    Args:
        d_in: width of the inputs.
        device: a CUDA device (any, where Triton interprets).
    """

    def __init__(self, d_in: int, device: torch.device) -> None:
        super().__init__(d_in, device)
        self.launch_tokens = launch_tokens(d_in)
        self._buffer: torch.Tensor | None = None
        self._filled = 0
        self._norms: list[torch.Tensor] = []
        # Outliers; energy of what the fast kernel summed; what it may have lost, in common and (a square) independently.
        self._counters = torch.zeros(4, dtype=torch.float64, device=device)
        self._is_read = True
        self._failure: str | None = None

    def add(self, x_nd: torch.Tensor, mask: TokenMask | None) -> None:
        """Add rows, without waiting for the device."""
        self._is_read = False
        # Dtypes that the kernels do not take (8-bit floats) fit into float32.
        known = x_nd.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
        x_nd = x_nd.to(self.device, x_nd.dtype if known else torch.float32)
        if x_nd.dtype == torch.float64:
            self._add_float64(x_nd if mask is None else x_nd.index_select(0, mask.indices(self.device)))
            return
        if x_nd.shape[1] > 1 and x_nd.stride(1) != 1:
            x_nd = x_nd.contiguous()
        if self._buffer is None or self._buffer.dtype != x_nd.dtype:
            self._absorb()
            self._buffer = new_buffer(self.launch_tokens, x_nd)
        done, count = 0, len(x_nd) if mask is None else mask.count
        while done < count:
            part = min(count - done, self.launch_tokens - self._filled)
            out = self._buffer[self._filled : self._filled + part]
            if mask is None:
                norms, total = csrc_triton.stage_rows(x_nd[done : done + part], out)
            else:
                norms, total = csrc_triton.stage_rows(x_nd, out, mask.indices(self.device)[done : done + part])
            self._norms.append(norms)
            self.unchecked.add(norms)
            self.total += total
            self._filled += part
            done += part
            if self._filled == self.launch_tokens:
                self._absorb()

    def launch(self) -> None:
        self._absorb()
        self._buffer = None  # a reader has had most of the tokens, and needs the memory

    def flush(self) -> None:
        if not self._is_read:
            self._read()
        if self._failure is not None:
            raise InputError(self._failure)

    def _read(self) -> None:
        """Sum what is staged, and bring the counters to the host: one wait."""
        unchecked = self.unchecked.take()
        # The stream of a reader may be another one than that on which these were allocated: they are freed behind the wait.
        staged = self._buffer, self._norms
        self.launch()
        excess = unchecked.excess()
        counters = self._counters if excess is None else torch.cat([self._counters, excess[None]])
        outliers, energy, common, independent, *rest = counters.tolist()
        del staged
        self._counters.zero_()
        self._is_read = True
        if not all(map(math.isfinite, rest)):
            self._failure = unchecked.failure()
        self.outliers += int(outliers)
        self._mixed_energy += energy
        self._common_loss += common
        self._independent_loss += independent

    def _absorb(self) -> None:
        if self._buffer is None or self._filled == 0:
            return
        rows, norms = self._buffer[: self._filled], torch.cat(self._norms)
        self._filled, self._norms = 0, []
        outlier, median = find_outliers(norms)
        self._counters[0].add_(outlier.sum())
        low, high = FLOAT32_NORMS
        in_float64 = outlier | (median <= low) | (median >= high)  # all of them, if that is where the median lies
        # A flush can leave fewer than STAGE_TOKENS rows. The median of so few may be that of outliers: these are summed in float64.
        few = len(rows) < STAGE_TOKENS
        if few:
            in_float64 = torch.ones_like(outlier)
        chosen = (~in_float64).to(torch.int8).argsort(stable=True)
        count = in_float64.sum()
        packed = self.triangle.packed
        csrc_triton.syrk_accumulate_rows(packed, rows, chosen, count, panel_rows=PANEL_ROWS)
        if not few:
            csrc_triton.zero_rows(rows, chosen, count)
            csrc_triton.syrk_accumulate(packed, rows, panel_rows=PANEL_ROWS)
            energy = torch.where(in_float64, 0.0, norms).square().sum()
            self._counters[1].add_(energy)
            lost = resolution_of(tiling_for(rows.dtype, rows.device, self.d_in), rows.dtype, rows.device)
            self._counters[2].add_(energy, alpha=lost.common)
            self._counters[3].add_(energy.square(), alpha=lost.independent_square(len(rows)))

    def _add_float64(self, rows_nd: torch.Tensor) -> None:
        self._absorb()
        norms = torch.linalg.vector_norm(rows_nd, dim=1)
        self.unchecked.add(norms)
        self._counters[0].add_(find_outliers(norms)[0].sum())
        self.total += rows_nd.sum(0)
        self.triangle.add_gram(rows_nd)


class Float64Sums(TritonSums):
    """Sums with every product in float64. As above, the host never waits for the device while adding."""

    def add(self, x_nd: torch.Tensor, mask: TokenMask | None) -> None:
        """Add rows, without waiting for the device."""
        x_nd = x_nd.to(self.device)
        rows = x_nd if mask is None else x_nd.index_select(0, mask.indices(self.device))
        for part in rows.split(CHAIN_TOKENS):  # in float64 they take up to four times their memory
            super().add(part.double(), None)
