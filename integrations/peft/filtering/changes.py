"""What an adapter of any origin adds to the untouched base: ΔW of every layer, as thin factors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from nullspace import analysis
from nullspace.errors import InputError, OtherModelError
from nullspace.factors import LowRank
from nullspace.integrations.peft.files import (
    ADAPTER_CONFIG,
    Adapter,
    adapter_in,
    factors_of,
    init_around,
    located,
    places_in,
    read_adapter,
)
from nullspace.integrations.peft.folders.cards import says_two
from nullspace.integrations.peft.folders.checkpoints import has_recorded_weights, is_residual, local_folder
from nullspace.integrations.peft.folders.describe import base_of
from nullspace.integrations.peft.folders.export import check_pair, contents, is_zero, original_base
from nullspace.integrations.peft.guard.adapted import Adapted, adapted_layers, start_of
from nullspace.integrations.peft.layers import PEFT_RESIDUALS, SUBTRACTED
from nullspace.integrations.peft.origin import recorded
from nullspace.integrations.transformers.load import ModelSource
from nullspace.model.sharded import is_model_sharded

_TWO = SUBTRACTED.format("")


class Changes(NamedTuple):
    """An adapter's changes of the untouched base."""

    what: str
    """The adapter, for messages."""
    factors: dict[str, LowRank]
    """Layer → A (k, d_in) and B (d_out, k), float64, ΔW = B A; the scaling is in B."""
    holds: dict[str, list[str]]
    """What the adapter holds beside A and B: kind → names."""
    dora: bool
    """Whether ΔW is the change of a direction whose norm is set by DoRA's magnitudes."""


class Stored(NamedTuple):
    """An adapter in a directory."""

    changes: Changes
    now: Adapter
    start: Adapter | None
    """What it was trained from, where a residual base, or a second adapter, has taken that away from the base."""
    base: str | None
    """The name of the untouched base, if it is known."""


def read_changes(
    directory: str | os.PathLike[str],
    *,
    initial: str | os.PathLike[str] | None = None,
    base: str | None = None,
    adapter_name: str | None = None,
) -> Stored:
    """The changes of an adapter in a directory.

    Args:
        directory: of `PeftModel.save_pretrained`, of a Trainer's checkpoint, `export_lora`, `save_init`, ….
        initial: what the adapter was trained from: an init, or an adapter's directory. By default it is found as far as it can be:
            in the init that the residual base is part of, or as the second adapter in the directory.
        base: name of the untouched base, if the files do not know it.
        adapter_name: of several adapters in the directory.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`; if the start is needed and unknown, or does not belong to the adapter; for
            DoRA's magnitudes on a residual base; naming the layer, for an adapter of a layer that is not linear.
    """
    now = read_adapter(_place(Path(directory), adapter_name))
    start = _start_of(now) if initial is None else _given(now, Path(initial))
    factors = factors_of(now)
    odd = next((name for name in places_in(now) if name not in factors), None)
    if odd is not None:
        raise InputError(f"{now.path}: {odd!r} is no linear layer: its adapter cannot be filtered; leave it out of target_modules")
    original = now.config.get("base_model_name_or_path")
    if start is not None:
        first = factors_of(start)
        if first.keys() != factors.keys():
            alone = min(first.keys() ^ factors.keys())
            raise OtherModelError(f"{now.path} and {start.path} do not belong together: only one of them has {alone!r}")
        untouched = all(is_zero(*each) for each in first.values())
        if not untouched and now.config.get("use_dora"):
            raise InputError(f"{now.path} uses DoRA on a residual base: its change of the untouched base is no product B A")
        factors = {name: pair if is_zero(*first[name]) else analysis.update(first[name], pair) for name, pair in factors.items()}
        if base is None and not start.path.name.endswith(_TWO):  # beside a second adapter the base is untouched
            original = original_base(start, untouched)
        start = None if untouched else start
    named = located(base) or located(original)
    # The name of a base that the caller gives is without its revision.
    folder = local_folder(ModelSource.in_revision(named, now.config.get("revision"))) if named else None
    comparable = base is None or Path(base).is_dir()
    if folder is not None and is_residual(folder):
        raise InputError(f"{named} is a residual base, and the changes are of the untouched model: name that one (base=, --base)")
    if folder is not None and comparable and has_recorded_weights(folder, recorded(now.config).get("base") or {}) is False:
        raise OtherModelError(f"{named} is not the model that {now.path} was made for: it has other weights (base=, --base)")
    changes = Changes(str(now.path), factors, contents(now.tensors), bool(now.config.get("use_dora")))
    return Stored(changes, now, start, named)


