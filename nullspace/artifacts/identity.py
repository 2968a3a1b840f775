"""By what models, weights, data and runs are recognised: all fingerprints."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
from torch import nn

from nullspace import __version__
from nullspace.distributed.job import Job
from nullspace.distributed.loaders import add_to_digest
from nullspace.model.linear import weight_of, weight_shape
from nullspace.model.sharded import class_of
from nullspace.model.sharded_tensors import entries, is_sharded, shape_of
from nullspace.model.weights import execution_device, own_tensors, restore_layout, tensor_of

# A fingerprint is this many entries of a weight, evenly spaced.
FINGERPRINT_ENTRIES = 64

# Two roundings of one number to bf16 (8 bits) differ by less than this, relatively.
FINGERPRINT_TOLERANCE = 2.0**-7


def fingerprint(weight: torch.Tensor) -> torch.Tensor | None:
    """A few entries of a weight, by which it is known again in any floating dtype: (≤ 64,) float32.

    None if the weight is not a plain floating-point tensor with its values at hand (quantised or offloaded). Tensors of another
    type are none: bitsandbytes packs 4-bit weights into whatever dtype it is asked to (`bnb_4bit_quant_storage`). Nor are those of
    8 bits, whose scales are elsewhere. Of a weight that is spread over ranks it is that of the whole, and a collective.
    """
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) or is_sharded(weight)
    plain = plain and weight.is_floating_point() and weight.element_size() > 1
    if not plain or weight.device.type == "meta" or shape_of(weight).numel() == 0:
        return None
    return some_entries(weight).to("cpu", torch.float32)


def some_entries(tensor: torch.Tensor) -> torch.Tensor:
    """At most 64 of a tensor's entries, evenly spread: (≤ 64,)."""
    return entries(tensor, sampled_positions(shape_of(tensor).numel()))


def sampled_positions(total: int) -> torch.Tensor:
    """Which of so many entries a fingerprint has: (≤ 64,) int64."""
    return torch.linspace(0, total - 1, min(FINGERPRINT_ENTRIES, total), dtype=torch.float64).long()


def same_fingerprint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fingerprints are of one weight, up to rounding to a 16-bit dtype."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=FINGERPRINT_TOLERANCE, atol=1e-6)


# (d_out, d_in) of a weight, and its fingerprint where it has one.
Weight: TypeAlias = tuple[tuple[int, int], torch.Tensor | None]

Weights: TypeAlias = Mapping[str, Weight]


def weights_of(modules: Mapping[str, nn.Module]) -> Weights:
    """Shape and fingerprint of every layer's weight."""
    return {name: (weight_shape(module), sample(module)) for name, module in modules.items()}


def sample(module: nn.Module) -> torch.Tensor | None:
    """The fingerprint of a layer's weight; None where its values are nowhere at hand. A collective where weights are sharded."""
    try:
        weight = weight_of(module)
        return fingerprint(weight if is_sharded(weight) else tensor_of(module, "weight"))
    except ValueError:
        return None


def fingerprint_of_run(
    model: nn.Module, loader: Iterable[Any], targets: Iterable[str], settings: Mapping[str, Any], job: Job | None = None
) -> dict[str, Any]:
    """What a result depends on: the model's weights (some entries of each), the data (all of them), settings and versions.

    Args:
        model: its weights may be on the disk; of each, 64 entries are read.
        loader: is read to its end.
        targets: names of layers.
        settings: as JSON takes them.
        job: the processes that compute together; of a loader that is not the same for all, every share counts.

    Raises:
        ValueError: if the loader can be read only once.
    """
    if isinstance(loader, Iterator):
        raise ValueError("a checkpoint needs a loader that can be read more than once: a list or a DataLoader, not an iterator")
    packages = ("nullspace-lora", "torch", *(name for name in ("transformers", "triton") if name in sys.modules))
    return {
        "model": {"class": class_of(model).__name__, "weights": _hash_weights(model)},
        "data": hash_data(loader) if (job or Job.alone()).share(loader).split else _hash_shares(loader, job or Job.alone()),
        "targets": _short(hashlib.sha256("\n".join(targets).encode())),
        **settings,
        "device": (execution_device(model) or torch.device("cpu")).type,
        "versions": {name: _version(name) for name in packages},
    }


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        restore_layout(module)
        for key, own in own_tensors(module).items():
            if key in module._non_persistent_buffers_set:
                continue
            value = own if is_sharded(own) else tensor_of(module, key)
            digest.update(f"{name}.{key} {tuple(shape_of(value))} {value.dtype}".encode())
            sample = fingerprint(value)
            packed = not value.is_floating_point() or hasattr(value, "quant_state")  # bitsandbytes, in whatever dtype
            if sample is None and packed and value.device.type != "meta":
                sample = some_entries(value).cpu().view(torch.uint8)
            if sample is not None:
                digest.update(sample.numpy().tobytes())
    return _short(digest)


def hash_data(loader: Iterable[Any]) -> dict[str, Any]:
    """Which data these are: how many batches, and a digest of all that they hold. The loader is read to its end."""
    digest, batches = hashlib.sha256(), 0
    for batch in loader:
        add_to_digest(digest, batch)
        batches += 1
    return {"batches": batches, "content": _short(digest)}


def _hash_shares(loader: Iterable[Any], job: Job) -> dict[str, Any]:
    shares = job.exchange(hash_data(loader))
    if len(shares) == 1:
        return shares[0]
    content = hashlib.sha256("\n".join(share["content"] for share in shares).encode())
    return {"batches": sum(share["batches"] for share in shares), "content": _short(content)}


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])


def _version(package: str) -> str:
    if package == "nullspace-lora":
        return __version__  # a checkout need not be installed
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
