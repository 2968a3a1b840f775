"""What the compiler makes of the kernels, for GPUs that need not be here: the levels of the sum stay apart, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes

pytest.importorskip("triton")
CAPABILITIES = (80, 89, 90)
# Shared memory that one block may take (CUDA C++ programming guide, "Technical Specifications per Compute Capability").
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run(
        [sys.executable, script, "--representative", *map(str, CAPABILITIES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def capability_of(name: str) -> int:
    return int(name.split("sm_")[1].split()[0])


def test_the_levels_of_the_sum_stay_apart(compiled: dict[str, Any]) -> None:
    for kernel in ("syrk", "grouped"):
        assert compiled[kernel]
        for name, facts in compiled[kernel].items():
            # Kahan's three additions an entry, in the loop: were the chain merged into the pair, or the correction simplified away
            # (it is zero in real numbers), there would be fewer.
            assert facts["loop"]["float32 adds"] >= 3 * facts["entries"] // facts["threads"], (kernel, name)
            assert facts["loop"]["products"] > 0, (kernel, name)


def test_nothing_spills_and_everything_fits(compiled: dict[str, Any]) -> None:
    for kernel in ("syrk", "grouped", "stage"):
        for name, facts in compiled[kernel].items():
            assert facts["loop"]["spills"] == 0, (kernel, name)
            assert facts["stack"] <= 256, (kernel, name)  # the epilogue: none with Triton 3.9, a little with older ones
            assert facts["shared"] <= SHARED[capability_of(name)], (kernel, name)


def test_nothing_is_atomic(compiled: dict[str, Any]) -> None:
    for kernel in ("syrk", "grouped", "rows", "stage"):
        assert all(facts["atomics"] == 0 for facts in compiled[kernel].values()), kernel


def test_hopper_runs_on_its_own_tensor_cores_and_waits_once_a_window(compiled: dict[str, Any]) -> None:
    kernels = [facts for name, facts in compiled["syrk"].items() if "sm_90" in name and not name.startswith("fp32")]
    for facts in [*kernels, compiled["grouped"]["bf16 sm_90"]]:
        assert all("wgmma" in f".{m}" for m in facts["mma"]), facts["mma"]
        # A window is eight products of 16 tokens, and then one wait. ptxas, when it cannot follow an accumulator, waits after
        # each of them.
        assert facts["loop"]["products"] == 8
        assert facts["loop"]["waits"] == 1
    assert len(kernels) == 3


def test_no_float32_product_is_a_single_tf32_one(compiled: dict[str, Any]) -> None:
    for capability in (80, 89):
        for facts in (compiled["syrk"][f"fp32 sm_{capability} pointer"], compiled["grouped"][f"fp32 sm_{capability}"]):
            assert facts["mma"] == ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"]
            # m16n8k8, a block of 64 × 64 and 16 tokens: 64 products on 4 warps are one TF32 product for each; there are three.
            assert facts["loop"]["products"] == 3 * 16


def test_selected_rows_are_multiplied_in_float64(compiled: dict[str, Any]) -> None:
    for name, facts in compiled["rows"].items():
        if capability_of(name) in (80, 90):  # devices with float64 tensor cores
            assert facts["mma"], name
            assert all(".f64.f64.f64.f64" in m for m in facts["mma"]), name
