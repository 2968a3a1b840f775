"""Fingerprints that identify weights, models, data and runs."""

from __future__ import annotations

import base64
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
from torch import nn

from nullspace import __version__
from nullspace.distributed.job import Job
from nullspace.distributed.loaders import add_to_digest
from nullspace.errors import InputError
from nullspace.model.experts import ExpertMatrix
from nullspace.model.linear import weight_of, weight_shape
from nullspace.model.sharded import class_of
from nullspace.model.sharded_tensors import entries, is_sharded, shape_of
from nullspace.model.weights import execution_device, own_tensors, restore_layout, tensor_of

# Entries of a weight in its fingerprint, evenly spaced.
FINGERPRINT_ENTRIES = 64
# Two roundings of one number to bf16 (8 bits) differ by less than this, relatively.
FINGERPRINT_TOLERANCE = 2.0**-7


def fingerprint(weight: torch.Tensor) -> torch.Tensor | None:
    """(≤ 64,) float32: evenly spaced entries of a weight, which identify it in any floating dtype.

    None for a weight whose values cannot be read (offloaded, on the meta device) and for a quantised one: a tensor subclass
    (bitsandbytes packs 4-bit weights into the dtype `bnb_4bit_quant_storage`), or 8 bits an entry, with scales stored elsewhere.
    For a sharded weight this is a collective, and the fingerprint of the whole weight.
    """
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) or is_sharded(weight)
    plain = plain and weight.is_floating_point() and weight.element_size() > 1
    if not plain or weight.device.type == "meta" or shape_of(weight).numel() == 0:
        return None
    return some_entries(weight).to("cpu", torch.float32)


def _of_parts(stack: torch.Tensor) -> torch.Tensor | None:
    """(E, ≤ 64) float32: the fingerprints of the parts of a tensor along its first axis."""
    if fingerprint(stack) is None:
        return None
    count, *part = shape_of(stack)
    size = math.prod(part)
    positions = torch.arange(count)[:, None] * size + sampled_positions(size)
    return entries(stack, positions.flatten()).to("cpu", torch.float32).reshape(count, -1)


def some_entries(tensor: torch.Tensor) -> torch.Tensor:
    """(≤ 64,): evenly spaced entries of a tensor."""
    return entries(tensor, sampled_positions(shape_of(tensor).numel()))


def sampled_positions(total: int) -> torch.Tensor:
    """(≤ 64,) int64: indices of the entries in the fingerprint of a tensor with `total` entries."""
    return torch.linspace(0, total - 1, min(FINGERPRINT_ENTRIES, total), dtype=torch.float64).long()


