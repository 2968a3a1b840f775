"""`NullSpace` (one site), `NullSpaces` (a model) and `compute_null_spaces`: the whole calibration in one call."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nullspace import plan, solvers, tables
from nullspace.batches import example_of, length
from nullspace.checkpoint import Checkpoint, check_site, fingerprint_of_run
from nullspace.checks import Range, check_integer, check_real
from nullspace.covariance import Covariance
from nullspace.covariances import Covariances
from nullspace.decompose import decompose
from nullspace.directions import Directions
from nullspace.distributed import Job
from nullspace.listening import precision_of
from nullspace.progress import Progress, reporter
from nullspace.schema import check_fields, check_tensor, finite, list_of, one_of, optional, or_none, text, whole
from nullspace.sharded import bring_to_rest, prepare
from nullspace.sites import Site, find_targets, weight_shape
from nullspace.sitewise import Fetched, Sitewise, Weights, weights_of
from nullspace.stream import check_options, resolve_strategy, stream_covariances
from nullspace.weights import refuse_meta
from nullspace.wrappers import unwrap

logger = logging.getLogger(__name__)


# Excess leak, by estimate, above which a float32 sum is not trusted and the site is summed again in float64.
TOLERANCE = 1e-4
# Infinity: whatever rounding has left is accepted.
ANY_TOLERANCE = Range("a number ≥ 0", lambda value: value >= 0)
# A leak below this is none: the excess over it is not counted.
NO_LEAK = 1e-8
# What float64 sums leave of an exact null space, where no massive tokens make the norm of X meaningless.
QUIET = 1e-7
# And what `excess_estimate` makes of that, as a leak: at most 2e-7 where measured, and from 5e-5 on for sums kept in float32.
FLOAT64_NOISE = 1e-6

# What a file says of a null space, beside its tensors.
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
    "excluded": optional(whole()),  # files of the first versions do not have it
}
# Relative to tr C: an eigenvalue further below zero is not rounding's.
INDEFINITE = 1e-6
# ‖UᵀU − I‖ of a basis that was written is some 1e-13: eigenvectors of float64 solvers.
ORTHONORMAL = 1e-8
# Relative to tr C: what rounding may do to the order of eigenvalues, and to their sum.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The r quietest directions of one site's input: C U = U Λ (arXiv 2503.02659, eq. 6–7; U is the paper's U_null).

    Attributes:
        basis: (d_in, rank) float64, orthonormal columns, by ascending eigenvalue.
        eigenvalues: (rank,) float64, ascending, ≥ 0: λ_i = ‖u_iᵀX‖², summed over tokens.
        trace: tr C = ‖X‖_F².
        tokens: tokens that were summed, padding left out.
        gap: (λ_{r+1} − λ_r) / λ_{r+1}, between 0 and 1: how clearly the spectrum says where to cut. Near 0 the next direction is as
            quiet as the last one, and the basis, but not its leak, depends on rounding and on the data's chance.
        outliers: tokens whose norm exceeded 8 × the median.
        nullity: eigenvalues, of those that were found, that are zero as far as the sum can tell: not above `Covariance.error_norm`.
            Where it exceeds the rank, any basis within the null space would have done as well.
        precision: `"mixed"` (float32 chains into float64 sums, outlier tokens in float64), `"fp64"` or `"qr"`.
        excess_estimate: how much louder than the quietest basis this one may be for rounding's sake: leak / optimum − 1, by
            second-order perturbation theory (`estimated_excess`). Rather too high than too low.
        excess_bound: the same without any theory of how errors fall (Ky Fan's inequality, `bounded_excess`): never too low if the
            error of the sum is what it is taken for, and often too high by many orders.
        effective_rank: exp of the entropy of σ / Σσ of X (eq. 2–3); None unless it was asked for with `spectrum=True`.
        site: which input, and which layers hear it.
        avoided: how many directions the basis had to be orthogonal to (`avoid`).
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
        """‖UᵀX‖_F / ‖X‖_F = √(Σ λ / tr C): the part of the calibration input that the space hears, 0 for a true null space."""
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
        """The bottom of a second moment.

        Args:
            covariance: the sums, with at least one token.
            rank: 1 ≤ rank < d_in.
            site: which input this is; a site without a name by default.
            spectrum: report the effective rank too (of the whole input, whatever is avoided).
            avoid: (d_in, m) orthonormal columns that the basis is to be orthogonal to: it is then the quietest such basis.

        Raises:
            ValueError: if the rank is out of range or there are no tokens.
        """
        avoided = 0 if avoid is None else avoid.shape[1]
        rank = check_integer("rank", rank, least=None)
        if not 1 <= rank < covariance.d_in - avoided:
            limit = f"d_in - {avoided + 1} = {covariance.d_in - avoided - 1}"
            where = f" at {site.name!r}" if site is not None else ""
            beside = f" ({avoided} avoided)" if avoided else ""
            raise ValueError(f"rank must be between 1 and {limit}{where}{beside}, not {rank}")
        if covariance.tokens == 0:
            raise ValueError("the covariance has no tokens")
        squared = covariance.products != "qr"
        if squared:
            c = covariance.matrix()
            whole = solvers.spectrum(c) if spectrum and avoid is not None else None
            known, vectors = solvers.partial_eigh(
                c if avoid is None else _made_loud(c, avoid.to(c)), rank, overwrite=True, every=spectrum
            )
        else:
            root = covariance.root()
            whole = torch.linalg.svdvals(root).square() if spectrum and avoid is not None else None
            known, vectors = solvers.bottom_right_singular(root if avoid is None else _made_loud_root(root, avoid.to(root)), rank)
        error, trace = covariance.error_norm, covariance.trace
        if trace > 0 and float(known[0]) < -max(10 * error, INDEFINITE * trace):
            where = f" of {site.name!r}" if site is not None else ""
            raise ValueError(
                f"the second moment{where} is none: it has the eigenvalue {float(known[0]):.3g}, and its trace is {trace:.3g}"
            )
        known = known.clamp(min=0).cpu()
        values, behind = known[:rank], float(known[rank])
        return cls(
            basis=vectors.cpu().contiguous(),
            eigenvalues=values.clone(),
            trace=trace,
            tokens=covariance.tokens,
            gap=(behind - float(values[rank - 1])) / behind if behind > 0 else 0.0,
            outliers=covariance.outliers,
            nullity=int((known <= (error if squared else error**2)).sum()),
            precision=covariance.products,
            excess_estimate=estimated_excess(known, rank, error, trace, d_in=covariance.d_in, squared=squared),
            excess_bound=bounded_excess(values, error, trace, squared=squared),
            site=site or Site(members=("",), d_in=covariance.d_in),
            effective_rank=(solvers.effective_rank((known if whole is None else whole.clamp(min=0)).sqrt()) if spectrum else None),
            avoided=avoided,
        )

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON takes it; the inverse is `from_facts`."""
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
        """A space of what `facts` gave and its two tensors, `basis` and `eigenvalues`; the basis may be on the meta device.

        Raises:
            ValueError: naming the fact or the tensor, if this is no null space: values of a wrong type, shape or sign, a basis
                that is not orthonormal, or eigenvalues that do not ascend from 0 or exceed the trace.
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


def _check_tensors(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless these are the orthonormal basis and the eigenvalues that the facts speak of."""
    where = f"the null space of {facts['members'][0]!r}"
    d_in, rank = facts["d_in"], facts["rank"]
    basis = check_tensor(tensors, "basis", (d_in, rank), (torch.float64,), where)
    values = check_tensor(tensors, "eigenvalues", (rank,), (torch.float64,), where)
    if rank >= d_in:
        raise ValueError(f"{where}: the rank {rank} should be below d_in = {d_in}")
    rounding = ROUNDING * facts["trace"]
    if bool((values.diff() < -rounding).any()) or float(values[0]) < 0:
        raise ValueError(f"{where}: its eigenvalues should ascend from 0 or more")
    if float(values.sum()) > facts["trace"] + rounding:
        raise ValueError(f"{where}: its eigenvalues should not exceed the trace, {facts['trace']:g}")
    if not basis.is_meta:
        distance = float((basis.mT @ basis - torch.eye(rank, dtype=basis.dtype)).abs().max())
        if not distance <= ORTHONORMAL:  # NaN, where squares overflow
            raise ValueError(f"{where}: the columns of its basis are not orthonormal: they are off by {distance:.1e}")


