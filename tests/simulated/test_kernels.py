"""Every kernel through Triton's launch path: compiled for the launch at hand, on the devices that it serves, in real widths."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("simulated.runtime", exc_type=ImportError)

from simulated.kernels import SHARED, Launch, simulated_kernels
from simulated.runtime import simulated_cuda
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from nullspace import csrc_triton
from nullspace.csrc_triton import syrk, tiles
from nullspace.moments.sums import TokenMask
from nullspace.moments.sums_grouped import GroupedTritonSums
from nullspace.moments.sums_triton import TritonSums

CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CUDA = torch.device("cuda", 0)


def launchable() -> set[str]:
    """The names of the kernels that the host launches."""
    found = set()
    for module in {importlib.import_module(f"{csrc_triton.__name__}.{name}") for name in csrc_triton._OPS.values()}:
        kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction)}
        found |= {name for name in kernels if f"{name}[" in inspect.getsource(module)}
    return found


def launched(capability: tuple[int, int], call: Callable[[], None]) -> list[Launch]:
    """What a call launches, after the probe of the kernels that precedes any."""
    with simulated_cuda(capability=capability) as simulation, simulated_kernels(simulation) as launches:
        assert csrc_triton.unavailable(CUDA) is None
        launches.clear()
        call()
        assert all(launch.shared <= 1024 * SHARED[capability] for launch in launches)
        return list(launches)


def add_rows(d: int, dtype: torch.dtype) -> None:
    """Contiguous, masked and strided rows, enough for a launch."""
    sums = TritonSums(d, CUDA)
    x = torch.ones(700, d, dtype=dtype, device=CUDA)
    sums.add(x, None)
    sums.add(x, TokenMask(torch.arange(700) % 3 > 0))
    sums.add(torch.ones(700, d + 3, dtype=dtype, device=CUDA)[:, :d], None)
    sums.flush()


def add_groups(d: int, dtype: torch.dtype) -> None:
    """Rows of four groups, of which one gets none."""
    sums = GroupedTritonSums(4, d, CUDA)
    for counts in ((300, 0, 700, 1), (600, 0, 0, 5)):
        sums.add(torch.ones(sum(counts), d, dtype=dtype, device=CUDA), counts)
    sums.flush()


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_kernel_is_launched(capability: tuple[int, int]) -> None:
    seen = set()
    for dtype in DTYPES:
        launches = launched(capability, lambda dtype=dtype: (add_rows(576, dtype), add_groups(576, dtype)))
        seen |= {launch.kernel for launch in launches}
    assert seen == launchable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [1, 577, 4096])
def test_widths(d: int, dtype: torch.dtype) -> None:
    """An odd width's rows are 16 bytes apart only in the staging buffer, which pads them."""
    launches = launched((9, 0), lambda: (add_rows(d, dtype), add_groups(min(d, 768), dtype)))
    block = tiles.tiling_for(dtype, CUDA, d).block if dtype == torch.float32 else 128
    blocks = -(-d // block)
    products = [launch for launch in launches if launch.kernel == "_syrk"]
    assert products
    for product in products:
        assert product.signature["x"].startswith("tensordesc") == (dtype != torch.float32)
        assert product.grid == (blocks * (blocks + 1) // 2, 1, 1)


def test_the_widest_layer_of_a_model_of_8_billion() -> None:
    launches = launched((9, 0), lambda: add_rows(14336, torch.bfloat16))
    product = next(launch for launch in launches if launch.kernel == "_syrk")
    assert product.grid == (112 * 113 // 2, 1, 1)
    assert product.signature["x"].startswith("tensordesc")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_of_the_tile_table(dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that do not fit say so; the one that the table names fits."""
    monkeypatch.setattr(syrk, "gluon_obstacle", lambda _: None)  # it compares what its launch computes
    with simulated_cuda(capability=capability) as simulation, simulated_kernels(simulation) as launches:
        x, g = torch.ones(1024, 1024, dtype=dtype, device=CUDA), torch.zeros(1024, 1024, dtype=torch.float64, device=CUDA)
        fit = []
        for tiling in tiles.candidates(dtype, CUDA, 1024):
            with contextlib.suppress(OutOfResources):
                syrk.syrk_accumulate(g, x, tiling=tiling)
                fit.append(tiling)
        kernels = {launch.kernel for launch in launches}
        assert tiles.tiling_for(dtype, CUDA, 1024) in fit
    assert ("_syrk_gluon" in kernels) == (capability == (9, 0) and dtype != torch.float32)
