"""`simulated_cuda`: within it `torch.cuda` describes simulated devices, and tensors can be put on them."""

from __future__ import annotations

import os

if os.environ.get("NULLSPACE_SIMULATE_GPU") != "1":
    raise ImportError("simulated GPUs run by `make simulate-gpu`, in an environment of their own")

import contextlib
import functools
import math
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from simulated import device as simulated_device
from simulated.device import BACKEND, Mode, OnDevice, Simulation, set_data
from simulated.streams import Event, Stream
from torch import nn
from torch.nn import functional
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` by its definition: PyTorch's own asks the driver which kernel it has."""
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1).nan_to_num() @ value


@functools.cache
def _register_backend() -> None:
    torch._C._ensureCUDADeviceGuardSet()
    _setup_privateuseone_for_python_backend(BACKEND, _OfCuda())


def _forget() -> None:
    """Empty the library's caches: they may hold streams, and facts about devices, of another simulation."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "nullspace"]:
        for value in list(vars(sys.modules[name]).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


class _OfCuda:
    """PyTorch's module of the backend: `torch.cuda`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


@contextlib.contextmanager
def simulated_cuda(devices: int = 1, capability: tuple[int, int] = (9, 0), memory: int = 80 * 10**9) -> Iterator[Simulation]:
    """Context manager: simulated devices. At its end there must have been no race.

    Args:
        devices: their number.
        capability: their compute capability.
        memory: bytes of each.
    """
    _register_backend()
    simulation = Simulation(devices, capability, memory)
    mode = Mode(simulation)
    simulated_device._current.append(simulation)
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    lifted = torch._C._only_lift_cpu_tensors()
    _forget()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` then makes a CPU tensor, and copies it
    try:
        with pytest.MonkeyPatch.context() as patch:
            _patch(patch, simulation, mode)
            with mode:
                yield simulation
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_swap_module_params_on_conversion(swapping)
        simulated_device._current.pop()
        _forget()
    assert not simulation.ledger.races, simulation.ledger.races


def _patch(patch: pytest.MonkeyPatch, simulation: Simulation, mode: Mode) -> None:
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        name="simulated",
        multi_processor_count=132,
        total_memory=simulation.memory,
        major=simulation.capability[0],
        minor=simulation.capability[1],
        warp_size=32,
        shared_memory_per_block_optin=227 * 1024,
        regs_per_multiprocessor=65536,
        is_integrated=0,
        gcnArchName="",
    )

    def exchange(index: int) -> int:
        before = simulation.device
        if index >= 0:
            simulation.resolve(torch.device("cuda", index))
            simulation.device = index
        return before

    @contextlib.contextmanager
    def on_stream(stream: Stream | None) -> Iterator[Stream | None]:
        before = simulation.enter_stream(stream)
        try:
            yield stream
        finally:
            simulation.leave_stream(before)

    def synchronize(device: Any = None) -> None:
        simulation.wait("torch.cuda.synchronize", dict.fromkeys(range(2**12), 2**62))

    state = torch.zeros(16, dtype=torch.uint8)
    numbers: dict[str, Any] = {
        "get_rng_state": lambda device="cuda": state.clone(),
        "set_rng_state": lambda new_state, device="cuda": None,
        "get_rng_state_all": lambda: [state.clone() for _ in range(simulation.devices)],
        "set_rng_state_all": lambda new_states: None,
        "manual_seed_all": lambda seed: None,
        "manual_seed": lambda seed: None,
    }
    values: dict[str, Any] = {
        "simulation": simulation,
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "current_stream": simulation.stream,
        "default_stream": simulation.default_stream,
        "set_stream": simulation.set_stream,
        "synchronize": synchronize,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: simulation.capability >= (8, 0),
        "device_count": lambda: simulation.devices,
        "current_device": lambda: simulation.device,
        "set_device": lambda device: exchange(cuda._utils._get_device_index(device)) and None,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_capability": lambda device=None: simulation.capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "simulated",
        "mem_get_info": lambda device=None: (simulation.memory, simulation.memory),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "get_per_process_memory_fraction": lambda device=None: 1.0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "_is_in_bad_fork": lambda: False,
    }
    for name, value in numbers.items():
        patch.setattr(cuda.random, name, value)
    for name, value in {**values, **numbers}.items():
        patch.setattr(cuda, name, value, raising=False)
    patch.setattr(functional, "scaled_dot_product_attention", attention)

    plain = torch.Tensor.data

    def set_parameter(parameter: torch.Tensor, value: torch.Tensor) -> None:
        if isinstance(value, OnDevice):
            set_data(parameter, value)
        else:
            plain.__set__(parameter, value)  # type: ignore[attr-defined]

    patch.setattr(nn.Parameter, "data", property(plain.__get__, set_parameter), raising=False)  # type: ignore[attr-defined]

    run = threading.Thread.run

    def run_under_mode(thread: threading.Thread) -> None:
        with mode:  # modes are per thread
            run(thread)

    patch.setattr(threading.Thread, "run", run_under_mode)
