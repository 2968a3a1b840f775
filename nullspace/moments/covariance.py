"""`Covariance`: the running second moment of the inputs of one site.

"Covariance" is the field's word for the *uncentred* second moment C = Σ_t x_t x_tᵀ. Σ_t x_t is kept beside it for the methods that
centre.

`"fp64"` takes every product in float64. `"auto"` takes products in float32 over short chains of tokens, and adds each chain to a
float64 sum. *Outlier tokens* (norm above 8 × the median) are left out of the chains and added by a float64 product: one massive
activation in a float32 partial sum rounds away what directions of small energy have put there, and no wider sum restores it. Some
spectra are too steep for float32 chains without any outlier. On a CPU the first tokens show whether the bottom of the spectrum
would be lost; then they and all others are summed in float64. `error_norm` estimates what has been lost. `"mixed"` omits that test,
for methods that damp the bottom of the spectrum (CorDA). `"qr"` takes no products, and keeps a triangular factor.

The products are those of the Triton kernels on a CUDA device (`nullspace.moments.sums_triton`) and of PyTorch elsewhere
(`nullspace.moments.sums_torch`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from nullspace.checks import check_one_of
from nullspace.errors import InputError, InputTypeError
from nullspace.moments.pool import Pool
from nullspace.moments.precision import PRECISIONS, new_sums
from nullspace.moments.state import check_state
from nullspace.moments.sums import GramSums, Sums, TokenMask
from nullspace.moments.sums_qr import QrSums


class Covariance:
    """The running second moment C = Σ_t x_t x_tᵀ of the inputs of one site (arXiv 2503.02659, X_pre X_preᵀ of eq. 6).

    Args:
        d_in: width of the inputs, at least 1.
        device: where the sums live; inputs are moved there.
        precision: `"auto"` (float32 chains into a wider sum, outlier tokens in float64; all in float64 where the first tokens ask
            for it), `"mixed"` (the same without that test), `"fp64"` (every product in float64) or `"qr"` (no product
            at all: the root R of C = RᵀR by streaming QR in float64, some ten times the time of `"fp64"`).
            float64 inputs are never summed in less.

    Attributes:
        pool: the second moment of all experts of a layer, for one expert's input with few tokens; else None. See `completed`.

    Cost: n · d_in² flops for n tokens. Memory: 4 · d_in² bytes for the triangle; beside it, on a CPU at most 512 rows of
    input, on a GPU, until the sums are read, a buffer of min(8192, max(512, 2 · d_in)) rows.

    Raises:
        ValueError: if `d_in` is smaller than 1, or `precision` is unknown.

    Warns:
        UserWarning: once, if the kernels cannot run on a CUDA device (an old one, or no Triton): PyTorch's products are used.

    Example:
        >>> import torch
        >>> from nullspace import Covariance
        >>> covariance = Covariance(3)
        >>> covariance.update(torch.tensor([[1.0, 2.0, 0.0], [9.0, 9.0, 9.0]]), mask=torch.tensor([1, 0]))
        >>> covariance.tokens, covariance.matrix()[0].tolist()
        (1, [1.0, 2.0, 0.0])
    """

    def __init__(self, d_in: int, *, device: torch.device | str = "cpu", precision: str = "auto") -> None:
        check_arguments(d_in, precision)
        self._begin(new_sums(d_in, torch.device(device), precision), torch.device(device), precision)

    @classmethod
    def of_sums(cls, sums: Sums, device: torch.device, precision: str) -> Covariance:
        """A covariance of empty sums, which may belong to a group."""
        covariance = cls.__new__(cls)
        covariance._begin(sums, device, precision)
        return covariance

    def _begin(self, sums: Sums, device: torch.device, precision: str) -> None:
        self.d_in, self.device, self.precision = sums.d_in, device, precision
        self._sums = sums
        self._tokens = 0
        self._mass = 0.0
        self._samples = _Samples(self._sums.device)
        self.pool: Pool | None = None

    def count(self, tokens: int) -> None:
        """Count tokens that were added to the sums directly."""
        self._tokens += tokens
        self._mass += tokens

    def share_samples(self, sums: torch.Tensor) -> None:
        """Keep what `peft_trace` is made of in a tensor of others, (2,) float64 zeros."""
        self._samples.sums = sums

    @torch.no_grad()
    def update(self, x: torch.Tensor, mask: torch.Tensor | TokenMask | None = None) -> None:
        """Add the tokens of one batch. If it raises, nothing was added.

        Args:
            x: (..., d_in), any floating dtype and device. It may be overwritten afterwards.
            mask: as many entries as `x` has rows (tokens); zero or False leaves the row out (padding). None keeps all.
                On a GPU, looking at a mask waits for the device: wrap one that serves many inputs in a `TokenMask`.

        Raises:
            ValueError: on a wrong width, a mask of another size, or NaN or Inf in a row that counts. Where the kernels take the
                products, nothing waits for the device here: NaN or Inf is an error of the next method that reads the sums.
            TypeError: if `x` is not floating point.
        """
        if not x.is_floating_point():
            raise InputTypeError(f"activations must be floating point, not {x.dtype}")
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise InputError(f"expected inputs of width {self.d_in}, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.d_in)
        if isinstance(mask, torch.Tensor):
            mask = TokenMask(mask)
        if mask is not None and mask.rows != len(rows):
            raise InputError(f"the mask has {mask.rows} entries for {len(rows)} rows (input {tuple(x.shape)})")
        if mask is not None and mask.count == len(rows):
            mask = None
        count = len(rows) if mask is None else mask.count
        if count > 0:
            self._sums.add(rows, mask)
            self._samples.add(x.detach(), mask)
            self.count(count)

    def launch(self) -> None:
        """Begin to sum what is staged on a GPU, in the current stream; the host does not wait. For a reader on another stream."""
        self._sums.launch()

    def merge(self, other: Covariance) -> None:
        """Add another covariance of the same width: the result is that of all tokens together. `other` keeps its sums.

        Raises:
            ValueError: if the widths or the precisions differ.
        """
        if other.d_in != self.d_in or other.precision != self.precision:
            raise InputError(
                f"cannot merge a covariance of width {other.d_in} and precision {other.precision!r} "
                f"into one of width {self.d_in} and precision {self.precision!r}"
            )
        self._sums.merge(other._sums)
        self._samples.sums += other._samples.sums.to(self._samples.sums.device)
        self._tokens += other._tokens
        self._mass += other._mass

    @classmethod
    def from_matrix(cls, matrix: torch.Tensor, *, tokens: int = 1) -> Covariance:
        """A covariance from a second moment that was summed elsewhere, on its device. Σ x is unknown, and taken to be zero.

        Args:
            matrix: (d_in, d_in) symmetric and positive semi-definite; taken in float64, its lower triangle.
            tokens: how many were summed.
        """
        covariance = cls(len(matrix), device=matrix.device, precision="fp64")
        assert isinstance(covariance._sums, GramSums)
        covariance._sums.triangle.set_square(matrix)
        covariance._sums.count_rounding(matrix.dtype)
        covariance._tokens, covariance._mass = tokens, float(tokens)
        return covariance

    def completed(self, needed: int) -> Covariance:
        """The second moment to use for a basis that asks for so many tokens: C + (needed − n) / n_pool · C_pool.

        An expert's input with fewer tokens than `needed` is shrunk towards the mean second moment of all experts of its layer, as
        if that had given the tokens that are missing. Without any token, it is the pool's.

        Args:
            needed: tokens, usually d_in + rank.

        Returns:
            This object itself, if it has enough tokens or no pool; otherwise a new one, with `needed` tokens.
        """
        if self.pool is None or self.pool.tokens == 0 or self._tokens >= needed:
            return self
        pool, scale = self.pool, self._mass / self._tokens if self._tokens else 1.0
        share = scale * (needed - self._tokens) / pool.tokens
        facts, tensors = self.state()
        if "root" in tensors:
            result = Covariance.from_matrix(self.matrix(), tokens=needed)
            result._sums.total.copy_(self.total())
            result._sums.outliers = self.outliers
        else:
            result = Covariance.from_state(facts, tensors, device=self._sums.device)
        sums = result._sums
        assert isinstance(sums, GramSums)
        sums.add_product(share * pool.matrix.to(sums.device), mixed_energy=share * pool.mixed_energy, lost=share * pool.lost)
        sums.total += share * pool.total.to(sums.device)
        result._tokens, result._mass = needed, needed * scale
        return result

    def scale(self, weight: float) -> None:
        """Count every token added so far `weight` times: C, Σ x and `mass` are multiplied by it, `tokens` is not.

        Raises:
            ValueError: if the weight is not a positive number.
        """
        if not 0.0 < weight < float("inf"):
            raise InputError(f"a weight must be a positive number, not {weight}")
        self._sums.scale(weight)
        self._samples.sums *= weight
        self._mass *= weight

    def state(self, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The state to keep in a file: facts as JSON takes them, and tensors. The inverse is `from_state`.

        Args:
            dtype: of the one large tensor, d_in (d_in + 1) / 2 entries: float64, or float32 for half the space and 7 digits.

        Raises:
            ValueError: if it does not fit the range of float32.
        """
        sums = self._flushed()
        numbers, tensors = sums.state(dtype)
        facts = {"d_in": self.d_in, "tokens": self._tokens, "mass": self._mass, "outliers": sums.outliers, "sums": numbers}
        return {**facts, "samples": self._samples.numbers()}, tensors

    @classmethod
    def from_state(
        cls,
        facts: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp64",
    ) -> Covariance:
        """The covariance whose `state` this is.

        Args:
            facts, tensors: of `state`.
            device: where its sums will live.
            precision: for tokens that are added later. Always `"qr"` for a root.

        Raises:
            ValueError: naming the fact or the tensor, if these cannot be sums: values of a wrong type, shape or sign. The tensors'
                sizes are compared with `d_in` before anything of that size is allocated.
        """
        check_state(facts, tensors)
        covariance = cls(facts["d_in"], device=device, precision="qr" if "root" in tensors else precision)
        covariance._sums.load_state(facts["sums"], tensors)
        covariance._sums.outliers = facts["outliers"]
        covariance._tokens, covariance._mass = facts["tokens"], facts["mass"]
        covariance._samples.sums.copy_(torch.tensor(facts.get("samples", [0.0, 0.0]), dtype=torch.float64))
        return covariance

    def compress(self) -> torch.Tensor:
        """Pack the state in place into one vector. The sum of such vectors of parts of the data is the state of all data.

        The object is unusable until `expand`, which reads what the vector holds by then.

        Returns:
            (d (d + 1) / 2 + d + 9,) float64. Counts of tokens are exact up to 2⁵³.

        Raises:
            ValueError: for a root (`precision="qr"`): roots cannot be added.
        """
        sums = self._flushed()
        if not isinstance(sums, GramSums):
            raise InputError(f"no sum under precision={self.precision!r}: roots cannot be added")
        return sums.compress([self._tokens, self._mass, sums.outliers, *self._samples.numbers()])

    def expand(self) -> None:
        """Undo `compress`."""
        assert isinstance(self._sums, GramSums)
        tokens, self._mass, outliers, *samples = self._sums.expand(5)
        self._tokens, self._sums.outliers = int(tokens), int(outliers)
        self._samples.sums.copy_(torch.tensor(samples, dtype=torch.float64))

    def flush(self) -> None:
        """Sum the rows that are still staged. Every method that reads the sums does this first.

        Raises:
            ValueError: for NaN or Inf that `update` has not looked for.
        """
        self._sums.flush()

    def matrix(self) -> torch.Tensor:
        """C as a new (d_in, d_in) float64 tensor, symmetric to the bit. 8 · d_in² bytes."""
        return self._flushed().square()

    def root(self) -> torch.Tensor:
        """R, (d_in, d_in) upper triangular float64, with RᵀR = C, as `precision="qr"` keeps it: nothing was squared.

        Raises:
            ValueError: under another precision.
        """
        sums = self._flushed()
        if not isinstance(sums, QrSums):
            raise InputError(f'only precision="qr" keeps a root, not {self.precision!r}')
        return sums.root.clone()

    def total(self) -> torch.Tensor:
        """Σ x: (d_in,) float64."""
        return self._flushed().total

    def mean(self) -> torch.Tensor:
        """Σ x / n: (d_in,) float64. NaN without tokens."""
        total = self._flushed().total
        return total / self._mass if self._tokens else torch.full_like(total, float("nan"))

    @property
    def tokens(self) -> int:
        """Tokens that were added: padding is not counted."""
        return self._tokens

    @property
    def mass(self) -> float:
        """The sum of the tokens' weights: `tokens`, unless `scale` gave some a weight other than 1."""
        return self._mass

    @property
    def outliers(self) -> int:
        """Tokens whose norm exceeded 8 × the median norm of those that were summed with them."""
        return self._flushed().outliers

    @property
    def trace(self) -> float:
        """tr C = Σ_t ‖x_t‖²."""
        return self._flushed().trace

    @property
    def peft_trace(self) -> float | None:
        """The trace that this second moment has in PEFT's CorDA: the mean of ‖X‖²_F / (max X)² over samples.

        A sample is one entry of the first axis of what `update` was given, or all of it if there are no more than two axes. None
        where that is unknown: for sums that were made elsewhere, or kept by earlier versions.
        """
        self._flushed()
        energy, count = self._samples.numbers()
        return energy / count if energy > 0 and count > 0 else None

    @property
    def products(self) -> str:
        """`"mixed"` if float32 chains took part in the sum, `"fp64"` if every product was taken in float64, or `"qr"`."""
        return self._flushed().products

    @property
    def error_norm(self) -> float:
        """An estimate of ‖E‖_F, where `matrix()` is C + E: what float32 chains and float64 sums lose to rounding.

        An error that is proportional to C is not counted: it moves no eigenvector. Outlier tokens never pass through a chain.
        Under `"qr"`, of ‖E‖_F, where `root()` is the factor of X + E.
        """
        return self._flushed().error_norm

    def _flushed(self) -> Sums:
        self._sums.flush()
        return self._sums


