"""Weights that may be elsewhere: on another device, on disk behind accelerate's hooks, or spread over several ranks.

A model that does not fit is loaded with a `device_map`: accelerate then leaves meta tensors in its modules, keeps a mapping from
names to what is on the disk, and loads a layer's weights at every single call. `Loaded` does so once for a whole block, which then
runs any number of batches, and puts the modules' own tensors back. Nothing is written, so nothing has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import nn

from nullspace.model.sharded import compute_dtypes
from nullspace.model.sharded_tensors import device_of, is_sharded, shape_of, whole


def tensor_of(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of this very module, read from the disk or the host if accelerate keeps it there.

    Of one that is spread over several ranks it is gathered: a collective (`nullspace.parts`).

    Raises:
        ValueError: if it is on the meta device and nobody knows its values.
    """
    tensor: torch.Tensor = getattr(module, name)
    if is_sharded(tensor):
        return whole(tensor)
    if tensor.device.type != "meta":
        return tensor
    weights = offloaded_weights(module)
    if weights is None or name not in weights:
        raise ValueError(f"{name!r} of a {type(module).__name__} is on the meta device: its values were never loaded")
    value: torch.Tensor = weights[name]
    return value


def restore_layout(module: nn.Module) -> None:
    """Bring a 4-bit weight that bitsandbytes has repacked back into the layout that its functions read.

    On a CPU with AVX512-BF16, the first forward pass of a `Linear4bit` in eval mode repacks the weight in place and rounds its
    scales to bfloat16. `dequantize_4bit` reads other numbers from that layout. The layer's own `state_dict` undoes it.
    """
    quant_state = getattr(module._parameters.get("weight"), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        module.state_dict()


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes: where its weights are, or where accelerate would bring them; None if it has none."""
    for part in module.modules():
        if offloaded_weights(part) is not None:
            return _as_device(part._hf_hook.execution_device)  # type: ignore[union-attr]
        for tensor in _own_tensors(part).values():
            if tensor.device.type != "meta":
                return device_of(tensor)
    return None


def size_in_bytes(module: nn.Module) -> int:
    """Of all parameters and buffers, wherever they are; shared ones count once."""
    every = {id(t): t for _, _, t in _tensors(module)}.values()
    return sum(shape_of(t).numel() * t.element_size() for t in every)


def is_loaded(module: nn.Module) -> bool:
    """Whether nothing of a module is on the meta device."""
    return all(t.device.type != "meta" for _, _, t in _tensors(module))


def refuse_meta(model: nn.Module, skip: Iterable[nn.Module] = ()) -> None:
    """Raise `ValueError`, naming the first, if there are weights without values that nobody brings when the model runs.

    Args:
        model: any; what accelerate's hooks or sharding bring is at hand.
        skip: modules that do not count, with all that is in them.
    """
    served = {id(part) for module in skip for part in module.modules()}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if offloaded_weights(module) is not None:
            brings_all = any(getattr(each, "place_submodules", False) for each in getattr(hook, "hooks", (hook,)))
            served |= {id(part) for part in (module.modules() if brings_all else (module,))}
    for name, module in model.named_modules():
        for key, tensor in _own_tensors(module).items():
            if tensor.device.type == "meta" and not is_sharded(tensor) and id(module) not in served:
                raise ValueError(
                    f"{f'{name}.{key}'.lstrip('.')!r} is on the meta device: its values were never loaded. Load the model with its "
                    "weights, or with a device_map."
                )


class Loaded:
    """A module's weights, all of them, on one device.

    Reading starts at once, on a thread of its own and, for a GPU, on a stream of its own: make the next block's while this one
    computes. Use as a context manager, once or again: inside, the module works with the tensors that were read, and accelerate's
    hooks stand aside. Until `close` they stay in memory.

    Weights that are spread over ranks are not read ahead but gathered when the module is first entered, or before that by `gather`:
    collectives must come in the same order on all ranks, which no thread of one of them knows. Ranks may then call the module as
    often as they like, with FSDP2's and ZeRO-3's hooks removed by `nullspace.model.sharded.without_gather_hooks`.

    Args:
        module: what to load, with everything below it, but for
        but: these submodules.
        device: where to.
        within: the model that it is a part of, which may say what dtype sharded weights have when they are gathered.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, *, but: tuple[nn.Module, ...] = (), within: nn.Module | None = None
    ) -> None:
        left_out = {id(part) for each in but for part in each.modules()}
        self._device = device = torch.empty(0, device=device).device  # "cuda" is not equal to the "cuda:0" of a tensor
        self._parts = [part for part in module.modules() if id(part) not in left_out]
        own = [(part, name, tensor) for part in self._parts for name, tensor in _own_tensors(part).items()]
        self._spread = [(part, name) for part, name, tensor in own if is_sharded(tensor)]
        self._dtypes = compute_dtypes(within or module) if self._spread else {}
        self._wanted = [
            (part, name)
            for part, name, tensor in own
            if not is_sharded(tensor)
            and tensor.device != device
            and (tensor.device.type != "meta" or offloaded_weights(part) is not None)
        ]
        self._read: dict[int, torch.Tensor] = {}  # by the identity of the module's own tensor: tied weights are read once
        self._event: Any = None
        self._undo: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nullspace-weights") if self._wanted else None
        self._reading = self._reader.submit(self._run) if self._reader is not None else None

    def _run(self) -> None:
        if self._device.type != "cuda":
            # A copy: what safetensors reads is a view of the whole file, mapped once more for every tensor, and such mappings
            # count as memory of the process under some limits.
            for part, name in self._wanted:
                self._take(part, name, tensor_of(part, name).to(self._device, copy=True))
            return
        with torch.cuda.stream(torch.cuda.Stream(self._device)) as _, torch.no_grad():
            for part, name in self._wanted:
                value = tensor_of(part, name)
                pinned = value.pin_memory() if value.device.type == "cpu" else value
                self._take(part, name, pinned.to(self._device, non_blocking=True))
            self._event = torch.cuda.current_stream(self._device).record_event()

    def _take(self, part: nn.Module, name: str, value: torch.Tensor) -> None:
        self._read.setdefault(id(getattr(part, name)), value.detach())

    def gather(self) -> None:
        """Gather what is spread over ranks, all of which have to call this; nothing if they have."""
        for part, name in self._spread:
            own = getattr(part, name)
            if id(own) not in self._read:
                value = whole(own)
                dtype = self._dtypes.get(id(part), value.dtype) if value.is_floating_point() else value.dtype
                self._take(part, name, value.to(self._device, dtype))

    def __enter__(self) -> Loaded:
        self.gather()
        if self._reading is not None:
            self._reading.result()
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        for part, name in (*self._wanted, *self._spread):
            own = getattr(part, name)
            value = self._read[id(own)]
            if self._event is not None:
                value.record_stream(torch.cuda.current_stream(self._device))
            self._undo.append((part, name, own))
            _put(part, name, nn.Parameter(value, requires_grad=False) if isinstance(own, nn.Parameter) else value)
        if self._wanted:
            for part in self._parts:
                if hasattr(part, "_hf_hook") and "forward" in part.__dict__:
                    self._forwards.append((part, part.__dict__["forward"]))
                    part.__dict__["forward"] = part._old_forward
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for part, forward in self._forwards:
            part.__dict__["forward"] = forward
        for part, name, own in self._undo:
            _put(part, name, own)
        self._undo, self._forwards = [], []

    def close(self) -> None:
        """Forget what was read: the weights cannot be entered again."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._read = {}


def offloaded_weights(module: nn.Module) -> Any:
    """accelerate's mapping from the names of a module's own tensors to their values, if they are kept elsewhere."""
    hook: Any = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # a sequence of hooks, or one
        if getattr(each, "offload", False) and getattr(each, "weights_map", None) is not None:
            return each.weights_map
    return None


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    both = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in both if tensor is not None}


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for part in module.modules():
        for name, tensor in _own_tensors(part).items():
            yield part, name, tensor


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Exchange the object itself: `setattr` would refuse a plain tensor for a parameter, and copy nothing."""
    (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # type: ignore[assignment]


def _as_device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
