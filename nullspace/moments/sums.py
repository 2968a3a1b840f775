"""`Sums`: the interface of running sums, and `GramSums`, those that form products; `TokenMask`: which rows are tokens."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence

import torch

from nullspace.devices import upload
from nullspace.errors import InputError
from nullspace.moments.triangle import LowerTriangle

# A token is an outlier if its norm exceeds this many times the median norm of those around it.
OUTLIER_RATIO = 8.0
# Fewer rows than this are too few for a median norm, and for a product.
STAGE_TOKENS = 512
# Median norms outside this range would under- or overflow in float32 products: such rows are summed in float64.
FLOAT32_NORMS = (1e-12, 1e14)
# ‖E‖_F / ‖C‖_F of a float64 sum, where C + E is what the sum comes to and its eigensolver makes of it: an upper end of what was
# measured, by the excess leak under massive tokens of 1e3 to 3e6 times the others' norm.
FLOAT64_RESOLUTION = 2.5e-15


class TokenMask:
    """Which rows of an input are tokens and which are padding. The mask is read once, however many inputs it serves.

    Args:
        mask: as many entries as there are rows, of any shape; zero or False is padding.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        indices = mask.reshape(-1).nonzero().flatten()  # waits for the device, if the mask is on one
        self._indices = {indices.device: indices}
        self.rows = mask.numel()
        self.count = len(indices)

    def indices(self, device: torch.device) -> torch.Tensor:
        """(count,) int64: the rows that count, ascending."""
        if device not in self._indices:
            self._indices[device] = upload(next(iter(self._indices.values())), device)
        return self._indices[device]

    def keep(self, device: torch.device) -> torch.Tensor:
        """(rows,) bool: which rows count."""
        return torch.zeros(self.rows, dtype=torch.bool, device=device).index_fill_(0, self.indices(device), True)


class Norms:
    """Norms of tokens that were not yet checked for NaN and Inf.

    Attributes:
        parts: (n,) each.
        groups: for every part the group of each token, if these are several groups' norms; else empty.
    """

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.groups: list[torch.Tensor] = []

    def add(self, norms: torch.Tensor, of: torch.Tensor | None = None) -> None:
        """Keep the norms (n,) of some tokens, and of which group each token is."""
        self.parts.append(norms)
        if of is not None:
            self.groups.append(of)

    def take(self) -> Norms:
        """A new object with these norms; this one is empty then."""
        taken = Norms()
        taken.parts, self.parts = self.parts, taken.parts
        taken.groups, self.groups = self.groups, taken.groups
        return taken

    def excess(self) -> torch.Tensor | None:
        """A number on their device that is NaN or Inf if a norm is; None if there are no norms."""
        return torch.stack([part.sum(dtype=torch.float64) for part in self.parts]).sum() if self.parts else None

    def failure(self, group: int | None = None) -> str | None:
        """A message about NaN or Inf in them, or in those of one group; None without. Waits for the device."""
        if group is None:
            return nonfinite(self.parts)
        return nonfinite([part[of == group] for part, of in zip(self.parts, self.groups, strict=True)])


