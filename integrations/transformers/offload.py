"""Models whose weights stay in the checkpoint's files: which modules, and how transformers loads them so."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from nullspace.artifacts.locks import TemporaryFolder
from nullspace.errors import InputError
from nullspace.model.blocks import marked_blocks
from nullspace.model.linear import is_linear
from nullspace.model.weights import own_tensors


def offload_map(model: nn.Module, device: torch.device | str) -> dict[str, str]:
    """A `device_map` with which no more than one block of a model has to be in memory at once.

    On the `"disk"`: the blocks (every outermost `GradientCheckpointingLayer`) and, outside of them, embeddings and linear layers,
    which is everything large. On the device: the rest (norms and other small tensors), and modules tied to it.

    Args:
        model: the architecture; may be on the meta device.
        device: where everything else goes.

    Returns:
        Module (or tensor) name → `"disk"` or the device's name, for `from_pretrained`.

    Raises:
        ValueError: if the model has no blocks.
    """
    blocks = marked_blocks(model)
    if not blocks:
        raise InputError(
            f"{type(model).__name__} has no blocks that transformers knows of (GradientCheckpointingLayer): load it whole"
        )
    on_disk = dict(blocks)
    for name, module in model.named_modules():
        whole = (isinstance(module, nn.Embedding) or is_linear(module)) and not any(True for _ in module.children())
        if name and whole and not _within(name, blocks):
            on_disk[name] = module
    # Tied weights are one tensor: all of their names are on the disk, or none.
    while True:
        kept = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not _within(name, on_disk)}
        moved = [name for name, module in on_disk.items() if name not in blocks and any(id(p) in kept for p in module.parameters())]
        if not moved:
            break
        for name in moved:
            del on_disk[name]
    device_map = dict(_cover("", model, on_disk, str(device)))
    if set(device_map.values()) == {"disk"}:  # accelerate takes the device to compute on from the map
        device_map[next(reversed(device_map))] = str(device)
    return device_map


def _within(name: str, modules: Iterable[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts) + 1))


def _cover(name: str, module: nn.Module, on_disk: Mapping[str, nn.Module], device: str) -> Iterator[tuple[str, str]]:
    """Yields (name, device) for the largest modules that are on one device, and for tensors outside of them: each tensor once."""
    prefix = f"{name}." if name else ""
    if name in on_disk:
        yield name, "disk"
    elif name and not any(other.startswith(prefix) for other in on_disk):
        yield name, device
    else:
        for tensor in own_tensors(module):
            yield prefix + tensor, device
        for child_name, child in module.named_children():
            yield from _cover(prefix + child_name, child, on_disk, device)


def load_offloaded(
    model_class: Any,
    name: str,
    options: Mapping[str, Any],
    folder: str | os.PathLike[str] | None,
) -> Any:
    """`from_pretrained` with a device map.

    Args:
        model_class: with `from_pretrained`.
        name: hub name or folder.
        options: of `from_pretrained`; `device_map` is that of `offload_map`.
        folder: `load_model`'s `offload_folder`; by default a temporary one, deleted with the model, or now if nothing is in it.
    """
    temporary = TemporaryFolder() if folder is None else None
    try:
        with _one_file_at_a_time(), _without_chatter():
            model = model_class.from_pretrained(name, **options, offload_folder=str(temporary.path if temporary else folder))
    except BaseException:
        if temporary is not None:
            temporary.delete()
        raise
    if temporary is not None and not os.listdir(temporary.path):
        temporary.delete()
    elif temporary is not None:
        weakref.finalize(model, temporary.delete)
    return model


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Context manager without accelerate's warnings that parameters are on the disk and that the map names tensors."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _one_file_at_a_time() -> Iterator[None]:
    """Context manager: `from_pretrained` opens a file of the checkpoint when it reads a tensor, not all files at once.

    transformers maps every file before it reads the first tensor. These mappings are private and writable, so the whole checkpoint
    counts as memory of the process under `ulimit -d`, `ulimit -v` and strict overcommit, although nothing was read. The public way
    to hand over tensors that are read later, `state_dict=`, makes transformers write every offloaded weight to the disk again.
    """
    loading: Any = transformers.modeling_utils
    original = getattr(loading, "safe_open", None)
    if original is None:
        yield
        return
    loading.safe_open = functools.partial(_ClosedFile, original)
    try:
        yield
    finally:
        loading.safe_open = original


class _ClosedFile:
    """Names and slices of `safetensors.safe_open`; the file is open only while one of them is read."""

    def __init__(self, opener: Any, *args: Any, **options: Any) -> None:
        self._open = functools.partial(opener, *args, **options)

    def __enter__(self) -> _ClosedFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def metadata(self) -> Any:
        with self._open() as file:
            return file.metadata()

    def keys(self) -> list[str]:
        with self._open() as file:
            return list(file.keys())

    def get_slice(self, name: str) -> _ClosedSlice:
        return _ClosedSlice(self._open, name)


class _ClosedSlice:
    def __init__(self, opener: Any, name: str) -> None:
        self._open, self._name = opener, name

    def __getitem__(self, index: Any) -> Any:
        with self._open() as file:
            return file.get_slice(self._name)[index]

    def get_shape(self) -> Any:
        with self._open() as file:
            return file.get_slice(self._name).get_shape()

    def get_dtype(self) -> Any:
        with self._open() as file:
            return file.get_slice(self._name).get_dtype()
