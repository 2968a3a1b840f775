"""`NullSpace`: the bottom eigenspace of one site's second moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nullspace import solvers
from nullspace.checks import check_fields, check_integer, check_tensor, finite, list_of, one_of, optional, or_none, text, whole
from nullspace.errors import DamagedFileError, InputError
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance
from nullspace.moments.directions import noise_of

# Fields of a null space in a file, beside its tensors.
FIELDS = {
    "members": list_of(text(), least=1, distinct=True),
    "d_in": whole(1),
    "rank": whole(1),
    "tokens": whole(),
    "trace": finite(0),
    "gap": finite(-1e-9, 1),
    "outliers": whole(),
    "nullity": whole(),
    "precision": one_of("mixed", "fp64", "qr"),
    "excess_estimate": finite(-1e-9),
    "excess_bound": finite(-1e-9),
    "effective_rank": or_none(finite(0)),
    "excluded": optional(whole()),  # missing in files of the first versions
}

# Relative to tr C: rounding makes no eigenvalue more negative than this.
INDEFINITE = 1e-6

# Limit of ‖UᵀU − I‖; some 1e-13 for eigenvectors of float64 solvers.
ORTHONORMAL = 1e-8

# Relative to tr C: tolerance for the order of eigenvalues and for their sum.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The r directions with the smallest norm of one site's input: C U = U Λ (arXiv 2503.02659, eq. 6–7; U is the paper's U_null).

    Attributes:
        basis: (d_in, rank) float64, orthonormal columns, by ascending eigenvalue.
        eigenvalues: (rank,) float64, ascending, ≥ 0: λ_i = ‖u_iᵀX‖², summed over tokens.
        trace: tr C = ‖X‖_F².
        tokens: tokens that were summed, padding left out.
        gap: (λ_{r+1} − λ_r) / λ_{r+1}, between 0 and 1. Near 0, the basis, but not its leak, depends on rounding and on the sample
            of data, since the next direction is as good as the last one.
        outliers: tokens whose norm exceeded 8 × the median.
        nullity: number of computed eigenvalues that cannot be told from zero: at most `Covariance.error_norm`. If it exceeds the
            rank, any basis within the null space is as good.
        precision: `"mixed"` (float32 chains into float64 sums, outlier tokens in float64), `"fp64"` or `"qr"`.
        excess_estimate: leak / optimum − 1 that rounding may have caused, by second-order perturbation theory
            (`estimated_excess`); more often too high than too low.
        excess_bound: an upper bound of it (Ky Fan's inequality, `bounded_excess`), given the error of the sum; often too high by
            many orders of magnitude.
        effective_rank: exp of the entropy of σ / Σσ of X (eq. 2–3); None without `spectrum=True`.
        site: the input, and the layers that receive it.
        avoided: number of directions that the basis is orthogonal to by request (`avoid`).
    """

    basis: torch.Tensor
    eigenvalues: torch.Tensor
    trace: float
    tokens: int
    gap: float
    outliers: int
    nullity: int
    precision: str
    excess_estimate: float
    excess_bound: float
    site: Site
    effective_rank: float | None = None
    avoided: int = 0

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return self.basis.shape[1]

    @property
    def leak(self) -> float:
        """‖UᵀX‖_F / ‖X‖_F = √(Σ λ / tr C): the fraction of the calibration input in the space; 0 for an exact null space."""
        return float(self.eigenvalues.sum() / self.trace) ** 0.5 if self.trace > 0 else 0.0

    @classmethod
    def from_covariance(
        cls,
        covariance: Covariance,
        rank: int,
        *,
        site: Site | None = None,
        spectrum: bool = False,
        avoid: torch.Tensor | None = None,
    ) -> NullSpace:
        """The bottom eigenspace of a second moment.

        Args:
            covariance: the sums, with at least one token.
            rank: 1 ≤ rank < d_in.
            site: of the covariance; a site without a name by default.
            spectrum: compute the effective rank too (of the whole input, including what is avoided).
            avoid: (d_in, m) orthonormal columns; the basis is then the one with the smallest leak that is orthogonal to them.

        Raises:
            ValueError: if the rank is out of range or there are no tokens.
        """
        avoided = 0 if avoid is None else avoid.shape[1]
        rank = check_integer("rank", rank, least=None)
        if not 1 <= rank < covariance.d_in - avoided:
            limit = f"d_in - {avoided + 1} = {covariance.d_in - avoided - 1}"
            where = f" at {site.name!r}" if site is not None else ""
            beside = f" ({avoided} avoided)" if avoided else ""
            raise InputError(f"rank must be between 1 and {limit}{where}{beside}, not {rank}")
        tokens, covariance = covariance.tokens, covariance.completed(covariance.d_in + rank)
        if covariance.tokens == 0:
            raise InputError("the covariance has no tokens")
        lowest, vectors, every = _eigenpairs(covariance, rank, spectrum, avoid)
        error, trace, squared = covariance.error_norm, covariance.trace, covariance.products != "qr"
        if trace > 0 and float(lowest[0]) < -max(10 * error, INDEFINITE * trace):
            where = f" of {site.name!r}" if site is not None else ""
            raise InputError(
                f"the second moment{where} is not positive semi-definite: it has the eigenvalue {float(lowest[0]):.3g}, and its "
                f"trace is {trace:.3g}. Compute it again"
            )
        lowest = lowest.clamp(min=0).cpu()
        values, behind = lowest[:rank], float(lowest[rank])
        return cls(
            basis=vectors.cpu().contiguous(),
            eigenvalues=values.clone(),
            trace=trace,
            tokens=tokens,
            gap=(behind - float(values[rank - 1])) / behind if behind > 0 else 0.0,
            outliers=covariance.outliers,
            nullity=int((lowest <= noise_of(covariance)).sum()),
            precision=covariance.products,
            excess_estimate=solvers.estimated_excess(lowest, rank, error, trace, d_in=covariance.d_in, squared=squared),
            excess_bound=solvers.bounded_excess(values, error, trace, squared=squared),
            site=site or Site(members=("",), d_in=covariance.d_in),
            effective_rank=solvers.effective_rank((lowest if every is None else every.clamp(min=0)).sqrt()) if spectrum else None,
            avoided=avoided,
        )

    def facts(self) -> dict[str, Any]:
        """All attributes but the tensors, as values that JSON can hold; the inverse is `from_facts`."""
        return {
            "members": list(self.site.members),
            "d_in": self.site.d_in,
            "rank": self.rank,
            "tokens": self.tokens,
            "trace": self.trace,
            "gap": self.gap,
            "outliers": self.outliers,
            "precision": self.precision,
            "excess_estimate": self.excess_estimate,
            "excess_bound": self.excess_bound,
            "nullity": self.nullity,
            "effective_rank": self.effective_rank,
            "excluded": self.avoided,  # the key of directories that were written before the attribute had this name
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> NullSpace:
        """The inverse of `facts`, with the two tensors `basis` and `eigenvalues`; the basis may be on the meta device.

        Raises:
            ValueError: naming the fact or the tensor, for a wrong type, shape or sign, a basis that is not orthonormal, or
                eigenvalues that do not ascend from 0 or exceed the trace.
        """
        check_fields(facts, FIELDS, "the facts of a null space")
        _check_tensors(facts, tensors)
        names = ("trace", "tokens", "gap", "outliers", "nullity", "precision", "excess_estimate", "excess_bound", "effective_rank")
        return cls(
            basis=tensors["basis"],
            eigenvalues=tensors["eigenvalues"],
            site=Site(tuple(facts["members"]), facts["d_in"]),
            avoided=facts.get("excluded", 0),
            **{name: facts[name] for name in names},
        )


def _eigenpairs(
    covariance: Covariance, rank: int, spectrum: bool, avoid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Solve for the bottom of a second moment.

    Returns:
        More than `rank` eigenvalues (all with `spectrum`), ascending; the (d_in, rank) vectors; and all eigenvalues without regard
        to `avoid`, if they are needed and differ from the first result.
    """
    separately = spectrum and avoid is not None
    if covariance.products != "qr":
        c = covariance.matrix()
        every = solvers.spectrum(c) if separately else None
        c = c if avoid is None else solvers.deflated(c, avoid.to(c))
        return *solvers.partial_eigh(c, rank, overwrite=True, every=spectrum), every
    root = covariance.root()
    every = torch.linalg.svdvals(root).square() if separately else None
    root = root if avoid is None else solvers.deflated_root(root, avoid.to(root))
    return *solvers.bottom_right_singular(root, rank, every=spectrum), every


def _check_tensors(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless the basis is orthonormal and the eigenvalues fit the facts."""
    where = f"the null space of {facts['members'][0]!r}"
    d_in, rank = facts["d_in"], facts["rank"]
    basis = check_tensor(tensors, "basis", (d_in, rank), (torch.float64,), where)
    values = check_tensor(tensors, "eigenvalues", (rank,), (torch.float64,), where)
    if rank >= d_in:
        raise DamagedFileError(f"{where}: the rank {rank} should be below d_in = {d_in}")
    rounding = ROUNDING * facts["trace"]
    if bool((values.diff() < -rounding).any()) or float(values[0]) < 0:
        raise DamagedFileError(f"{where}: its eigenvalues should ascend from 0 or more")
    if float(values.sum()) > facts["trace"] + rounding:
        raise DamagedFileError(f"{where}: its eigenvalues should not exceed the trace, {facts['trace']:g}")
    if not basis.is_meta:
        distance = float((basis.mT @ basis - torch.eye(rank, dtype=basis.dtype)).abs().max())
        if not distance <= ORTHONORMAL:  # NaN, where squares overflow
            raise DamagedFileError(f"{where}: the columns of its basis are not orthonormal: they are off by {distance:.1e}")
