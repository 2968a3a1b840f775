"""The variants of `syrk_accumulate` compute one thing; which one runs, and that none is tuned in a run."""

from __future__ import annotations

import ast
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nullspace.csrc_triton as csrc_triton
from inputs import randn, small_integers
from nullspace.csrc_triton import naive, syrk_accumulate, syrk_accumulate_grouped, syrk_accumulate_rows
from nullspace.csrc_triton.tiles import DOUBLE, HALF, IN_TRITON, NARROW, SINGLE, VARIANTS, Tiling, candidates, tiling_for
from nullspace.moments.triangle import PANEL_ROWS
from reference import entrywise_error

pytest.importorskip("triton")
from nullspace.csrc_triton import gemm, grouped, selected, stage, syrk

HOPPER = HALF[9, 0][2048]
SMALL = Tiling(block=64, block_k=32, window=64, warps=4, stages=2, descriptor=False)
# Windows of one step and of two, tokens shared by programs, and every variant.
TILINGS = [
    SMALL._replace(variant="plain"),
    SMALL._replace(block_k=64, variant="plain"),
    SMALL._replace(splits=3),
    SMALL._replace(variant="plain", splits=2),
    HOPPER._replace(variant="gluon-kahan"),
    HOPPER._replace(variant="gluon-plain", splits=2),
    SMALL._replace(variant="gemm"),
]
IDS = [f"{t.variant}-{t.window // t.block_k}-{t.splits}" for t in TILINGS]


@pytest.mark.parametrize("tiling", TILINGS, ids=IDS)
@pytest.mark.parametrize(
    ("tokens", "d", "dtype"),
    [(0, 3, torch.bfloat16), (1, 5, torch.bfloat16), (150, 70, torch.float16), (150, 9, torch.float32)],
)
def test_each_adds_the_lower_triangle(tokens: int, d: int, dtype: torch.dtype, tiling: Tiling, device: torch.device) -> None:
    x = small_integers(tokens, d + 3, dtype).to(device)[:, 3:]
    whole = torch.full((d + 2, d + 5), 7.0, dtype=torch.float64, device=device)
    g = whole[1:-1, 2:-3]  # a part of a matrix
    expected = whole.clone()
    naive.syrk_accumulate(expected[1:-1, 2:-3], x)
    syrk_accumulate(g, x, tiling=tiling)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("tiling", [SMALL._replace(splits=2), SMALL._replace(variant="gemm")], ids=["split", "gemm"])
def test_panels_are_packed_triangles(tiling: Tiling, device: torch.device) -> None:
    d, panel = 70, 64
    x = small_integers(130, d, torch.bfloat16).to(device)
    packed = torch.zeros(syrk.packed_size(d, panel), dtype=torch.float64, device=device)
    expected = torch.zeros(d, d, dtype=torch.float64, device=device)
    naive.syrk_accumulate(expected, x)
    syrk_accumulate(packed, x, panel_rows=panel, tiling=tiling)
    panels = [packed[: panel**2].view(panel, panel), packed[panel**2 :].view(d - panel, d)]
    assert torch.equal(panels[0], expected[:panel, :panel])
    assert torch.equal(panels[1], expected[panel:])


def test_products_that_do_not_fit_into_memory_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "ENTRIES", 3 * 20**2)
    x, g = small_integers(500, 20, torch.bfloat16).to(device), torch.zeros(20, 20, dtype=torch.float64, device=device)
    expected = g.clone()
    naive.syrk_accumulate(expected, x)
    syrk_accumulate(g, x, tiling=SMALL._replace(variant="gemm"))
    assert torch.equal(g, expected)


@pytest.mark.parametrize("tiling", [TILINGS[1], TILINGS[3], TILINGS[6]], ids=["plain", "split", "gemm"])
def test_every_entry_is_right_and_the_same_twice(tiling: Tiling, device: torch.device) -> None:
    x = (randn(140, 40) * torch.logspace(-3, 3, 40)).bfloat16().to(device)
    sums = torch.zeros(2, 40, 40, dtype=torch.float64, device=device)
    for g in sums:
        syrk_accumulate(g, x, tiling=tiling)
    assert torch.equal(*sums)
    assert entrywise_error((sums[0] + sums[0].tril(-1).T).cpu(), x.cpu()) <= 1e-6


