"""The grouped products against `naive.py`, and against one launch a group."""

from __future__ import annotations

import itertools

import pytest
import torch

from inputs import activations, randn, small_integers
from nullspace.csrc_triton import naive, sum_rows_grouped, syrk_accumulate, syrk_accumulate_grouped, syrk_accumulate_rows_grouped
from nullspace.csrc_triton.tiles import Tiling
from nullspace.moments.triangle import PANEL_ROWS
from reference import entrywise_error

pytest.importorskip("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = Tiling(block=64, block_k=32, window=64, warps=4, stages=2, descriptor=False)
# Groups that are empty, at the ends too; of one row; shorter and longer than a step and a window.
COUNTS = [0, 1, 37, 0, 64, 131, 0]


def offsets_of(counts: list[int], device: torch.device, dtype: torch.dtype = torch.int64, first: int = 0) -> torch.Tensor:
    return torch.tensor([first, *counts]).cumsum(0).to(device, dtype)


def numbered(groups: int, d: int, device: torch.device) -> torch.Tensor:
    return torch.arange(groups * d * d, dtype=torch.float64, device=device).reshape(groups, d, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "tiling"), [(1, None), (70, SMALL)])
def test_every_group_gets_the_product_of_its_own_rows(
    d: int, tiling: Tiling | None, dtype: torch.dtype, device: torch.device
) -> None:
    # Rows before the first group and behind the last one belong to none.
    x = small_integers(sum(COUNTS) + 9, d + 3, dtype).to(device)[:, 1 : d + 1]
    offsets = offsets_of(COUNTS, device, first=4)
    g = numbered(len(COUNTS), d, device)
    expected = g.clone()
    naive.syrk_accumulate_grouped(expected, x, offsets)
    assert syrk_accumulate_grouped(g, x, offsets, tiling=tiling) is None
    assert torch.equal(g, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_in_any_order_are_grouped_by_a_list(dtype: torch.dtype, device: torch.device) -> None:
    x = small_integers(60, 70, torch.bfloat16).to(device)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:50].to(device, dtype)
    offsets = offsets_of([20, 0, 29, 1], device, dtype)
    g = numbered(4, 70, device)
    expected = g.clone()
    naive.syrk_accumulate_grouped(expected, x, offsets, rows)
    syrk_accumulate_grouped(g, x, offsets, rows=rows)
    assert torch.equal(g, expected)