def _made_loud(c: torch.Tensor, e_dm: torch.Tensor) -> torch.Tensor:
    """P C P + ‖C‖ E Eᵀ with P = I − E Eᵀ: the same matrix in the complement of E, and E where nobody looks for quiet directions."""
    loudness = torch.linalg.matrix_norm(c)
    loudness = torch.where(loudness > 0, loudness, 1.0)
    heard = c @ e_dm
    half = heard - e_dm @ ((e_dm.mT @ heard) / 2)
    cross = half @ e_dm.mT
    return c - cross - cross.mT + loudness * (e_dm @ e_dm.mT)


def _made_loud_root(root: torch.Tensor, e_dm: torch.Tensor) -> torch.Tensor:
    """The same of a root: its rows projected, and E's behind them."""
    loudness = torch.linalg.matrix_norm(root)
    return torch.cat([root - (root @ e_dm) @ e_dm.mT, torch.where(loudness > 0, loudness, 1.0) * e_dm.mT])


def estimated_excess(
    eigenvalues: torch.Tensor, rank: int, error_norm: float, trace: float, *, d_in: int | None = None, squared: bool = True
) -> float:
    """How much leak rounding may have cost the bottom `rank` eigenvectors of a perturbed second moment: leak / optimum − 1.

    Second-order perturbation theory with a random error of entry size e = ‖E‖_F / d: the basis picks up the energy
    Σ_{i ≤ r < j} e² / max(λ_j − λ_i, e). An error E of X instead of C puts e · (σ_i + σ_j) in the place of e: the entries of
    EᵀX + XᵀE in the singular basis. Where even λ_{r+1} is below ‖E‖₂ the computed eigenvalues say nothing, and all of ‖E‖₂ counts.

    Args:
        eigenvalues: ascending, more than r of them; those that are not known count as the last one, which they exceed.
        rank: r < d.
        error_norm: ‖E‖_F (`Covariance.error_norm`).
        trace: tr C, against which a leak below 1e-8 counts as none.
        d_in: order of C; by default, as many as there are eigenvalues.
        squared: whether the error is one of C; otherwise of X.
    """
    if trace == 0:
        return 0.0
    values = eigenvalues.to(torch.float64).clamp(min=0)
    unknown = (d_in or len(values)) - len(values)
    values = torch.cat([values, values[-1:].expand(unknown)])
    near, far = values[:rank, None], values[None, rank:]
    entry = torch.full_like(near - far, error_norm / len(values))
    if not squared:
        entry = entry * (near.sqrt() + far.sqrt())
    entry = entry.clamp(min=torch.finfo(torch.float64).tiny)
    picked_up = float((entry * (entry / torch.maximum(far - near, entry))).sum())
    noise = float(2 * entry[:, 0].max() * len(values) ** 0.5)  # the spectral norm of a random matrix of such entries
    if values[rank] <= noise:
        picked_up += float((noise - values[:rank]).clamp(min=0).sum())
    return (1 + picked_up / max(float(values[:rank].sum()), NO_LEAK**2 * trace)) ** 0.5 - 1