def check_arguments(d_in: int, precision: str) -> None:
    """Raise `ValueError` for a width or a precision that no covariance has."""
    if d_in < 1:
        raise InputError(f"d_in must be at least 1, not {d_in}")
    check_one_of("precision", precision, PRECISIONS)


class _Samples:
    """Σ ‖X‖²_F / (max X)² over samples, and the number of samples: their quotient is the trace that PEFT's CorDA has.

    Attributes:
        sums: (2,) float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, mask: TokenMask | None) -> None:
        """Add an input (…, d_in) with at least one row that counts, without waiting for the device."""
        samples = len(x) if x.ndim > 2 else 1
        rows = x.reshape(samples, -1, x.shape[-1])
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = rows.to(wide) if x.dtype.itemsize == 1 else rows
        norms, peaks = torch.linalg.vector_norm(rows, dim=-1, dtype=wide), rows.amax(dim=-1).to(wide)
        if mask is not None:
            padding = ~mask.keep(x.device).view(norms.shape)
            norms, peaks = norms.masked_fill(padding, 0.0), peaks.masked_fill(padding, -math.inf)
        peak = peaks.amax(dim=1).abs()
        counts = (peak > 0) & (peak < math.inf)
        energy = torch.where(counts, (norms / peak[:, None]).square().sum(dim=1), 0.0)
        self.sums += torch.stack([energy.sum(), counts.sum().to(wide)]).to(self.sums.device).double()

    def numbers(self) -> list[float]:
        """Both as numbers, and zeros where they are beyond the range of float32."""
        numbers: list[float] = self.sums.tolist()
        return numbers if all(map(math.isfinite, numbers)) else [0.0, 0.0]
