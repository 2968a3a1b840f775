"""Hidden states between two blocks, for all batches, in the memory that has room for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from nullspace.artifacts.locks import TemporaryFolder
from nullspace.devices import Fetched, free_on_device, side_stream, upload
from nullspace.model.sharded_tensors import version_of
from nullspace.planning.memory import free_on_host, slab_size

PLACES = ("auto", "device", "host", "disk")
# "auto" fills at most this fraction of the free memory.
SHARE = 0.25
# Tensors in pinned memory begin at multiples of this.
ALIGNMENT = 512

_Key = tuple[int, int]


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
        expected: bytes of all tensors, as far as that is known.
        folder: parent of the temporary folder; by default the system's directory for temporary files.
    """

    def __init__(self, place: str, expected: int = 0, folder: str | None = None) -> None:
        self.place = place
        self._kept: dict[_Key, torch.Tensor] = {}
        self._versions: dict[_Key, int | None] = {}  # of tensors that are not copies
        self._pinned: dict[_Key, _Pinned] = {}
        self._memory = _PinnedMemory(expected)
        self._ahead: dict[tuple[_Key, torch.device], tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._files: dict[_Key, tuple[torch.dtype, torch.Size]] = {}
        self._unwritten: tuple[_Key, Fetched] | None = None
        self._folder = TemporaryFolder(folder) if place == "disk" else None

    def put(self, batch: int, slot: int, tensor: torch.Tensor) -> None:
        """Store a tensor, in the place of the slot's previous one."""
        key = (batch, slot)
        if self._folder is not None:
            self._write()  # the one before, which has arrived by now
            self._files[key] = (tensor.dtype, tensor.shape)
            self._unwritten = key, Fetched(tensor.detach())
            if tensor.device.type != "cuda":  # it may be overwritten
                self._write()
        elif self.place == "host" and tensor.device.type == "cuda":
            self._kept.pop(key, None)
            self._versions.pop(key, None)
            pinned = self._pinned.get(key)
            if pinned is None or not pinned.fits(tensor):
                pinned = self._pinned[key] = _Pinned(self._memory.take(tensor.shape, tensor.dtype))
            pinned.put(tensor)
        else:
            self._pinned.pop(key, None)
            self._kept[key] = tensor
            self._versions[key] = version_of(tensor)

    def get(self, batch: int, slot: int, device: torch.device) -> torch.Tensor:
        """The tensor of a slot, on a device, where the current stream waits for it."""
        key = (batch, slot)
        if self._folder is not None:
            return upload(self._read(key), device)
        if key in self._kept:
            return upload(self._kept[key], device)
        if device.type != "cuda":
            return self._pinned[key].read()
        self.fetch(batch, slot, device)
        tensor, event = self._ahead.pop((key, device))
        torch.cuda.current_stream(device).wait_event(event)
        return tensor

    def fetch(self, batch: int, slot: int, device: torch.device) -> None:
        """Begin to copy a tensor from pinned memory to a GPU, where the next `get` finds it."""
        key = (batch, slot)
        if key in self._pinned and device.type == "cuda" and (key, device) not in self._ahead:
            self._ahead[key, device] = self._pinned[key].fetch(device)

    def find_rewritten(self) -> int | None:
        """The first batch with a stored tensor that was written to since `put`; None if there is none."""
        return next((key[0] for key, version in self._versions.items() if version_of(self._kept[key]) != version), None)

    def close(self) -> None:
        """Drop all tensors, and delete the temporary folder."""
        for (_, device), (_, event) in self._ahead.items():
            torch.cuda.current_stream(device).wait_event(event)  # before their memory is used for something else
        for kept in (self._ahead, self._kept, self._versions, self._pinned, self._files):
            kept.clear()
        self._unwritten, self._memory = None, _PinnedMemory(0)
        if self._folder is not None:
            self._folder.delete()

    def _write(self) -> None:
        if self._unwritten is not None:
            (key, fetched), self._unwritten = self._unwritten, None
            fetched.read().contiguous().view(-1).view(torch.uint8).numpy().tofile(self._path(key))

    def _read(self, key: _Key) -> torch.Tensor:
        self._write()
        dtype, shape = self._files[key]
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(np.fromfile(self._path(key), dtype=np.uint8)).view(dtype).view(shape)

    def _path(self, key: _Key) -> Path:
        assert self._folder is not None
        return self._folder.path / f"{key[0]}-{key[1]}.bin"


class _Pinned:
    """A piece of pinned memory, and the copies to and from it in their order, each on a stream of its own beside computation.

    Args:
        memory: of the tensor that it is for.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._written: torch.cuda.Event | None = None
        self._fetched: dict[torch.device, torch.cuda.Event] = {}  # the last copy to each device

    def fits(self, tensor: torch.Tensor) -> bool:
        return self._memory.shape == tensor.shape and self._memory.dtype == tensor.dtype

    def put(self, tensor: torch.Tensor) -> None:
        """Copy a GPU's tensor here, when its stream has made it and the copies of the last one have ended."""
        stream = side_stream(tensor.device, "hidden states, to the host")
        stream.wait_event(torch.cuda.current_stream(tensor.device).record_event())
        for event in (self._written, *self._fetched.values()):
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            self._memory.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self._written, self._fetched = stream.record_event(), {}

    def fetch(self, device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A copy on a GPU, and what its current stream must wait for. The memory is that stream's own."""
        tensor = torch.empty(self._memory.shape, dtype=self._memory.dtype, device=device)
        stream = side_stream(device, "hidden states, to the device")
        stream.wait_event(torch.cuda.current_stream(device).record_event())  # which may use that memory until now
        if self._written is not None:
            stream.wait_event(self._written)
        with torch.cuda.stream(stream):
            tensor.copy_(self._memory, non_blocking=True)
        self._fetched[device] = event = stream.record_event()
        return tensor, event

    def read(self) -> torch.Tensor:
        """A copy in ordinary memory. The host waits for it."""
        if self._written is not None:
            self._written.synchronize()
        return self._memory.clone()


class _PinnedMemory:
    """Pinned memory that is carved up: PyTorch rounds each piece that it allocates up to a power of two.

    Args:
        expected: bytes that will be taken, as far as that is known.
    """

    def __init__(self, expected: int) -> None:
        self._left, self._slab, self._used = expected, torch.empty(0, dtype=torch.uint8), 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor of pinned memory, which is free when nothing of its slab is in use any more."""
        size = max(shape.numel() * dtype.itemsize, 1)
        begin = -(-self._used // ALIGNMENT) * ALIGNMENT
        if begin + size > len(self._slab):
            self._slab, begin = torch.empty(slab_size(size, self._left), dtype=torch.uint8, pin_memory=True), 0
        self._used, self._left = begin + size, self._left - size
        return self._slab[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)


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

    def take(self, batch: int, block: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
        """`(args, kwargs)` of a block, and the hidden states among them."""
        leaves, spec = self._calls[batch, block]
        numbers = [leaf.number for leaf in leaves if isinstance(leaf, _Slot)]
        tensors = {number: self._shelf.get(batch, number, device) for number in dict.fromkeys(numbers)}
        args, kwargs = pytree.tree_unflatten([tensors[leaf.number] if isinstance(leaf, _Slot) else leaf for leaf in leaves], spec)
        return args, kwargs, tensors[0]

    def fetch(self, batch: int, block: int, device: torch.device) -> None:
        """Begin to bring the arguments of a block to a GPU, for the next `take`."""
        for leaf in self._calls[batch, block][0]:
            if isinstance(leaf, _Slot):
                self._shelf.fetch(batch, leaf.number, device)

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        """Store the hidden states that a block returned: the next block's."""
        self._shelf.put(batch, 0, hidden)

    def hidden(self, batch: int, device: torch.device) -> torch.Tensor:
        """The hidden states that were stored last."""
        return self._shelf.get(batch, 0, device)


class _Slot:
    def __init__(self, number: int) -> None:
        self.number = number
