"""The residual base's checkpoint: a copy of the original one with the targets replaced, or written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from nullspace.artifacts import records
from nullspace.checks import is_plain_name
from nullspace.errors import InputError
from nullspace.integrations.peft.shell import BASE_WEIGHTS, BasePlan, in_checkpoint
from nullspace.model.weights import execution_device, offloaded_weights

# Files of a checkpoint that are copied beside the weights: configurations, tokenizer, the model's own code.
COPIED = (".json", ".jinja", ".model", ".py", ".txt")


class Source(NamedTuple):
    """The checkpoint that an offloaded model reads its weights from."""

    folder: Path
    files: list[str]
    """To be copied."""
    locations: dict[str, tuple[str, str]]
    """Tensor in the model → (file, name in the file), for the targets and for what is in memory."""
    in_memory: dict[str, torch.Tensor]


def source_of(model: nn.Module, targets: Sequence[str]) -> Source | None:
    """The checkpoint of an offloaded model, if a copy of it with other targets is the residual model.

    That is so if accelerate reads every target from a safetensors file of one checkpoint, in the file's dtype, and every parameter
    and buffer in memory is in such a file under its own name. All other weights are in the files alone, in whatever form.

    Args:
        model: any.
        targets: names of the tensors that are to be replaced.
    """
    index = _index(model)
    if not targets or any("safetensors_file" not in index.get(name, ()) for name in targets):
        return None
    locations = {name: (Path(index[name]["safetensors_file"]), index[name]["weight_name"]) for name in targets}
    folder, *others = {path.parent for path, _ in locations.values()}
    if others or not (folder / "config.json").is_file():  # accelerate's offload folder has weights that are in another form here
        return None
    files = _weight_files(folder, {path.name for path, _ in locations.values()})
    if files is None:
        return None
    index_file, weights = files
    entries = {(folder / file, key): entry for file in weights for key, entry in records.read_header(folder / file).items()}
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    saved = model.state_dict().keys()
    in_memory = {name: t for name, t in tensors.items() if t.device.type != "meta" and name in saved}
    path_of = {key: path for path, key in entries}
    locations |= {name: (path_of.get(name, folder), name) for name in in_memory}
    if not all(location in entries and records.fits(entries[location], tensors[name]) for name, location in locations.items()):
        return None
    names = {path.name for path in folder.iterdir() if path.suffix in COPIED} - {records.MANIFEST}
    beside = sorted(name for name in names if not name.endswith(".index.json"))
    return Source(
        folder, [*weights, *index_file, *beside], {name: (path.name, key) for name, (path, key) in locations.items()}, in_memory
    )


def _index(model: nn.Module) -> dict[str, Any]:
    """accelerate's index of the weights that stay in files: tensor → `safetensors_file` and `weight_name`."""
    for module in model.modules():
        loader = getattr(offloaded_weights(module), "dataset", None)  # an OffloadedWeightsLoader
        index = getattr(loader, "index", None)
        if loader is not None and isinstance(index, Mapping):
            return {name: entry for name, entry in index.items() if name not in loader.state_dict}
    return {}


def _weight_files(folder: Path, used: set[str]) -> tuple[list[str], list[str]] | None:
    """The index (one, or none) and the weights of the checkpoint that has these files; None if it has files elsewhere."""
    for path in sorted(folder.glob("*.safetensors.index.json")):
        index = records.read_json(path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        files = {file for file in weight_map.values() if isinstance(file, str)} if isinstance(weight_map, dict) else set()
        if used <= files:
            return ([path.name], sorted(files)) if all(map(is_plain_name, files)) else None
    return [], sorted(used)


def copy_base(folder: Path, source: Source, residual: Callable[[str], torch.Tensor]) -> None:
    """Copy a checkpoint, then replace the targets and what is in memory, one tensor at a time.

    Args:
        folder: where to.
        source: of `source_of`.
        residual: target tensor → its residual.
    """
    folder.mkdir()
    for name in source.files:
        shutil.copyfile(source.folder / name, folder / name)
    for name, (file, key) in source.locations.items():
        value = source.in_memory[name] if name in source.in_memory else residual(name)
        records.replace_tensor(folder / file, key, value)


def check_plan(model: nn.Module, plan: BasePlan, targets: Iterable[str]) -> None:
    """Raise `ValueError`, naming the tensor, if a target tensor is not among what is saved, or has no values."""
    lost = set(targets).difference(plan.names.values())
    if lost:
        raise InputError(f"{min(lost)!r} is not saved with {type(model).__name__}, so it cannot become a residual")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in plan.names.values():
        module, _, tensor = name.rpartition(".")
        if getattr(modules[module], tensor).device.type == "meta" and execution_device(modules[module]) is None:
            raise InputError(f"{name!r} is on the meta device: its values were never loaded")


def files_of(plan: BasePlan, max_shard_bytes: int) -> Any:
    """Which tensors go into which file."""
    return split_torch_state_dict_into_shards(plan.tensors, filename_pattern=BASE_WEIGHTS, max_shard_size=max_shard_bytes)


def write_base(
    folder: Path,
    plan: BasePlan,
    shell: Any,
    targets: Container[str],
    residual: Callable[[str], torch.Tensor],
    fetch: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
) -> None:
    """Read, change and write the weights one at a time, into the files that `save_pretrained` would write.

    A tensor of all experts of a layer is in memory until all its parts are written: two of them, where those of an expert come
    together.

    Args:
        folder: where to.
        plan: of `plan_base`.
        shell: that it was made with.
        targets: the tensors that become residuals.
        residual: tensor → its residual.
        fetch: tensor → its values.
        max_shard_bytes: of one file.
    """
    split = files_of(plan, max_shard_bytes)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for filename, keys in split.filename_to_tensors.items():
        with records.TensorFile(folder / filename, {key: plan.tensors[key] for key in keys}, plan.metadata) as file:
            for key in keys:
                name = plan.names[key]
                if name not in parts:
                    value = residual(name) if name in targets else fetch(name)
                    parts[name] = in_checkpoint(shell, name, value) if name in plan.experts else {key: value}
                    del value
                file.write(key, parts[name].pop(key))
                if not parts[name]:
                    del parts[name]
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": plan.total_parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        path = folder / f"{BASE_WEIGHTS.format(suffix='')}.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
