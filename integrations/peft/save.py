"""`save_init`: the result of `inject_adapters` as a folder. And what a `PeftModel` must know to be saved after training."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from nullspace.artifacts import records, store
from nullspace.artifacts.residual import name_start
from nullspace.artifacts.shared_writes import written_once
from nullspace.artifacts.spaces import NullSpaces
from nullspace.errors import InputError
from nullspace.integrations.peft.budget import budget_facts
from nullspace.integrations.peft.files import ADAPTER_CONFIG, init_record, located, record_start, save_adapter
from nullspace.integrations.peft.folders.cards import CARD, name_base, set_section, write_card, write_cards
from nullspace.integrations.peft.layers import SUBTRACTED, WRAPPED, frozen_of, lora_layers, take_out
from nullspace.integrations.peft.made_for import entries_of
from nullspace.integrations.peft.origin import frozen_entries, keep, recorded
from nullspace.integrations.peft.shell import saving_here, without_weights
from nullspace.methods import Sources
from nullspace.model.sharded import is_model_sharded
from nullspace.model.wrappers import unwrap, unwrapped

# The base's name until it is saved: nothing that can be loaded.
UNSAVED = "(residual of {}: call save_init)"


def save_init(
    out: str | os.PathLike[str],
    peft_model: PeftModel,
    spaces: NullSpaces | None = None,
    *,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the result of `inject_adapters`, before training: whole or not at all.

    `OUT/adapter` is a plain PEFT adapter, `OUT/base` the residual model as a plain transformers checkpoint, `OUT/spaces` the null
    spaces, if there are any, `OUT/nullspace.json` the record. Each model folder has a card. Where the base was left alone there is
    no `OUT/base`, and the adapter names the original model; a second adapter that takes the first one's product away is in
    `OUT/subtracted`.

    In a process group, one process may call this, or all of them: then one writes, and the others return when it has.

    Args:
        out: must not exist yet, or be empty.
        peft_model: fresh from `inject_adapters`. Not changed, but that its adapter's configuration names `OUT/base` from now on,
            by its absolute path, and so do the cards that it writes, so that the trained adapter names its base.
        spaces: that it was made of, to be saved beside it.
        tokenizer: saved beside the base, if given.
        record: JSON-able facts to keep in `nullspace.json`: the model's name, the data, …
        overwrite: replace an earlier directory of ours.

    Raises:
        ValueError: if the model does not come from `inject_adapters`; if its base is spread over several ranks.
        FileExistsError: if `out` is in the way, or another run is writing to it.
        OSError: if it cannot be written; then nothing is left behind. All errors of one process are raised by all that call.
    """
    out, peft_model = Path(out), unwrap(peft_model)
    residual = getattr(peft_model, "nullspace_residual", None)
    if is_model_sharded(peft_model):
        raise InputError("the base is spread over several ranks: call write_init on it instead, before it gets its adapters")
    if residual is None:
        raise InputError("the model does not come from inject_adapters: what its base was before is not known")
    base: Any = peft_model.get_base_model()
    adapter = peft_model.active_adapter
    config: Any = peft_model.peft_config[adapter]
    original = located(config.base_model_name_or_path)
    base_path = os.path.abspath(out / "base") if residual == "base" else original
    frozen = frozen_of(lora_layers(peft_model, adapter), adapter)
    name = getattr(base, "name_or_path", None)
    more = {**peft_model.nullspace_budget, **(record or {})}
    facts = init_record(base, name, peft_model.nullspace_method, config, residual, frozen, spaces, more)

    def write() -> None:
        with store.new_directory(out, overwrite=overwrite) as part, unwrapped(peft_model):
            if spaces is not None:
                spaces.write(part / "spaces")
            config.base_model_name_or_path = base_path
            try:
                save_adapter(peft_model, adapter, part / "adapter")
            finally:
                config.base_model_name_or_path = original
            if residual == "adapter":
                save_adapter(peft_model, SUBTRACTED.format(adapter), part / "subtracted")
            if residual == "base":
                # transformers' conversions look for the parameters of experts under their own names.
                named = _unadapted(base) if any(isinstance(module, ParamWrapper) for module in base.modules()) else base
                with saving_here(named):
                    named.save_pretrained(part / "base", state_dict=_base_state(base))
                if tokenizer is not None:
                    tokenizer.save_pretrained(part / "base")
            record_start(part, facts, config.revision, recorded(config).get("base", {}))
            write_cards(part, facts)
            records.write_manifest(part, "init", facts)

    written_once(out, write)
    config.base_model_name_or_path = base_path
    start = recorded(records.read_json(out / "adapter" / ADAPTER_CONFIG))
    keep(config, start)
    name_start(base, start["factors"])
    _keep_card(peft_model, facts, base_path)
    return out


