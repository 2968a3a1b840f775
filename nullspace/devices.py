"""CUDA devices: streams that are made once, copies for which the host does not wait, and free memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree


def free_on_device(device: torch.device) -> int:
    """Bytes that this process can still allocate: free ones, and those that PyTorch has reserved and does not use."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    room = free + torch.cuda.memory_reserved(device) - allocated
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return int(min(room, fraction * total - allocated))


@functools.cache
def side_stream(device: torch.device, use: str, number: int = 0) -> torch.cuda.Stream:
    """The stream of a device for a use, made at the first call.

    PyTorch's allocator keeps freed memory by stream: a new one for every task would find none of what the last one freed.

    Args:
        device: with its index.
        use, number: name the stream.
    """
    return torch.cuda.Stream(device)


def with_index(device: torch.device) -> torch.device:
    """The device that a new tensor would report: "cuda" is not equal to "cuda:0"."""
    return torch.empty(0, device=device).device


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. From the host to a GPU it goes by a pinned copy, and the host does not wait."""
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device, non_blocking=device.type == "cuda")
    # The allocator of pinned memory does not hand out the copy's again before the transfer has ended.
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetched:
    """A GPU's tensor, copied to the host, which waits for it when it is read and not when the copy begins.

    Other tensors are read as they are.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = _begun(tensor)
        is_there = tensor.device.type == "cuda"
        self._event = torch.cuda.current_stream(tensor.device).record_event() if is_there else None

    def read(self) -> torch.Tensor:
        """The copy, when it is complete."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._copy


def on_host(value: Any) -> Any:
    """A GPU's tensor, or containers with some, on the host: it waits once for each GPU. Other tensors stay where they are."""
    leaves, spec = pytree.tree_flatten(value)
    begun = [_begun(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    for device in {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return pytree.tree_unflatten(begun, spec)


def _begun(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory of a GPU's tensor, which its current stream is still to make; another tensor itself."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
