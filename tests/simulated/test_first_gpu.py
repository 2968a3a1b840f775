"""The first half hour on a GPU, on a simulated one, at tiny sizes: every branch for a device runs, and its rows are right.

Not here: rounding, since a simulated kernel's sums are those of its twin, at full size; methods and PEFT's doors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("simulated.runtime", exc_type=ImportError)
pytest.importorskip("benchmarks.first_gpu", reason="needs the repository's root on the path: python -m pytest")

from simulated.streams import Event

from benchmarks import gpu_models, gpu_variants
from benchmarks.first_gpu import check, command, experts, job, kernels, profile, solvers, sums

CUDA = torch.device("cuda", 0)
LEFT_OUT = (check.real_products, check.methods, check.doors)


class HostGenerator(torch.Generator):
    """Of whichever device it is asked for: a simulated one has none."""

    def __new__(cls, device: Any = "cpu") -> HostGenerator:
        return super().__new__(cls, "cpu")


@pytest.fixture
def small(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiny sizes under the device's name, and what of `torch.cuda` these programs ask for alone."""
    for module in (kernels, sums, solvers, profile):
        monkeypatch.setitem(module.SIZES, "cuda", module.SIZES["cpu"])
    monkeypatch.setitem(experts.BLOCKS, "cuda", experts.BLOCKS["cpu"])
    monkeypatch.setitem(experts.TOKENS, "cuda", experts.TOKENS["cpu"])
    for name in ("_sleep", "set_sync_debug_mode", "set_per_process_memory_fraction", "clock_rate"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 1755, raising=False)
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(Event, "elapsed_time", lambda self, other: 1.0, raising=False)
    return gpu


def running(name: str, out: Path) -> command.Command:
    return command.Command(name, ["a question?"], command.options_of(name, "", ["--out", str(out)]))


@pytest.mark.parametrize("variant", [kernels.CEILINGS, "default", "plain", "gemm", "window 64", "pointers"])
def test_variants_of_the_kernel(variant: str, small: Any) -> None:
    rows = list(kernels.rows_of(variant, "cuda"))
    assert "cuBLAS" in rows[0]["startup"]
    assert not any("failed" in row for row in rows)
    if variant != kernels.CEILINGS:
        assert rows[1]["exact"]
        assert rows[-1]["ms"] == 1.0
        assert variant == "gemm" or rows[-1]["cycles a window"] > 0


def test_sums_and_experts(small: Any, tmp_path: Path) -> None:
    with running("sums", tmp_path) as run:
        sums.run(run)
    assert {row["what"] for row in run.rows} == {"speed", "experts", "error"}
    assert not run.failed


def test_solvers(small: Any, tmp_path: Path) -> None:
    with running("solvers", tmp_path) as run:
        solvers.run(run)
    assert {row["what"] for row in run.rows} == {"small eigenproblem", "solver", "part", "several at once", "tuning"}
    assert not run.failed
    assert any("allocated_squares" in row for row in run.rows)


@pytest.mark.parametrize("one", [c for c in check.CHECKS if c not in LEFT_OUT], ids=lambda one: one.__name__)
def test_checks(one: Any, small: Any) -> None:
    one(CUDA)


@pytest.mark.parametrize(
    "variant", ["forward", "sums-layerwise", "resident", "layerwise-device", "layerwise-host", "layerwise-disk", "capped"]
)
def test_variants_of_the_job(variant: str, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = job.workload("cpu", 2)
    options.device = "cuda"
    monkeypatch.setattr(gpu_variants, "CAPPED_MODEL", "tiny")
    result = gpu_models.run_variant(options, variant)
    assert "out_of_memory" not in result
    assert result["seconds"] > 0
    assert "cuSOLVER" in result["startup_s"]
    assert {"peak_above_weights_gb", "reserved_above_weights_gb"} <= result.keys()
