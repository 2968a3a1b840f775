"""What the compiler makes of the kernels, for GPUs that need not be here: the levels of the sum stay apart, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from nullspace.csrc_triton import selected, syrk

CAPABILITIES = (80, 89, 90)
KERNELS = ("syrk", "gluon", "grouped", "rows", "float64", "stage")
# Shared memory that one block may take (CUDA C++ programming guide, "Technical Specifications per Compute Capability").
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


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
    result = json.loads(done.stdout)
    failed = {name: facts["error"] for kernel in KERNELS for name, facts in result[kernel].items() if "error" in facts}
    assert not failed
    return result


def capability_of(name: str) -> int:
    return int(name.split("sm_")[1].split()[0])


@pytest.mark.processes
def test_the_levels_of_the_sum_stay_apart(compiled: dict[str, Any]) -> None:
    for kernel in ("syrk", "gluon", "grouped"):
        assert compiled[kernel]
        for name, facts in compiled[kernel].items():
            # Kahan's three additions an entry, in the loop, or one: were the chain merged into the pair or the sum, or the
            # correction simplified away (it is zero in real numbers), there would be fewer.
            additions = 1 if name.endswith("plain") else 3
            for loop in facts["loops"]:
                assert loop["float32 adds"] >= additions * facts["entries"] // facts["threads"], (kernel, name)
                assert loop["products"] > 0, (kernel, name)


@pytest.mark.processes
def test_nothing_spills_and_everything_fits(compiled: dict[str, Any]) -> None:
    for kernel in ("syrk", "gluon", "grouped", "float64", "stage"):
        for name, facts in compiled[kernel].items():
            assert all(loop.get("spills", 0) == 0 for loop in facts["loops"]), (kernel, name)
            assert facts["stack"] <= (768 if kernel == "gluon" else 256), (kernel, name)  # the epilogue
            assert facts["shared"] <= SHARED[capability_of(name)], (kernel, name)


@pytest.mark.processes
def test_nothing_is_atomic(compiled: dict[str, Any]) -> None:
    for kernel in KERNELS:
        assert all(facts["atomics"] == 0 for facts in compiled[kernel].values()), kernel


@pytest.mark.processes
def test_hopper_runs_on_its_own_tensor_cores_and_waits_once_a_window(compiled: dict[str, Any]) -> None:
    kernels = [facts for name, facts in compiled["syrk"].items() if "sm_90" in name and not name.startswith("fp32")]
    for facts in [*kernels, compiled["grouped"]["bf16 sm_90"]]:
        assert all("wgmma" in f".{m}" for m in facts["mma"]), facts["mma"]
        # A window is eight products of 16 tokens, and then one wait. ptxas, when it cannot follow an accumulator, waits after
        # each of them.
        assert facts["loop"]["products"] == 8
        assert facts["loop"]["waits"] == 1
    assert len(kernels) == 3


@pytest.mark.processes
def test_a_sum_of_one_addition_leaves_registers(compiled: dict[str, Any]) -> None:
    plain, kahan = (compiled["syrk"][f"bf16 sm_90 descriptor{suffix}"] for suffix in (" plain", ""))
    assert plain["registers"] <= 160 < kahan["registers"]
    assert plain["loop"]["instructions"] <= 0.6 * kahan["loop"]["instructions"]


@pytest.mark.processes
def test_warpgroups_of_gluon_do_not_wait_for_each_other(compiled: dict[str, Any]) -> None:
    for name, facts in compiled["gluon"].items():
        assert len(facts["loops"]) == 2, name  # a warpgroup each
        for loop in facts["loops"]:
            assert (loop["products"], loop["waits"], loop["barriers"]) == (8, 1, 0), name
            # All four warps have read their operands before one of them lets the loading warp overwrite these.
            assert loop["freed behind a barrier"], name


@pytest.mark.processes
def test_no_float32_product_is_a_single_tf32_one(compiled: dict[str, Any]) -> None:
    for capability in (80, 89):
        for facts in (compiled["syrk"][f"fp32 sm_{capability} pointer"], compiled["grouped"][f"fp32 sm_{capability}"]):
            assert facts["mma"] == ["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"]
            # m16n8k8, a block of 64 × 64 and 16 tokens: 64 products on 4 warps are one TF32 product for each; there are three.
            assert facts["loop"]["products"] == 3 * 16


@pytest.mark.processes
def test_selected_rows_are_multiplied_in_float64(compiled: dict[str, Any]) -> None:
    for name, facts in compiled["rows"].items():
        if capability_of(name) in (80, 90):  # devices with float64 tensor cores
            assert facts["mma"], name
            assert all(".f64.f64.f64.f64" in m for m in facts["mma"]), name


# ----------------------------------------------------------------------------------------------- every Triton, from the result file

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "compiled.json"
VERSIONS = json.loads(RESULT.read_text())["versions"]
# Cells that do not compile, and what happens instead: `Tiling.in_triton`, and `selected.multiplies_float64`.
GAPS = {("3.5.1", "gluon"): "", **dict.fromkeys([(v, "float64") for v in ("3.5.1", "3.6.0", "3.7.0")], "bf16 sm_100 matrix")}


def cells(*kernels: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Version, kernel, name and facts of what compiled."""
    for version, of_version in VERSIONS.items():
        for kernel in kernels or of_version:
            for name, facts in of_version[kernel].items():
                if "error" not in facts:
                    yield version, kernel, name, facts