def same_fingerprint(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fingerprints are equal up to rounding to a 16-bit dtype."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=FINGERPRINT_TOLERANCE, atol=1e-6)


def as_text(fingerprint: torch.Tensor) -> str:
    """A fingerprint in bfloat16, as base64: what a JSON file can hold in a line."""
    return base64.b64encode(fingerprint.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()).decode()


def from_text(text: str) -> torch.Tensor | None:
    """(≤ 64,) float32: the fingerprint of `as_text`; None for a text that is none."""
    try:
        content = bytearray(base64.b64decode(text, validate=True))
        return torch.frombuffer(content, dtype=torch.bfloat16).to(torch.float32)
    except ValueError:
        return None


# (d_out, d_in) of a weight, and its fingerprint; None if its values cannot be read.
Weight: TypeAlias = tuple[tuple[int, int], torch.Tensor | None]

Weights: TypeAlias = Mapping[str, Weight]


class Fingerprints:
    """Fingerprints of the weights of one model, each computed once, since for a sharded weight it is a collective."""

    def __init__(self) -> None:
        self._taken: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # by id of the tensor; the reference keeps it valid
        self._stacks: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # of experts, (E, ≤ 64)

    def weights(self, modules: Mapping[str, nn.Module]) -> Weights:
        """Layer name → shape and fingerprint of its weight."""
        return {name: (weight_shape(module), self._of_layer(module)) for name, module in modules.items()}

    def digest(self, model: nn.Module) -> str:
        """One digest of all parameters and persistent buffers: their names, shapes, dtypes and some entries of each."""
        digest = hashlib.sha256()
        for name, module in model.named_modules():
            restore_layout(module)
            for key, own in own_tensors(module).items():
                if key in module._non_persistent_buffers_set:
                    continue
                value = own if is_sharded(own) else tensor_of(module, key)
                digest.update(f"{name}.{key} {tuple(shape_of(value))} {value.dtype}".encode())
                sample = self._of(own, value)
                samples = _codes(value) if sample is None else [sample]
                for each in samples:
                    digest.update(each.numpy().tobytes())
        return _short(digest)

    def _of_layer(self, module: nn.Module) -> torch.Tensor | None:
        if isinstance(module, ExpertMatrix):
            return self._of_expert(module)
        own = weight_of(module)
        if own is not getattr(module, "weight", None):  # packed under another name
            return None
        if id(own) in self._taken:
            return self._taken[id(own)][1]
        try:
            return self._of(own, own if is_sharded(own) else tensor_of(module, "weight"))
        except ValueError:
            return None

    def _of_expert(self, matrix: ExpertMatrix) -> torch.Tensor | None:
        """Of entries of its part of the experts' tensor, in the order of storage; those of all experts are taken at once."""
        own = matrix.stack
        if id(own) not in self._stacks:
            try:
                value = own if is_sharded(own) else tensor_of(matrix.experts, matrix.parameter)
            except ValueError:
                self._stacks[id(own)] = own, None
            else:
                self._stacks[id(own)] = own, _of_parts(value)
        marks = self._stacks[id(own)][1]
        return None if marks is None else marks[matrix.index]

    def _of(self, own: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
        """Fingerprint of the model's tensor `own`, whose value may lie elsewhere (in `value`)."""
        if id(own) not in self._taken:
            self._taken[id(own)] = own, fingerprint(value)
        return self._taken[id(own)][1]


def _codes(value: torch.Tensor) -> list[torch.Tensor]:
    """Some bytes of a quantised tensor, of each of the tensors that it consists of; of integers too."""
    if is_sharded(value) or value.device.type == "meta":
        return []
    if hasattr(value, "__tensor_flatten__"):
        return [sample for name in value.__tensor_flatten__()[0] for sample in _codes(getattr(value, name))]
    return [some_entries(value).cpu().reshape(-1).view(torch.uint8)]


def weights_of(modules: Mapping[str, nn.Module]) -> Weights:
    """Layer name → shape and fingerprint of its weight. A collective where weights are sharded."""
    return Fingerprints().weights(modules)


def fingerprint_of_run(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Iterable[str],
    settings: Mapping[str, Any],
    job: Job | None = None,
    fingerprints: Fingerprints | None = None,
) -> dict[str, Any]:
    """Identity of a run: the model's weights (some entries of each), the data (every byte), targets, settings and versions.

    Args:
        model: its weights may be on the disk; 64 entries of each are read.
        loader: is read to its end.
        targets: names of layers.
        settings: values that JSON can hold.
        job: the processes that work together. If each has its own loader, all their data count.
        fingerprints: those of this model that are known; new ones are added.

    Raises:
        ValueError: if the loader can be read only once.
    """
    if isinstance(loader, Iterator):
        raise InputError("a checkpoint needs a loader that can be read more than once: a list or a DataLoader, not an iterator")
    packages = ("nullspace-lora", "torch", *(name for name in ("transformers", "triton") if name in sys.modules))
    return {
        "model": {"class": class_of(model).__name__, "weights": (fingerprints or Fingerprints()).digest(model)},
        "data": hash_data(loader) if (job or Job.alone()).share(loader).split else _hash_shares(loader, job or Job.alone()),
        "targets": _short(hashlib.sha256("\n".join(targets).encode())),
        **settings,
        "device": (execution_device(model) or torch.device("cpu")).type,
        "versions": {name: _version(name) for name in packages},
    }


def hash_data(loader: Iterable[Any]) -> dict[str, Any]:
    """Number of batches, and a digest of their content. Reads the loader to its end."""
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
