"""Memory and flops of a forward pass, measured by running it on the meta device, where tensors have no data.

`watch` runs a module with meta tensors in place of its weights, under a dispatch mode that follows every storage from allocation
to release and counts flops, for any architecture. Attention counts as one fused operation, as CPUs and GPUs compute it: on the
meta device PyTorch would form the matrix of all pairs of tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
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
        ignored: storages that are not counted: weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.ignored: set[int] = set()
        self._alive: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """Start to measure a new peak."""
        self.peak = self.live

    def held(self, extra: int) -> None:
        """Count `extra` bytes that exist for a moment beside those that are live."""
        self.peak = max(self.peak, self.live + extra)

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave a tensor out of the count: a weight. It must outlive the mode."""
        storage = tensor.untyped_storage()
        self.ignored.add(storage._cdata)
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
        width, out_width = query.shape[-1], value.shape[-1]
        pairs = query.numel() // width * key.shape[-2]
        self._live.flops += 2 * pairs * (width + out_width) // (2 if is_causal else 1)
        out: torch.Tensor = _Attention.apply(query, key, value)
        self._live.held(query.numel() // width * 4)  # log Σ exp, float32
        return out


class _Attention(torch.autograd.Function):
    """The output of attention as kernels store it, and what they save for its derivative; it is not computed."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        *batch, queries, _ = query.shape
        heads = batch.pop()  # stored by tokens, so that no copy follows
        out = query.new_empty(*batch, queries, heads, value.shape[-1]).transpose(-2, -3)
        if any(context.needs_input_grad):
            context.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


@contextlib.contextmanager
def watch(model: nn.Module, trained: Collection[str] | None = None) -> Iterator[tuple[LiveBytes, Callable[..., Any]]]:
    """Yields `(live, run)`; `run(*args, **kwargs)` is the model's forward pass on meta tensors.

    Nothing is loaded or computed, and weights are not counted. The model's hooks run, also those added inside, but accelerate's do
    not.

    Args:
        model: any module.
        trained: if given, the pass keeps what a backward pass needs, and these parameters are results that have gradients.
    """
    originals = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stand_ins = {name: _stand_in(tensor) for name, tensor in originals.items()}
    live = LiveBytes()
    for name, tensor in stand_ins.items():
        if trained is not None and name in trained:
            tensor.requires_grad_()
        else:
            live.ignore(tensor)

    def run(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, stand_ins, args, kwargs)

    with _without_accelerate(model), torch.set_grad_enabled(trained is not None), live, _FusedAttention(live):
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
