"""The initial factors of an adapter, and the residual of its base layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from nullspace.artifacts.spaces import NullSpaces
from nullspace.errors import InputError
from nullspace.integrations.peft.layers import ONE_AT_A_TIME
from nullspace.methods import METHODS, Layer, Sources
from nullspace.solvers.checks import is_finite


def random_seed(method: str) -> int:
    """From PyTorch's generator, for a method that draws numbers: the same after the same `torch.manual_seed`."""
    draws = method in METHODS and METHODS[method].draws  # an unknown one is refused later
    return int(torch.randint(2**62, ())) if draws else 0


def with_spaces(method: str, given: Sources, rank: int) -> Sources:
    """The same with null spaces, computed from the covariances if the method needs them and they are not given: of this rank."""
    if "spaces" not in METHODS[method].needs or given.spaces is not None:
        return given
    assert given.covariances is not None
    spaces = NullSpaces.from_covariances(given.covariances, rank=rank, progress=False)
    return replace(given, spaces=spaces, covariances=None)


@torch.no_grad()
def start_of(
    name: str, layer: Any, stored: torch.Tensor, adapter: str, method: str, given: Sources
) -> tuple[torch.Tensor, torch.Tensor]:
    """The initial A and B of an adapter.

    Args:
        name: of the layer, in the base model.
        layer: PEFT's; rank, scaling, layout and dtypes are read, not its values.
        stored: the weight as the base layer stores it, (d_out, d_in) or the transpose of it (`layer.fan_in_fan_out`).
        adapter: PEFT's name for it.
        method: of `inject_adapters`.
        given: the method's sources.

    Returns:
        A (r, d_in) and B (d_out, r) in the adapter's dtypes.

    Raises:
        ValueError, RuntimeError, MemoryError: naming the layer.
    """
    scaling = layer.scaling[adapter]
    dtype_a, dtype_b = (each[adapter].weight.dtype for each in (layer.lora_A, layer.lora_B))
    with naming(name):
        entry = METHODS[method]
        weight = _exact(layer, stored) if entry.reads_weight else None
        if weight is not None and not is_finite(stored):
            raise InputError("the weight holds NaN or Inf: load an undamaged model, or leave the layer out of target_modules")
        device = torch.device("cpu") if stored.device.type == "meta" else stored.device
        target = Layer(name, weight, layer.out_features, layer.in_features, layer.r[adapter], device)
        a, b = entry.start(target, given)
        # s·BA is the product that counts, so where it is not zero each factor takes 1/√s.
        root = math.sqrt(scaling) if entry.changes_base else 1.0
        a, b = (a / (root / given.split)).to(dtype_a), (b / (root * given.split)).to(dtype_b)
        if not (is_finite(a) and is_finite(b)):
            raise InputError(f"A or B holds NaN or Inf in {dtype_a}: check lora_alpha, sigma_scale and split")
        return a, b


@torch.no_grad()
def residual_of(name: str, layer: Any, stored: torch.Tensor, adapter: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """W₀ − s·BA of the factors as they are stored, rounded once.

    Args:
        name: of the layer, in the base model.
        layer: PEFT's; scaling and layout are read.
        stored: as in `start_of`.
        adapter: PEFT's name for it.
        a: (r, d_in), as `start_of` returned it.
        b: (d_out, r), likewise.

    Returns:
        A new tensor in the layout and dtype of `stored`.

    Raises:
        ValueError, RuntimeError, MemoryError: naming the layer.
    """
    with naming(name):
        weight = _exact(layer, stored)
        rest = weight.addmm_(b.to(weight), a.to(weight), alpha=-layer.scaling[adapter]).to(stored.dtype)
        if not is_finite(rest):
            raise InputError(f"W₀ − s·BA is beyond the range of {stored.dtype}: load the model in another dtype")
        return rest.T if _is_transposed(layer) else rest


def _exact(layer: Any, stored: torch.Tensor) -> torch.Tensor:
    """(d_out, d_in) float64, a copy."""
    return (stored.T if _is_transposed(layer) else stored).to(torch.float64, copy=True)


def _is_transposed(layer: Any) -> bool:
    """Whether a LoRA layer's base stores its weight as (d_in, d_out). PEFT's layers of GPTQ and AWQ do not say."""
    return bool(getattr(layer, "fan_in_fan_out", False))


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Context manager: errors name the layer."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"layer {name!r}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        more = "" if isinstance(error, torch.linalg.LinAlgError) else f" (write_init needs less memory: {ONE_AT_A_TIME})"
        raise type(error)(f"layer {name!r}: {error}{more}") from error
