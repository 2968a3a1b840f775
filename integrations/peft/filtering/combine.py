"""`combine_adapters`: one adapter in place of several, each of which answers its own task."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.identity import Weight
from nullspace.checks import NOT_NEGATIVE, POSITIVE, check_integer, check_real
from nullspace.errors import AdapterWarning, InputError, OtherModelError
from nullspace.factors import RIDGE, LowRank, combined
from nullspace.integrations.peft.experts.layout import parameter_name
from nullspace.integrations.peft.files import A_WEIGHT
from nullspace.integrations.peft.filtering.adapters import check_early, fitting
from nullspace.integrations.peft.filtering.changes import Stored, read_changes
from nullspace.integrations.peft.filtering.moments import NAMES, Moments, check, loaded, naming, place_of
from nullspace.integrations.peft.folders.export import described, plain_adapter, write_plain
from nullspace.model.experts import expert_of
from nullspace.progress import Progress, reporter


class Combined(NamedTuple):
    """What `combine_adapters` has done."""

    out: Path
    rank: int
    """Of the written adapter: the largest of its layers."""
    ranks: dict[str, int]
    """Layer → rank of its change."""
    partly: tuple[str, ...]
    """Layers that only some of the adapters change: for the tasks of the others their change is zero."""


def combine_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    tasks: Sequence[Moments],
    keep: Moments,
    out: str | os.PathLike[str],
    *,
    strength: float,
    rank: int | None = None,
    ridge: float = RIDGE,
    initials: Sequence[str | os.PathLike[str] | None] | None = None,
    base: str | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
) -> Combined:
    """One adapter in place of several of one base: Σ ΔW_i T_i (Σ T_i + μ C_k)⁻¹ (`nullspace.factors.combined`), without training.

    It answers the inputs of each task as that task's adapter does, as far as they do not contradict each other, and is small on
    what must be kept. What an adapter does not change is zero for its task, whose second moment counts there too.

    Args:
        adapters: directories of at least two adapters, of any origin: see `filter_adapter`.
        tasks: second moments of the inputs of each one's task, in the same order, on the untouched model, for all layers that any
            of the adapters changes; or their directories.
        keep: the same, of what must be kept.
        out: directory of the new adapter, for the untouched base: written whole or not at all.
        strength: μ ≥ 0.
        rank: of the new adapter: every change is cut to it by the SVD that is optimal for the same objective. By default the sum of
            the ranks, which loses nothing.
        ridge: ρ of every task.
        initials: of each adapter what it was trained from; see `filter_adapter`.
        base: name of the untouched base; by default that which the adapters name.
        overwrite: replace an earlier output of ours.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError, ValueError: as `filter_adapter`; for less than two adapters, or not one task each; if they are of different
            bases, or hold more than A and B (DoRA's magnitudes, whole modules, tokens, biases), which cannot be combined.
        FileExistsError, OSError: if `out` is in the way, or cannot be written; then nothing is left behind.

    Warns:
        UserWarning: naming layers that only some adapters change.
    """
    strength, ridge = check_real("strength", strength, NOT_NEGATIVE), check_real("ridge", ridge, POSITIVE)
    rank = None if rank is None else check_integer("rank", rank)
    if len(adapters) < 2 or len(tasks) != len(adapters) or len(initials or adapters) != len(adapters):
        raise InputError(
            f"at least two adapters are needed, and one task each (and one of initials, if given): {len(adapters)} adapters, "
            f"{len(tasks)} tasks"
        )
    check_early(out, overwrite=overwrite)
    firsts = initials or [None] * len(adapters)
    stored = [read_changes(each, initial=first, base=base) for each, first in zip(adapters, firsts, strict=True)]
    named = _base_of(stored, base)
    kept, of_tasks = loaded(keep), [loaded(each) for each in tasks]
    shapes = _shapes(stored)
    for name, weight in shapes.items():
        for moments, role in ((kept, "keep"), *((each, f"task {i}") for i, each in enumerate(of_tasks, 1))):
            check(moments, role, name, weight, "one of the adapters")
            known = kept.weight(name)
            if known is not None:
                check(moments, role, name, known, "one of the adapters")
    partly = tuple(name for name in shapes if not all(name in each.changes.factors for each in stored))
    factors = _combine(stored, shapes, of_tasks, kept, strength, rank, ridge, reporter(progress))
    ranks = {name: len(pair.A) for name, pair in factors.items()}
    first = stored[0].now.tensors[next(key for key in stored[0].now.tensors if key.endswith(A_WEIGHT))].dtype
    dtype = fitting((factor for pair in factors.values() for factor in pair), first)
    config, tensors = plain_adapter(stored[0].now, factors, dtype, named)
    parameters = sorted({each for one in stored for each in one.now.config.get("target_parameters") or ()})
    modules = sorted(name for name in factors if parameter_name(name) not in parameters and not expert_of(name))
    config |= {"target_modules": modules, "target_parameters": parameters or None}
    config |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    facts = {
        "strength": strength,
        "ridge": ridge,
        "scale": 1.0,
        "keep": place_of(keep),
        "tasks": [place_of(each) for each in tasks],
    }
    write_plain(
        out, "combined", config, tensors, {"filter": facts, "adapters": [each.changes.what for each in stored]}, overwrite=overwrite
    )
    if partly:
        named = f"{', '.join(map(repr, partly[:NAMES]))}{', …' if len(partly) > NAMES else ''}"
        warnings.warn(
            f"{len(partly)} of {len(shapes)} layers are changed by some of the adapters alone ({named}): for the tasks of the "
            "others their change is zero, and is held there",
            AdapterWarning,
            stacklevel=2,
        )
    return Combined(Path(out), max(ranks.values()), ranks, partly)


def _base_of(stored: Sequence[Stored], base: str | None) -> str | None:
    """The one base of all adapters, which hold nothing but A and B."""
    for each in stored:
        if each.changes.holds:
            raise InputError(f"{each.changes.what} also holds {described(each.changes.holds)}, which cannot be combined")
    names = list(dict.fromkeys(each.base for each in stored))
    if len(names) > 1 and base is None:
        raise OtherModelError(
            f"the adapters name different bases: {', '.join(map(repr, names))}. If these are one model, name it (base=, --base)"
        )
    return names[0]


def _shapes(stored: Sequence[Stored]) -> dict[str, Weight]:
    """Layer → the shape of its weight, of all adapters."""
    shapes: dict[str, Weight] = {}
    for each in stored:
        for name, (a, b) in each.changes.factors.items():
            shape = (b.shape[0], a.shape[1])
            if shapes.setdefault(name, (shape, None))[0] != shape:
                raise OtherModelError(
                    f"{each.changes.what} changes a weight {shape} at {name!r}, and another one {shapes[name][0]}"
                )
    return shapes


def _combine(
    stored: Sequence[Stored],
    shapes: dict[str, Weight],
    tasks: Sequence[Covariances],
    keep: Covariances,
    strength: float,
    rank: int | None,
    ridge: float,
    report: Progress,
) -> dict[str, LowRank]:
    """Layer → the combined change."""
    factors: dict[str, LowRank] = {}
    for name in (name for name in keep if name in shapes):
        d_out, d_in = shapes[name][0]
        nothing = LowRank(torch.zeros(0, d_in, dtype=torch.float64), torch.zeros(d_out, 0, dtype=torch.float64))
        updates = [each.changes.factors.get(name, nothing) for each in stored]
        most = min(sum(len(update.A) for update in updates), d_out, d_in)
        with naming(name):
            factors[name] = combined(
                updates,
                [each[name].completed(d_in).matrix() for each in tasks],
                keep[name].completed(d_in).matrix(),
                strength=strength,
                rank=most if rank is None else min(rank, most),
                ridge=ridge,
            )
        report("combine", len(factors), len(shapes), 0)
    return factors
