"""The paper's analyses (arXiv 2503.02659): from second moments, weights and adapters to numbers by layer.

Functions of tensors come first: `leak`, `drift`, `shares_read`, `change` and `outside` (the effective rank is in
`nullspace.solvers`). They need no model and no file. `analyse` calls them for every layer and returns rows, dictionaries that are
valid JSON; each covariance is read once, decomposed once, and freed.

X is the calibration input of a site, d_in × tokens, and C = X Xᵀ its second moment: ‖M X‖_F = √tr(M C Mᵀ) for any M.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nullspace import solvers
from nullspace.artifacts import identity
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.null_space import NullSpace
from nullspace.artifacts.spaces import NullSpaces
from nullspace.errors import InputError
from nullspace.factors import LowRank
from nullspace.model.layer_names import Location, is_attention, locations
from nullspace.model.linear import is_conv1d, weight_of, weight_shape
from nullspace.model.quantised import dequantised, is_dequantisable, is_quantised_layer
from nullspace.model.sites import Site
from nullspace.model.weights import restore_layout, tensor_of
from nullspace.moments.covariance import Covariance
from nullspace.progress import Progress, reporter
from nullspace.solvers import decompose

Row = dict[str, Any]

# Rows hold so many evenly spaced singular values of a spectrum, and so many bins of the directions that an A reads.
POINTS, BINS = 128, 100
# Names of a state and of two groups of layers.
INITIAL, ATTENTION, ALL = "initial", "all of attention", "all"
# Of these, `adapter_summary` has medians.
_MEDIANS = ("leak", "held_out_leak", "change", "outside", "drift")


def leak(a: torch.Tensor, c: torch.Tensor) -> float:
    """The part of the calibration input's norm in the row space of an adapter's A: ‖QᵀX‖_F / ‖X‖_F = √(tr(QᵀCQ) / tr C).

    For the untrained A of LoRA-Null this is `NullSpace.leak`. Training with a frozen A does not change it.

    Args:
        a: (r, d_in); Q (d_in, ≤ r) is an orthonormal basis of its row space.
        c: (d_in, d_in) second moment.

    Returns:
        Between 0 and 1; 0.0 if A or C is zero. C is rounded by some 1e-16 of its norm, so values below 1e-8 are rounding.

    Raises:
        ValueError: if the shapes do not fit.
    """
    a, c = _checked(a, c)
    rows = _row_space(a)
    return _root(((rows @ c) * rows).sum() / c.trace()) if float(c.trace()) > 0 else 0.0


def update(initial: LowRank, trained: LowRank) -> LowRank:
    """What training has added to a layer's weight, ΔW = B A − B₀ A₀, as thin factors.

    `[B − B₀, B₀] [A; A − A₀]`: differences are taken before products, so that nothing cancels however small the update is. The
    second halves are left out if A has not changed or B₀ is zero.

    Args:
        initial: A₀ (r, d_in) and B₀ (d_out, r), B with the adapter's scaling in it.
        trained: A and B, of the same shapes.

    Returns:
        `LowRank(A (k, d_in), B (d_out, k))` with k = r or 2r, float64.

    Raises:
        ValueError: if the shapes differ.
    """
    if initial.A.shape != trained.A.shape or initial.B.shape != trained.B.shape:
        raise InputError(
            f"A {tuple(trained.A.shape)} and B {tuple(trained.B.shape)} are not what A {tuple(initial.A.shape)} and "
            f"B {tuple(initial.B.shape)} were trained to"
        )
    a0, b0, a, b = (t.detach().to(torch.float64) for t in (*initial, *trained))
    if torch.equal(a, a0) or not bool(b0.any()):
        return LowRank(a, b - b0)
    return LowRank(torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1))


def output_norm(weight: torch.Tensor, c: torch.Tensor) -> float:
    """‖W X‖_F = √tr(W C Wᵀ), the norm of a layer's output, for a (d_out, d_in) weight. 2 · d_out · d_in² flops."""
    weight, c = _checked(weight, c)
    return _root(((weight @ c) * weight).sum())


