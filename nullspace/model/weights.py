"""Weights that may be elsewhere: on another device, on disk behind accelerate's hooks, or sharded over several ranks.

A model that does not fit is loaded with a `device_map`: accelerate then leaves meta tensors in its modules, keeps a mapping from
names to tensors on the disk, and loads a layer's weights at every call. `Loaded` loads a whole block once, which then runs any
number of batches, and puts the modules' own tensors back. It writes no weights.

accelerate's public `has_offloaded_params` and `align_module_device` do not serve: they miss a module with another hook beside the
one that loads (accelerate chains them), and load all of a module's tensors, one by one, into the module itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import nn

from nullspace.devices import side_stream, upload, with_index
from nullspace.errors import InputError
from nullspace.model.experts import ExpertMatrix
from nullspace.model.sharded import compute_dtypes
from nullspace.model.sharded_tensors import device_of, is_sharded, shape_of, whole


def tensor_of(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of this very module, read from the disk or the host if accelerate keeps it there.

    Of an expert's matrix, the parameter of all experts is read.

    Collective if it is sharded: it is gathered.

    Raises:
        ValueError: if it is on the meta device and has no values.
    """
    if isinstance(module, ExpertMatrix):
        return module.of_stack(tensor_of(module.experts, module.parameter))
    tensor: torch.Tensor = getattr(module, name)
    if is_sharded(tensor):
        return whole(tensor)
    if tensor.device.type != "meta":
        return tensor
    weights = offloaded_weights(module)
    if weights is None or name not in weights:
        raise InputError(f"{name!r} of a {type(module).__name__} is on the meta device: its values were never loaded")
    value: torch.Tensor = weights[name]
    return value


