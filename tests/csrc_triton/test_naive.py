"""`naive.syrk_accumulate` is the specification of the kernels; `LowerTriangle` is another implementation of it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from nullspace.csrc_triton.naive import syrk_accumulate
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "d"), [(0, 3), (1, 1), (1, 4), (5, 1), (6, 4)])
def test_adds_the_exact_lower_triangle_and_leaves_the_upper_one(tokens: int, d: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, d).to(torch.bfloat16).to(dtype)  # 8-bit significands: six products of them add up exactly in float64
    g = torch.arange(d * d, dtype=torch.float64).reshape(d, d)
    before = g.clone()
    assert syrk_accumulate(g, x) is None
    rows = [[Fraction(float(value)) for value in row] for row in x]
    for i in range(d):
        for j in range(d):
            added = sum(row[i] * row[j] for row in rows) if j <= i else 0
            assert Fraction(float(g[i, j])) == Fraction(float(before[i, j])) + added


def test_what_the_upper_triangle_holds_does_not_matter() -> None:
    g = torch.full((3, 3), float("nan"), dtype=torch.float64).triu(1)
    syrk_accumulate(g, torch.ones(2, 3))
    assert torch.equal(g.tril(), torch.full((3, 3), 2.0, dtype=torch.float64).tril())
    assert g[torch.ones(3, 3).triu(1).bool()].isnan().all()


def test_16_bit_products_are_exact() -> None:
    g = torch.zeros(1, 1, dtype=torch.float64)
    # From 2^32 down to 2^-20: the sum just fits into float64, and would lose all of the second product in float32.
    x = torch.tensor([[65504.0], [1.0 + 2.0**-10]], dtype=torch.float16)
    syrk_accumulate(g, x)
    assert g.item() == 65504**2 + (1 + 2.0**-10) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, PANEL_ROWS, PANEL_ROWS + 1, 600])
def test_the_triangle_of_panels_agrees(d: int, dtype: torch.dtype) -> None:
    g, triangle = torch.zeros(d, d, dtype=torch.float64), LowerTriangle(d)
    for tokens in (20, 0, 1):
        x = torch.randn(tokens, d, dtype=torch.float64).to(dtype)
        syrk_accumulate(g, x)
        triangle.add_gram(x)
    # 21 products of unit variance: a rounding error of eps times their sum of magnitudes at most, term by term.
    torch.testing.assert_close(triangle.square().tril(), g, rtol=0.0, atol=21 * 16 * torch.finfo(dtype).eps)
