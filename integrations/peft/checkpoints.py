"""Two checkpoints of one architecture, compared by what their files say: nothing is loaded as a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from nullspace.artifacts import identity, records
from nullspace.integrations.peft.files import init_around


def what_differs(residual: Path, base: str, *, adapted: Collection[str], saved: Collection[str]) -> list[str]:
    """What a residual base has and the untouched base has not, or has otherwise, as far as their safetensors files are at hand.

    Args:
        residual: folder of the residual base.
        base: folder, or hub name, of the untouched one. Nothing is fetched: a hub name is looked up in the local cache.
        adapted: names of the layers with an adapter, whose weights differ.
        saved: names of tensors that the adapter brings along itself.

    Returns:
        One sentence a tensor, or a top-level module; empty where nothing can be compared.
    """
    folder = local_folder(base)
    ours, theirs = _shapes(residual), {} if folder is None else _shapes(folder)
    if folder is None or not ours or not theirs:
        return []
    tied = read_config(folder).get("tie_word_embeddings", False)
    found = []
    for top in dict.fromkeys(name.split(".")[0] for name in ours):
        names = [name for name in ours if name.split(".")[0] == top]
        # Checkpoints of a base class have the same names without the first component.
        if any(name in theirs or name.partition(".")[2] in theirs for name in names) or (tied and top == "lm_head"):
            continue
        if not any(name in saved for name in names):
            found.append(f"it has no {top!r}")
    for name, shape in ours.items():
        if name in theirs and shape != theirs[name]:
            found.append(f"{name!r} has shape {list(theirs[name])} there and {list(shape)} in {residual}")
    same = [
        name
        for name, shape in ours.items()
        if theirs.get(name) == shape and name not in saved and name.removesuffix(".weight") not in adapted
    ]
    mine, other = _fingerprints(residual, same), _fingerprints(folder, same)
    found += [f"{name!r} is another one in {residual}" for name in same if not _alike(mine[name], other[name])]
    return found


def local_folder(name: str) -> Path | None:
    """Where a model's files are on this machine: the folder itself, or a hub name's snapshot in the cache; None if nowhere."""
    if Path(name).is_dir():
        return Path(name)
    try:
        path: Any = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def read_config(folder: Path) -> dict[str, Any]:
    """A model's `config.json`; empty if there is none that can be read."""
    try:
        config = records.read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def is_residual(base: Path) -> bool:
    """Whether a folder holds a residual model, by the record beside it or by a mark in its configuration that still holds."""
    init = init_around(base)
    return (init is not None and base.name == "base") or mark_of(base) is not None


def mark_of(folder: Path) -> dict[str, Any] | None:
    """What a model's configuration says of being a residual base; None if it says nothing, or if it no longer is one.

    The mark shows a few entries of a weight. After the adapter was merged into the model these are others, and the mark is void.
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
            raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(file.get_slice(name).get_shape()) for file in _files(folder) for name in file.keys()}  # noqa: SIM118


def _fingerprints(folder: Path, names: Collection[str]) -> dict[str, torch.Tensor | None]:
    wanted = set(names)
    return {
        name: identity.fingerprint(file.get_tensor(name)) for file in _files(folder) for name in wanted.intersection(file.keys())
    }


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or b is None or identity.same_fingerprint(a, b)
