"""The two files of PEFT's CorDA: `covariance_file` and `cache_file`, read with checks and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nullspace.artifacts import records, store
from nullspace.artifacts.locks import locked
from nullspace.errors import DamagedFileError, InputError
from nullspace.model.linear import weight_of, weight_shape
from nullspace.model.sites import Site
from nullspace.moments.covariance import Covariance

# The dtypes of tensors in the two files.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The asymmetry of a covariance that was summed in 16 bits, relative to its largest entry.
ASYMMETRY = 2e-2


@dataclass
class CordaEigens:
    """What PEFT's `corda_init` reads from a layer, and deletes.

    Attributes:
        S_WC: (r,) float32 singular values of W C, descending.
        U_WC: (d_out, r) float32, their left singular vectors.
        V_WC: (d_in, r) float32, C⁻¹ times the right ones, which is Wᵀ U_WC / S_WC.
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


def path_of(name: str | os.PathLike[str] | None) -> Path | None:
    return None if name is None else Path(name)


def is_filled(path: Path) -> bool:
    """Whether there is a file with content; `ValueError` for a directory, a pipe or a device."""
    if path.exists():
        records.check_regular(path)
    return path.exists() and path.stat().st_size > 0


def read_covariances(path: Path, targets: Mapping[str, nn.Module]) -> Iterator[tuple[Site, Covariance]]:
    """The sites and covariances of PEFT's `covariance_file` (module name → (d_in, d_in)), on the devices of the targets' weights.

    Raises:
        ValueError: naming the file and the layer, for what is missing, of another shape, not finite, not symmetric, or has a
            negative or zero diagonal.
    """
    tensors = _load(path)
    by_storage: dict[tuple[int, ...], list[str]] = {}
    for name, layer in targets.items():
        d_in = weight_shape(layer)[1]
        if name not in tensors:
            raise InputError(f"{path} has no covariance of {name!r}; it was made for other target_modules")
        c, what = tensors[name], f"{path}: the covariance of {name!r}"
        if c.shape != (d_in, d_in):
            raise InputError(f"{what} is {tuple(c.shape)}, not ({d_in}, {d_in})")
        _check_values(c, what)
        if not bool((c.diagonal() >= 0).all()) or not bool(c.diagonal().float().mean() > 0):
            raise DamagedFileError(f"{what} is zero or negative")
        if not float((c - c.mT).abs().max()) <= ASYMMETRY * float(c.abs().max()):
            raise DamagedFileError(f"{what} is not symmetric")
        by_storage.setdefault((c.data_ptr(), *c.stride()), []).append(name)
    for names in by_storage.values():
        c = tensors[names[0]].to(weight_of(targets[names[0]]).device)
        yield Site(tuple(names), len(c)), Covariance.from_matrix(c, tokens=len(c))  # the file does not have the number of tokens


def read_eigens(path: Path, targets: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> dict[str, CordaEigens]:
    """The content of PEFT's `cache_file` ("{name}.eigens.S_WC" and so on), on the devices of the targets' weights.

    Raises:
        ValueError: naming the file and the tensor, for what is missing, of another shape, not finite, or negative.
    """
    tensors = _load(path)
    eigens: dict[str, CordaEigens] = {}
    for name, layer in targets.items():
        (d_out, d_in), r = weight_shape(layer), ranks[name]
        parts = []
        for field, shape in (("S_WC", (r,)), ("U_WC", (d_out, r)), ("V_WC", (d_in, r))):
            key = f"{name}.eigens.{field}"
            if key not in tensors:
                raise InputError(f"{path} has no {key!r}; it was made for other target_modules")
            part, what = tensors[key], f"{path}: {key!r}"
            if part.shape != shape:
                raise InputError(f"{what} is {tuple(part.shape)}, not {shape}: it was made for another rank or model")
            _check_values(part, what)
            if field == "S_WC" and bool((part < 0).any()):
                raise DamagedFileError(f"{what} holds singular values, and one is negative")
            parts.append(part.to(weight_of(layer).device, copy=True))
        eigens[name] = CordaEigens(*parts)
    return eigens


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """`torch.save`, whole or not at all. A file that another process has written in the meantime stays."""
    with locked(path, wait=True):
        if not is_filled(path):
            with store.new_file(path, overwritable=lambda _: False) as part:
                torch.save(dict(tensors), part)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many types, from the archive's reader and from the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(f"{path} is damaged, or holds something else than tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise DamagedFileError(f"{path} does not hold a dictionary of tensors")
    return tensors


def _check_values(tensor: torch.Tensor, what: str) -> None:
    if tensor.dtype not in FLOATS:
        raise InputError(f"{what} is {tensor.dtype}, not one of {', '.join(map(str, FLOATS))}")
    if not bool(torch.isfinite(tensor).all()):
        raise DamagedFileError(f"{what} holds NaN or Inf")