def test_packed_panels_are_those_of_single_launches_to_the_bit(device: torch.device) -> None:
    d, counts = PANEL_ROWS + 9, [20, 0, 35]
    x, offsets = randn(sum(counts), d, dtype=torch.bfloat16).to(device), offsets_of(counts, device)
    size = PANEL_ROWS**2 + 9 * d
    memory = torch.zeros(3, size + 5, dtype=torch.float64, device=device)
    syrk_accumulate_grouped(memory[:, :size], x, offsets, panel_rows=PANEL_ROWS)
    for packed, (start, stop) in zip(memory, itertools.pairwise(offsets.tolist()), strict=True):
        alone = torch.zeros(size, dtype=torch.float64, device=device)
        syrk_accumulate(alone, x[start:stop], panel_rows=PANEL_ROWS)
        assert torch.equal(packed[:size], alone)
    assert not memory[:, size:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_entry_is_right(dtype: torch.dtype, device: torch.device) -> None:
    counts, d = [300, 20], 100
    x = randn(sum(counts), d, dtype=dtype).to(device) * torch.logspace(-3, 3, d, device=device).to(dtype)
    g = torch.zeros(2, d, d, dtype=torch.float64, device=device)
    syrk_accumulate_grouped(g, x, offsets_of(counts, device))
    for one, part in zip(g, x.split(counts), strict=True):
        assert entrywise_error((one + one.tril(-1).T).cpu(), part.cpu()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_listed_rows_in_float64(dtype: torch.dtype, device: torch.device) -> None:
    x = activations(60, 70, quietest=1e-3).to(dtype).to(device)
    rows = torch.arange(59, -1, -1, device=device)
    offsets = offsets_of([0, 1, 33, 0, 16], device, first=2)
    g = torch.zeros(5, 70, 70, dtype=torch.float64, device=device)
    expected = g.clone()
    naive.syrk_accumulate_grouped(expected, x, offsets, rows)
    syrk_accumulate_rows_grouped(g, x, rows, offsets)
    torch.testing.assert_close(g, expected, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_listed_rows(dtype: torch.dtype, device: torch.device) -> None:
    x = randn(60, 133, dtype=dtype).to(device)[:, 3:]
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(1)).to(device)
    offsets = offsets_of([0, 1, 40, 0, 16], device, first=2)
    total = torch.ones(5, 130, dtype=torch.float64, device=device)
    expected = total.clone()
    naive.sum_rows_grouped(expected, x, rows, offsets)
    sum_rows_grouped(total, x, rows, offsets)
    torch.testing.assert_close(total, expected, rtol=0.0, atol=1e-13)
    with pytest.raises(ValueError, match=r"total must be \(groups, 130\)"):
        sum_rows_grouped(total.T, x, rows, offsets)


def test_what_other_groups_hold_does_not_matter(device: torch.device) -> None:
    x = small_integers(50, 40, torch.bfloat16).to(device)
    x[20:30] = float("nan")
    g = numbered(3, 40, device)
    expected = g.clone()
    naive.syrk_accumulate_grouped(expected, x, offsets_of([20, 10, 20], device))
    syrk_accumulate_grouped(g, x, offsets_of([20, 10, 20], device))
    assert torch.equal(g[[0, 2]], expected[[0, 2]])


def test_offsets_beyond_the_rows_read_nothing_there(device: torch.device) -> None:
    x = small_integers(30, 20, torch.bfloat16).to(device)
    g = torch.zeros(3, 20, 20, dtype=torch.float64, device=device)
    syrk_accumulate_grouped(g, x[:25], torch.tensor([0, 10, 40, 50], device=device))
    expected = torch.zeros_like(g)
    naive.syrk_accumulate_grouped(expected, x, torch.tensor([0, 10, 25, 25]))
    assert torch.equal(g, expected)


@pytest.mark.parametrize("groups", [0, 2])
def test_without_rows_or_groups_nothing_happens(groups: int, device: torch.device) -> None:
    x = torch.zeros(0, 3, device=device)
    g, offsets = (
        torch.ones(groups, 3, 3, dtype=torch.float64, device=device),
        torch.zeros(groups + 1, dtype=torch.int64, device=device),
    )
    syrk_accumulate_grouped(g, x, offsets)
    syrk_accumulate_rows_grouped(g, x, offsets[:0], offsets)
    assert (g == 1).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(5, 3, dtype=torch.float64)}, TypeError, "x must be bfloat16, float16 or float32"),
        ({"x": torch.zeros(3, 5).T}, ValueError, "the last axis of x must be contiguous"),
        ({"g": torch.zeros(3, 3, dtype=torch.float64)}, ValueError, r"g must be \(groups, 3, 3\)"),
        ({"g": torch.zeros(2, 3, 3)}, TypeError, "g must be float64"),
        ({"g": torch.zeros(2, 3, 3, dtype=torch.float64).mT}, ValueError, "contiguous last axis"),
        (
            {"panel_rows": 256},
            ValueError,
            r"g must be \(groups, 9\) with contiguous rows \(d = 3, 256 rows a panel\), not \(2, 3, 3\)",
        ),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"offsets must be \(3,\) for 2 groups, not \(2,\)"),
        ({"offsets": torch.zeros(3)}, TypeError, r"offsets must be int32 or int64, not torch\.float32"),
        ({"rows": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"rows must be one list of indices, not \(4, 1\)"),
        ({"rows": torch.zeros(8, dtype=torch.int64)[::2]}, ValueError, "rows must be contiguous and on cpu"),
        ({"tiling": SMALL._replace(window=40)}, ValueError, "a window of 40 tokens is not made of whole steps of 32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict, error: type[Exception], message: str) -> None:
    g, x, offsets = torch.zeros(2, 3, 3, dtype=torch.float64), torch.zeros(5, 3), torch.tensor([0, 2, 5])
    arguments = {"g": g, "x": x, "offsets": offsets} | changes
    with pytest.raises(error, match=message):
        syrk_accumulate_grouped(**arguments)
