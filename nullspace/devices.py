"""CUDA devices: streams that are made once, copies for which the host does not wait, and free memory."""

from __future__ import annotations

import functools

import torch


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
        return tensor.to(device)
    # The allocator of pinned memory does not hand out the copy's again before the transfer has ended.
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors as they are on the host; the host waits once for each GPU that has some of them."""
    copies = [download(tensor) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host of a GPU's tensor, which is complete when the device's current stream has come to it."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