def _place(directory: Path, adapter_name: str | None) -> Path:
    """The adapter in a directory: the one in it, or in its subfolder of that name."""
    directory = adapter_in(directory)
    if adapter_name is None or (adapter_name == "default" and (directory / ADAPTER_CONFIG).is_file()):
        inner = sorted(path.parent.name for path in directory.glob(f"*/{ADAPTER_CONFIG}"))
        inner = [name for name in inner if name.removesuffix(_TWO) == name or name.removesuffix(_TWO) not in inner]
        if (directory / ADAPTER_CONFIG).is_file() or not inner:
            return directory
        if len(inner) == 1:
            return directory / inner[0]
        raise InputError(
            f"{directory} holds the adapters {', '.join(map(repr, inner))}: choose one (adapter_name=, --adapter-name)"
        )
    if not (directory / adapter_name / ADAPTER_CONFIG).is_file():
        raise InputError(f"{directory} holds no adapter of the name {adapter_name!r}")
    return directory / adapter_name


def _given(now: Adapter, initial: Path) -> Adapter:
    """The start that the caller names."""
    start = read_adapter(adapter_in(initial.parent if initial.name == "subtracted" else initial))
    check_pair(now, start, stacklevel=5)
    return start


def _start_of(now: Adapter) -> Adapter | None:
    """The start of an adapter, from the files around it; None for an adapter of an untouched base."""
    kind = recorded(now.config, now.path).get("residual")
    if kind in ("none", "zero"):
        return None
    # PEFT saves "default" into the folder itself and any other adapter into a subfolder, its second one beside it.
    for second in (now.path / SUBTRACTED.format("default"), now.path.with_name(SUBTRACTED.format(now.path.name))):
        if (second / ADAPTER_CONFIG).is_file():
            return _negated(read_adapter(second))
    _refuse_peft_residual(now.config, str(now.path))
    base = base_of(now)
    init = init_around(now.path) or {}
    if init.get("residual") == "adapter":
        return _given(now, now.path.parent)
    folder = base.folder if base.residual else None
    if folder is not None and init_around(folder) is not None and (folder.parent / "adapter" / ADAPTER_CONFIG).is_file():
        return _given(now, folder.parent)
    # A base that save_init has called so, on another machine; or one that was never saved.
    named = base.named or ""
    lost = base.residual is None and (named.startswith("(residual of") or (os.path.isabs(named) and Path(named).name == "base"))
    if base.residual or kind == "adapter" or lost or says_two(now.path) or says_two(now.path.parent):
        raise InputError(
            f"{now.path} was trained on a base without what it started with ({base.named}): give the folder that it started from, "
            "with initial= (on the command line --initial)"
        )
    return None


def _negated(second: Adapter) -> Adapter:
    """The start of which a second adapter holds −B₀ and A₀."""
    return second._replace(tensors={key: -t if ".lora_B." in key else t for key, t in second.tensors.items()})


def _refuse_peft_residual(config: Mapping[str, Any], what: str) -> None:
    """Raise `ValueError` for an adapter whose base PEFT itself has made a residual."""
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(PEFT_RESIDUALS):
        raise InputError(
            f"{what} starts by PEFT's init_lora_weights={init!r}, which has changed the base: save it as a plain LoRA "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...)), or name the adapter as it was saved before "
            "training with initial= (--initial)"
        )


class InModel(NamedTuple):
    """An adapter in a `PeftModel`."""

    changes: Changes
    layers: tuple[Adapted, ...]
    """Its layers, and those of the second adapter that subtracts its start, if there is one."""

    @property
    def bases(self) -> dict[str, nn.Module]:
        """Layer → the linear layer of the base."""
        return {each.name: each.layer.get_base_layer() for each in self.layers}


@torch.no_grad()
def changes_in(peft_model: PeftModel, adapter_name: str | None = None) -> InModel:
    """The changes of an adapter in a model, whose base is untouched.

    Args:
        peft_model: on any devices.
        adapter_name: by default the active one.

    Raises:
        ValueError: if there is no such adapter, its base is a residual, it is merged or spread over several ranks; naming the
            layer, for NaN or Inf, and for a layer that is not linear.
    """
    layers = adapted_layers(peft_model, adapter_name, dora=True, experts=True)
    name = layers[0].adapter
    if is_model_sharded(peft_model):
        raise InputError(
            "the model is spread over several ranks: save the adapter (save_pretrained), and filter its directory, which needs no "
            "model"
        )
    start = start_of(peft_model, layers)
    if start.residual:
        raise InputError(
            f"adapter {name!r} is on a residual base: B A holds a part of the model's weights, which a filter would damage, and "
            "the change of the untouched model is of another rank. Save the adapter and filter its directory "
            "(filter_adapter(DIRECTORY, …, initial=INIT)), or call export_lora first; the result is for the untouched base"
        )
    factors = {}
    for each in layers:
        pair = LowRank(each.a.detach().double(), each.scaling * each.b.detach().double())
        if not all(bool(t.isfinite().all()) for t in pair):
            raise InputError(f"adapter {name!r} holds NaN or Inf in A or B of {each.name!r}")
        first = start.of(each)
        factors[each.name] = pair if first is None else analysis.update(first._replace(B=each.scaling * first.B.double()), pair)
    second = SUBTRACTED.format(name)
    parts = layers + tuple(each._replace(adapter=second) for each in layers if second in each.layer.lora_A)
    saved = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    dora = bool(getattr(peft_model.peft_config[name], "use_dora", False))
    return InModel(Changes(f"adapter {name!r}", factors, contents(saved), dora), parts)