@pytest.mark.parametrize(("variant", "kept"), [("kahan", 8), ("plain", 0), ("gemm", 8)])
def test_kahan_and_float64_keep_what_a_plain_addition_rounds_off(variant: str, kept: int, device: torch.device) -> None:
    # The first window's 2^24 is where float32 ends; each of the 8 windows that follow is 1.
    x = torch.zeros(9 * 64, 1, dtype=torch.float16, device=device)
    x[::64] = 1.0
    x[0] = 2.0**12
    g = torch.zeros(1, 1, dtype=torch.float64, device=device)
    syrk_accumulate(g, x, tiling=SMALL._replace(variant=variant, block_k=64))
    assert g.item() == 2**24 + kept


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_are_summed_by_the_variant_of_triton(variant: str, device: torch.device) -> None:
    x = randn(150, 40, dtype=torch.bfloat16).to(device)
    offsets = torch.tensor([0, 0, 100, 150], device=device)
    tiling = HOPPER._replace(variant=variant)
    both = torch.zeros(2, 3, 40, 40, dtype=torch.float64, device=device)
    syrk_accumulate_grouped(both[0], x, offsets, tiling=tiling)
    syrk_accumulate_grouped(both[1], x, offsets, tiling=tiling._replace(variant=IN_TRITON.get(variant, variant)))
    assert both[0].any()
    assert torch.equal(*both)


# ------------------------------------------------------------------------------------------------ which one runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "fast"}, "a tiling's variant is one of kahan, plain, gluon-kahan, gluon-plain, gemm, not 'fast'"),
        ({"splits": 0}, "split over 1 program or more, not 0"),
        ({"variant": "gluon-plain", "block": 64}, "gluon-plain has tiles of 128 on 8 warps .* not tiles of 64 on 8 warps"),
        ({"variant": "gluon-kahan", "window": 256}, "windows of one step, not .* windows of 256 tokens in steps of 128"),
        ({"window": 100}, "a window of 100 tokens is not made of whole steps of 128"),
    ],
)
def test_tilings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    for tokens in (0, 5):
        with pytest.raises(ValueError, match=message):
            syrk_accumulate(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(tokens, 3), tiling=HOPPER._replace(**changes))


@pytest.mark.parametrize(
    ("variant", "x", "obstacle", "runs"),
    [
        ("gluon-kahan", torch.zeros(4, 16, dtype=torch.bfloat16), None, "gluon-kahan"),
        ("gluon-kahan", torch.zeros(4, 16, dtype=torch.bfloat16), "no Gluon", "kahan"),
        ("gluon-plain", torch.zeros(4, 16, dtype=torch.bfloat16)[:, 1:], None, "plain"),  # no descriptor can address it
        ("gluon-plain", torch.zeros(4, 16), None, "plain"),
        ("gemm", torch.zeros(4, 16, dtype=torch.float16), "no Gluon", "gemm"),
        ("gemm", torch.zeros(4, 16), None, "kahan"),  # cuBLAS may take single TF32 products for float32
        ("plain", torch.zeros(4, 16), "no Gluon", "plain"),
    ],
)
def test_what_cannot_run_is_replaced_by_the_same_sum_in_triton(
    variant: str, x: torch.Tensor, obstacle: str | None, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syrk, "gluon_obstacle", lambda device: obstacle)
    tiling = HOPPER._replace(variant=variant)
    assert syrk.runnable(tiling, x) == tiling._replace(variant=runs)