def update_norm(delta: LowRank | torch.Tensor, c: torch.Tensor) -> float:
    """‖ΔW X‖_F = √tr((A C Aᵀ) (BᵀB)) of ΔW = B A, whose d_out × d_in product is never formed; or of ΔW itself."""
    if isinstance(delta, torch.Tensor):
        return output_norm(delta, c)
    a, c = _checked(delta.A, c)
    b = delta.B.detach().to(a)
    return _root(((a @ c @ a.mT) * (b.mT @ b)).sum())


def drift(weight: torch.Tensor, c: torch.Tensor, delta: LowRank | torch.Tensor) -> float:
    """The relative change of a layer's output on the calibration input: ‖ΔW X‖_F / ‖W₀ X‖_F.

    Args:
        weight: (d_out, d_in) W₀, of the model before training.
        c: (d_in, d_in) second moment.
        delta: ΔW, of `update`; or (d_out, d_in) itself.

    Returns:
        0.0 without a change; 1.0 if the change has the norm of the output.

    Raises:
        ValueError: if the shapes do not fit, or the layer's output was zero and no longer is.
    """
    moved, before = update_norm(delta, c), output_norm(weight, c)
    if moved > 0 and before == 0:
        raise InputError("the layer's output on the calibration input was zero: there is nothing to measure its drift by")
    return moved / before if moved > 0 else 0.0


