"""Triton's launch path with a driver that is not there: kernels are compiled and their launches checked, but not run.

`simulated_kernels` gives Triton a driver whose launcher records. Everything before it is Triton's own: which specialisation a
launch asks for, its compilation to a binary of the device, shared memory against the device's. The launcher refuses what the driver
of a GPU would: pointers to another device, grids and tensor descriptors out of their limits. What the kernel would have written is
then computed by its twin in `nullspace.csrc_triton.naive`; large products are left out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from simulated.device import OnDevice, Simulation

import nullspace.csrc_triton as csrc_triton
from nullspace.csrc_triton import naive

# Shared memory that one block may take (CUDA C++ programming guide, "Technical Specifications per Compute Capability").
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
# Parameters of kernels that are only read; all others are taken as written.
READ = {"x", "tiles", "rows", "listed", "offsets", "count"}
WRITTEN = {("_zero", "x")}
# Entries of the input of a product that is computed.
LARGEST = 2**20
# Where the specification has another name.
TWINS = {"syrk_accumulate_rows_grouped": lambda g, x, rows, offsets: naive.syrk_accumulate_grouped(g, x, offsets, rows)}


class LaunchError(RuntimeError):
    """A launch that the driver of a GPU would refuse."""


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: its name.
        grid: programs along each axis.
        signature: parameter name → Triton's type, "constexpr" for constants.
        arguments: parameter name → argument.
        shared: bytes of shared memory.
        warps: of a program.
    """

    kernel: str
    grid: tuple[int, int, int]
    signature: dict[str, str]
    arguments: dict[str, Any]
    shared: int
    warps: int


class Driver:
    """Stands for Triton's driver of NVIDIA GPUs. Compiled kernels hold it: it serves one simulation after the other.

    Attributes:
        launches: all that the simulation made.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.utils = self
        self._compiled_for: tuple[int, int] | None = None

    def serve(self, simulation: Simulation) -> None:
        self._simulation, self.launches = simulation, []
        if simulation.capability != self._compiled_for:
            self._compiled_for = simulation.capability
            _forget_kernels()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return functools.partial(self._launch, source, metadata)

    def get_current_device(self) -> int:
        return self._simulation.device

    def get_current_stream(self, device: int) -> int:
        return self._simulation.stream(device).number

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self._simulation.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1024 * SHARED[self._simulation.capability]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        assert binary[:4] == b"\x7fELF"
        return None, 0, 0, 0, 1024  # module (None: nothing to unload), function, registers, spills, threads at most

    def _launch(self, source: Any, metadata: Any, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        names = list(source.fn.arg_names)
        arguments = dict(zip(names, rest[-len(names) :], strict=True))
        device = torch.device("cuda", self._simulation.device)
        kernel = source.fn.__name__
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise LaunchError(f"{kernel}: a grid of {(x, y, z)}")
        tensors = {}
        for name, value in arguments.items():
            if hasattr(value, "block_shape"):
                _check_descriptor(kernel, value)
            value = getattr(value, "base", value)
            if isinstance(value, torch.Tensor):
                if value.device != device:
                    raise LaunchError(f"{kernel}: {name} is on {value.device}, and the launch on {device}")
                tensors[name] = value
        self._simulation.operations += 1
        current = self._simulation.stream(device)
        assert current.number == stream
        clock = current.advance(self._simulation.host)
        for name, tensor in tensors.items():
            writes = name not in READ or (kernel, name) in WRITTEN
            self._simulation.ledger.on_stream(current, clock, tensor.held, writes=writes, host=self._simulation.host)  # type: ignore[attr-defined]
        launch = Launch(kernel, (x, y, z), dict(source.signature), arguments, metadata.shared, metadata.num_warps)
        self.launches.append(launch)


def _check_descriptor(kernel: str, descriptor: Any) -> None:
    """The conditions of `cuTensorMapEncodeTiled`."""
    size = descriptor.base.element_size()
    steps = [stride * size for stride in descriptor.strides[:-1]]
    if descriptor.base.data_ptr() % 16 or any(step % 16 or not 0 < step < 2**40 for step in steps):
        raise LaunchError(f"{kernel}: a descriptor of steps of {steps} bytes, from {descriptor.base.data_ptr():#x}")
    if any(not 0 < n <= 2**32 for n in descriptor.shape) or any(not 0 < n <= 256 for n in descriptor.block_shape):
        raise LaunchError(f"{kernel}: a descriptor of {descriptor.shape} in blocks of {descriptor.block_shape}")
    if descriptor.block_shape[-1] * size % 16:
        raise LaunchError(f"{kernel}: a descriptor's block of {descriptor.block_shape[-1]} columns")


_driver = Driver()


def _forget_kernels() -> None:
    """Forget what is compiled, and for which device."""
    from triton.compiler import compiler
    from triton.runtime.jit import JITFunction

    compiler.max_shared_mem.cache_clear()
    for name in [name for name in sys.modules if name.startswith(csrc_triton.__name__)]:
        for kernel in vars(sys.modules[name]).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


@contextlib.contextmanager
def simulated_kernels(simulation: Simulation) -> Iterator[list[Launch]]:
    """Context manager, inside of `simulated_cuda`: launches are checked and recorded."""
    from triton.runtime import driver

    before = driver._active
    _driver.serve(simulation)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in csrc_triton._OPS.items():
            place = importlib.import_module(f"{csrc_triton.__name__}.{module}")
            patch.setattr(place, name, _computed(getattr(place, name), TWINS.get(name) or getattr(naive, name)))
        driver.set_active(_driver)
        try:
            yield _driver.launches
        finally:
            driver._active = before


def _computed(operation: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that, after its launches, computes what they would have."""

    @functools.wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = len(_driver.launches)
        result = operation(*args, **kwargs)
        if len(_driver.launches) == before:  # PyTorch's own products have computed it
            return result
        named = inspect.signature(operation).bind(*args, **kwargs).arguments
        panel_rows = named.pop("panel_rows", None)
        named.pop("tiling", None)
        held = {name: value.held if isinstance(value, OnDevice) else value for name, value in named.items()}
        sums, x = held.get("g"), held["x"]
        if sums is not None and x.numel() > LARGEST:
            return result
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            if panel_rows is not None:
                grouped = sums.ndim == 2
                held["g"] = x.new_zeros(*((len(sums),) if grouped else ()), x.shape[1], x.shape[1], dtype=torch.float64)
            # By position: the specification names its tensors by their axes.
            values = twin(*(held.get(name) for name in inspect.signature(operation).parameters if name in held))
            if panel_rows is not None:
                for packed, dense in zip(sums if grouped else [sums], held["g"] if grouped else [held["g"]], strict=True):
                    _add_packed(packed, dense, panel_rows)
            for made, value in zip(result or (), values or (), strict=True):
                made.held.copy_(value)
        return result

    return call


def _add_packed(packed: torch.Tensor, dense: torch.Tensor, panel_rows: int) -> None:
    """Add the lower triangle of a matrix to its row panels, as `LowerTriangle` packs them."""
    at, d = 0, len(dense)
    for start in range(0, d, panel_rows):
        stop = min(start + panel_rows, d)
        panel = packed[at : at + (stop - start) * stop].view(stop - start, stop)
        panel.add_(dense[start:stop, :stop])
        at += panel.numel()
