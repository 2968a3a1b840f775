"""The launches before a run: every kernel that a run launches is among them, and the first one that fails is named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import nullspace.csrc_triton as csrc_triton

pytest.importorskip("triton")
from nullspace.csrc_triton import grouped, probe, selected, stage, syrk, tiles
from nullspace.csrc_triton.tiles import HALF_DEFAULT

MODULES = {"stage_rows": stage, "zero_rows": stage, "syrk_accumulate": syrk, "syrk_accumulate_rows": selected}
MODULES |= dict.fromkeys(["syrk_accumulate_grouped", "syrk_accumulate_rows_grouped", "sum_rows_grouped"], grouped)


def names(device: torch.device) -> list[str]:
    return [name for name, _ in probe.launches(device)]


def test_every_kernel_of_a_run_is_launched_on_both_kinds_of_input() -> None:
    assert set(MODULES) == set(csrc_triton._OPS)
    for kind in ("bfloat16", "float32"):
        assert {name.split()[0] for name in names(torch.device("cpu")) if name.endswith(kind)} == set(MODULES)


def test_every_tiling_of_the_table_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    with_stubs(monkeypatch)
    table = {1: HALF_DEFAULT[1]._replace(splits=2), 2048: HALF_DEFAULT[1], 4096: HALF_DEFAULT[1]._replace(variant="plain")}
    monkeypatch.setattr(tiles, "HALF_DEFAULT", table)
    launched = []
    stub = syrk.syrk_accumulate
    monkeypatch.setattr(
        syrk, "syrk_accumulate", lambda g, x, **options: (launched.append(options["tiling"]), stub(g, x, **options))
    )
    assert probe.first_failure(torch.device("cpu")) is None
    assert launched == [*table.values(), tiles.SINGLE]


def test_the_kernels_pass(device: torch.device) -> None:
    assert probe.first_failure(device) is None


@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_that_fails_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stubs that compute by PyTorch, but for one that fails for float32 alone: whatever its place, it is found."""
    with_stubs(monkeypatch)
    stub = getattr(MODULES[name], name)
    assert probe.first_failure(torch.device("cpu")) is None

    def out_of_resource(*arguments: Any, **options: Any) -> Any:
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in arguments):
            raise RuntimeError("out of resource: shared memory, Required: 262144\nmore")
        return stub(*arguments, **options)

    monkeypatch.setattr(MODULES[name], name, out_of_resource)
    expected = next(launched for launched in names(torch.device("cpu")) if launched.split()[0] == name and "float32" in launched)
    assert probe.first_failure(torch.device("cpu")) == (
        f"Triton cannot launch {expected} (RuntimeError: out of resource: shared memory, Required: 262144)"
    )


@pytest.mark.parametrize("name", ["syrk_accumulate", "zero_rows", "sum_rows_grouped"])
def test_a_kernel_that_computes_something_else_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_stubs(monkeypatch)
    monkeypatch.setattr(MODULES[name], name, lambda *arguments, **options: None)
    assert probe.first_failure(torch.device("cpu")) == f"{name} on bfloat16 computes wrong numbers"


def with_stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the kernels their definitions, on one packed panel, which is a square."""
    naive = probe.naive

    def square(g: torch.Tensor, d: int) -> torch.Tensor:
        return g.view(*g.shape[:-1], d, d)

    stubs = {
        "stage_rows": naive.stage_rows,
        "zero_rows": naive.zero_rows,
        "sum_rows_grouped": naive.sum_rows_grouped,
        "syrk_accumulate": lambda g, x, panel_rows, tiling: naive.syrk_accumulate(square(g, x.shape[1]), x),
        "syrk_accumulate_rows": lambda g, x, rows, count, panel_rows: naive.syrk_accumulate_rows(
            square(g, x.shape[1]), x, rows, count
        ),
        "syrk_accumulate_grouped": lambda g, x, offsets, rows, panel_rows, tiling: naive.syrk_accumulate_grouped(
            square(g, x.shape[1]), x, offsets, rows
        ),
        "syrk_accumulate_rows_grouped": lambda g, x, rows, offsets, panel_rows: naive.syrk_accumulate_grouped(
            square(g, x.shape[1]), x, offsets, rows
        ),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(MODULES[name], name, stub)


def test_a_device_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    monkeypatch.setattr(probe, "first_failure", lambda device: f"failure {next(calls)}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    csrc_triton._launch_failure.cache_clear()
    try:
        devices = [torch.device("cuda", index) for index in (0, 0, 1, 0)]
        assert [csrc_triton.unavailable(device) for device in devices] == ["failure 0", "failure 0", "failure 1", "failure 0"]
    finally:
        csrc_triton._launch_failure.cache_clear()