def shares_read(a: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The share of A in each direction of the input: ‖A u_j‖ / ‖A‖_F (Figure 4, eq. 12–13).

    Args:
        a: (r, d_in).
        directions: (d_in, d_in) u_1, u_2, … in columns, the eigenvectors of C by descending eigenvalue.

    Returns:
        (d_in,) float64, whose squares sum to 1; zeros if A is zero.

    Raises:
        ValueError: if the shapes do not fit.
    """
    a, directions = _checked(a, directions)
    norm = torch.linalg.matrix_norm(a)
    return torch.linalg.vector_norm(a @ directions, dim=0) / torch.where(norm > 0, norm, 1.0)


def binned(shares: torch.Tensor, bins: int = BINS) -> list[float]:
    """Shares by direction in bins of relative rank: from the largest eigenvalue (0) to the smallest (1), for any d_in.

    Args:
        shares: (d_in,), of `shares_read`.
        bins: their number.

    Returns:
        Root mean square of the shares in each bin, times √d_in: about 1 in every bin for a random A.
    """
    energy = np.concatenate([[0.0], np.cumsum(shares.square().cpu().numpy())])
    edges = np.interp(np.linspace(0.0, len(shares), bins + 1), np.arange(len(shares) + 1), energy)
    return np.sqrt(np.diff(edges).clip(min=0.0) * bins).tolist()


def change(a: torch.Tensor, initial: torch.Tensor) -> float:
    """‖A − A₀‖_F / ‖A₀‖_F (Figure 1), the relative change of A; infinite if A₀ is zero and A is not.

    Raises:
        ValueError: if the shapes differ.
    """
    if a.shape != initial.shape:
        raise InputError(f"A {tuple(a.shape)} is not what A {tuple(initial.shape)} was trained to")
    a, initial = a.detach().to(torch.float64), initial.detach().to(torch.float64)
    moved, before = float(torch.linalg.matrix_norm(a - initial)), float(torch.linalg.matrix_norm(initial))
    return 0.0 if moved == 0 else moved / before if before > 0 else float("inf")


def outside(a: torch.Tensor, initial: torch.Tensor) -> float:
    """‖A (I − Q₀Q₀ᵀ)‖_F / ‖A‖_F, Q₀ the row space of A₀: the part of A outside of the row space of A₀.

    A change within the row space leaves the leak as it was; only this part can raise it.

    Raises:
        ValueError: if the widths differ.
    """
    if a.shape[1] != initial.shape[1]:
        raise InputError(f"A {tuple(a.shape)} and A {tuple(initial.shape)} read inputs of different widths")
    a, rows = a.detach().to(torch.float64), _row_space(initial.detach().to(torch.float64))
    norm = float(torch.linalg.matrix_norm(a))
    return float(torch.linalg.matrix_norm(a - (a @ rows.mT) @ rows)) / norm if norm > 0 else 0.0


def singular_values(weight: torch.Tensor) -> torch.Tensor:
    """Singular values of a weight, (min(d_out, d_in),), descending, float64.

    They come from the smaller Gram matrix, so that those below some 1e-8 of the first are rounding.
    """
    weight = weight.detach().to(torch.float64)
    gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    return solvers.spectrum(gram).clamp(min=0).sqrt().flip(0)


class State(NamedTuple):
    """An adapter at one step of its training."""

    label: str
    step: int | None
    """The optimiser's step; None if unknown."""
    factors: Mapping[str, LowRank]
    """Layer → A and B, B times the adapter's scaling: the layer adds B A."""


class Course(NamedTuple):
    """An adapter from its start through training."""

    name: str
    initial: Mapping[str, LowRank]
    """Layer → A and B before training, B times the adapter's scaling."""
    trained: tuple[State, ...] = ()

    @property
    def states(self) -> tuple[State, ...]:
        """The start and the states after it."""
        return (State(INITIAL, 0, self.initial), *self.trained)


class Analysis(NamedTuple):
    """Rows by site, by layer, and by adapter, state and layer. A value whose input was not given is None."""

    inputs: list[Row]
    """`site`, `members`, `block`, `projection`, `d_in`, `tokens`, `outliers`, `outlier_share`, `effective_rank` and `spectrum`
    (σ_i / σ_1 at evenly spaced i) of X; `rank`, `leak`, `gap` and `held_out_leak` of its null space."""
    weights: list[Row]
    """`layer`, `site`, `block`, `projection`, `d_out`, `d_in`, `effective_rank` and `spectrum` of W₀."""
    adapters: list[Row]
    """`adapter`, `state`, `step`, `layer`, `block`, `projection`, `rank`, `change`, `outside`, `leak`, `held_out_leak`, `drift` and
    `read` (`binned` shares) of A, or of B A."""


def analyse(
    covariances: Covariances | None = None,
    spaces: NullSpaces | None = None,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    courses: Sequence[Course] = (),
    held_out: Covariances | None = None,
    progress: bool | Progress = True,
) -> Analysis:
    """All rows that the given inputs allow.

    Args:
        covariances: second moments of the calibration input: spectra, effective ranks, leak and drift of adapters.
        spaces: their leak and gap; effective ranks, if they have them.
        modules: name → linear layer of the base model before training; layers that no other input names are left out.
        courses: adapters, each with the states of its training.
        held_out: second moments on text that is not in the calibration: the leak there, of the spaces and of the adapters.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Cost: a site's second moment is read once; 4/3 · d_in³ flops for its eigenvalues, 9 · d_in³ for its eigenvectors, which only
    adapters need; 2 · d_out · d_in² a layer for its drift. In memory, a few sites of d_in² float64 numbers at a time.

    Raises:
        ValueError: naming the adapter and the layer, if one is missing from the covariances or of another width there or in the
            model; naming the layer, if covariances or spaces are of another model than `modules`, or if the held-out moments lack
            it or are of another width.
    """
    report = reporter(progress)
    sites = _sites(covariances, spaces, courses)
    layers = [name for site in sites for name in site.members]
    where = locations(layers)
    _check_courses(courses, covariances, modules)
    if held_out is not None:
        _check_held_out(held_out, sites)
    if modules is not None:
        _check_modules(modules, layers, covariances, spaces, held_out)
    facts: dict[str, Row] = {}
    adapters: dict[str, list[Row]] = {}
    if covariances is not None:
        examine = _Examination(modules, courses, where)
        report("inputs", 0, len(covariances.sites), 0)
        pairs = ((site, covariances[site.name]) for site in covariances.sites)
        for site, (row, moves) in zip(covariances.sites, decompose(pairs, examine), strict=True):
            facts[site.name], adapters[site.name] = row, moves
            report("inputs", len(facts), len(covariances.sites), 0)
    for site in sites:
        if site.name not in adapters:
            adapters[site.name] = [move.row for move in _moves(site, courses, where)]
    weights: list[Row] = []
    for site in sites:
        for name in site.members if modules is not None else ():
            weights.append(_weight_row(name, site, modules[name], where[name]))  # type: ignore[index]
            report("weights", len(weights), len(layers), 0)
    order = {course.name: i for i, course in enumerate(courses)}
    if held_out is not None:
        _add_held_out(held_out, sites, spaces, courses, facts, adapters, report)
    return Analysis(
        [_input_row(site, facts.get(site.name, {}), _space(spaces, site), where) for site in sites],
        weights,
        sorted((row for site in sites for row in adapters[site.name]), key=lambda row: order[row["adapter"]]),
    )


class _Move(NamedTuple):
    """One layer of an adapter in one state: its row so far, and its factors at the start and now."""

    row: Row
    initial: LowRank
    now: LowRank


class _Examination:
    """The function that `decompose` calls for every site: the facts of its input, and the rows of its adapters."""

    def __init__(self, modules: Mapping[str, nn.Module] | None, courses: Sequence[Course], where: Mapping[str, Location]) -> None:
        self._modules, self._courses, self._where = modules or {}, courses, where

    def __call__(self, site: Site, covariance: Covariance) -> tuple[Row, list[Row]]:
        tokens, covariance = covariance.tokens, covariance.completed(site.d_in)
        c = covariance.matrix()
        moves = _moves(site, self._courses, self._where)
        sigma, directions = _decomposed(covariance, c, vectors=bool(moves))
        adapted = {move.row["layer"] for move in moves} & self._modules.keys()
        before = {name: output_norm(_weight(name, self._modules[name]), c) for name in adapted}
        for row, initial, now in moves:
            row["leak"] = leak(now.A, c)
            row["read"] = binned(shares_read(now.A, directions))
            if before.get(row["layer"], 0.0) > 0:
                row["drift"] = update_norm(update(initial, now), c) / before[row["layer"]]
        facts = {
            **_tokens(tokens, covariance.outliers),
            "effective_rank": solvers.effective_rank(sigma),
            "spectrum": _sampled(sigma),
        }
        return facts, [move.row for move in moves]


def _decomposed(covariance: Covariance, c: torch.Tensor, *, vectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """σ (d,) of X, descending, and its left singular vectors (d, d), or (d, 0) without `vectors`."""
    if covariance.products == "qr":  # has the triangular factor, so that singular values need not be squared
        _, sigma, rows = torch.linalg.svd(covariance.root())
        return sigma, rows.mT
    if not vectors:
        return solvers.spectrum(c).clamp(min=0).sqrt().flip(0), c[:, :0]
    values, directions = torch.linalg.eigh(c)
    return values.clamp(min=0).sqrt().flip(0), directions.flip(1)


def _moves(site: Site, courses: Sequence[Course], where: Mapping[str, Location]) -> list[_Move]:
    """The adapters of a site, with the columns that A alone determines."""
    moves = []
    for name in site.members:
        for course in courses:
            for state in course.states if name in course.initial else ():
                initial, now = course.initial[name], state.factors[name]
                row = {"adapter": course.name, "state": state.label, "step": state.step, "layer": name, **where[name]._asdict()}
                row |= {"rank": len(now.A), "change": change(now.A, initial.A), "outside": 0.0}
                if row["change"] > 0:  # otherwise only rounding is outside
                    row["outside"] = outside(now.A, initial.A)
                moves.append(_Move({**row, "leak": None, "held_out_leak": None, "drift": None, "read": None}, initial, now))
    return moves


def _add_held_out(
    held_out: Covariances,
    sites: Sequence[Site],
    spaces: NullSpaces | None,
    courses: Sequence[Course],
    facts: dict[str, Row],
    adapters: Mapping[str, list[Row]],
    report: Progress,
) -> None:
    """Add to the facts of every input, and to the rows of its adapters, their leak on text that they were not made from."""
    factors = {(course.name, state.label): state.factors for course in courses for state in course.states}
    for done, site in enumerate(sites, start=1):
        c, space = held_out[site.members[0]].completed(site.d_in).matrix(), _space(spaces, site)
        facts.setdefault(site.name, {})["held_out_leak"] = None if space is None else leak(space.basis.mT, c)
        for row in adapters[site.name]:
            row["held_out_leak"] = leak(factors[row["adapter"], row["state"]][row["layer"]].A, c)
        report("held-out text", done, len(sites), 0)


def _tokens(tokens: int, outliers: int) -> Row:
    return {"tokens": tokens, "outliers": outliers, "outlier_share": outliers / tokens if tokens else 0.0}


def _input_row(site: Site, facts: Row, space: NullSpace | None, where: Mapping[str, Location]) -> Row:
    row: Row = {
        "site": site.name,
        "members": list(site.members),
        "block": where[site.name].block,
        "projection": ", ".join(where[name].projection for name in site.members),
        "d_in": site.d_in,
        **dict.fromkeys(
            ("tokens", "outliers", "outlier_share", "effective_rank", "spectrum", "rank", "leak", "gap", "held_out_leak")
        ),
    }
    if space is not None:
        row |= {"rank": space.rank, "leak": space.leak, "gap": space.gap, "effective_rank": space.effective_rank}
        row |= _tokens(space.tokens, space.outliers)
    return row | facts


def _weight_row(name: str, site: Site, module: nn.Module, location: Location) -> Row:
    weight = _weight(name, module)
    sigma = singular_values(weight)
    return {
        "layer": name,
        "site": site.name,
        **location._asdict(),
        "d_out": weight.shape[0],
        "d_in": weight.shape[1],
        "effective_rank": solvers.effective_rank(sigma),
        "spectrum": _sampled(sigma),
    }


def rank_summary(analysis: Analysis) -> list[Row]:
    """Mean effective ranks by projection, of attention and of all layers, and the layers where X's is below W₀'s (Table 2).

    Returns:
        Rows of `layers` (a name for the group), `count`, `x` and `w` (mean effective ranks) and `below` (a number of layers).
        `x_share`, `w_share` and `below_share` are the same for effective ranks divided by the largest possible ones (d_in and
        min(d_out, d_in)). Empty if X's or W₀'s are not known.
    """
    of_site = {row["site"]: row["effective_rank"] for row in analysis.inputs}
    pairs = [(row, of_site[row["site"]]) for row in analysis.weights if of_site[row["site"]] is not None]
    groups: dict[str, list[tuple[Row, float]]] = {}
    for row, x in pairs:
        groups.setdefault(row["projection"], []).append((row, x))
    attention = [pair for pair in pairs if is_attention(pair[0]["layer"])]
    if attention and len(attention) < len(pairs):
        groups[ATTENTION] = attention
    if pairs:
        groups[ALL] = pairs
    return [_rank_row(name, group) for name, group in groups.items()]


def _rank_row(name: str, group: list[tuple[Row, float]]) -> Row:
    ranks = [(x, row["effective_rank"]) for row, x in group]
    shares = [(x / row["d_in"], row["effective_rank"] / min(row["d_out"], row["d_in"])) for row, x in group]
    return {
        "layers": name,
        "count": len(group),
        "x": statistics.fmean(x for x, _ in ranks),
        "w": statistics.fmean(w for _, w in ranks),
        "x_share": statistics.fmean(x for x, _ in shares),
        "w_share": statistics.fmean(w for _, w in shares),
        "below": sum(x < w for x, w in ranks),
        "below_share": sum(x < w for x, w in shares),
    }


def adapter_summary(analysis: Analysis) -> list[Row]:
    """One row an adapter and state: medians over layers of `leak`, `held_out_leak`, `change`, `outside` and `drift`; the largest
    drift and its layer."""
    states: dict[tuple[str, str], list[Row]] = {}
    for row in analysis.adapters:
        states.setdefault((row["adapter"], row["state"]), []).append(row)
    summary = []
    for (adapter, state), rows in states.items():
        drifts = [row for row in rows if row["drift"] is not None]
        worst = max(drifts, key=lambda row: row["drift"], default={"drift": None, "layer": None})
        summary.append(
            {
                "adapter": adapter,
                "state": state,
                "step": rows[0]["step"],
                "layers": len(rows),
                **{field: _median(row.get(field) for row in rows) for field in _MEDIANS},
                "worst_drift": worst["drift"],
                "worst_layer": worst["layer"],
            }
        )
    return summary


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _sites(covariances: Covariances | None, spaces: NullSpaces | None, courses: Sequence[Course]) -> list[Site]:
    """The sites of all inputs; a layer that only an adapter has is a site of its own."""
    of_layer: dict[str, Site] = {}
    for known in (covariances, spaces):
        for site in known.sites if known is not None else ():
            other = next((of_layer[name] for name in site.members if name in of_layer), None)
            if other is None:
                of_layer.update(dict.fromkeys(site.members, site))
            elif other.d_in != site.d_in:
                raise InputError(f"{site.name!r} has inputs of width {other.d_in} in the covariances and {site.d_in} in the spaces")
    for course in courses:
        for name, factors in course.initial.items():
            of_layer.setdefault(name, Site((name,), factors.A.shape[1]))
    return list(dict.fromkeys(of_layer.values()))


def _space(spaces: NullSpaces | None, site: Site) -> NullSpace | None:
    return None if spaces is None else next((spaces[name] for name in site.members if name in spaces), None)


def _check_courses(courses: Sequence[Course], covariances: Covariances | None, modules: Mapping[str, nn.Module] | None) -> None:
    widths = {} if covariances is None else {name: site.d_in for site in covariances.sites for name in site.members}
    for course in courses:
        labels = [state.label for state in course.states]
        if len(set(labels)) < len(labels):
            raise InputError(f"adapter {course.name!r}: its states need different labels, not {', '.join(labels)}")
        for name, (a, b) in course.initial.items():
            if covariances is not None and name not in widths:
                raise InputError(
                    f"adapter {course.name!r} is on {name!r}, for which there is no covariance; there are such for "
                    f"{', '.join(list(widths)[:3])}, … ({len(widths)} layers)"
                )
            if widths and a.shape[1] != widths[name]:
                raise InputError(
                    f"adapter {course.name!r} reads inputs of width {a.shape[1]} at {name!r}; the covariance there is of width "
                    f"{widths[name]}"
                )
            if modules is not None and name in modules and weight_shape(modules[name]) != (b.shape[0], a.shape[1]):
                raise InputError(
                    f"adapter {course.name!r} is for a weight {(b.shape[0], a.shape[1])} at {name!r}; the model's is "
                    f"{weight_shape(modules[name])}"
                )


def _check_held_out(held_out: Covariances, sites: Sequence[Site]) -> None:
    widths = {name: site.d_in for site in held_out.sites for name in site.members}
    for site in sites:
        if site.members[0] not in widths:
            raise InputError(f"the held-out second moments have none of {site.members[0]!r}: compute them with the same targets")
        if widths[site.members[0]] != site.d_in:
            raise InputError(
                f"{site.members[0]!r} has inputs of width {site.d_in}; in the held-out second moments, of {widths[site.members[0]]}"
            )


def _check_modules(modules: Mapping[str, nn.Module], layers: Sequence[str], *stored: Covariances | NullSpaces | None) -> None:
    for name in layers:
        if name not in modules:
            raise InputError(f"the model has no linear layer {name!r}; its layers are called {', '.join(list(modules)[:3])}, …")
        for known in stored:
            if known is not None and name in known:
                known.check(name, modules[name])


def _weight(name: str, module: nn.Module) -> torch.Tensor:
    restore_layout(module)
    stored = weight_of(module)
    if is_dequantisable(module, stored):
        return dequantised(module, stored)
    weight = stored if is_quantised_layer(module) else tensor_of(module, "weight")
    if is_quantised_layer(module) or identity.fingerprint(weight) is None:
        raise InputError(f"the weight of {name!r} is quantised or sharded: its values are not at hand")
    return weight.detach().mT if is_conv1d(module) else weight.detach()


def _checked(m: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if m.ndim != 2 or c.ndim != 2 or c.shape[0] != c.shape[1] or m.shape[1] != c.shape[0]:
        raise InputError(f"a matrix {tuple(m.shape)} does not fit inputs whose second moment is {tuple(c.shape)}")
    return m.detach().to(c.device, torch.float64), c.detach().to(torch.float64)


def _row_space(a: torch.Tensor) -> torch.Tensor:
    """(k, d_in): orthonormal rows that span those of A, k ≤ r."""
    _, sigma, vt = torch.linalg.svd(a, full_matrices=False)
    return vt[sigma > torch.finfo(torch.float64).eps * max(a.shape) * sigma[:1]]


def _root(square: torch.Tensor) -> float:
    """The square root of a number that may be negative by rounding."""
    return float(square.clamp(min=0).sqrt())


def _sampled(sigma: torch.Tensor) -> list[float]:
    """σ_i / σ_1 at evenly spaced i, the first and the last among them."""
    at = torch.linspace(0, len(sigma) - 1, min(POINTS, len(sigma)), dtype=torch.float64).round().long()
    return (sigma[at] / sigma[0]).tolist() if float(sigma[0]) > 0 else [0.0] * len(at)
