"""Tensors of which each rank holds a part: DTensors (FSDP2, tensor parallelism) and parameters of DeepSpeed's ZeRO-3.

ZeRO-3's parameters are empty, and hold a part of the flattened values in `ds_tensor`. This module imports neither library: it looks
in `sys.modules` for those that are already imported.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist


def is_sharded(tensor: torch.Tensor | None) -> bool:
    """Whether a parameter or buffer is one rank's part of a larger one."""
    return is_dtensor(tensor) or is_zero(tensor)


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return torch.Size(tensor.ds_shape) if is_zero(tensor) else tensor.shape  # type: ignore[attr-defined]


def device_of(tensor: torch.Tensor) -> torch.device:
    """The device of the tensor when it is gathered: its parts may be in host memory."""
    if is_zero(tensor):
        return torch.device(sys.modules["deepspeed"].accelerator.get_accelerator().current_device_name())
    if is_dtensor(tensor):
        return mesh_device(tensor)
    return tensor.device


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor, or a view of it, was written to in place; None for inference tensors, where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, not to be written to. Collective for a sharded one, over the ranks that share it."""
    if is_zero(tensor):
        with sys.modules["deepspeed"].zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if is_dtensor(tensor):
        gathered: torch.Tensor = tensor.detach().to(mesh_device(tensor)).full_tensor()  # type: ignore[attr-defined]
        return gathered
    return tensor


@torch.no_grad()
def entries(tensor: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Entries of the flattened whole tensor, at indices `at`. Collective for a sharded one: only these entries are sent."""
    at = at.cpu()
    if is_zero(tensor):
        flat: Any = tensor.ds_tensor  # type: ignore[attr-defined]
        group = tensor.ds_process_group  # type: ignore[attr-defined]
        if flat.numel() != flat.ds_numel:  # on NVMe
            return whole(tensor).reshape(-1)[at.to(device_of(tensor))]
        position = at - dist.get_rank(group) * flat.numel()
        held = (position >= 0) & (position < flat.numel())
        return _pooled(flat.reshape(-1), position, held, [group], device_of(tensor))
    if not is_dtensor(tensor):
        flat = tensor.detach().reshape(-1)
        return flat[at.to(flat.device)]
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if not all(p.is_replicate() or type(p).__name__ == "Shard" for p in placements):
        return whole(tensor).reshape(-1)[at.to(mesh_device(tensor))]
    local: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    held, position = torch.ones_like(at, dtype=torch.bool), torch.zeros_like(at)
    rest, stride = at, tensor.numel()
    for dim, size in enumerate(tensor.shape):
        stride //= size
        index, rest = rest // stride, rest % stride
        own = _indices(tensor, dim)
        nearest = torch.searchsorted(own, index)
        held &= (nearest < len(own)) & (own[nearest.clamp(max=max(len(own) - 1, 0))] == index if len(own) else torch.tensor(False))
        position = position * len(own) + nearest
    groups = [mesh.get_group(i) for i, p in enumerate(placements) if p.is_shard()]
    return _pooled(local.reshape(-1), position, held, groups, mesh_device(tensor))


@torch.no_grad()
def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write the whole tensor `value`, which every rank gives, into a tensor's parts. Collective for a ZeRO-3 parameter."""
    if is_zero(tensor):
        with sys.modules["deepspeed"].zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(value)
    elif is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        own = distribute_tensor(value.to(mesh_device(tensor)), mesh, placements, src_data_rank=None)  # nothing is sent
        tensor.to_local().copy_(own.to_local())  # type: ignore[attr-defined]
    else:
        tensor.copy_(value)


def local_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the memory that holds this rank's part: to copy from them and back restores the part.

    For a ZeRO-3 parameter they are its partition and, while it is gathered, its values.
    """
    if is_zero(tensor):
        gathered = [tensor.detach()] if tensor.numel() else []
        return [tensor.ds_tensor.detach(), *gathered]  # type: ignore[attr-defined]
    return [tensor.to_local().detach() if is_dtensor(tensor) else tensor.detach()]  # type: ignore[attr-defined]


def is_dtensor(tensor: Any) -> bool:
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def is_zero(tensor: Any) -> bool:
    return hasattr(tensor, "ds_status") and hasattr(tensor, "ds_tensor")


def mesh_device(tensor: Any) -> torch.device:
    kind = tensor.device_mesh.device_type
    return tensor.device if tensor.device.type == kind else torch.empty(0, device=kind).device


def _indices(tensor: Any, dim: int) -> torch.Tensor:
    """The indices of one dimension that this rank holds."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    along = [Shard(0) if p.is_shard() and p.dim % tensor.ndim == dim else Replicate() for p in tensor.placements]
    every = torch.arange(tensor.shape[dim], device=mesh_device(tensor))
    return distribute_tensor(every, tensor.device_mesh, along, src_data_rank=None).to_local().cpu()


def _pooled(
    local: torch.Tensor, position: torch.Tensor, held: torch.Tensor, groups: list[Any], device: torch.device
) -> torch.Tensor:
    """Combine the entries that each rank holds: as bits, whose sum is exact because all but one summand are zero."""
    own = local[position[held].to(local.device)]
    bits = torch.zeros(len(position), dtype=torch.int64)
    bits[held] = own.to(torch.float64).cpu().view(torch.int64) if own.is_floating_point() else own.cpu().to(torch.int64)
    bits = bits.to(device)
    for group in groups:
        dist.all_reduce(bits, group=group)
    return bits.view(torch.float64).to(local.dtype) if local.is_floating_point() else bits.to(local.dtype)