def restore_layout(module: nn.Module) -> None:
    """Restore the layout that bitsandbytes' functions read, of a 4-bit weight that bitsandbytes has repacked.

    On a CPU with AVX512-BF16, the first forward pass of a `Linear4bit` in eval mode repacks the weight in place and rounds its
    scales to bfloat16. `dequantize_4bit` reads other numbers from that layout. The layer's `state_dict` undoes it.
    """
    quant_state = getattr(own_tensors(module).get("weight"), "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        module.state_dict()


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module computes: where its weights are, or where accelerate would bring them; None if it has none."""
    for part in module.modules():
        hook = _offload_hook(part)
        if hook is not None:
            return _as_device(hook.execution_device)
        for tensor in own_tensors(part).values():
            if tensor.device.type != "meta":
                return device_of(tensor)
    return None


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, wherever they are; shared ones count once, sharded ones whole."""
    every = {id(t): t for _, _, t in _tensors(module)}.values()
    return sum(map(stored_bytes, every))


def size_to_load(module: nn.Module, device: torch.device) -> int:
    """Bytes that `Loaded` takes on a device."""
    away = {id(t): t for _, _, t in _tensors(module) if is_sharded(t) or t.device != with_index(device)}.values()
    return sum(map(stored_bytes, away))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor: of a quantised one, what it consists of; of one of a forecast, what was set by `set_stored_bytes`."""
    own: int | None = getattr(tensor, _STORED_BYTES, None)
    if own is not None:
        return own
    if not is_sharded(tensor) and hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return shape_of(tensor).numel() * tensor.element_size()


def set_stored_bytes(tensor: torch.Tensor, size: int) -> None:
    """Let a tensor of a model without weights count as one that is stored in so many bytes."""
    setattr(tensor, _STORED_BYTES, size)


_STORED_BYTES = "nullspace_stored_bytes"


def is_loaded(module: nn.Module) -> bool:
    """Whether no parameter or buffer of a module is on the meta device."""
    return all(t.device.type != "meta" for _, _, t in _tensors(module))


def refuse_meta(model: nn.Module, skip: Iterable[nn.Module] = ()) -> None:
    """Raise `ValueError`, naming the first, if weights have no values and neither accelerate's hooks nor sharding provide them.

    Args:
        model: any.
        skip: modules to leave out, recursively.
    """
    served = {id(part) for module in skip for part in module.modules()}
    for module in model.modules():
        hook = _offload_hook(module)
        if hook is not None:
            served |= {id(part) for part in (module.modules() if hook.place_submodules else (module,))}
    for name, module in model.named_modules():
        for key, tensor in own_tensors(module).items():
            if tensor.device.type == "meta" and not is_sharded(tensor) and id(module) not in served:
                raise InputError(
                    f"{f'{name}.{key}'.lstrip('.')!r} is on the meta device: its values were never loaded. Load the model with its "
                    "weights, or with a device_map."
                )


# Pinned copies of tensors on their way to a GPU.
PINNED_AT_ONCE = 2


class Loaded:
    """A module's weights, all of them, on one device.

    The constructor starts to read them, on a thread of its own and, for a GPU, on the device's stream for weights: make the next
    block's while this one computes. Use as a context manager, once or several times: inside, the module computes with the tensors
    that were read, and accelerate's hooks are disabled. The tensors stay in memory until `close`.

    Sharded weights are not read ahead but gathered when the module is first entered, or before that by `gather`: collectives must
    come in the same order on all ranks, which a thread of one rank cannot know. Ranks may then call the module as
    often as they like, with FSDP2's and ZeRO-3's hooks removed by `nullspace.model.sharded.without_gather_hooks`.

    Args:
        module: the module to load, recursively.
        device: where to.
        skip: submodules to leave out.
        within: the model that the module is a part of, whose FSDP2 policies set the dtype of gathered weights.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, *, skip: tuple[nn.Module, ...] = (), within: nn.Module | None = None
    ) -> None:
        left_out = {id(part) for each in skip for part in each.modules()}
        self._device = device = with_index(device)
        self._parts = [part for part in module.modules() if id(part) not in left_out]
        own = [(part, name, tensor) for part in self._parts for name, tensor in own_tensors(part).items()]
        self._sharded = [(part, name) for part, name, tensor in own if is_sharded(tensor)]
        self._dtypes = compute_dtypes(within or module) if self._sharded else {}
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
        stream = side_stream(self._device, "weights")
        sent: list[torch.cuda.Event] = []
        with torch.cuda.stream(stream), torch.no_grad():
            for part, name in self._wanted:
                if len(sent) >= PINNED_AT_ONCE:
                    sent.pop(0).synchronize()
                self._take(part, name, upload(tensor_of(part, name), self._device))
                sent.append(stream.record_event())
            self._event = stream.record_event()

    def _take(self, part: nn.Module, name: str, value: torch.Tensor) -> None:
        self._read.setdefault(id(getattr(part, name)), value.detach())

    def gather(self) -> None:
        """Gather the sharded weights, unless that is done. Collective."""
        for part, name in self._sharded:
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
        for part, name in (*self._wanted, *self._sharded):
            own = getattr(part, name)
            value = self._read[id(own)]
            if self._event is not None:
                value.record_stream(torch.cuda.current_stream(self._device))
            self._undo.append((part, name, own))
            setattr(part, name, nn.Parameter(value, requires_grad=False) if isinstance(own, nn.Parameter) else value)
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
            setattr(part, name, own)
        self._undo, self._forwards = [], []

    def close(self) -> None:
        """Free the tensors that were read: the context cannot be entered again."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._read = {}


def offloaded_weights(module: nn.Module) -> Any:
    """accelerate's mapping from the names of a module's own tensors to their values, if it keeps them elsewhere; else None."""
    hook = _offload_hook(module)
    return None if hook is None else hook.weights_map


def _offload_hook(module: nn.Module) -> Any:
    """The `AlignDevicesHook` that loads a module's weights for each call, alone or in a chain of hooks; None if there is none."""
    loads = (each for each in _chained(getattr(module, "_hf_hook", None)) if getattr(each, "offload", False))
    return next((each for each in loads if getattr(each, "weights_map", None) is not None), None)


def _chained(hook: Any) -> Iterator[Any]:
    """The hooks of a `SequentialHook`, whose hooks may be chains too; another hook is the only one."""
    if not hasattr(hook, "hooks"):
        yield hook
        return
    for each in hook.hooks:
        yield from _chained(each)


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name → parameter or buffer of this very module."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(recurse=False, remove_duplicate=False))}


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for part in module.modules():
        for name, tensor in own_tensors(part).items():
            yield part, name, tensor


def _as_device(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
