"""A simulated CUDA device: tensors that say they are on `cuda:0`, are computed on the CPU, and obey a device's rules.

`OnDevice` holds a CPU tensor and says it is elsewhere. Every operation that involves one, or that makes a tensor on a CUDA device,
comes to `Simulation`, which

- refuses tensors of two devices in one operation, as a device would,
- counts what makes the host wait for the device (`Simulation.waits`),
- puts the operation on the current stream and checks its order against others' (`simulated.streams`),

and then computes the result on the CPU. Values are therefore right, and the program takes the way that it takes on a device.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from simulated.operations import INDEXING, MIXING, READING, aten, computed, is_view, mapped, tensors, written
from simulated.streams import Clock, Hold, Ledger, Stream, is_of_model, join, where
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
# PyTorch's own name for the device of the wrappers: autograd asks the driver about tensors that are on "cuda" for it.
BACKEND = "simulated"


class DeviceMismatchError(RuntimeError):
    """Tensors of several devices in one operation."""


class Wait(NamedTuple):
    """One wait of the host for a device.

    Attributes:
        why: the operation.
        line: of the library.
        kind: "read" if the host wants a result; "upload" if it copies from memory that is not pinned, or without `non_blocking`,
            which waits for what the stream still has to do; "model" for either, if the model's own code does it.
    """

    why: str
    line: str
    kind: str


class OnDevice(torch.Tensor):
    """A tensor on a simulated device.

    Attributes:
        held: its values, on the CPU.
        where: the device that it says it is on.
    """

    held: torch.Tensor
    where: torch.device
    hold: Hold

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, *, requires_grad: bool = False) -> OnDevice:
        if device is None:  # accelerate: `type(parameter)(value, requires_grad=…)`
            return nn.Parameter(held, requires_grad=requires_grad)  # type: ignore[return-value]
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(BACKEND, device.index),
        )
        made.held, made.where = held, device
        return made  # type: ignore[no-any-return]

    def __init__(self, *_: Any, **__: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return current().run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def get_device(self) -> int:
        return self.where.index  # type: ignore[no-any-return]

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or current().resolve(device) == self.where:
            if not copy and dtype in (None, self.dtype) and memory_format is None:
                return self
            return super().to(dtype=dtype or self.dtype, copy=copy, memory_format=memory_format)
        return super().to(device, dtype or self.dtype, non_blocking=non_blocking, copy=copy, memory_format=memory_format)

    def cuda(self, device: Any = None, non_blocking: bool = False, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda", non_blocking=non_blocking)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        set_data(self, value)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        current().ledger.record(self.held, stream)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r}, {self.device})"


def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, where one of them is on a simulated device."""
    with torch.no_grad():
        made = value.detach()
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, made)


_current: list[Simulation] = []


def current() -> Simulation:
    return _current[-1]


