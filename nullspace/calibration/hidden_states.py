"""Hidden states between two blocks, for all batches, in the memory that has room for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from nullspace.artifacts.locks import TemporaryFolder
from nullspace.devices import free_on_device
from nullspace.model.sharded_tensors import version_of
from nullspace.planning.memory import free_on_host

PLACES = ("auto", "device", "host", "disk")
# "auto" fills at most this fraction of the free memory.
SHARE = 0.25


def choose_place(place: str, size: int, device: torch.device) -> str:
    """`place`, or for `"auto"` the first of device, host and disk with room for `size` bytes."""
    if place != "auto":
        return place
    if device.type == "cuda" and size <= SHARE * free_on_device(device):
        return "device"
    free = free_on_host()
    return "host" if free is None or size <= SHARE * free else "disk"


class Shelf:
    """Storage of tensors by batch and slot.

    Args:
        place: `"device"`: tensors stay on their devices. `"host"`: in host memory, pinned if they come from a GPU. `"disk"`: in
            files of a temporary folder, one a tensor, of the tensor's size.
        folder: parent of the temporary folder; by default the system's directory for temporary files.

    Attributes:
        bytes: size of all tensors.
    """

    def __init__(self, place: str, folder: str | None = None) -> None:
        self.place = place
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._versions: dict[tuple[int, int], int | None] = {}  # of tensors that are not copies
        self._files: dict[tuple[int, int], tuple[torch.dtype, torch.Size, torch.device]] = {}
        self._folder = TemporaryFolder(folder) if place == "disk" else None
        self.bytes = 0

    def put(self, batch: int, slot: int, tensor: torch.Tensor) -> None:
        """Store a tensor, in the place of the slot's previous one."""
        key = (batch, slot)
        if key not in self._kept and key not in self._files:
            self.bytes += tensor.numel() * tensor.element_size()
        if self._folder is not None:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            flat.numpy().tofile(self._path(key))
            self._files[key] = (tensor.dtype, tensor.shape, tensor.device)
        elif self.place == "host" and tensor.device.type == "cuda":
            known = self._kept.get(key)
            fits = known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype
            pinned = known if known is not None and fits else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            pinned.copy_(tensor, non_blocking=True)  # reads come later in the same stream
            self._kept[key] = pinned
        else:
            self._kept[key] = tensor
            self._versions[key] = version_of(tensor)

    def get(self, batch: int, slot: int, device: torch.device) -> torch.Tensor:
        """The tensor of a slot, on a device."""
        key = (batch, slot)
        if self._folder is None:
            return self._kept[key].to(device, non_blocking=True)
        dtype, shape, _ = self._files[key]
        count = shape.numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.from_numpy(np.fromfile(self._path(key), dtype=np.uint8)).view(dtype).view(shape).to(device)

    def find_rewritten(self) -> int | None:
        """The first batch with a stored tensor that was written to since `put`; None if there is none."""
        return next((key[0] for key, version in self._versions.items() if version_of(self._kept[key]) != version), None)

    def close(self) -> None:
        """Drop all tensors, and delete the temporary folder."""
        self._kept.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.delete()

    def _path(self, key: tuple[int, int]) -> Path:
        assert self._folder is not None
        return self._folder.path / f"{key[0]}-{key[1]}.bin"


class Arguments:
    """The arguments of every block, for all batches.

    A tensor that several blocks get (a mask, rotary embeddings) is stored once. Slot 0 holds the hidden states.

    Args:
        shelf: stores the tensors.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._calls: dict[tuple[int, int], tuple[list[Any], Any]] = {}

    def keep(self, batch: int, blocks: list[tuple[list[Any], Any]], hidden: list[int]) -> None:
        """Store the arguments of one batch.

        Args:
            batch: its number.
            blocks: for every block the leaves of its `(args, kwargs)`, and their structure.
            hidden: for every block, the index of the leaf with the hidden states. Only the first block's are stored.
        """
        slots: dict[int, int] = {}
        for index, ((leaves, spec), at) in enumerate(zip(blocks, hidden, strict=True)):
            named: list[Any] = []
            for number, leaf in enumerate(leaves):
                if number == at:
                    named.append(_Slot(0))
                    if index == 0:
                        self._shelf.put(batch, 0, leaf)
                elif isinstance(leaf, torch.Tensor):
                    if id(leaf) not in slots:
                        slots[id(leaf)] = len(slots) + 1
                        self._shelf.put(batch, slots[id(leaf)], leaf)
                    named.append(_Slot(slots[id(leaf)]))
                else:
                    named.append(leaf)
            self._calls[batch, index] = (named, spec)

    def take(self, batch: int, block: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of a block."""
        leaves, spec = self._calls[batch, block]
        values = [self._shelf.get(batch, leaf.number, device) if isinstance(leaf, _Slot) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(values, spec)
        return args, kwargs

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Store the hidden states that a block returned: the next block's."""
        self._shelf.put(batch, 0, hidden)

    def hidden(self, batch: int, device: torch.device) -> torch.Tensor:
        """The hidden states that were stored last."""
        return self._shelf.get(batch, 0, device)


class _Slot:
    def __init__(self, number: int) -> None:
        self.number = number