def test_every_cell_compiles_or_is_a_stated_gap() -> None:
    assert [version.rpartition(".")[0] for version in VERSIONS] == ["3.5", "3.6", "3.7", "3.8", "3.9"]
    failed = set()
    for version, of_version in VERSIONS.items():
        names = [name for cells in of_version.values() for name in cells]
        assert {capability_of(name) for name in names} == {80, 86, 89, 90, 100, 120}
        assert set(of_version) == {*KERNELS, "grouped rows", "zero", "sum rows"}
        failed |= {(version, kernel, name) for kernel, cells in of_version.items() for name, f in cells.items() if "error" in f}
    assert failed == {
        (version, kernel, name)
        for (version, kernel), ending in GAPS.items()
        for name in VERSIONS[version][kernel]
        if name.endswith(ending)
    }
    for version, kernel in GAPS:  # what takes their place does compile
        if kernel == "float64":
            assert not selected.multiplies_float64((10, 0), tuple(map(int, version.split(".")[:2])))
            assert "error" not in VERSIONS[version]["rows"]["bf16 sm_100"]
        else:
            assert tuple(map(int, version.split(".")[:2])) < syrk.GLUON_VERSION


def test_no_version_spills_in_the_loop() -> None:
    for *where, facts in cells():
        assert all(loop.get("spills", 0) == 0 for loop in facts["loops"]), where
    for version, kernel, name, facts in cells("rows", "grouped rows", "stage", "zero", "sum rows"):
        assert facts["stack"] <= 80, (version, kernel, name)


def test_every_version_keeps_the_levels_apart() -> None:
    for version, kernel, name, facts in cells("syrk", "gluon", "grouped"):
        additions = 1 if name.endswith("plain") else 3
        # Compute capability 10 adds two numbers an instruction.
        numbers = 2 if capability_of(name) == 100 and additions == 3 else 1
        for loop in facts["loops"]:
            assert numbers * loop["float32 adds"] >= additions * facts["entries"] // facts["threads"], (version, kernel, name)


def test_every_version_waits_once_a_window_on_hopper() -> None:
    for version, kernel, name, facts in cells("syrk", "gluon", "grouped"):
        if capability_of(name) == 90 and not name.startswith("fp32"):
            for loop in facts["loops"]:
                assert (loop["products"], loop["waits"]) == (8, 1), (version, kernel, name)
                if kernel == "gluon":
                    assert (loop["barriers"], loop["freed behind a barrier"]) == (0, True), (version, name)
                else:
                    assert 0 < loop["barriers"] <= 4, (version, kernel, name)


def test_every_version_fits_into_shared_memory() -> None:
    for version, kernel, name, facts in cells():
        assert facts["shared"] <= SHARED[capability_of(name)], (version, kernel, name)
        assert facts["atomics"] == 0, (version, kernel, name)
