"""The filter: a change of a weight that still answers the task's inputs, and is small on what must be kept; several in one.

One layer: W₀ its weight, ΔW what training has added, X_t the inputs of the task and X_k those of what must be kept, one token a
column; C_t and C_k their second moments, each divided by its trace, so that the strength μ has no unit.

    ΔW′ = argmin ‖(ΔW′ − ΔW) X_t‖² / ‖X_t‖² + (ρ / d) ‖ΔW′ − ΔW‖² + μ ‖ΔW′ X_k‖² / ‖X_k‖²
        = ΔW T (T + μ C_k)⁻¹,  T = C_t + (ρ / d) I

This is RegMean (arXiv 2212.09849, eq. 2) between the tuned weight on the task and W₀ on the rest: the Wiener filter of the change.
With the ridge ρ, directions that neither data have keep their change. One strength takes a Cholesky factorisation of T + μ C_k. For
many, T and C_k are diagonalised together (`solvers.diagonalise`): with T = Z diag(f) Zᵀ, C_k = Z diag(s) Zᵀ and V = Z⁻ᵀ,

    F(μ) = T (T + μ C_k)⁻¹ = Z diag(w) Vᵀ,  w = f / (f + μ s).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nullspace import solvers
from nullspace.checks import NOT_NEGATIVE, POSITIVE, check_between, check_real
from nullspace.errors import InputError
from nullspace.factors.low_rank import LowRank

RIDGE = 1e-3
# Relative to ‖ΔW‖: a response or a drift below this is rounding.
_ZERO = 1e-15
# One strength is solved for by itself if rounding cannot move its filter by more than this, relatively, …
_ACCURATE = 1e-9
# … or if the noise of C_k is so many times larger than rounding, and cannot move it by more than this.
_ABOVE_ROUNDING, _MOVED_BY_NOISE = 10.0, 0.01
# More strengths than this are served by the decomposition.
_FEW = 2
_TINY = torch.finfo(torch.float64).tiny


class Forecast(NamedTuple):
    """What a filter of one strength does to one layer, computed from the moments, without running the model.

    `drift` is relative to ‖ΔW X_k‖ of the change before filtering, `response` and `lost` to ‖ΔW X_t‖, with T for C_t.
    """

    strength: float
    drift: float
    """‖ΔW′ X_k‖ / ‖ΔW X_k‖, 1 without a filter, falling with the strength."""
    response: float
    """‖ΔW′ X_t‖ / ‖ΔW X_t‖, 1 without a filter, falling with the strength."""
    lost: float
    """‖(ΔW′ − ΔW) X_t‖ / ‖ΔW X_t‖, 0 without a filter, rising with the strength."""
    unseen_drift: float
    """`drift` on text like X_k that was not in it, estimated by generalised cross-validation: / (1 − Σ (1 − w) / n) for n tokens.
    Tokens of one text resemble each other, so it is rather too low. Infinite if n tokens cannot say; `drift` if n is not known."""
    unseen_lost: float
    """The same of `lost`: / (1 − Σ w f′/f / n), f′ the part of f that is not the ridge."""
    rounding: float
    """A bound of the error of `drift` that comes from the rounding of C_k (`Covariance.error_norm`); added, not multiplied."""


class Curve(NamedTuple):
    """One change under filters of all strengths, in 2 d numbers beside the site's: what is left of it on either input.

    ‖ΔW′ X_t‖² / ‖X_t‖² = Σ energy · task · w² and ‖ΔW′ X_k‖² / ‖X_k‖² = Σ energy · keep · w², w of the module's formula.
    """

    energy: torch.Tensor
    """(d,) ‖ΔW z‖² of the common directions z, float64."""
    task: torch.Tensor
    """(d,) f, the same for all changes of a site."""
    keep: torch.Tensor
    """(d,) s."""
    size: float
    """‖ΔW‖²"""

    def drift(self, strength: float) -> float:
        """`Forecast.drift` of a strength."""
        return self._left(self.keep, strength)

    def response(self, strength: float) -> float:
        """`Forecast.response` of a strength."""
        return self._left(self.task, strength)

    def lost(self, strength: float) -> float:
        """`Forecast.lost` of a strength."""
        before = float((self.energy * self.task).sum())
        gone = float((self.energy * self.task * self.taken(strength).square()).sum())
        return (gone / before) ** 0.5 if before > 0 else 0.0

    def taken(self, strength: float) -> torch.Tensor:
        """(d,) 1 − w = μ s / (f + μ s)."""
        return _taken(self.task, self.keep, strength)

    def _left(self, values: torch.Tensor, strength: float) -> float:
        """The norm of the change on one of the inputs, relative to that without a filter; 1 if that is zero."""
        before, kept = float((self.energy * values).sum()), 1 - self.taken(strength)
        if before <= _ZERO**2 * self.size:
            return 1.0
        return (float((self.energy * values * kept.square()).sum()) / before) ** 0.5


class _Solved(NamedTuple):
    """T + μ C_k, factorised after a division by its diagonal on both sides."""

    strength: float
    lower: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, t: torch.Tensor, k: torch.Tensor, strength: float) -> _Solved:
        total = torch.add(t, k, alpha=strength)
        diagonal = total.diagonal().clone()
        scale = torch.where(diagonal > 0, diagonal, torch.nan).rsqrt()
        lower, failed = torch.linalg.cholesky_ex(total.mul_(scale[:, None]).mul_(scale))
        if bool(failed) or not bool(scale.isfinite().all()):
            raise InputError("T + μ C_k is not positive definite: one of the second moments is none, or a larger ridge is needed")
        return cls(strength, lower, scale)

    def divide(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (T + μ C_k)⁻¹"""
        return torch.cholesky_solve((rows * self.scale).mT, self.lower).mT * self.scale

    def used(self, t: torch.Tensor, k: torch.Tensor, ridge: float) -> tuple[float, float]:
        """tr(C_t (T + μ C_k)⁻¹) and tr(μ C_k (T + μ C_k)⁻¹): the degrees of freedom that either data take."""
        inverse = torch.cholesky_inverse(self.lower).mul_(self.scale[:, None]).mul_(self.scale)
        of_ridge = ridge / len(t) * float(inverse.diagonal().sum())
        return float((t * inverse).sum()) - of_ridge, self.strength * float((k * inverse).sum())


