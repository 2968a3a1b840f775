"""`stage_rows` and `zero_rows` against `naive.py`."""

from __future__ import annotations

import pytest
import torch

from inputs import randn
from nullspace.csrc_triton import naive, stage_rows, zero_rows

pytest.importorskip("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "d"), [(0, 3), (1, 1), (31, 127), (32, 128), (70, 129), (5, 1100)])
@pytest.mark.parametrize("gather", [False, True])
def test_rows_are_copied_and_measured(tokens: int, d: int, dtype: torch.dtype, gather: bool, device: torch.device) -> None:
    source = randn(tokens + 4, d + 5, dtype=dtype).to(device)
    x = source[:, 2 : d + 2]
    rows = torch.randperm(tokens + 4, generator=torch.Generator().manual_seed(1))[:tokens].to(device) if gather else None
    into = torch.full((tokens + 2, d + 3), 7.0, dtype=dtype, device=device)
    expected = torch.empty(tokens, d, dtype=dtype, device=device)
    expected_norms, expected_total = naive.stage_rows(x, expected, rows)
    norms, total = stage_rows(x, into[1 : tokens + 1, :d], rows)
    assert torch.equal(into[1 : tokens + 1, :d], expected)
    into[1 : tokens + 1, :d] = 7.0
    assert (into == 7.0).all()  # nothing was written beside the rows
    torch.testing.assert_close(norms, expected_norms, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(total, expected_total, rtol=0.0, atol=1e-12)
    assert norms.dtype == total.dtype == torch.float64


def test_a_shorter_out_takes_the_first_rows(device: torch.device) -> None:
    x = randn(9, 4).to(device)
    out = torch.empty(5, 4, device=device)
    norms, total = stage_rows(x, out)
    assert torch.equal(out, x[:5])
    assert norms.shape == (5,)
    torch.testing.assert_close(total, x[:5].double().sum(0), rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_do_not_overflow(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([[1e38, 1e38], [1e-37, 0.0], [0.0, 0.0]], dtype=dtype, device=device)
    norms, _ = stage_rows(x, torch.empty_like(x))
    torch.testing.assert_close(norms, x.double().norm(dim=1), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_show_in_the_norm_of_their_row_only(value: float, device: torch.device) -> None:
    x = randn(40, 200, dtype=torch.bfloat16).to(device)
    x[33, 150] = value
    norms, _ = stage_rows(x, torch.empty_like(x))
    assert torch.isfinite(norms).nonzero().flatten().tolist() == [k for k in range(40) if k != 33]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 20])
def test_selected_rows_become_zero(count: int, dtype: torch.dtype, device: torch.device) -> None:
    x = randn(20, 1030, dtype=dtype).to(device)
    expected = x.clone()
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(1)).to(device)
    naive.zero_rows(expected[:, 3:], rows, torch.tensor(count))
    zero_rows(x[:, 3:], rows, torch.tensor(count, device=device))
    assert torch.equal(x, expected)
