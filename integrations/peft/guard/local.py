"""The part of a parameter that this process can read and write: whole, rows of a DTensor (FSDP2), or DeepSpeed's float32 copy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from nullspace.errors import InputError
from nullspace.model.sharded_tensors import is_dtensor, is_zero, mesh_device, shape_of, whole, write


def read(parameter: torch.Tensor) -> torch.Tensor:
    """The values in float32 (float64 as they are), not to be written to.

    Of a DTensor the rows of this rank; of a parameter of DeepSpeed's ZeRO all of the float32 copy that the optimizer updates, which
    is a collective.

    Raises:
        ValueError: for a DTensor that is not sharded by rows.
    """
    master = _master(parameter)
    if master is not None:
        return master
    if is_dtensor(parameter):
        check_rows(parameter)
        parameter = parameter.to_local()  # type: ignore[attr-defined]
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write what `read` returns: to the parameter, and to DeepSpeed's float32 copy of it. Collective under ZeRO-3."""
    if is_dtensor(parameter):
        parameter.to_local().copy_(value)  # type: ignore[attr-defined]
        return
    deepspeed: Any = sys.modules.get("deepspeed")
    if is_zero(parameter):
        _put_partition(parameter, value)
    elif deepspeed is not None:
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)  # does nothing unless ZeRO manages it
    write(parameter, value)


def read_whole(parameter: torch.Tensor) -> torch.Tensor:
    """As `read`, but all rows of a DTensor, which is a collective."""
    return read(whole(parameter) if is_dtensor(parameter) else parameter)


def put_whole(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write what `read_whole` returns: to a DTensor the rows of this rank."""
    put(parameter, rows_here(parameter, value))


def on_gradient(parameter: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The handle of a hook: what is added to the parameter's gradient is `change` of it, a linear function of the whole gradient.

    A gradient that DDP or DeepSpeed averages is changed before, one that FSDP2 has summed after that, which is a collective.
    """
    if not is_dtensor(parameter):
        return parameter.register_hook(change)

    def after(summed: Any) -> None:
        put_whole(summed.grad, change(whole(summed.grad)))

    return parameter.register_post_accumulate_grad_hook(after)


def rows_here(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The rows of a whole tensor that `read` returns of a parameter of this shape."""
    if not is_dtensor(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(mesh_device(parameter)), mesh, placements, src_data_rank=None).to_local()


def check_rows(parameter: Any) -> None:
    """Raise `ValueError` for a DTensor that is sharded along its columns."""
    if any(not p.is_replicate() and not (p.is_shard() and p.dim % parameter.ndim == 0) for p in parameter.placements):
        raise InputError(
            f"a parameter {tuple(parameter.shape)} is sharded as {parameter.placements}: only shards of rows can be held"
        )


def _master(parameter: torch.Tensor) -> torch.Tensor | None:
    """DeepSpeed's float32 copy, gathered; None if ZeRO does not manage the parameter."""
    deepspeed: Any = sys.modules.get("deepspeed")
    value = None if deepspeed is None else deepspeed.utils.safe_get_full_fp32_param(parameter)
    return None if value is None else value.reshape(shape_of(parameter))


def _put_partition(parameter: Any, value: torch.Tensor) -> None:
    """ZeRO-3's copy of this rank. `safe_set_full_fp32_param` fails where the last rank's part is padded."""
    utils: Any = sys.modules["deepspeed"].utils
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    own = utils.safe_get_local_fp32_param(parameter).clone()
    part = value.reshape(-1)[rank * size : (rank + 1) * size]
    own.reshape(-1)[: part.numel()] = part
    utils.safe_set_local_fp32_param(parameter, own)
