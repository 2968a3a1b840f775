"""What would make the host wait for a GPU, counted on the CPU: some tensors, and what is made of them, stand for a GPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import nullspace.csrc_triton as csrc_triton
from nullspace.devices import Fetched
from nullspace.moments import precision

# A number, or a shape, that the device must compute first.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "aten::equal", "unique", "is_nonzero", "nanmedian")


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait, while it is entered.

    Attributes:
        seen: their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._there: dict[int, torch.UntypedStorage] = {}  # held, so that no other one gets its place

    def put(self, value: Any) -> Any:
        """Take the tensors in `value` for a GPU's; returns it."""
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                self._there[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return value

    def is_there(self, value: Any) -> bool:
        leaves = pytree.tree_leaves(value)
        return any(isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata in self._there for leaf in leaves)

    def read(self, tensor: torch.Tensor, what: str) -> None:
        if self.is_there(tensor):
            self.seen.append(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        there = self.is_there((args, kwargs))
        by_mask = name in ("aten::index.Tensor", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool and self.is_there(index) for index in args[1]
        )
        if by_mask or (there and any(word in name for word in WAITS)):
            self.seen.append(name)
        result = func(*args, **(kwargs or {}))
        return self.put(result) if there else result


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Sums are those of the kernels, which do nothing but stage rows; what is uploaded is on the GPU, and fetching waits."""
    waits = Waits()

    def stage_rows(x: torch.Tensor, out: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        out.copy_(x[: len(out)] if rows is None else x[rows])
        return waits.put((torch.linalg.vector_norm(out, dim=1, dtype=torch.float64), out.sum(0, dtype=torch.float64)))

    def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        return waits.put(tensor.clone())

    read, tolist = Fetched.read, torch.Tensor.tolist

    def counted_read(fetched: Fetched) -> torch.Tensor:
        waits.read(fetched._copy, "fetched")
        with _disable_current_modes():  # a copy is of the host
            return read(fetched).clone()

    def counted_tolist(tensor: torch.Tensor) -> Any:
        waits.read(tensor, "tolist")
        return tolist(tensor)

    for name in csrc_triton.__all__:
        monkeypatch.setattr(csrc_triton, name, lambda *args, **kwargs: None, raising=False)
    monkeypatch.setattr(csrc_triton, "stage_rows", stage_rows, raising=False)
    monkeypatch.setattr(precision, "_has_kernels", lambda device, precision: True)
    monkeypatch.setattr("nullspace.model.batches.upload", upload)
    monkeypatch.setattr(Fetched, "read", counted_read)
    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    with waits:
        yield waits
