"""How far a change has moved each layer's output on what must be kept: ‖ΔW X_k‖ / ‖W₀ X_k‖, from second moments and weights."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from nullspace import analysis
from nullspace.artifacts import residual
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.identity import weights_of
from nullspace.errors import AdapterWarning, InputError, InputTypeError
from nullspace.integrations.peft.experts.layout import INNER
from nullspace.integrations.peft.filtering.changes import Changes, Stored, read_changes
from nullspace.integrations.peft.filtering.moments import Moments, check, loaded
from nullspace.integrations.peft.filtering.paths import Change
from nullspace.integrations.peft.folders.export import described
from nullspace.integrations.peft.guard.gauge import Drift, drift_of
from nullspace.integrations.peft.layers import computed_weight
from nullspace.integrations.transformers.load import ModelSource, load_weights, read_config
from nullspace.model.experts import expert_of, named_layers
from nullspace.model.linear import is_linear, weight_shape
from nullspace.model.wrappers import unwrap
from nullspace.progress import Progress, reporter

Base = nn.Module | str | os.PathLike[str]
"""A model, or the name of one: of the hub, or a folder."""


def adapter_drift(
    adapter: PeftModel | str | os.PathLike[str],
    keep: Moments,
    base: Base | None = None,
    *,
    initial: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    progress: bool | Progress = True,
) -> Drift:
    """The drift of every layer that an adapter changes, ‖ΔW X_k‖ / ‖W₀ X_k‖, without running the model.

    Args:
        adapter: a directory, or a model with the adapter, whose drift is that of `drift_of`.
        keep: second moments of the inputs that must be kept, on the untouched model, or their directory.
        base: the untouched model, or its name, for a directory; its weights may be quantised by bitsandbytes, or offloaded. By
            default that which the directory names.
        initial: what the adapter was trained from, if that was not zero: see `filter_adapter`.
        adapter_name: of several.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Raises:
        FileNotFoundError, TypeError, ValueError: as `filter_adapter`, `drift_of`; for DoRA.

    Warns:
        UserWarning: naming it, if the adapter holds more than A and B, whose effect is not in the drift.
    """
    covariances = loaded(keep)
    if isinstance(unwrap(adapter), PeftModel):
        if base is not None:
            raise InputTypeError("base belongs to the directory of an adapter: a model has its own")
        return drift_of(unwrap(adapter), covariances, adapter_name=adapter_name, initial=initial)
    stored = read_changes(adapter, initial=initial, base=name_of(base), adapter_name=adapter_name)
    _check_rest(stored.changes)
    changes, modules = stored.changes, base_modules(named_base(stored) if base is None else base)
    check_base(modules, changes.factors, changes.what)
    for name, weight in weights_of({name: modules[name] for name in changes.factors}).items():
        check(covariances, "keep", name, weight, changes.what)
    drifts = drifts_of(changes.factors, covariances, weights_in(modules), reporter(progress))
    worst = max(drifts, key=drifts.__getitem__)
    return Drift(statistics.median(drifts.values()), drifts[worst], worst, drifts)


def _check_rest(changes: Changes) -> None:
    """Raise `ValueError` for DoRA, and warn of what else a drift of B A does not count."""
    if changes.dora:
        raise InputError(f"{changes.what} uses DoRA: what it adds to a weight is no product B A, so that its drift is not known")
    if changes.holds:
        warnings.warn(
            f"{changes.what} also holds {described(changes.holds)}: what they change is not in the drift",
            AdapterWarning,
            stacklevel=3,
        )


def name_of(base: Base | None) -> str | None:
    """The name of a base that is given by its name."""
    return None if base is None or isinstance(base, nn.Module) else os.fspath(base)


def named_base(stored: Stored) -> ModelSource:
    """The untouched base that an adapter names, in the revision that its configuration names. It must be known."""
    if not stored.base:
        raise InputError("the untouched base is not known by name, and its weights are needed: give it with base= (--base)")
    return ModelSource.in_revision(stored.base, stored.now.config.get("revision"))


def base_modules(base: Base) -> dict[str, nn.Module]:
    """Layer → linear layer of an untouched model; a model of the hub, or in a folder, is loaded onto the CPU, its blocks offloaded.

    Raises:
        FileNotFoundError, ValueError: naming the model, if it cannot be loaded, or is a residual base.
    """
    model: Any = base if isinstance(base, nn.Module) else _load(base)
    model = unwrap(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    mark = residual.residual_mark(model)
    if mark is not None:
        raise InputError(f"{type(model).__name__} {residual.described(mark)}: name the untouched model (base=, --base)")
    modules = {name if expert_of(name) is None else name.replace(INNER, ""): each for name, each in named_layers(model).items()}
    layers = {name: each.get_base_layer() if isinstance(each, LoraLayer) else each for name, each in modules.items()}
    return {name: each for name, each in layers.items() if is_linear(each)}


def _load(name: str | os.PathLike[str]) -> nn.Module:
    whole = Path(name).suffix == ".gguf" or getattr(read_config(name), "quantization_config", None) is not None
    return load_weights(name, device="cpu", offload=not whole)


def check_base(modules: Mapping[str, nn.Module], changes: Mapping[str, Any], what: str) -> None:
    """Raise `ValueError`, naming the layer, if the base lacks one that is changed, or has another shape there."""
    for name, change in changes.items():
        shape = (change.B.shape[0], change.A.shape[1])
        if name not in modules:
            raise InputError(
                f"{what} changes {name!r}, and the base has no such linear layer: name the model that it was trained on"
            )
        if weight_shape(modules[name]) != shape:
            raise InputError(f"{what} changes a weight {shape} at {name!r}; the base has {weight_shape(modules[name])} there")


def weights_in(modules: Mapping[str, nn.Module]) -> Callable[[str], torch.Tensor]:
    """Layer → the weight that it computes with, (d_out, d_in); `ValueError`, naming the layer, if that cannot be read."""
    return lambda name: computed_weight(name, modules[name])


@torch.no_grad()
def drifts_of(
    changes: Mapping[str, Change], keep: Covariances, weight_of: Callable[[str], torch.Tensor], report: Progress
) -> dict[str, float]:
    """Layer → ‖ΔW X_k‖ / ‖W₀ X_k‖, site by site.

    Args:
        changes: layer → ΔW.
        keep: their second moments, checked.
        weight_of: layer → W₀, (d_out, d_in).
        report: progress.

    Raises:
        ValueError: naming the layer, if its weight cannot be read, or its output was zero.
    """
    drifts: dict[str, float] = {}
    for site in keep.sites:
        members = [name for name in site.members if name in changes]
        c = keep[members[0]].completed(site.d_in).matrix() if members else None
        for name in members:
            assert c is not None
            try:
                drifts[name] = analysis.drift(weight_of(name), c, changes[name])
            except ValueError as error:
                raise InputError(f"layer {name!r}: {error}") from error
            report("drift", len(drifts), len(changes), 0)
    return drifts
