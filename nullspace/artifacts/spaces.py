"""`NullSpaces`: the null spaces of a model's sites, from kept second moments or from `compute_null_spaces`."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from nullspace import solvers, tables
from nullspace.artifacts.checkpoint import Checkpoint
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.identity import Weights
from nullspace.artifacts.null_space import FIELDS, NullSpace
from nullspace.artifacts.sitewise import Fetched, Sitewise
from nullspace.checks import (
    check_integer,
)
from nullspace.errors import DataWarning, InputError, PrecisionWarning
from nullspace.model.experts import expert_of
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance
from nullspace.moments.directions import Directions
from nullspace.progress import Progress, reporter
from nullspace.solvers import NO_LEAK, decompose

# Estimated excess leak above which a float32 sum is repeated in float64.
TOLERANCE = 1e-4
# Leak of an exact null space in float64 sums without outlier tokens, which would dominate the norm of X.
NEGLIGIBLE_LEAK = 1e-7
# Limit of (1 + excess_estimate) · NO_LEAK for an exact null space: measured at most 2e-7 in float64, at least 5e-5 in float32.
FLOAT64_NOISE = 1e-6


class NullSpaces(Sitewise[NullSpace]):
    """Module name → `NullSpace`; the members of a site share one object.

    Args:
        spaces: one a site.
        weights: module name → (d_out, d_in) and fingerprint (`nullspace.artifacts.identity.fingerprint`) of its weight, which
            identify the model.
        matrix_parameters: parameters in the model's matrices, embeddings and output head aside; None if that is unknown.
    """

    KIND, WHAT, FIELDS = "spaces", "null space", FIELDS

    def __init__(
        self, spaces: Iterable[NullSpace], weights: Weights | None = None, *, matrix_parameters: int | None = None
    ) -> None:
        super().__init__(((space.site, space) for space in spaces), weights, matrix_parameters=matrix_parameters)

    @staticmethod
    def _pack(value: NullSpace) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return value.facts(), {"basis": value.basis, "eigenvalues": value.eigenvalues}

    @staticmethod
    def _unpack(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> NullSpace:
        return NullSpace.from_facts(facts, tensors)

    @classmethod
    def _of_files(cls, spaces: Iterable[NullSpace], kept: Checkpoint, weights: Weights, matrix_parameters: int) -> NullSpaces:
        """Spaces whose tensors are read from a checkpoint when needed."""

        def make(space: NullSpace) -> NullSpace:
            read = kept.reader(space.site.name)()
            return replace(space, basis=read["basis"], eigenvalues=read["eigenvalues"])

        result = cls((), matrix_parameters=matrix_parameters)
        # Without the bases: those that are in memory are freed.
        lean = [replace(space, basis=space.basis.to("meta")) for space in spaces]
        result._set_entries(Fetched(space.site, functools.partial(make, space), weights) for space in lean)
        return result

    def summary(self) -> str:
        """A table: site, layers, d_in, tokens, rank, leak, gap, outliers, precision, and the effective rank where known.

        The experts of a layer are one row. Below the table: the least, the median and the largest number of their tokens, which of
        them got few, and the share of the model's parameters that the layers have.
        """
        return "\n".join((tables.text_table(self.rows()), *self.notes()))

    def notes(self) -> list[str]:
        """Sentences below a table of the sites: about experts, and the share of the parameters."""
        text = experts_text([self[site.name] for site in self.sites if is_completed(site)])
        return [*filter(None, [text]), *super().notes()]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a site, in the model's order, of values that JSON can hold: those of `summary`, unrounded, and more."""
        return [
            {
                "site": site.name,
                "members": list(site.members),
                "d_in": site.d_in,
                "tokens": space.tokens,
                "rank": space.rank,
                "leak": space.leak,
                "gap": space.gap,
                "outliers": space.outliers,
                "precision": space.precision,
                "excess_estimate": space.excess_estimate,
                "excess_bound": space.excess_bound,
                "nullity": space.nullity,
                "effective_rank": space.effective_rank,
            }
            for site in self.sites
            for space in [self[site.name]]
        ]

    @classmethod
    def from_covariances(
        cls,
        covariances: Covariances,
        *,
        rank: int = 128,
        spectrum: bool = False,
        avoid: Mapping[str, torch.Tensor] | None = None,
        progress: bool | Progress = True,
    ) -> NullSpaces:
        """The null spaces of kept second moments, without model and data.

        Args:
            covariances: of one run, or merged (`Covariances.merge`); with `normalise=True`, the spaces are small in every one of
                several corpora or tasks.
            rank: as in `compute_null_spaces`.
            spectrum: as in `compute_null_spaces`.
            avoid: as in `compute_null_spaces`.
            progress: True for a bar, False for none, or a callable (`nullspace.progress.Progress`).

        Raises:
            ValueError: naming the site, if the rank does not fit it.

        Warns:
            UserWarning: naming the sites with fewer than d_in + rank tokens, those whose tokens span fewer than d_in − rank
                directions, and those whose sums have too large a rounding error for their bases.
        """
        rank = check_integer("rank", rank, least=None)
        report_progress = reporter(progress)
        kept = check_avoid(avoid, covariances)
        for site in covariances.sites:
            check_site_rank(site, rank, kept)
        spaces: list[NullSpace] = []
        report_progress("null spaces", 0, len(covariances), 0)
        pairs = ((site, covariances[site.name]) for site in covariances.sites)
        solve = functools.partial(bottom_of, rank=rank, spectrum=spectrum, avoid=kept)
        for space in decompose(pairs, solve, rank=None if spectrum else rank):
            spaces.append(space)
            report_progress("null spaces", sum(len(s.site.members) for s in spaces), len(covariances), 0)
        # In a float32 file, rounding may hide a leak: the computed one is then 0.
        unsure = [
            s
            for s in spaces
            if s.excess_estimate > TOLERANCE
            and (s.outliers > 0 or s.leak > NEGLIGIBLE_LEAK or (1 + s.excess_estimate) * NO_LEAK > FLOAT64_NOISE)
        ]
        if unsure:
            warnings.warn(
                f"rounding may have cost {len(unsure)} of {len(spaces)} sites more than {TOLERANCE:g} of their leak (at worst "
                f"{max(s.excess_estimate for s in unsure):.1g}, by estimate): {few_names(unsure)}. Sum them again with "
                'precision="fp64" or "qr", and keep them in float64.',
                PrecisionWarning,
                stacklevel=2,
            )
        warn_of_few_directions(spaces)
        weights = {name: weight for entry in covariances._entries for name, weight in entry.weights().items()}
        return cls(spaces, weights, matrix_parameters=covariances.matrix_parameters)