class Filter:
    """F(μ) of one site, for every strength and every change of its layers.

    Args:
        c_task: (d, d) second moment of the task's inputs, in any scale.
        c_keep: (d, d) second moment of the inputs to be kept, in any scale.
        ridge: ρ, relative to the mean eigenvalue of C_t; positive.
        noise: ‖E‖ of the unknown error of `c_keep`, in its scale (`Covariance.error_norm`). What is not larger counts as zero.
        tokens: numbers of tokens of the two, for `Forecast.unseen_lost` and `Forecast.unseen_drift`.

    Attributes:
        d_in: d.

    Cost: one strength (`apply`, and `path` of it and 0) takes 2 d³ flops. `curve`, `path` of more strengths, and a strength so
    large that rounding would be seen take 16 d³ once, most of it in an eigensolver: 5 to 8 times as long on a CPU. In memory, four
    matrices of d² float64 numbers, on the device of `c_task`; four more during the decomposition.

    Raises:
        TypeError, ValueError: if the moments are not square, of different sizes, zero, or hold NaN or Inf; for a ridge that is not
            positive. From the methods: if the moments are not positive semi-definite.
    """

    @torch.no_grad()
    def __init__(
        self,
        c_task: torch.Tensor,
        c_keep: torch.Tensor,
        *,
        ridge: float = RIDGE,
        noise: float = 0.0,
        tokens: tuple[float, float] | None = None,
    ) -> None:
        self._ridge, noise = check_real("ridge", ridge), check_real("noise", noise, NOT_NEGATIVE)
        task, keep = (unit_trace(c, what) for c, what in ((c_task, "the task's inputs"), (c_keep, "the inputs to be kept")))
        if task.shape != keep.shape:
            raise InputError(f"two second moments of one site are needed, not {tuple(task.shape)} and {tuple(keep.shape)}")
        self.d_in = len(task)
        task.diagonal().add_(self._ridge / self.d_in)
        self._t, self._k = task, keep.to(task.device)
        self._noise = noise / float(c_keep.diagonal().to(torch.float64).sum())
        self._tokens = tokens
        self._one: _Solved | None = None
        self._used: dict[float, tuple[float, float]] = {}
        self._every: solvers.Pencil | None = None

    @torch.no_grad()
    def apply(self, rows: torch.Tensor, strength: float) -> torch.Tensor:
        """Rows (k, d) of a change times F(μ), float64: those of a LoRA's A, or of ΔW itself. Unchanged for a strength of 0.

        Raises:
            TypeError, ValueError: if the rows are not as wide as the moments, or the strength is not a number ≥ 0.
        """
        rows = self._checked(rows)
        strength = check_real("strength", strength, NOT_NEGATIVE)
        if strength == 0:
            return rows.clone()
        # Of w and 1 − w the smaller one: a weak filter rounds its small correction, a strong one the little that it leaves.
        if self._is_solved_alone(strength):
            solved = self._solved(strength)
            if strength <= 1:
                return rows - solved.divide((rows @ self._k) * strength)
            return solved.divide(rows @ self._t)
        task, keep, vectors, dual = self._diagonal()
        along, taken = rows @ dual, _taken(task, keep, strength)
        if strength <= 1:
            return rows - (along * taken) @ vectors.mT
        return (along * (1 - taken)) @ vectors.mT

    @torch.no_grad()
    def curve(self, update: LowRank | torch.Tensor) -> Curve:
        """A change under all strengths.

        Args:
            update: A (r, d) and B (d_out, r), with the adapter's scaling in one of them; or ΔW itself, (d_out, d).

        Raises:
            TypeError, ValueError: as `apply`; if A and B do not fit.
        """
        return self._curve(self._rows(update))

    @torch.no_grad()
    def path(self, update: LowRank | torch.Tensor, strengths: Sequence[float], *, rounding: bool = True) -> list[Forecast]:
        """What each strength does to a change.

        Args:
            update: of `curve`.
            strengths: numbers ≥ 0.
            rounding: False leaves `Forecast.rounding` at 0, which saves 4 k d² flops a strength for k rows.

        Returns:
            One `Forecast` a strength, in their order. Of a change that is zero, or zero on the inputs, the figures are those of
            strength 0.

        Raises:
            TypeError, ValueError: as `curve`; if a strength is not a number ≥ 0.
        """
        rows = self._rows(update)
        strengths = [check_real("strength", each, NOT_NEGATIVE) for each in strengths]
        if len({*strengths} - {0.0}) < _FEW and all(self._is_solved_alone(each) for each in strengths):
            return [self._forecast_alone(each, rows, rounding=rounding) for each in strengths]
        curve = self._curve(rows)
        return [self._forecast(each, curve, rows if rounding else None) for each in strengths]

    def norms(self, update: LowRank | torch.Tensor) -> tuple[float, float]:
        """‖ΔW X_t‖ / ‖X_t‖ (with the ridge) and ‖ΔW X_k‖ / ‖X_k‖ of a change before filtering."""
        rows = self._rows(update)
        return _norm(rows, self._t), _norm(rows, self._k)

    def _is_solved_alone(self, strength: float) -> bool:
        """Whether to factorise T + μ C_k, or whether only a decomposition tells C_k from its rounding and noise."""
        if self._every is not None:
            return False
        amplified, rounding = strength * self.d_in / self._ridge, 4 * torch.finfo(torch.float64).eps
        if amplified * rounding <= _ACCURATE:
            return True
        # The noise is spread over d directions.
        return self._noise >= _ABOVE_ROUNDING * rounding and amplified * self._noise <= _MOVED_BY_NOISE * self.d_in**0.5

    def _solved(self, strength: float) -> _Solved:
        if self._one is None or self._one.strength != strength:
            self._one = _Solved.of(self._t, self._k, strength)
        return self._one

    def _diagonal(self) -> solvers.Pencil:
        if self._every is None:
            self._every, self._one = solvers.diagonalise(self._t, self._k, noise=self._noise), None
        return self._every

    def _curve(self, rows: torch.Tensor) -> Curve:
        task, keep, _, dual = self._diagonal()
        return Curve((rows @ dual).square().sum(0), task, keep, float(rows.square().sum()))

    def _forecast(self, strength: float, curve: Curve, rows: torch.Tensor | None) -> Forecast:
        before = float((curve.energy * curve.keep).sum()) ** 0.5
        taken = curve.taken(strength)
        # The part of f that is not the ridge: f − ρ/d ‖v‖².
        shown = (curve.task - self._ridge / self.d_in * self._diagonal().vectors.square().sum(0)).clamp(min=0)
        used = float(((1 - taken) * shown / curve.task.clamp(min=_TINY)).sum()), float(taken.sum())
        seen = curve.drift(strength), curve.response(strength), curve.lost(strength)
        return self._said(strength, seen, used, before, None if rows is None else self.apply(rows, strength))

    def _forecast_alone(self, strength: float, rows: torch.Tensor, *, rounding: bool) -> Forecast:
        """`_forecast` without the decomposition."""
        after = self.apply(rows, strength)
        before_t, before_k = _norm(rows, self._t), _norm(rows, self._k)
        drift = _norm(after, self._k) / before_k if before_k > _ZERO * float(rows.norm()) else 1.0
        response, lost = (_norm(after, self._t) / before_t, _norm(after - rows, self._t) / before_t) if before_t > 0 else (1.0, 0.0)
        used = 0.0, 0.0
        if strength > 0 and self._tokens is not None:
            if strength not in self._used:
                self._used[strength] = self._solved(strength).used(self._t, self._k, self._ridge)
            used = self._used[strength]
        return self._said(strength, (drift, response, lost), used, before_k, after if rounding else None)

    def _said(
        self,
        strength: float,
        seen: tuple[float, float, float],
        used: tuple[float, float],
        before: float,
        after: torch.Tensor | None,
    ) -> Forecast:
        """A forecast from drift, response and loss as seen, degrees of freedom, ‖ΔW X_k‖, and the rows of ΔW′ for the bound."""
        drift, response, lost = seen
        unseen_drift, unseen_lost = drift, lost
        if self._tokens is not None:
            unseen_lost, unseen_drift = _unseen(lost, used[0], self._tokens[0]), _unseen(drift, used[1], self._tokens[1])
        rounding = 0.0
        if after is not None and before > _ZERO * float(after.norm()):
            rounding = self._noise**0.5 * float(after.norm()) / before
        return Forecast(strength, drift, response, lost, unseen_drift, unseen_lost, rounding)

    def _rows(self, update: LowRank | torch.Tensor) -> torch.Tensor:
        """Rows whose Gram matrix is that of the change: R A for B = Q R."""
        if isinstance(update, torch.Tensor):
            return self._checked(update)
        a = self._checked(update.A)
        if update.B.ndim != 2 or update.B.shape[1] != len(a):
            raise InputError(f"a B (d_out, {len(a)}) is needed for an A {tuple(a.shape)}, not {tuple(update.B.shape)}")
        return self._checked(torch.linalg.qr(update.B.detach().to(a), mode="r").R @ a)

    def _checked(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.ndim != 2 or rows.shape[1] != self.d_in:
            raise InputError(f"rows of width {self.d_in} are needed, as the second moments are, not {tuple(rows.shape)}")
        rows = rows.detach().to(self._t)
        if not bool(rows.isfinite().all()):
            raise InputError("the change holds NaN or Inf")
        return rows


def filtered(
    update: LowRank, c_task: torch.Tensor, c_keep: torch.Tensor, *, strength: float, ridge: float = RIDGE, noise: float = 0.0
) -> LowRank:
    """The change ΔW′ = ΔW T (T + μ C_k)⁻¹ of the module's formula, for ΔW = B A: A′ = A F(μ), B as it is.

    For several strengths, or several layers of a site, make one `Filter`.

    Args:
        update: A (r, d_in) and B (d_out, r).
        c_task: (d_in, d_in) second moment of the task's inputs, in any scale.
        c_keep: (d_in, d_in) second moment of the inputs to be kept, in any scale.
        strength: μ ≥ 0; 0 leaves the change as it is, to the bit.
        ridge: ρ, relative to the mean eigenvalue of C_t: directions that neither data have keep their change.
        noise: as `Filter`.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, of the rank that it had.

    Raises:
        TypeError, ValueError: as `Filter`; if the shapes do not fit, or the strength is not a number ≥ 0.
    """
    once = Filter(c_task, c_keep, ridge=ridge, noise=noise)
    return LowRank(once.apply(update.A, strength), update.B.detach().to(torch.float64))


@torch.no_grad()
def combined(
    updates: Sequence[LowRank],
    c_tasks: Sequence[torch.Tensor],
    c_keep: torch.Tensor,
    *,
    strength: float,
    rank: int | None = None,
    ridge: float = RIDGE,
) -> LowRank:
    """One change in place of several: each answers the inputs of its own task, and together they are small on what must be kept.

    ΔW = Σ ΔW_i T_i (Σ T_i + μ C_k)⁻¹ minimises Σ ‖(ΔW − ΔW_i) X_i‖² + μ ‖ΔW X_k‖², the ridges as in `filtered` (RegMean,
    arXiv 2212.09849, eq. 2, with the base as the model of what must be kept). Cut to rank r by the SVD of ΔW J^½ with
    J = Σ T_i + μ C_k, which is the best of this rank for the same objective.

    Args:
        updates: one an adapter: A_i (r_i, d_in), B_i (d_out, r_i).
        c_tasks: (d_in, d_in) second moments of the inputs of each one's task, in any scale.
        c_keep: (d_in, d_in) second moment of the inputs to be kept.
        strength: μ ≥ 0.
        rank: r, at least 1; by default and at most Σ r_i (or the smaller side of the weight).
        ridge: ρ of every T_i.

    Returns:
        `LowRank(A (r, d_in), B (d_out, r))`, float64, singular values descending; A positive in the entry of largest magnitude of
        every row. Singular values are divided evenly: ‖A J^½‖ and ‖B‖ of each triple are the same.

    Raises:
        TypeError, ValueError: for no change or not one second moment a change, shapes that do not fit, a rank or a strength out of
            range, moments that are zero or hold NaN or Inf.
    """
    strength, ridge = check_real("strength", strength, NOT_NEGATIVE), check_real("ridge", ridge, POSITIVE)
    if not updates or len(updates) != len(c_tasks):
        raise InputError(f"one second moment a change is needed: {len(updates)} changes, {len(c_tasks)} second moments")
    d_out, d_in = updates[0].B.shape[0], updates[0].A.shape[1]
    joint = strength * unit_trace(c_keep, "the inputs to be kept")
    answers, columns = [], []
    for number, (update, c) in enumerate(zip(updates, c_tasks, strict=True), 1):
        task = unit_trace(c, f"the inputs of task {number}").to(joint.device)
        fits = update.A.shape[1:] == (d_in,) and update.B.shape == (d_out, len(update.A))
        if not fits or task.shape != joint.shape or len(joint) != d_in:
            raise InputError(f"change {number}, A {tuple(update.A.shape)} and B {tuple(update.B.shape)}, does not fit the others")
        task.diagonal().add_(ridge / d_in)
        joint += task
        answers.append(update.A.detach().to(task) @ task)
        columns.append(update.B.detach().to(task))
    rows, b = torch.cat(answers), torch.cat(columns, dim=1)
    most = min(len(rows), d_in, d_out)
    rank = check_between("rank", most if rank is None else rank, most, f" ({len(rows)} ranks together, a weight {d_out} × {d_in})")
    lower = torch.linalg.cholesky(joint)
    # ΔW L = B (Σ A_i T_i) L⁻ᵀ, as J = L Lᵀ.
    right, r = torch.linalg.qr(torch.linalg.solve_triangular(lower, rows.mT, upper=False))
    u, sigma, vt = torch.linalg.svd(b @ r.mT, full_matrices=False)
    root = sigma[:rank].sqrt()
    a = torch.linalg.solve_triangular(lower.mT, right @ (vt[:rank].mT * root), upper=True).mT
    signs = solvers.column_signs(a.mT)
    return LowRank(signs[:, None] * a, u[:, :rank] * (root * signs))


def unit_trace(c: torch.Tensor, what: str) -> torch.Tensor:
    """A second moment divided by its trace, float64, a copy; `ValueError` naming `what` if that is not possible."""
    if c.ndim != 2 or c.shape[0] != c.shape[1]:
        raise InputError(f"the second moment of {what} should be (d_in, d_in), not {tuple(c.shape)}")
    c = c.detach().to(torch.float64)
    if not bool(c.isfinite().all()):
        raise InputError(f"the second moment of {what} holds NaN or Inf")
    trace = c.diagonal().sum()
    if not bool(trace > 0):
        raise InputError(f"the second moment of {what} is zero: leave the layer out, or add data that reach it")
    return c / trace


def _taken(task: torch.Tensor, keep: torch.Tensor, strength: float) -> torch.Tensor:
    """1 − w = μ s / (f + μ s)."""
    pull = strength * keep
    return torch.where(pull > 0, pull / (task + pull), 0.0)  # 0 / 0 where the task's side has been rounded to zero


def _norm(rows: torch.Tensor, c: torch.Tensor) -> float:
    """‖rows X‖ of a second moment C = X Xᵀ."""
    return float(((rows @ c) * rows).sum().clamp(min=0)) ** 0.5


def _unseen(seen: float, used: float, tokens: float) -> float:
    """seen / (1 − used / n): n tokens less what is used up of them."""
    left = 1 - used / tokens if tokens > 0 else 0.0
    if seen == 0:
        return 0.0
    return seen / left if left > 0 else float("inf")