def record_init(peft_model: Any, model: nn.Module, adapter: str, method: str, residual: str, given: Sources) -> None:
    """Record method and original model on the `PeftModel`, for `save_init` and for later saving. The base is still the original.

    A collective, where weights are sharded.
    """
    peft_model.nullspace_residual, peft_model.nullspace_method = residual, method
    peft_model.nullspace_budget = budget_facts(given)
    config = peft_model.peft_config[adapter]
    original = peft_model.nullspace_model = located(config.base_model_name_or_path)
    # A residual base has no name before save_init gives it one, and must not keep that of the original model.
    config.base_model_name_or_path = UNSAVED.format(original or "a model without a name") if residual == "base" else original
    layers = lora_layers(peft_model, adapter)
    frozen, entries = frozen_of(layers, adapter), entries_of({name: layer.get_base_layer() for name, layer in layers.items()})
    record = {"model": original, "revision": config.revision, "residual": residual, "base": entries}
    keep(config, {**frozen_entries(frozen), **record})
    if residual == "adapter":
        peft_model.peft_config[SUBTRACTED.format(adapter)].base_model_name_or_path = original
    facts = init_record(model, original, method, config, residual, frozen, given.spaces, peft_model.nullspace_budget)
    _keep_card(peft_model, facts, config.base_model_name_or_path)


def _keep_card(peft_model: PeftModel, facts: Mapping[str, Any], base: str | None) -> None:
    """From now on, saving the adapter writes a card that names and describes its base."""
    write = functools.partial(_card_in_training, peft_model, facts, base)
    peft_model.create_or_update_model_card = write  # type: ignore[method-assign]


def add_section(peft_model: PeftModel, sections: Mapping[str, str]) -> None:
    """From now on, saving an adapter writes these sections into its card too.

    Args:
        peft_model: any.
        sections: heading → text, as they are when the adapter is saved.
    """
    write = functools.partial(_card_with, peft_model.create_or_update_model_card, sections)
    peft_model.create_or_update_model_card = write  # type: ignore[method-assign]


def _card_with(before: Callable[[str], None], sections: Mapping[str, str], output_dir: str) -> None:
    before(output_dir)
    for heading, text in sections.items():
        set_section(Path(output_dir), heading, text)


def _card_in_training(peft_model: PeftModel, facts: Mapping[str, Any], base: str | None, output_dir: str) -> None:
    """In place of `PeftModel.create_or_update_model_card`, which would name the original model."""
    if (Path(output_dir) / CARD).exists():
        type(peft_model).create_or_update_model_card(peft_model, output_dir)
        if base is not None:
            name_base(Path(output_dir), facts, base)
    else:
        write_card(Path(output_dir), "trained", facts, base)


def _unadapted(base: nn.Module) -> Any:
    """A copy of the base without weights, and without what PEFT has wrapped its modules in."""
    shell = without_weights(base)
    take_out(shell)
    return shell


def _base_state(base: nn.Module) -> dict[str, torch.Tensor]:
    """The base's weights under its own names: what PEFT has added is left out, what it has wrapped is unwrapped."""
    modules = dict(base.named_modules(remove_duplicate=False))
    named = ((_own_name(key, modules), tensor) for key, tensor in base.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None}


def _own_name(key: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of a tensor in the base without adapters; None for a tensor that PEFT has added."""
    path, own = "", []
    for part in key.split("."):
        if not isinstance(modules.get(path), (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own.append(part)
        elif part not in WRAPPED:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(own)