class Sums(abc.ABC):
    """Σ x xᵀ and Σ x of the tokens added so far.

    Attributes:
        total: Σ x, (d_in,) float64.
        outliers: tokens whose norm exceeded `OUTLIER_RATIO` × the median of those that were summed with them.
        unchecked: norms of tokens that were not yet checked for NaN and Inf. Sums of one group share them.
        group: number of these sums in their group; None for sums of their own.

    These, and everything that is read of Σ x xᵀ, are complete after `flush`.
    """

    def __init__(self, d_in: int, device: torch.device) -> None:
        self.d_in = d_in
        self.total = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.device = self.total.device  # with its index, whatever the current device will be
        self.outliers = 0
        self.unchecked = Norms()
        self.group: int | None = None

    @abc.abstractmethod
    def add(self, x_nd: torch.Tensor, mask: TokenMask | None) -> None:
        """Add the rows of x, or those of them that the mask names. x may be overwritten as soon as this returns."""

    def launch(self) -> None:
        """Sum all staged rows in a GPU's current stream, for a reader on another stream: what `flush` drops was allocated here.

        Sums for which the host need not wait only begin to, and `flush` is left with reading the counters.
        """
        if self.device.type == "cuda":
            self.flush()

    @abc.abstractmethod
    def flush(self) -> None:
        """Sum all staged rows.

        Raises:
            ValueError: for NaN or Inf that `add` has not looked for.
        """

    def merge(self, other: Sums) -> None:
        """Add other sums, of the same precision."""
        self.flush()
        other.flush()
        self.total += other.total.to(self.device)
        self.outliers += other.outliers

    def scale(self, weight: float) -> None:
        """Multiply Σ x xᵀ and Σ x by a positive number."""
        self.flush()
        self.total *= weight

    @abc.abstractmethod
    def state(self, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Numbers and tensors to keep, the large tensor in `dtype`, as `(d (d + 1) / 2,)`; complete after `flush`.

        Raises:
            ValueError: if it does not fit the range of `dtype`.
        """

    @abc.abstractmethod
    def load_state(self, numbers: Mapping[str, float], tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`, into new sums."""

    @abc.abstractmethod
    def square(self) -> torch.Tensor:
        """Σ x xᵀ as a new (d, d) matrix, symmetric to the bit."""

    @property
    @abc.abstractmethod
    def trace(self) -> float:
        """Σ ‖x‖²."""

    @property
    @abc.abstractmethod
    def products(self) -> str:
        """The precision of the products: `"mixed"`, `"fp64"` or `"qr"`."""

    @property
    @abc.abstractmethod
    def error_norm(self) -> float:
        """An estimate of ‖E‖_F: the sum is C + E, or a root is that of X + E."""


class GramSums(Sums):
    """Sums of products: the lower triangle of Σ x xᵀ, and an account of its rounding errors."""

    LOSSES = ("mixed_energy", "independent_loss", "common_loss", "storage_loss")

    def __init__(self, d_in: int, device: torch.device, *, memory: torch.Tensor | None = None) -> None:
        super().__init__(d_in, device)
        self.triangle = LowerTriangle(d_in, device=device, memory=memory)
        # Σ‖x‖² over the tokens whose products were not taken in float64; and estimates of their errors, as Frobenius norms: the sum
        # of squares of independent errors, and the sum of errors of the same sign.
        self._mixed_energy = 0.0
        self._independent_loss = 0.0
        self._common_loss = 0.0
        self._storage_loss = 0.0  # absolute: ‖·‖_F of the rounding to a narrower dtype in a file

    def scale(self, weight: float) -> None:
        super().scale(weight)
        self.triangle.packed.mul_(weight)
        self._mixed_energy *= weight
        self._independent_loss *= weight**2
        self._common_loss *= weight
        self._storage_loss *= weight

    @property
    def mixed_energy(self) -> float:
        """Σ ‖x‖² over the tokens whose products were not taken in float64."""
        return self._mixed_energy

    def add_product(self, matrix: torch.Tensor, *, mixed_energy: float = 0.0, lost: float = 0.0) -> None:
        """Add a symmetric matrix (d, d), float64, of which so much is mixed, and its rounding error; complete after `flush`."""
        other = LowerTriangle(self.d_in, device=self.device)
        other.set_square(matrix)
        self.triangle.add_(other)
        self._mixed_energy += mixed_energy
        self._storage_loss += lost

    def count_rounding(self, dtype: torch.dtype) -> None:
        """Count the rounding of all that is summed so far to a dtype narrower than float64."""
        if dtype != torch.float64:
            self._storage_loss += torch.finfo(dtype).eps * self.triangle.norm()

    def state(self, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        rows = self.triangle.rows()
        narrow, lost = narrowed(rows, dtype)
        numbers = {
            "mixed_energy": self._mixed_energy,
            "independent_loss": self._independent_loss,
            "common_loss": self._common_loss,
            "storage_loss": self._storage_loss + 2**0.5 * lost,  # entries beside the diagonal count twice
        }
        return numbers, {"triangle": narrow, "total": self.total.clone()}

    def load_state(self, numbers: Mapping[str, float], tensors: Mapping[str, torch.Tensor]) -> None:
        self.triangle.set_rows(tensors["triangle"])
        self.total.copy_(tensors["total"])
        self._load_losses(numbers)

    def _load_losses(self, numbers: Mapping[str, float]) -> None:
        self._mixed_energy, self._independent_loss = numbers["mixed_energy"], numbers["independent_loss"]
        self._common_loss, self._storage_loss = numbers["common_loss"], numbers["storage_loss"]

    def compress(self, counts: Sequence[float]) -> torch.Tensor:
        """Pack the state and some counts in place into one vector; complete after `flush`, and undone by `expand`.

        The sum of the vectors of parts of the data is that of all data.

        Returns:
            (d (d + 1) / 2 + d + 4 + len(counts),) float64.
        """
        losses = [self._mixed_energy, self._independent_loss, self._common_loss, self._storage_loss]
        return self.triangle.compress(torch.cat([self.total, self.total.new_tensor([*losses, *counts])]))

    def expand(self, count: int) -> list[float]:
        """Read the state back from the vector of `compress`, whatever it holds by now. Returns its `count` counts."""
        beside = self.triangle.expand()
        self.total.copy_(beside[: self.d_in])
        numbers: list[float] = beside[self.d_in : self.d_in + 4 + count].tolist()
        self._load_losses(dict(zip(self.LOSSES, numbers[:4], strict=True)))
        return numbers[4:]

    def merge(self, other: Sums) -> None:
        assert isinstance(other, GramSums)  # `Covariance.merge` compares the precisions
        super().merge(other)
        self.triangle.add_(other.triangle)
        self._mixed_energy += other._mixed_energy
        self._independent_loss += other._independent_loss
        self._common_loss += other._common_loss
        self._storage_loss += other._storage_loss

    def square(self) -> torch.Tensor:
        return self.triangle.square()

    @property
    def trace(self) -> float:
        return float(self.triangle.diagonal().sum())

    @property
    def products(self) -> str:
        return "mixed" if self._mixed_energy > 0 else "fp64"

    @property
    def error_norm(self) -> float:
        # The losses were counted relative to the energy of the tokens, which bounds the norm of their sum from above.
        norm = self.triangle.norm()
        lost = FLOAT64_RESOLUTION * norm + self._storage_loss
        if self._mixed_energy > 0:
            lost += (math.sqrt(self._independent_loss) + self._common_loss) * min(norm / self._mixed_energy, 1.0)
        return lost


def narrowed(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """float64 numbers in `dtype`, and the norm of their rounding errors. `rows` is overwritten.

    Raises:
        ValueError: if one is beyond the range of `dtype`.
    """
    if dtype == torch.float64:
        return rows, 0.0
    narrow = rows.to(dtype)
    lost = float(torch.linalg.vector_norm(rows.sub_(narrow)))
    if not math.isfinite(lost):
        raise InputError(f"the sums exceed the range of {dtype}: keep them in float64")
    return narrow, lost


def nonfinite(norms: Sequence[torch.Tensor]) -> str | None:
    """A message about tokens whose norms are NaN or Inf; None if there are none. Waits for the device."""
    if not norms:
        return None
    bad = ~torch.isfinite(torch.cat(list(norms)))
    if not bad.any():
        return None
    return f"NaN or Inf in {int(bad.sum())} of {len(bad)} tokens (the first one is token {int(bad.nonzero()[0])})"


def refuse_nonfinite(norms: Sequence[torch.Tensor]) -> None:
    """Raise `ValueError`, naming the first token, if norms of tokens are NaN or Inf. Waits for the device."""
    message = nonfinite(norms)
    if message:
        raise InputError(message)


def find_outliers(norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(outlier, median)`: which norms exceed `OUTLIER_RATIO` × the median of those that are not zero (0 if all are)."""
    zeros = (norms == 0).sum()
    # Not `nanmedian`, nor an index in brackets: on a GPU both make the host wait.
    median = norms.sort().values.gather(0, (zeros + (len(norms) - zeros - 1).div(2, rounding_mode="floor"))[None])
    return norms > OUTLIER_RATIO * median, median
