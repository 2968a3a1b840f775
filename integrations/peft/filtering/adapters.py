"""`filter_adapter`: a trained adapter that keeps what it answers to the task, and loses what it does to the rest."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from nullspace.artifacts import store
from nullspace.artifacts.identity import Weight, weights_of
from nullspace.checks import NOT_NEGATIVE, check_real
from nullspace.errors import AdapterWarning, InputError, InputTypeError
from nullspace.factors import RIDGE, Filter, LowRank
from nullspace.integrations.peft.experts.layout import layout_of
from nullspace.integrations.peft.files import A_WEIGHT, PREFIX, init_around
from nullspace.integrations.peft.filtering.changes import Changes, InModel, Stored, changes_in, read_changes
from nullspace.integrations.peft.filtering.drift import Base, base_modules, check_base, drifts_of, name_of, named_base, weights_in
from nullspace.integrations.peft.filtering.moments import Moments, Pair, loaded, place_of
from nullspace.integrations.peft.filtering.paths import STRENGTHS, Budget, FilterPath, Step, choose, forecast
from nullspace.integrations.peft.folders.checkpoints import local_folder
from nullspace.integrations.peft.folders.export import described, other_tensors, plain_adapter, write_plain
from nullspace.integrations.peft.layers import is_readable
from nullspace.model.wrappers import unwrap, unwrapped
from nullspace.progress import Progress, reporter

# A dtype holds a factor if rounding to it changes the factor by no more than this, relatively: bfloat16 has 2⁻⁸.
_TOLERANCE = 2.0**-7


class Filtered(NamedTuple):
    """What `filter_adapter`, `filter_checkpoint` have done."""

    strength: float
    """μ, given or chosen by a budget."""
    path: FilterPath
    """The forecast without a filter and of this strength, layer by layer."""
    out: Path | None
    """What was written; None for a model."""
    rest: tuple[str, ...] = ()
    """What training has changed and the filter does not reach: names of layers or tensors that stay as they are."""

    @property
    def before(self) -> Step:
        """The forecast without a filter, and without a scale."""
        return self.path._replace(scale=1.0).at(0.0)

    @property
    def after(self) -> Step:
        """The forecast of the chosen strength."""
        return self.path.at(self.strength)


def filter_adapter(
    adapter: PeftModel | str | os.PathLike[str],
    task: Moments,
    keep: Moments,
    out: str | os.PathLike[str] | None = None,
    *,
    strength: float | None = None,
    drift: float | None = None,
    retain: float | None = None,
    scale: float = 1.0,
    ridge: float = RIDGE,
    initial: str | os.PathLike[str] | None = None,
    base: Base | None = None,
    adapter_name: str | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
) -> Filtered:
    """Filter a trained adapter: ΔW of every layer becomes ΔW T (T + μ C_k)⁻¹ (`nullspace.factors.Filter`), without training.

    A' = A F; rank, B and scaling stay. The change answers the task's inputs as before, and is small on those that must be kept.
    Exactly one of `strength`, `drift` and `retain` says how strong the filter is. Layers with the same input share a factorisation
    of d_in³ / 3 flops; a budget needs a decomposition of 16 d_in³ before.

    Args:
        adapter: the directory of a LoRA adapter of any origin (PEFT's, with patterns or rsLoRA; ours on a residual base, or with a
            second adapter; a Trainer's checkpoint), or a model with one, whose A is changed in place, on any error not at all.
        task, keep: second moments of the inputs of the task and of what must be kept, both computed on the untouched model, for all
            layers of the adapter; or their directories.
        out: directory for the result of a directory, written whole or not at all: an adapter for the *untouched* base, in the
            dtype of the original unless the values do not fit. Where the start was not zero, of twice the rank, or of the same if
            A was frozen.
        strength: μ ≥ 0.
        drift: the largest allowed median of ‖ΔW' X_k‖ / ‖W₀ X_k‖; the weakest filter that meets it is taken. Needs the weights of
            the base.
        retain: the smallest allowed median of ‖ΔW' X_t‖ / ‖ΔW X_t‖, at most 1; the strongest filter that meets it is taken.
        scale: the change is multiplied by this after the filter; it is in `drift` and `retain`.
        ridge: ρ of the filter.
        initial: what the adapter was trained from (`save_init`'s folder, or the adapter as it was saved before training), if that
            was not zero. By default it is found where the base is the residual of an init, or beside a second adapter.
        base: the untouched model, or its name; by default that which the adapter names. `drift` needs its weights. They are also
            read if it is given and on this machine, or if the adapter is in a model: absolute drifts are then part of the result,
            and second moments of another model are refused by its weights. The name is written into the new configuration.
        adapter_name: of several adapters; by default the one in the folder itself, or the model's active one.
        overwrite: replace an earlier output of ours.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Returns:
        The strength, and the forecast path.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError, ValueError: naming the layer, if it has no second moments or those of another model, is not linear, or its A or B
            holds NaN or Inf; saying what is reachable, if no filter meets the budget; if the start is needed and not known; for a
            model on a residual base, or spread over several ranks (filter the directory instead).
        FileExistsError, OSError: if `out` is in the way, or cannot be written; then nothing is left behind.

    Warns:
        UserWarning: naming sites whose data are too few for the filter; naming what the adapter holds beside A and B (DoRA's
            magnitudes, whole modules, tokens, biases), which the filter does not reach.
    """
    budget = Budget.checked(strength, drift, retain, scale)
    report, pair = reporter(progress), Pair(loaded(task), loaded(keep), ridge)
    model = unwrap(adapter)
    if isinstance(model, PeftModel):
        if out is not None or initial is not None:
            name = "out" if out is not None else "initial"
            raise InputTypeError(f"{name} belongs to the directory of an adapter: that in a model is changed in place")
        with unwrapped(model):
            return _filter_model(changes_in(model, adapter_name), pair, budget, base, report)
    if out is None:
        raise InputTypeError("out is needed: the directory for the filtered adapter")
    check_early(out, overwrite=overwrite)
    stored = read_changes(adapter, initial=initial, base=name_of(base), adapter_name=adapter_name)
    changes = stored.changes
    drifts = _prepare(stored, pair, budget.drift is not None, base, report)
    made: dict[str, torch.Tensor] = {}

    def done(name: str, one: Filter, chosen: float) -> None:
        made[name] = budget.scale * one.apply(changes.factors[name].A, chosen)

    chosen, path = _run(changes, pair, budget, drifts, done, report)
    result = Filtered(chosen, path, Path(out), _rest(changes))
    facts = {"task": place_of(task), "keep": place_of(keep), "ridge": pair.ridge, **facts_of(result)}
    _write(stored, made, facts, Path(out), overwrite)
    return result


def filter_path(
    adapter: PeftModel | str | os.PathLike[str],
    task: Moments,
    keep: Moments,
    *,
    strengths: Sequence[float] = STRENGTHS,
    scale: float = 1.0,
    ridge: float = RIDGE,
    initial: str | os.PathLike[str] | None = None,
    base: Base | None = None,
    adapter_name: str | None = None,
    progress: bool | Progress = True,
) -> FilterPath:
    """What filters of several strengths would do to an adapter; nothing is changed. To choose by.

    Args:
        adapter, task, keep, scale, ridge, initial, base, adapter_name, progress: of `filter_adapter`.
        strengths: numbers ≥ 0.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `filter_adapter`.
    """
    report, pair = reporter(progress), Pair(loaded(task), loaded(keep), ridge)
    check_real("scale", scale)
    strengths = [check_real("strengths", each, NOT_NEGATIVE) for each in strengths]
    model = unwrap(adapter)
    if isinstance(model, PeftModel):
        in_model = changes_in(model, adapter_name)
        changes, drifts = in_model.changes, _prepare_model(in_model, pair, False, base, report)
    else:
        stored = read_changes(adapter, initial=initial, base=name_of(base), adapter_name=adapter_name)
        changes, drifts = stored.changes, _prepare(stored, pair, False, base, report)
    return forecast(changes.factors, pair, drifts, strengths, scale, report)[0]


def check_early(out: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check before the work that `out` can be written. Not in a group of processes, one of which may have written it already."""
    if not (dist.is_available() and dist.is_initialized()):
        store.check_free(out, overwrite=overwrite)


def _prepare(stored: Stored, pair: Pair, needs_weights: bool, base: Base | None, report: Progress) -> Mapping[str, float]:
    """Check the second moments of an adapter's layers. Returns the drifts before filtering, if the weights are given or needed."""
    changes = stored.changes
    pair.check(_shapes(changes), changes.what)
    _warn_of_rest(changes)
    at_hand = isinstance(base, nn.Module) or (base is not None and (Path(base).exists() or local_folder(base) is not None))
    if not at_hand and not needs_weights:
        return {}
    modules = base_modules(named_base(stored) if base is None else base)
    return _drifts(changes, pair, modules, needs_weights, report)


def _prepare_model(adapter: InModel, pair: Pair, needs_weights: bool, base: Base | None, report: Progress) -> Mapping[str, float]:
    """The same for an adapter in a model."""
    pair.check(_shapes(adapter.changes), adapter.changes.what)
    _warn_of_rest(adapter.changes)
    return _drifts(adapter.changes, pair, adapter.bases if base is None else base_modules(base), needs_weights, report)


def _shapes(changes: Changes) -> dict[str, Weight]:
    return {name: ((b.shape[0], a.shape[1]), None) for name, (a, b) in changes.factors.items()}


def _drifts(changes: Changes, pair: Pair, modules: Mapping[str, nn.Module], needed: bool, report: Progress) -> Mapping[str, float]:
    """The drifts before filtering, after a comparison of the base's weights with those at calibration.

    Empty if they are not needed and the weights are quantised in a form that cannot be read.
    """
    check_base(modules, changes.factors, changes.what)
    pair.check(weights_of({name: modules[name] for name in changes.factors}), changes.what)
    if not needed and not all(is_readable(modules[name], offloaded=True) for name in changes.factors):
        return {}
    return drifts_of(changes.factors, pair.keep, weights_in(modules), report)


def _rest(changes: Changes) -> tuple[str, ...]:
    return tuple(name for names in changes.holds.values() for name in names)


def _warn_of_rest(changes: Changes) -> None:
    """`UserWarning`, naming it, if an adapter holds what a filter does not reach."""
    if changes.holds:
        dora = (
            " DoRA's magnitudes scale W₀ + B A as before: filter and forecast are of the direction B A alone."
            if changes.dora
            else ""
        )
        warnings.warn(
            f"{changes.what} also holds {described(changes.holds)}: they are kept as they are, and the filter does not reach "
            f"what they change.{dora}",
            AdapterWarning,
            stacklevel=4,
        )


def _run(
    changes: Changes,
    pair: Pair,
    budget: Budget,
    drifts: Mapping[str, float],
    done: Callable[[str, Filter, float], None],
    report: Progress,
) -> tuple[float, FilterPath]:
    """Choose the strength, and call `done` with every layer, its filter and the strength."""
    chosen = float(budget.strength) if budget.strength is not None else choose(budget, changes.factors, pair, drifts, report)
    path, few = forecast(
        changes.factors, pair, drifts, (0.0, chosen), budget.scale, report, done=lambda name, one: done(name, one, chosen)
    )
    few.warn(stacklevel=3)
    return chosen, path


@torch.no_grad()
def _filter_model(adapter: InModel, pair: Pair, budget: Budget, base: Base | None, report: Progress) -> Filtered:
    """Filter an adapter in a model: A of all layers, or of none on any error."""
    drifts = _prepare_model(adapter, pair, budget.drift is not None, base, report)
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def done(name: str, one: Filter, chosen: float) -> None:
        for each in (each for each in adapter.layers if each.name == name):
            rows = budget.scale * one.apply(each.a, chosen)
            if not _fits(rows, each.a.dtype):
                raise InputError(f"the filtered A of {name!r} does not fit {each.a.dtype}: load the adapter in float32")
            made.append((each.a, rows.to(each.a)))

    chosen, path = _run(adapter.changes, pair, budget, drifts, done, report)
    before = [weight.clone() for weight, _ in made]
    try:
        for weight, rows in made:
            weight.copy_(rows)
    except BaseException:
        for (weight, _), was in zip(made, before, strict=True):
            weight.copy_(was)
        raise
    return Filtered(chosen, path, None, _rest(adapter.changes))


def _fits(factor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds a float64 factor, up to its rounding."""
    rounded = factor.to(dtype).double()
    return bool(rounded.isfinite().all()) and bool((rounded - factor).norm() <= _TOLERANCE * factor.norm())


def fitting(factors: Iterable[torch.Tensor], dtype: torch.dtype) -> torch.dtype:
    """A dtype that holds all factors: this one, or a wider one."""
    return dtype if all(_fits(each, dtype) for each in factors) else torch.promote_types(dtype, torch.float32)


def facts_of(result: Filtered) -> dict[str, Any]:
    """What a record and a card say of a filter."""
    before, after = result.before, result.after
    drift = None if before.drift is None else [before.drift, after.drift]
    facts = {
        "strength": result.strength,
        "scale": result.path.scale,
        "drift": drift,
        "left": after.left,
        "response": after.response,
    }
    return {**facts, "worst_layer": after.worst_layer, "worst_drift": after.worst_drift}


def _write(stored: Stored, made: Mapping[str, torch.Tensor], facts: Mapping[str, Any], out: Path, overwrite: bool) -> None:
    """Write the filtered adapter: that in the directory with another A, or a plain one where it had a start."""
    now = stored.now
    first = now.tensors[next(key for key in now.tensors if key.endswith(A_WEIGHT))].dtype
    if stored.start is None:
        same = {"base_model_name_or_path": stored.base, "init_lora_weights": True, "inference_mode": True}
        config, tensors = {**now.config, **same}, dict(now.tensors)
        for path, names in layout_of(made).items():
            key, rows = f"{PREFIX}{path}{A_WEIGHT}", torch.cat([made[name] for name in names])
            tensors[key] = rows.to(fitting([rows], tensors[key].dtype))
            if not bool(tensors[key].isfinite().all()):
                raise InputError(f"{now.path}: the filtered A of {names[0]!r} is beyond the range of {tensors[key].dtype}")
    else:
        factors = {name: LowRank(rows, stored.changes.factors[name].B) for name, rows in made.items()}
        dtype = fitting((factor for pair in factors.values() for factor in pair), first)
        config, tensors = plain_adapter(now, factors, dtype, stored.base)
        tensors |= other_tensors(now, stored.start, dtype)
    init = init_around((stored.start or now).path) or {}
    known = {name: init[name] for name in ("architecture", "method", "data") if init.get(name) is not None}
    if now.config.get("task_type") == "CAUSAL_LM":
        known.setdefault("architecture", "AutoModelForCausalLM")
    write_plain(out, "filtered", config, tensors, {**known, "filter": facts}, overwrite=overwrite)
