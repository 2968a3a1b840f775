"""The lower triangle of a symmetric matrix, in float64, held as row panels.

Panel i holds rows `[start, stop)` and columns `[0, stop)`: half the memory of the square, and each panel takes its share of a
Gram matrix from one GEMM over plain slices of the input, which is what BLAS libraries are best at. All panels lie one behind the
other in one vector, so that a kernel can address any tile, and a triangle is added, moved or reduced as a whole.
"""

from __future__ import annotations

import torch

# 256 rows a panel: GEMM is at full speed, and the part of the diagonal blocks that is computed twice stays small (8 % at
# d = 1536). Measured on 2 CPU cores for d = 576 and 1536; 96 to 384 are within 10 % of each other.
PANEL_ROWS = 256
# Below SMALL_D, products are taken for so many rows at once: less of the diagonal blocks is computed twice.
# float32 chains of 1024 tokens, against whole panels: 9 % less time at d = 576, 7 % more at d = 1536.
SMALL_D, SMALL_ROWS = 1024, 96
# How many numbers beside d more may be packed with a triangle into one vector.
BESIDE = 16


def memory_size(d: int) -> int:
    """Entries that a triangle of order d takes, packed as panels or, in `compress`, with other numbers behind it."""
    panels = sum((min(start + PANEL_ROWS, d) - start) * min(start + PANEL_ROWS, d) for start in range(0, d, PANEL_ROWS))
    return max(panels, d * (d + 1) // 2 + d + BESIDE)  # the latter for the very smallest


class LowerTriangle:
    """A (d, d) symmetric float64 matrix, of which only the lower triangle is stored: 8 · (d² + d · PANEL_ROWS) / 2 bytes.

    Args:
        d: order of the matrix.
        device: where it lives.
        memory: where to keep it: at least `memory_size(d)` float64 zeros; None: memory of its own.

    Attributes:
        packed: the panels, one behind the other. Entries above the diagonal have no meaning.
    """

    def __init__(self, d: int, *, device: torch.device | str = "cpu", memory: torch.Tensor | None = None) -> None:
        self.d = d
        bounds = [(start, min(start + PANEL_ROWS, d)) for start in range(0, d, PANEL_ROWS)]
        sizes = [(stop - start) * stop for start, stop in bounds]
        self._memory = torch.zeros(memory_size(d), dtype=torch.float64, device=device) if memory is None else memory
        self.packed = self._memory[: sum(sizes)]
        parts = self.packed.split(sizes)
        self._panels = [(start, stop, part.view(stop - start, stop)) for (start, stop), part in zip(bounds, parts, strict=True)]

    def add_gram(self, x_nd: torch.Tensor) -> None:
        """Add `x_nd.T @ x_nd`; the products are taken in the dtype of `x_nd` (float32 or float64), the sum in float64."""
        rows = SMALL_ROWS if self.d < SMALL_D else PANEL_ROWS
        for first, last, panel in self._panels:
            for start in range(first, last, rows):
                stop = min(start + rows, last)
                left, right, part = x_nd[:, start:stop].T, x_nd[:, :stop], panel[start - first : stop - first, :stop]
                if x_nd.dtype == panel.dtype:
                    part.addmm_(left, right)
                else:
                    part.add_(left @ right)

    def add_(self, other: LowerTriangle) -> None:
        """Add another triangle of the same order."""
        self.packed.add_(other.packed.to(self.packed.device))

    def rows(self) -> torch.Tensor:
        """The triangle alone, row by row, (d (d + 1) / 2,): the order of LAPACK's packed upper triangle, column by column."""
        return torch.cat([panel[row - start, : row + 1] for start, stop, panel in self._panels for row in range(start, stop)])

    def set_rows(self, rows: torch.Tensor) -> None:
        """The inverse of `rows`, from any floating dtype."""
        at = 0
        for start, stop, panel in self._panels:
            for row in range(start, stop):
                panel[row - start, : row + 1] = rows[at : at + row + 1].to(panel)
                at += row + 1

    def set_square(self, matrix: torch.Tensor) -> None:
        """Take the lower triangle of a (d, d) matrix of any floating dtype."""
        self.set_rows(torch.cat([matrix[i, : i + 1] for i in range(len(matrix))]))

    def compress(self, beside: torch.Tensor) -> torch.Tensor:
        """Pack the entries on and below the diagonal, and other numbers behind them, in place into one vector.

        The triangle is unusable until `expand`.

        Args:
            beside: at most d + BESIDE numbers.

        Returns:
            (d (d + 1) / 2 + len(beside),): of every panel what is left of the diagonal block, then the block's own triangle.
        """
        at = 0
        for start, stop, panel in self._panels:  # no panel moves to where one is that has not moved yet
            left = panel[:, :start].clone(memory_format=torch.contiguous_format)
            for part in (left.view(-1), panel[:, start:][_below(stop - start, panel.device)]):
                self._memory[at : at + len(part)] = part
                at += len(part)
        self._memory[at : at + len(beside)] = beside
        return self._memory[: at + len(beside)]

    def expand(self) -> torch.Tensor:
        """Undo `compress`, whatever its vector holds by now.

        Returns:
            The other numbers, (d + BESIDE,): a copy.
        """
        end = self.d * (self.d + 1) // 2
        beside = self._memory[end : end + self.d + BESIDE].clone()
        for start, stop, panel in reversed(self._panels):
            rows = stop - start
            end -= rows * start + rows * (rows + 1) // 2
            left, block = self._memory[end:].split([rows * start, len(self._memory) - end - rows * start])
            left, block = left.clone(), block[: rows * (rows + 1) // 2].clone()
            panel[:, :start] = left.view(rows, start)
            panel[:, start:] = 0.0
            panel[:, start:][_below(rows, panel.device)] = block
        return beside

    def diagonal(self) -> torch.Tensor:
        """The (d,) diagonal."""
        return torch.cat([panel.diagonal(offset=start) for start, _, panel in self._panels])

    def norm(self) -> float:
        """The Frobenius norm of the whole matrix."""
        left = [torch.linalg.vector_norm(panel[:, :start]) for start, _, panel in self._panels]
        below = [torch.linalg.vector_norm(panel[:, start:].tril(-1)) for start, _, panel in self._panels]
        strict, diagonal = torch.stack(left + below).norm(), self.diagonal().norm()
        return float(torch.hypot(2**0.5 * strict, diagonal))

    def lower(self, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """A new (d, d) tensor with the lower triangle of the matrix, divided by a number; what is above it has no meaning."""
        out = torch.zeros(self.d, self.d, dtype=dtype, device=self.packed.device)
        for start, stop, panel in self._panels:
            out[start:stop, :stop] = panel / scale
        return out

    def square(self) -> torch.Tensor:
        """The whole (d, d) matrix as a new tensor, symmetric to the bit."""
        out = self.packed.new_empty(self.d, self.d)
        for start, stop, panel in self._panels:
            out[start:stop, :start] = panel[:, :start]
            out[:start, start:stop] = panel[:, :start].T
            block = panel[:, start:].tril()
            out[start:stop, start:stop] = block + block.tril(-1).T
        return out


def _below(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column indices of the lower triangle of a block."""
    row, column = torch.tril_indices(rows, rows, device=device)
    return row, column