def check_avoid(avoid: Mapping[str, torch.Tensor] | None, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Checked rows that a basis must be orthogonal to: layer → (m, d_in) float64 on the CPU.

    Raises:
        ValueError: naming the layer, if it is none of these, or its rows are not a finite matrix.
    """
    known, checked = set(names), {}
    for name, rows in (avoid or {}).items():
        if name not in known:
            raise InputError(f"avoid: {name!r} is none of the layers; their names are like {next(iter(known))!r}")
        if rows.ndim != 2 or not rows.is_floating_point() or not bool(torch.isfinite(rows).all()):
            raise InputError(
                f"avoid: {name!r} needs a finite floating-point matrix (m, d_in), not {tuple(rows.shape)} {rows.dtype}"
            )
        checked[name] = rows.detach().to("cpu", torch.float64)
    return checked


def _avoided_at(site: Site, avoid: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """(d_in, m) orthonormal: the span of the rows of all members of a site; None if there are none."""
    rows = [avoid[name] for name in site.members if name in avoid]
    if not any(map(len, rows)):
        return None
    wrong = next((r for r in rows if r.shape[1] != site.d_in), None)
    if wrong is not None:
        raise InputError(f"avoid: {site.name!r} has inputs of width {site.d_in}, and its rows are {tuple(wrong.shape)}")
    _, sigma, vt = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    return vt[sigma > 1e-12 * sigma[0]].mT if sigma[0] > 0 else None


def bottom_of(site: Site, covariance: Covariance, *, rank: int, spectrum: bool, avoid: Mapping[str, torch.Tensor]) -> NullSpace:
    return NullSpace.from_covariance(covariance, rank, site=site, spectrum=spectrum, avoid=_avoided_at(site, avoid))


def check_site_rank(site: Site, rank: int, avoid: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError`, naming the site, if a basis of `rank` columns does not fit beside what is avoided there."""
    avoided = _avoided_at(site, avoid)
    left = site.d_in - (0 if avoided is None else avoided.shape[1])
    if not 1 <= rank < left:
        beside = "" if left == site.d_in else f", {site.d_in - left} directions of which are avoided"
        raise InputError(f"rank must be between 1 and {left - 1} at {site.name!r} (d_in = {site.d_in}{beside}), not {rank}")


def warn_of_few_directions(spaces: list[NullSpace]) -> None:
    """One warning for sites with too few tokens, and for sites whose tokens span fewer than d_in − rank directions."""
    routed = [s for s in spaces if is_completed(s.site)]
    short = [s for s in spaces if s.tokens < s.site.d_in + s.rank and not is_completed(s.site)]
    directions = Directions()
    for s in spaces:
        # Only the lowest eigenvalues may be known, so there may be still fewer directions. No warning where rounding hides zeros.
        is_exact = (1 + s.excess_estimate) * NO_LEAK <= FLOAT64_NOISE
        is_zero = float(s.eigenvalues[-1]) <= solvers.ZERO_EIGENVALUE * s.trace
        lacks = s.tokens >= s.site.d_in + s.rank and is_exact and is_zero
        directions.add(s.site.name, s.site.d_in - (s.nullity if lacks else 0), s.site.d_in - s.rank, s.site.d_in)
    texts = [directions.text("a null space")]
    if short:
        needed = max(s.site.d_in + s.rank for s in short)
        texts.insert(
            0,
            f"{len(short)} of {len(spaces)} sites saw fewer tokens ({min(s.tokens for s in short)}) than d_in + rank ({needed} at "
            f"most): {few_names(short)}. Part of their null space is only what these data did not show: use at least {needed} "
            "tokens.",
        )
    texts.append(experts_text(routed, few_only=True))
    if any(texts):
        warnings.warn(" ".join(filter(None, texts)), DataWarning, stacklevel=3)


def is_completed(site: Site) -> bool:
    """Whether a site is one expert's, whose second moment all experts of its layer complete where its tokens are few."""
    return len(site.members) == 1 and expert_of(site.name) is not None


def experts_text(spaces: list[NullSpace], *, few_only: bool = False) -> str:
    """How many tokens the experts got, and which of them got few or none.

    Args:
        spaces: of experts.
        few_only: an empty text if all got enough.
    """
    few = [s for s in spaces if 0 < s.tokens < s.site.d_in + s.rank]
    none = [s for s in spaces if s.tokens == 0]
    if not spaces or (few_only and not few and not none):
        return ""
    counts = sorted(s.tokens for s in spaces)
    text = f"Experts: {counts[0]} to {counts[-1]} tokens each, median {statistics.median(counts):g}."
    if few:
        text += (
            f" {len(few)} of {len(spaces)} got fewer than d_in + rank, and all experts of the layer complete their second moments: "
            f"{few_names(few)}."
        )
    if none:
        text += f" {len(none)} got none, and have the basis of all experts of the layer: {few_names(none)}."
    return text


def few_names(spaces: list[NullSpace]) -> str:
    return ", ".join(s.site.name for s in spaces[:4]) + (", …" if len(spaces) > 4 else "")