def test_what_gluon_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    obstacle, cuda = syrk.gluon_obstacle.__wrapped__, torch.device("cuda", 0)
    assert "compute capability 9.0" in obstacle(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "compute capability 9.0" in obstacle(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert obstacle(cuda) == "Triton 3.5.1 is older than 3.6"
    # A version that has renamed what the kernel uses, and one whose compiler refuses it.
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    ones, zeros = torch.ones, torch.zeros
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    monkeypatch.setitem(sys.modules, "nullspace.csrc_triton.hopper", None)
    monkeypatch.delattr("nullspace.csrc_triton.hopper", raising=False)
    assert "Gluon of Triton 4.0.0: ImportError" in obstacle(cuda) or "ModuleNotFoundError" in obstacle(cuda)
    # One that launches: what it computes decides.
    monkeypatch.setattr(syrk, "_on", lambda device: contextlib.nullcontext())

    def launch(g: torch.Tensor, x: torch.Tensor, *arguments: Any, variant: str, **options: Any) -> None:
        if variant in works:
            naive.syrk_accumulate(g, x)
        elif variant in refused:
            raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr(csrc_triton, "hopper", SimpleNamespace(launch=launch), raising=False)
    works, refused = {"kahan", "plain"}, set()
    assert obstacle(cuda) is None
    works.remove("plain")
    assert obstacle(cuda) == "gluon-plain gives wrong sums"
    refused.add("plain")
    assert obstacle(cuda) == "Gluon of Triton 4.0.0: RuntimeError: PassManager::run failed"


def test_every_device_keeps_kahans_sum() -> None:
    assert all(tiling.variant == "kahan" and tiling.splits == 1 for table in HALF.values() for tiling in table.values())
    assert (SINGLE.variant, DOUBLE.splits) == ("kahan", 1)


def test_the_table_is_read_by_capability_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, narrow = torch.device("cuda", 0), HOPPER._replace(splits=4)
    monkeypatch.setitem(HALF, (9, 0), {1: narrow, 2048: HOPPER})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [tiling_for(torch.bfloat16, cuda, d) for d in (1, 2047, 2048, 28672)] == [narrow, narrow, HOPPER, HOPPER]
    assert tiling_for(torch.float32, cuda, 4096) == SINGLE


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_are_possible_and_differ(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for d in (512, 2 * NARROW):
        found = candidates(dtype, torch.device("cuda", 0), d)
        assert len(set(found)) == len(found) >= 3
        assert tiling_for(dtype, torch.device("cuda", 0), d) in found
        for tiling in found:
            syrk.check_tiling(tiling)
            assert PANEL_ROWS % tiling.block == 0
    variants = {t.variant for t in candidates(torch.bfloat16, torch.device("cuda", 0), 512)}
    assert variants == (set(VARIANTS) if capability == (9, 0) else {"kahan", "plain", "gemm"})


def test_a_run_never_tunes() -> None:
    kinds = [type(value).__name__ for module in (syrk, selected, grouped, stage) for value in vars(module).values()]
    assert sum(kind in ("JITFunction", "InterpretedFunction") for kind in kinds) > 10
    assert not {"Autotuner", "Heuristics"} & set(kinds)
    for path in Path(syrk.__file__).parent.glob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"autotune", "heuristics", "Config", "do_bench"}, path.name


# ------------------------------------------------------------------------------------------------ float64 without matrix products


@pytest.mark.parametrize("version", [(3, 5), (3, 7), (3, 8), (3, 9)])
def test_a_compiler_without_float64_products_gets_none(version: tuple[int, int]) -> None:
    assert selected.multiplies_float64((10, 0), version) == (version >= (3, 8))
    assert all(selected.multiplies_float64(capability, version) for capability in ((8, 0), (8, 9), (9, 0)))
    assert not selected.multiplies_float64((12, 0), version)


@pytest.mark.parametrize("count", [0, 1, 17])
def test_selected_rows_by_outer_products(count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (selected, grouped):
        monkeypatch.setattr(module, "has_matrix_products", lambda device: False)
    x = randn(20, 66, dtype=torch.bfloat16).to(device)
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(1)).to(device)
    g, expected = (torch.zeros(3, 66, 66, dtype=torch.float64, device=device) for _ in range(2))
    naive.syrk_accumulate_rows(expected[0], x, rows, torch.tensor(count))
    syrk_accumulate_rows(g[0], x, rows, torch.tensor(count, device=device))
    offsets = torch.tensor([0, count, 20], device=device)
    naive.syrk_accumulate_grouped(expected[1:], x, offsets, rows)
    grouped.syrk_accumulate_rows_grouped(g[1:], x, rows, offsets)
    torch.testing.assert_close(g, expected, rtol=0.0, atol=1e-13)