def bounded_excess(values: torch.Tensor, error_norm: float, trace: float, *, squared: bool = True) -> float:
    """How much leak rounding can have cost at the most: leak / optimum − 1.

    With S the sum of the r computed eigenvalues and e = ‖E‖: the basis hears at most S + r e, the best one at least S − r e (Ky Fan
    1949). An error E of X instead of C changes the norm of X on any r directions by at most √r · e: √S ± √r · e.

    Args:
        values: (r,), the computed bottom eigenvalues.
        error_norm: ‖E‖_F, which bounds the spectral norm.
        trace: tr C, against which a leak below 1e-8 counts as none.
        squared: whether the error is one of C; otherwise of X.
    """
    if trace == 0:
        return 0.0
    heard, none = float(values.sum()), NO_LEAK**2 * trace
    if squared:
        most, least = heard + len(values) * error_norm, heard - len(values) * error_norm
    else:
        spread = len(values) ** 0.5 * error_norm
        most, least = (heard**0.5 + spread) ** 2, max(heard**0.5 - spread, 0.0) ** 2
    return (max(most, none) / max(least, none)) ** 0.5 - 1


class NullSpaces(Sitewise[NullSpace]):
    """Module name → `NullSpace`; the members of a site share one object.

    Args:
        spaces: one a site.
        weights: module name → (d_out, d_in) and fingerprint (`nullspace.store.fingerprint`) of its weight, by which the model is
            known again.
    """

    KIND, WHAT, FIELDS = "spaces", "null space", FIELDS

    def __init__(self, spaces: Iterable[NullSpace], weights: Weights | None = None) -> None:
        super().__init__(((space.site, space) for space in spaces), weights)

    @staticmethod
    def _pack(value: NullSpace) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return value.facts(), {"basis": value.basis, "eigenvalues": value.eigenvalues}

    @staticmethod
    def _unpack(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> NullSpace:
        return NullSpace.from_facts(facts, tensors)

    @classmethod
    def _of_files(cls, spaces: Iterable[NullSpace], kept: Checkpoint, weights: Weights) -> NullSpaces:
        """Spaces whose tensors are read from a checkpoint when they are asked for."""

        def make(space: NullSpace) -> NullSpace:
            read = kept.reader(space.site.name)()
            return replace(space, basis=read["basis"], eigenvalues=read["eigenvalues"])

        found = cls(())
        # Not the space itself, whose basis may be at hand: none is to be held.
        lean = [replace(space, basis=space.basis.to("meta")) for space in spaces]
        found._set_entries(Fetched(space.site, functools.partial(make, space), weights) for space in lean)
        return found

    def summary(self) -> str:
        """A table: site, layers, d_in, tokens, rank, leak, gap, outliers, precision, and the effective rank where known."""
        return tables.text_table(tables.rows(self))

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
        """The null spaces of second moments that were kept: no model, no data.

        Args:
            covariances: of one run, or merged (`Covariances.merge`): with `normalise=True`, what is quiet in every one of several
                corpora or tasks.
            rank: as in `compute_null_spaces`.
            spectrum: as in `compute_null_spaces`.
            avoid: as in `compute_null_spaces`.
            progress: True for a bar, False for none, or a callable (`nullspace.progress.Progress`).

        Raises:
            ValueError: naming the site, if the rank does not fit it.

        Warns:
            UserWarning: naming the sites that saw fewer than d_in + rank tokens, or whose tokens span fewer than d_in − rank
                directions, and those whose sums rounding has made too coarse for their bases.
        """
        rank = check_integer("rank", rank, least=None)
        report_progress = reporter(progress)
        kept = check_avoid(avoid, covariances)
        for site in covariances.sites:
            check_site_rank(site, rank, kept)
        found: list[NullSpace] = []
        report_progress("null spaces", 0, len(covariances), 0)
        pairs = ((site, covariances[site.name]) for site in covariances.sites)
        for space in decompose(pairs, functools.partial(_bottom, rank=rank, spectrum=spectrum, avoid=kept)):
            found.append(space)
            report_progress("null spaces", sum(len(s.site.members) for s in found), len(covariances), 0)
        # A leak that the sum is too coarse to show (a float32 file's) may be more than the computed one, which is then 0.
        unsure = [
            s
            for s in found
            if s.excess_estimate > TOLERANCE
            and (s.outliers > 0 or s.leak > QUIET or (1 + s.excess_estimate) * NO_LEAK > FLOAT64_NOISE)
        ]
        if unsure:
            warnings.warn(
                f"rounding may have cost {len(unsure)} of {len(found)} sites more than {TOLERANCE:g} of their leak (at worst "
                f"{max(s.excess_estimate for s in unsure):.1g}, by estimate): {_few_names(unsure)}. Sum them again with "
                'precision="fp64" or "qr", and keep them in float64.',
                stacklevel=2,
            )
        _warn_of_few_directions(found)
        return cls(found, {name: weight for entry in covariances._entries for name, weight in entry.weights().items()})


def check_avoid(avoid: Mapping[str, torch.Tensor] | None, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Checked rows that a basis must be orthogonal to: layer → (m, d_in) float64 on the CPU.

    Raises:
        ValueError: naming the layer, if it is none of these, or its rows are no finite matrix.
    """
    known, found = set(names), {}
    for name, rows in (avoid or {}).items():
        if name not in known:
            raise ValueError(f"avoid: {name!r} is none of the layers; their names are like {next(iter(known))!r}")
        if rows.ndim != 2 or not rows.is_floating_point() or not bool(torch.isfinite(rows).all()):
            raise ValueError(
                f"avoid: {name!r} needs a finite floating-point matrix (m, d_in), not {tuple(rows.shape)} {rows.dtype}"
            )
        found[name] = rows.detach().to("cpu", torch.float64)
    return found


def _avoided_at(site: Site, avoid: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """(d_in, m) orthonormal: the span of what is to be avoided by any member of a site; None if there is nothing."""
    rows = [avoid[name] for name in site.members if name in avoid]
    if not any(map(len, rows)):
        return None
    wrong = next((r for r in rows if r.shape[1] != site.d_in), None)
    if wrong is not None:
        raise ValueError(f"avoid: {site.name!r} has inputs of width {site.d_in}, and its rows are {tuple(wrong.shape)}")
    _, sigma, vt = torch.linalg.svd(torch.cat(rows), full_matrices=False)
    return vt[sigma > 1e-12 * sigma[0]].mT if sigma[0] > 0 else None


def _bottom(site: Site, covariance: Covariance, *, rank: int, spectrum: bool, avoid: Mapping[str, torch.Tensor]) -> NullSpace:
    return NullSpace.from_covariance(covariance, rank, site=site, spectrum=spectrum, avoid=_avoided_at(site, avoid))


def check_site_rank(site: Site, rank: int, avoid: Mapping[str, torch.Tensor]) -> None:
    """Raise `ValueError`, naming the site, if a basis of `rank` columns does not fit beside what is avoided there."""
    avoided = _avoided_at(site, avoid)
    left = site.d_in - (0 if avoided is None else avoided.shape[1])
    if not 1 <= rank < left:
        beside = "" if left == site.d_in else f", {site.d_in - left} directions of which are avoided"
        raise ValueError(f"rank must be between 1 and {left - 1} at {site.name!r} (d_in = {site.d_in}{beside}), not {rank}")


def compute_null_spaces(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    rank: int = 128,
    targets: str | Iterable[str] = "all-linear",
    exclude: str | Iterable[str] | None = None,
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "auto",
    tolerance: float = TOLERANCE,
    spectrum: bool = False,
    avoid: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Progress = True,
    job: Job | None = None,
) -> NullSpaces:
    """Run the model over the loader and find, for every linear layer, the directions that its input hardly ever takes.

    Under an initialised `torch.distributed` process group, all of its processes have to call this: each reads its share of the
    loader and solves its share of the sites, and all get the same. See `stream_covariances`.

    Args:
        model: any module; run in eval mode, without gradients, and left as it was found.
        loader: an iterable of mappings that the model takes (`input_ids`, `attention_mask`, …), or of tensors. It should yield
            at least d_in + rank tokens: with fewer, part of the null space is only what the data did not show.
        rank: columns of each basis: at least the rank of the adapters that will be made of it.
        targets: `"all-linear"`, a list of name endings, or a regular expression: see `nullspace.sites.find_targets`. `"all-linear"`
            leaves out layers that are smaller than the rank, that these data do not reach, or whose output is not W x + b, with
            one warning; a layer that is named otherwise is an error then.
        exclude: what to take away from `targets`: a list of name endings, or a regular expression.
        strategy: how the model is run: see `stream_covariances`.
        precision: `"auto"`: the fast sums of `Covariance`, and a second pass in float64 over just those sites, if there are any,
            whose bases rounding may have made louder than `tolerance` allows (`NullSpace.excess_estimate`), and a third one
            by QR where float64 is short too. `"mixed"`: the fast sums alone. `"fp64"`: every product in float64 at once. `"qr"`:
            no product at all. Or a mapping from regular expressions for layer names to these: see `stream_covariances`.
        tolerance: excess leak, by estimate, that `"auto"` accepts.
        spectrum: report effective ranks too.
        avoid: module name → (m, d_in) matrix whose rows the basis is to be orthogonal to: the A matrices of adapters that were
            trained before (`nullspace.integrations.peft.row_spaces`), so that a new one does not write where they read (O-LoRA,
            arXiv 2310.14152). The members of a site avoid each other's too.
        device, hidden_states: for the layerwise strategy: see `stream_covariances`.
        checkpoint: a directory for what is finished, site by site. A run that was cut off and is called again with the same
            arguments goes on behind the last finished site (with `strategy="layerwise"`, in the block where it was), and ends
            with the same bits. The caller deletes it. The loader must give the same batches every time. Several processes need a
            directory that all of them see; each writes its own sites, no process holds all bases, and what is returned reads them
            from there when they are asked for: it is to be deleted after that. Another number of processes may go on with it.
        progress: True for bars (of the first process), False for none, or a callable (`nullspace.progress.Progress`).
        job: which processes work together; by default those of the default process group, if one is initialised.

    Returns:
        A mapping from module name to `NullSpace`, in the model's own order. Of several processes without a checkpoint, each holds
        all bases, 8 · d_in · rank bytes a site.

    Raises:
        ValueError: see `stream_covariances`; before the forward pass if the rank does not fit a layer, or if the checkpoint is
            that of another run (another model, data, or setting: which ones is said), has a damaged `run.json`, or is asked for
            with a loader that can be read only once; after it, naming the site, if the rank does not fit beside what members that
            turn out to share an input avoid between them.

    Warns:
        UserWarning: naming what `"all-linear"` has left out; the sites that saw fewer than d_in + rank tokens; those that a second
            pass should sum again, if the loader can be read only once; and file and site of a damaged file of the checkpoint,
            whose site is computed again.

    Out of memory, PyTorch's error comes with what the run was going to take, and the cheapest setting that fits
    (`nullspace.plan`).
    """
    job = job or Job()
    with job.telling(), contextlib.ExitStack() as held:
        rank = check_integer("rank", rank)
        check_real("tolerance", tolerance, ANY_TOLERANCE)
        check_options(strategy, precision, hidden_states, device)
        model = unwrap(model)
        modules = find_targets(model, targets, exclude=exclude, rank=rank)
        refuse_meta(model)
        spread = prepare(model, modules, job, strategy)
        avoided = check_avoid(avoid, modules)
        for name in avoided:
            check_site_rank(Site((name,), weight_shape(modules[name])[1]), rank, avoided)
        if strategy == "auto":
            strategy, hidden_states = resolve_strategy(
                model, loader, modules, device=device, hidden_states=hidden_states, rank=rank, job=job
            )
            device = None if strategy == "resident" else device
            hidden_states = "auto" if strategy == "resident" else hidden_states
        report_progress = reporter(progress, bars=job.first)
        kept: Checkpoint | None = None
        if checkpoint is not None:
            settings = {
                "rank": rank,
                "precision": precision if isinstance(precision, str) else dict(precision),
                "tolerance": tolerance,
                "spectrum": spectrum,
                "strategy": strategy,
                "avoid": {name: hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest() for name, rows in avoided.items()},
            }
            if spread:  # fingerprints of sharded weights are collectives
                job.exchange(None)
            run = fingerprint_of_run(model, loader, modules, settings, job)
            job.check_same(**run)
            kept = Checkpoint(checkpoint, run, job)
            held.callback(kept.close)

        def check(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
            space = NullSpace.from_facts(facts, tensors)
            check_site(facts, modules)
            if space.rank != rank:
                raise ValueError(f"its rank is {space.rank}, not {rank}")

        found_before = kept.load(check) if kept is not None else ()
        spaces = [NullSpace.from_facts(f, read() if job.count == 1 else _without_basis(f, read)) for f, read in found_before]
        done = {name for space in spaces for name in space.site.members}

        bottom_of = functools.partial(_bottom, rank=rank, spectrum=spectrum, avoid=avoided)

        def explain() -> str:
            return plan.advice(
                model,
                targets=modules,
                strategy=strategy,
                batch=example_of(loader),
                batches=length(loader),
                device=device,
                rank=rank,
            )

        def measure(names: Iterable[str], precision: str | Mapping[str, str], forward: str) -> list[NullSpace]:
            def renamed(stage: str, done: int, total: int | None, tokens: int) -> None:
                report_progress(forward if stage == "forward" else stage, done, total, tokens)

            if kept is not None:
                kept.hold()
            found: list[NullSpace] = []
            # A caller in inference mode would otherwise get bases that no later training step may touch.
            # A forecast runs the model; of a sharded one all processes would have to.
            with torch.inference_mode(False), contextlib.nullcontext() if spread else _explaining_memory(explain):
                stream = stream_covariances(
                    model,
                    loader,
                    targets=modules.only(names),
                    strategy=strategy,
                    precision=precision,
                    device=device,
                    hidden_states=hidden_states,
                    progress=renamed,
                    job=job,
                )
                for space in decompose(stream, bottom_of):
                    if kept is not None:
                        kept.keep(space.site.name, space.facts(), {"basis": space.basis, "eigenvalues": space.eigenvalues})
                    logger.info("%s: leak %.1e, rounding %.0e of it", space.site, space.leak, space.excess_estimate)
                    found.append(space)
                    members = sum(len(s.site.members) for s in found)
                    report_progress("null spaces", members + (len(done) if forward == "forward" else 0), len(modules), 0)
            return _pooled(found, owners, kept, job)

        owners: dict[Site, int] = {}
        left = [name for name in modules if name not in done]
        if left:
            spaces += measure(left, precision, "forward")
        once = isinstance(loader, Iterator)
        for better in ("fp64", "qr"):
            unsure = [
                s
                for s in spaces
                if precision_of(s.site.name, precision) == "auto"
                and s.precision not in (better, "qr")
                and s.excess_estimate > tolerance
            ]
            if better == "qr":  # without massive tokens a leak as small as this is none, and more digits of it are worth no pass
                unsure = [s for s in unsure if s.outliers > 0 or s.leak > QUIET]
            if once:
                break
            if not unsure:
                continue
            again = {s.site: s for s in measure([m for s in unsure for m in s.site.members], better, f"forward, {better}")}
            spaces = [again.get(s.site, s) for s in spaces]
        if once and unsure and job.first:
            warnings.warn(
                f"rounding may have cost {len(unsure)} of {len(spaces)} sites more than {tolerance:g} of their leak (at worst "
                f"{max(s.excess_estimate for s in unsure):.1g}, by estimate): {_few_names(unsure)}. The loader can be read only "
                "once, so they were not summed again: use precision='fp64', or a loader that can be read twice.",
                stacklevel=2,
            )
        modules.settle(model, quiet=not job.first)
        if job.first:
            _warn_of_few_directions(spaces)
        if spread:
            bring_to_rest(model)
            job.exchange(None)
        weights = weights_of(modules)
        place = {name: index for index, name in enumerate(modules)}  # one process does not see in which order all are called
        spaces.sort(key=lambda s: min(place[member] for member in s.site.members))
        if job.count == 1:
            return NullSpaces(spaces, weights)
        report_progress("null spaces", len(modules), len(modules), 0)
        if kept is not None:
            return NullSpaces._of_files(spaces, kept, weights)
        return NullSpaces([replace(s, basis=job.broadcast(s.basis, owners[s.site])) for s in spaces], weights)


def _without_basis(facts: Mapping[str, Any], read: Callable[..., dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a space, the basis only by its shape: what a process must know of another one's."""
    basis = torch.empty(facts["d_in"], facts["rank"], dtype=torch.float64, device="meta")
    return {"basis": basis, **read("eigenvalues")}


def _pooled(found: list[NullSpace], owners: dict[Site, int], kept: Checkpoint | None, job: Job) -> list[NullSpace]:
    """What all processes have found; of the others', all but the bases. `owners` learns whose they are."""
    if job.count == 1:
        return found
    own = [(s.facts(), s.eigenvalues, 0 if kept is None else kept.numbers[s.site.name]) for s in found]
    mine = {s.site: s for s in found}
    everyones: list[NullSpace] = []
    for number, theirs in enumerate(job.exchange(own)):
        for facts, eigenvalues, file in theirs:
            space = NullSpace.from_facts(facts, _without_basis(facts, lambda _, found=eigenvalues: {"eigenvalues": found}))
            owners[space.site] = number
            everyones.append(mine.get(space.site, space))
            if kept is not None:
                kept.numbers[space.site.name] = file
    return everyones


@contextlib.contextmanager
def _explaining_memory(explain: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # PyTorch's allocator for the CPU raises a plain RuntimeError.
        if not isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        try:
            text = explain()
        except Exception:  # advice is not worth hiding the error for
            raise error from None
        kind = torch.cuda.OutOfMemoryError if isinstance(error, torch.cuda.OutOfMemoryError) else MemoryError
        raise kind(f"{error}\n{text}") from error


def _warn_of_few_directions(spaces: list[NullSpace]) -> None:
    """One warning for sites with too few tokens, and for those whose tokens, however many, leave more than the basis untouched."""
    short = [s for s in spaces if s.tokens < s.site.d_in + s.rank]
    directions = Directions()
    for s in spaces:
        # Of the eigenvalues maybe only the bottom is known: there may be still fewer directions. Where the sum is too coarse to
        # tell zeros from small numbers, nothing is said.
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
            f"most): {_few_names(short)}. Part of their null space is only what these data did not show: use at least {needed} "
            "tokens.",
        )
    if any(texts):
        warnings.warn(" ".join(filter(None, texts)), stacklevel=3)


def _few_names(spaces: list[NullSpace]) -> str:
    return ", ".join(s.site.name for s in spaces[:4]) + (", …" if len(spaces) > 4 else "")
