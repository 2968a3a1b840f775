"""A mark in the configuration of a residual base, valid while its weights are unchanged.

A residual base W₀ − s·BA without its adapter is another model, but its files look like any other's. The mark in its `config.json`
(`"nullspace": {"residual": …}`; other libraries keep the entry and ignore it) holds the method, the original model, a digest of the
A and B whose product was subtracted, and a few entries of one weight. After the adapter is merged, these entries differ and the
mark is void.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nullspace.artifacts import identity
from nullspace.errors import AdapterWarning
from nullspace.model.experts import expert_matrices, expert_of
from nullspace.model.sharded_tensors import is_sharded

KEY = "nullspace"
# Where the initial product of an adapter is subtracted.
RESIDUALS = ("auto", "base", "adapter")
# Entries of a weight in a mark.
ENTRIES = 4


class Change(NamedTuple):
    """The entries of a weight that a residual changed most."""

    layer: str
    ratio: float
    """The largest change, in units of the tolerance for rounding to a 16-bit dtype."""
    at: list[int]
    """Flat indices into the weight as the layer stores it."""
    values: list[float]
    """The entries after the change."""


def change_of(layer: str, before: torch.Tensor, after: torch.Tensor) -> Change:
    """The change of a weight in a few of its entries; both (d_out, d_in) or the transpose, as the layer stores them."""
    at = identity.sampled_positions(before.numel())
    was, now = (t.detach().reshape(-1)[at.to(t.device)].to("cpu", torch.float64) for t in (before, after))
    ratios = (now - was).abs() / (identity.FINGERPRINT_TOLERANCE * was.abs() + 1e-6)
    chosen = ratios.topk(min(ENTRIES, len(at))).indices.sort().values
    return Change(layer, float(ratios.max()), at[chosen].tolist(), now[chosen].tolist())


def clearest(changes: Sequence[Change]) -> Change:
    """The change that a mark is to show: the largest one, of a layer with a weight of its own if there is one."""
    own = [change for change in changes if expert_of(change.layer) is None]
    return max(own or changes, key=lambda change: change.ratio)


def entry(method: str, model: str | None, change: Change) -> dict[str, Any]:
    """The entry of the configuration.

    Args:
        method: of `nullspace.methods`.
        model: name of the original one.
        change: of the layer whose entries identify the residual.
    """
    shown = {"layer": change.layer, "at": change.at, "values": change.values}
    return {"residual": {"method": method, "model": model, **shown}}


def mark(model: nn.Module, method: str, original: str | None, change: Change) -> None:
    """Put the entry into a model's configuration, if it is one of transformers; `save_pretrained` keeps it."""
    if hasattr(getattr(model, "config", None), "to_dict"):
        setattr(model.config, KEY, entry(method, original, change))


def mark_file(path: Path, method: str, original: str | None, change: Change) -> None:
    """Put the entry into a `config.json`, in the format of transformers."""
    config = {**json.loads(path.read_text(encoding="utf-8")), KEY: entry(method, original, change)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def name_start(model: nn.Module, factors: str) -> None:
    """Add to the entry, if there is one, the digest of the A and B whose product was subtracted."""
    ours = getattr(getattr(model, "config", None), KEY, None)
    if isinstance(ours, dict) and "residual" in ours:
        ours["residual"]["factors"] = factors


def name_start_in_file(path: Path, factors: str) -> None:
    """The same in a `config.json`, if there is one."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if isinstance(config.get(KEY), dict) and "residual" in config[KEY]:
        config[KEY]["residual"]["factors"] = factors
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def unmark(model: nn.Module) -> None:
    if hasattr(getattr(model, "config", None), KEY):
        delattr(model.config, KEY)


def residual_mark(model: nn.Module) -> dict[str, Any] | None:
    """The mark in a model's configuration; None if there is none or it is void.

    If the values of the weight cannot be read (meta device, quantised, sharded), the mark counts as valid.
    """
    ours = getattr(getattr(model, "config", None), KEY, None)
    mark = ours.get("residual") if isinstance(ours, dict) else None
    if not isinstance(mark, dict) or not isinstance(mark.get("layer"), str):
        return None
    at, values = mark.get("at"), mark.get("values")
    if at is None or values is None or not _are(int, at) or not _are((int, float), values) or len(at) != len(values):
        return None
    module = _layer(model, mark["layer"])
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or is_sharded(weight) or identity.fingerprint(weight) is None:
        return mark
    if at and max(at) >= weight.numel():
        return None
    now = weight.detach().reshape(-1)[torch.tensor(at, device=weight.device)].to("cpu", torch.float32)
    return mark if identity.same_fingerprint(torch.tensor(values, dtype=torch.float32), now) else None


def _layer(model: nn.Module, name: str) -> nn.Module | None:
    """The layer of this name, also in a model with adapters of PEFT's."""
    if expert_of(name) is None:
        return dict(model.named_modules()).get(name)
    return {each.replace(".base_layer", ""): matrix for each, matrix in expert_matrices(model).items()}.get(name)


def warn_of_residual(model: nn.Module) -> None:
    """`UserWarning` if a model is a residual base, whose activations are not those of the original model."""
    mark = residual_mark(model)
    if mark is not None:
        text = f"{type(model).__name__} {described(mark)}: calibrate that, or merge the adapter into the residual first"
        warnings.warn(text, AdapterWarning, stacklevel=4)


def described(mark: dict[str, Any]) -> str:
    """A mark of `residual_mark` as text, to follow the model's name."""
    return (
        f"is the residual base of an adapter (method {mark.get('method')!r}), and not {mark.get('model') or 'the original model'}"
    )


def _are(kind: Any, values: Any) -> bool:
    """Whether this is a list of finite numbers of one kind; integers must be ≥ 0."""
    numbers = isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return numbers and (kind is not int or min(values, default=0) >= 0)
