"""Two checkpoints of one architecture, compared by their files, without loading a model."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from nullspace.artifacts import identity, records
from nullspace.errors import DamagedFileError
from nullspace.integrations.peft.experts.layout import parameter_name
from nullspace.integrations.peft.files import init_around
from nullspace.integrations.peft.made_for import is_recorded_base
from nullspace.integrations.peft.shell import parts_in_checkpoint
from nullspace.integrations.transformers.load import ModelSource, empty_model


def what_differs(residual: Path, base: str | os.PathLike[str], *, adapted: Collection[str], saved: Collection[str]) -> list[str]:
    """Differences between a residual base and the untouched one, as far as their safetensors files are on this machine.

    Args:
        residual: folder of the residual base.
        base: folder, or hub name, of the untouched one. Nothing is fetched: a hub name is looked up in the local cache.
        adapted: names of the layers with an adapter, whose weights differ.
        saved: names of tensors that the adapter's file holds.

    Returns:
        One sentence per tensor or top-level module; empty if nothing can be compared.
    """
    folder = local_folder(base)
    ours, theirs = _shapes(residual), {} if folder is None else _shapes(folder)
    if folder is None or not ours or not theirs:
        return []
    tied = read_config(folder).get("tie_word_embeddings", False)
    differences = []
    for top in dict.fromkeys(name.split(".")[0] for name in ours):
        names = [name for name in ours if name.split(".")[0] == top]
        # Checkpoints of a base class have the same names without the first component.
        if any(name in theirs or name.partition(".")[2] in theirs for name in names) or (tied and top == "lm_head"):
            continue
        if not any(name in saved for name in names):
            differences.append(f"it has no {top!r}")
    for name, shape in ours.items():
        if name in theirs and shape != theirs[name]:
            differences.append(f"{name!r} has shape {list(theirs[name])} there and {list(shape)} in {residual}")
    weights = {parameter_name(name) for name in adapted}
    same = [name for name, shape in ours.items() if theirs.get(name) == shape and name not in saved and name not in weights]
    mine, other = _fingerprints(residual, same), _fingerprints(folder, same)
    others = [name for name in same if not _alike(mine[name], other[name])]
    if others:  # adapted layers, if they have other names in the checkpoint
        renamed = _in_checkpoint(residual, adapted)
        others = [name for name in others if name not in renamed]
    return differences + [f"{name!r} is another one in {residual}" for name in others]


def _in_checkpoint(folder: Path, layers: Collection[str]) -> set[str]:
    """What a checkpoint calls the weights of some layers of its model; empty if transformers cannot tell."""
    try:
        return parts_in_checkpoint(empty_model(folder), layers)
    except Exception:  # of any type, from the model's class or from a conversion
        return set()


def local_folder(name: str | os.PathLike[str]) -> Path | None:
    """A model's folder on this machine: the folder itself, or a hub name's snapshot in the cache; None if there is none."""
    if Path(name).is_dir():
        return Path(name)
    source = ModelSource.of(name)
    try:
        path: Any = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def has_recorded_weights(folder: Path, known: Mapping[str, str]) -> bool | None:
    """Whether a checkpoint has the weights of which a record has some entries (`made_for.entries_of`); None if it cannot be said.

    Args:
        folder: of the checkpoint.
        known: layer → text. Checkpoints of a base class have the same names without the first component.
    """
    names = {f"{name}.weight": name for name in known}
    names = {**{name.partition(".")[2]: layer for name, layer in names.items()}, **names}
    found = {names[key]: mark for key, mark in _fingerprints(folder, names).items()}
    return is_recorded_base(known, found)


def read_config(folder: Path) -> dict[str, Any]:
    """A model's `config.json`; empty if there is none or it cannot be read."""
    try:
        config = records.read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def is_residual(base: Path) -> bool:
    """Whether a folder holds a residual model, by the record beside it or by a valid mark in its configuration."""
    init = init_around(base)
    return (init is not None and base.name == "base") or mark_of(base) is not None


def mark_of(folder: Path) -> dict[str, Any] | None:
    """The mark of a residual base in a model's configuration; None if there is none, or if it is no longer valid.

    The mark has a few entries of a weight. Merging the adapter into the model changes them, which makes the mark invalid.
    """
    mark: Any = read_config(folder).get("nullspace")
    mark = mark.get("residual") if isinstance(mark, dict) else None
    if not isinstance(mark, dict):
        return None
    name = f"{mark.get('layer')}.weight"
    for file in _files(folder):
        if name in file.keys():  # noqa: SIM118
            weight = file.get_tensor(name).reshape(-1)
            try:
                shown = torch.tensor(mark["values"], dtype=torch.float32)
                return mark if identity.same_fingerprint(shown, weight[torch.tensor(mark["at"])].float()) else None
            except (KeyError, TypeError, ValueError, IndexError, RuntimeError):
                return None
    return mark


def _files(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise DamagedFileError(f"{path} is not a safetensors file: {error}") from error


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(file.get_slice(name).get_shape()) for file in _files(folder) for name in file.keys()}  # noqa: SIM118


def _fingerprints(folder: Path, names: Collection[str]) -> dict[str, torch.Tensor | None]:
    wanted = set(names)
    return {
        name: identity.fingerprint(file.get_tensor(name)) for file in _files(folder) for name in wanted.intersection(file.keys())
    }


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or b is None or identity.same_fingerprint(a, b)
