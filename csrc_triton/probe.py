"""What a run will launch, launched once on a few numbers: whether the kernels run on a device, and are right, before they must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nullspace.csrc_triton import grouped, naive, selected, stage, syrk
from nullspace.csrc_triton.tiles import Tiling, table_of

# 16-bit inputs take one way through the compiler, and float32 another.
DTYPES = (torch.bfloat16, torch.float32)
# Multiples of 16, as a run's widths and strides mostly are: Triton compiles for them, and a run finds compiled what it needs. A
# square matrix of few rows is also one packed panel.
ROWS, WIDTH, PANEL = 32, 64, 256


def first_failure(device: torch.device) -> str | None:
    """Launch each kernel of a run; the first one that fails, in a few words, or None."""
    for name, launch in launches(device):
        try:
            is_right = launch()
        except Exception as error:
            words = str(error).strip().splitlines()
            return f"Triton cannot launch {name} ({type(error).__name__}: {words[0] if words else ''})"
        if not is_right:
            return f"{name} computes wrong numbers"
    return None


def launches(device: torch.device) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Every launch by its name: a function that launches, waits, and returns whether the result is right."""
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        # Small integers, whose products and sums are exact.
        numbers = torch.arange(ROWS * WIDTH, device=device).remainder(7).sub(3)
        x = numbers.reshape(ROWS, WIDTH).to(dtype)
        rows = torch.arange(ROWS - 1, -1, -1, device=device)
        offsets = torch.tensor([0, ROWS // 2, ROWS], device=device)
        yield f"stage_rows on {kind}", partial(_stages, x, None)
        yield f"stage_rows on listed {kind}", partial(_stages, x, rows)
        yield f"syrk_accumulate_rows on {kind}", partial(_sums_rows, x, rows)
        yield f"zero_rows on {kind}", partial(_zeros, x, rows)
        for tiling in dict.fromkeys(table_of(dtype, device).values()):
            yield f"syrk_accumulate on {kind}", partial(_sums, x, tiling)
            yield f"syrk_accumulate_grouped on {kind}", partial(_sums_groups, x, rows, offsets, tiling)
        yield f"syrk_accumulate_rows_grouped on {kind}", partial(_sums_rows_of_groups, x, rows, offsets)
        yield f"sum_rows_grouped on {kind}", partial(_adds_rows_of_groups, x, rows, offsets)


def _stages(x: torch.Tensor, rows: torch.Tensor | None) -> bool:
    out, expected = torch.empty_like(x), torch.empty_like(x)
    norms, total = stage.stage_rows(x, out, rows)
    expected_norms, expected_total = naive.stage_rows(x, expected, rows)
    return torch.equal(out, expected) and torch.allclose(norms, expected_norms) and torch.equal(total, expected_total)


def _zeros(x: torch.Tensor, rows: torch.Tensor) -> bool:
    ours, expected, count = x.clone(), x.clone(), torch.tensor(ROWS // 2, device=x.device)
    stage.zero_rows(ours, rows, count)
    naive.zero_rows(expected, rows, count)
    return torch.equal(ours, expected)


def _sums(x: torch.Tensor, tiling: Tiling) -> bool:
    ours, expected = _zero_sums(x), _zero_sums(x)
    syrk.syrk_accumulate(ours.view(-1), x, panel_rows=PANEL, tiling=tiling)
    naive.syrk_accumulate(expected, x)
    return torch.equal(ours, expected)


def _sums_rows(x: torch.Tensor, rows: torch.Tensor) -> bool:
    ours, expected, count = _zero_sums(x), _zero_sums(x), torch.tensor(ROWS // 2, device=x.device)
    selected.syrk_accumulate_rows(ours.view(-1), x, rows, count, panel_rows=PANEL)
    naive.syrk_accumulate_rows(expected, x, rows, count)
    return torch.equal(ours, expected)


def _sums_groups(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, tiling: Tiling) -> bool:
    ours, expected = _zero_sums(x, 2), _zero_sums(x, 2)
    grouped.syrk_accumulate_grouped(ours.view(2, -1), x, offsets, rows=rows, panel_rows=PANEL, tiling=tiling)
    naive.syrk_accumulate_grouped(expected, x, offsets, rows)
    return torch.equal(ours, expected)


def _sums_rows_of_groups(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> bool:
    ours, expected = _zero_sums(x, 2), _zero_sums(x, 2)
    grouped.syrk_accumulate_rows_grouped(ours.view(2, -1), x, rows, offsets, panel_rows=PANEL)
    naive.syrk_accumulate_grouped(expected, x, offsets, rows)
    return torch.equal(ours, expected)


def _adds_rows_of_groups(x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> bool:
    ours, expected = (torch.zeros(2, WIDTH, dtype=torch.float64, device=x.device) for _ in range(2))
    grouped.sum_rows_grouped(ours, x, rows, offsets)
    naive.sum_rows_grouped(expected, x, rows, offsets)
    return torch.equal(ours, expected)


def _zero_sums(x: torch.Tensor, *groups: int) -> torch.Tensor:
    return torch.zeros(*groups, WIDTH, WIDTH, dtype=torch.float64, device=x.device)