class Simulation:
    """Simulated devices.

    Args:
        devices: their number.
        capability: their compute capability.
        memory: bytes of each.

    Attributes:
        waits: of the host, in order.
        ledger: of the memory.
    """

    def __init__(self, devices: int = 1, capability: tuple[int, int] = (9, 0), memory: int = 80 * 10**9) -> None:
        self.devices, self.capability, self.memory = devices, capability, memory
        self.waits: list[Wait] = []
        self.ledger = Ledger()
        self.operations = 0
        self._waited_after = -1
        self.host: Clock = {}
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._default = [Stream(torch.device("cuda", n)) for n in range(devices)]
        self._local = threading.local()
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- streams and waits

    @property
    def device(self) -> int:
        return getattr(self._local, "device", 0)

    @device.setter
    def device(self, index: int) -> None:
        self._local.device = index

    def stream(self, device: torch.device | str | int | None = None) -> Stream:
        """The current stream of a device, in this thread."""
        index = self._index(device)
        return getattr(self._local, "streams", {}).get(index) or self._default[index]

    def default_stream(self, device: torch.device | str | int | None = None) -> Stream:
        return self._default[self._index(device)]

    def _index(self, device: torch.device | str | int | None) -> int:
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        return self.device if index is None else index

    def enter_stream(self, stream: Stream | None) -> tuple[int, Stream | None]:
        before = (self.device, None)
        if stream is not None:
            before = (self.device, self.stream(stream.device))
            self.set_stream(stream)
        return before

    def set_stream(self, stream: Stream) -> None:
        self._local.streams = {**getattr(self._local, "streams", {}), stream.device.index: stream}
        self.device = stream.device.index

    def leave_stream(self, before: tuple[int, Stream | None]) -> None:
        device, stream = before
        if stream is not None:
            self.set_stream(stream)
        self.device = device

    def wait(self, why: str, clock: Clock, kind: str = "read") -> None:
        """The host waits for what `clock` says. Waits between which the device was given nothing to do count as one."""
        join(self.host, clock)
        if kind != "upload" and self._waited_after == self.operations:
            return
        self._waited_after = self.operations
        self.waits.append(Wait(why, where(), "model" if is_of_model() else kind))

    # ---------------------------------------------------------------- operations

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        leaves = list(tensors((args, kwargs)))
        there = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else self.resolve(torch.device(wanted))
        if packet is aten._pin_memory:
            return self._pin(args[0].clone())
        if packet is aten.is_pinned:
            return not there and self.is_pinned(args[0])
        if not there and (wanted is None or wanted.type != "cuda"):
            return self._on_host(func, args, kwargs, leaves)
        if packet is aten._to_copy or packet is aten.copy_:
            return self._copy(func, args, kwargs, wanted)
        device = wanted if wanted is not None and not there else self._common(func, args, leaves)
        if wanted is not None and wanted != device:  # `new_zeros(…, device="cpu")`
            device = wanted
        return self._compute(func, args, kwargs, leaves, device)

    def resolve(self, device: torch.device) -> torch.device:
        if device.type == BACKEND:
            device = torch.device("cuda", device.index)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.device)
        if device.type == "cuda" and device.index >= self.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {device.index}")
        return device

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage  # held, so that no other memory gets its number
        return tensor

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]) -> Any:
        pin = kwargs.pop("pin_memory", None)
        writes = written(func, args, kwargs)
        if not is_view(func):
            for leaf in leaves:
                self.ledger.on_host(self.host, leaf, writes=id(leaf) in writes)
        out = func(*args, **kwargs)
        return self._pin(out) if pin else out

    def _common(self, func: Any, args: tuple[Any, ...], leaves: list[torch.Tensor]) -> torch.device:
        """The device of an operation: that of all its tensors, but for CPU scalars, and indices on the CPU."""
        free = set()
        if func.overloadpacket in INDEXING:
            free = {id(leaf) for leaf in tensors(args[1]) if leaf.device == CPU}
        devices = {leaf.device for leaf in leaves if id(leaf) not in free and not (leaf.device == CPU and leaf.ndim == 0)}
        if len(devices) > 1 and func.overloadpacket not in MIXING:
            shown = ", ".join(f"{tuple(leaf.shape)} on {leaf.device}" for leaf in leaves)
            raise DeviceMismatchError(f"{func}: expected all tensors to be on the same device: {shown} ({where()})")
        return next(iter(devices), leaves[0].device)

    def _compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor], device: torch.device
    ) -> Any:
        self.operations += 1
        kwargs.pop("pin_memory", None)
        held = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, OnDevice)}
        inner_args, inner_kwargs = _on_cpu(args), _on_cpu(kwargs)
        writes = written(func, args, kwargs)
        views = is_view(func)
        if device.type == "cuda" and not views:
            stream = self.stream(device)
            clock = stream.advance(self.host)
            for leaf in leaves:
                if isinstance(leaf, OnDevice):
                    self.ledger.on_stream(stream, clock, leaf.held, writes=id(leaf) in writes, host=self.host)
            self._look_for_waits(func, args, kwargs, clock)
        out = computed(func, inner_args, inner_kwargs)
        if func.overloadpacket in (aten._local_scalar_dense, aten.equal):
            return out

        def wrap(value: torch.Tensor) -> torch.Tensor:
            if id(value) in held:
                return held[id(value)]
            if device.type != "cuda" or isinstance(value, OnDevice):
                return value
            if not views:
                self.ledger.on_stream(stream, clock, value, writes=True, home=stream, host=self.host)
            return self._placed(value, device)

        return mapped(out, wrap)

    def _look_for_waits(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], clock: Clock) -> None:
        packet = func.overloadpacket
        reading = packet in READING
        if packet in INDEXING:
            indices = list(tensors(args[1]))
            reading = any(leaf.dtype in (torch.bool, torch.uint8) and isinstance(leaf, OnDevice) for leaf in indices)
            if any(not isinstance(leaf, OnDevice) for leaf in indices):
                self.wait(f"{func}, indices on the CPU", clock, "upload")
        if packet is aten.repeat_interleave:
            reading = kwargs.get("output_size") is None
        if reading:
            self.wait(str(func), clock)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: torch.device | None) -> Any:
        """`_to_copy` and `copy_`: between devices, and between a device and the host."""
        in_place = func.overloadpacket is aten.copy_
        source = args[1] if in_place else args[0]
        target = args[0].device if in_place else wanted or source.device
        non_blocking = kwargs.get("non_blocking", args[2] if in_place and len(args) > 2 else False)
        out = self._copied(func, args, kwargs)
        if source.device == target and in_place is False and target.type == "cpu":
            return out
        pinned = self.is_pinned(args[0]) if in_place and target == CPU else non_blocking  # a new tensor is pinned for it
        if target == CPU and not in_place and non_blocking:
            self._pin(out)
        streams = [self.stream(device) for device in (source.device, target) if device.type == "cuda"]
        stream = streams[0]
        self.operations += 1
        if len(streams) > 1 and streams[1] is not stream:
            join(stream.clock, streams[1].clock)
        clock = stream.advance(self.host)
        if len(streams) > 1:
            join(streams[1].clock, clock)
        home = None if in_place or target == CPU else self.stream(target)
        self.ledger.on_stream(stream, clock, _held(source), writes=False, host=self.host)
        self.ledger.on_stream(stream, clock, _held(out), writes=True, home=home, host=self.host)
        if target == CPU and not (non_blocking and pinned):
            self.wait(f"{func} to the host", clock)
        if source.device == CPU and source.ndim > 0 and not (non_blocking and self.is_pinned(source)):
            self.wait(f"{func} from the host", clock, "upload")
        if in_place:
            return args[0]
        return out if target == CPU else self._placed(out, target)

    def _placed(self, held: torch.Tensor, device: torch.device) -> OnDevice:
        made = OnDevice(held, device)
        made.hold = self.ledger.hold(held, self.host)
        return made

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        inner_args, inner_kwargs = _on_cpu(args), _on_cpu(kwargs)
        inner_kwargs.pop("pin_memory", None)
        return func(*inner_args, **inner_kwargs)  # type: ignore[no-any-return]


class Mode(TorchDispatchMode):
    """Sends every operation to a simulation."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self.simulation = simulation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.simulation.run(func, args, kwargs or {})


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, OnDevice) else tensor


def _on_cpu(value: Any) -> Any:
    """Arguments of an operation, for the CPU."""
    if isinstance(value, torch.Tensor):
        return _held(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map(_on_cpu, value))
    if isinstance(value, dict):
        return {name: _on_cpu(each) for name, each in value.items()}
    return CPU if isinstance(value, torch.device) else value
