"""Memory and flops of a forward pass, measured by running it on the meta device, where tensors have no data.

`watch` runs a module with meta tensors in place of its weights, under a dispatch mode that follows every storage from allocation
to release and counts flops, for any architecture. Attention counts as one fused operation, as CPUs and GPUs compute it: on the
meta device PyTorch would form the matrix of all pairs of tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are allocated while it is on. All tensors become meta tensors.

    Attributes:
        live: bytes allocated now.
        peak: the largest `live` since `restart`.
        flops: of matrix products and attention so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """Start to measure a new peak."""
        self.peak = self.live

    def held(self, extra: int) -> None:
        """Count `extra` bytes that exist for a moment beside those that are live."""
        self.peak = max(self.peak, self.live + extra)

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave a tensor out of the count: a weight."""
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Constants that the model keeps beside its parameters and buffers are on a real device.
        args, kwargs = tree_map(_to_meta, (args, kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # models branch on their data: whether nothing is masked, whether a row is one sequence
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += int(count(*args, **kwargs, out_val=out))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        self.peak = max(self.peak, self.live)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def release(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.live -= size

        self._alive[key] = weakref.ref(storage, release)
        self.live += size


class _FusedAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` without the matrix of all pairs: its output, one number a query; half the flops if causal."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, is_causal: bool = False, **__: Any
    ) -> torch.Tensor:
        *batch, queries, width = query.shape
        keys, out_width = key.shape[-2], value.shape[-1]
        pairs = query.numel() // width * keys
        self._live.flops += 2 * pairs * (width + out_width) // (2 if is_causal else 1)
        heads = batch.pop()  # kernels store their output by tokens, so that no copy follows
        out = query.new_empty(*batch, queries, heads, out_width).transpose(-2, -3)
        self._live.held(query.numel() // width * 4)  # log Σ exp, float32
        return out


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[tuple[LiveBytes, Callable[..., Any]]]:
    """Yields `(live, run)`; `run(*args, **kwargs)` is the model's forward pass on meta tensors.

    Nothing is loaded or computed, and weights are not counted. The model's hooks run, also those added inside, but accelerate's do
    not.
    """
    originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stand_ins = {name: _stand_in(tensor) for name, tensor in originals.items()}
    live = LiveBytes()
    for tensor in stand_ins.values():
        live.ignore(tensor)

    def run(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, stand_ins, args, kwargs)

    with _without_accelerate(model), torch.no_grad(), live, _FusedAttention(live):
        yield live, run


def to_meta(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a batch as meta tensors."""
    return {name: _to_meta(value) for name, value in batch.items()}


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def _without_accelerate(model: nn.Module) -> Iterator[None]:
    forwards = [(m, m.__dict__.pop("forward")) for m in model.modules() if hasattr(m, "_hf_hook") and "forward" in m.__dict__]
    try:
        yield
    finally:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
