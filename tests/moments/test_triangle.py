"""`LowerTriangle`: the sum of Gram matrices, in float64, from half of the entries."""

from __future__ import annotations

import pytest
import torch

from inputs import small_integers
from nullspace.moments.triangle import BESIDE, PANEL_ROWS, SMALL_D, LowerTriangle

# One row, one panel and its neighbours, two panels and their neighbours, and an order that is no multiple of anything.
ORDERS = [1, 2, PANEL_ROWS - 1, PANEL_ROWS, PANEL_ROWS + 1, 2 * PANEL_ROWS, 2 * PANEL_ROWS + 1, 600]


def triangle_of(*parts_nd: torch.Tensor) -> LowerTriangle:
    triangle = LowerTriangle(parts_nd[0].shape[1])
    for part in parts_nd:
        triangle.add_gram(part)
    return triangle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("d", [*ORDERS, SMALL_D + 1])
def test_square_is_the_gram_matrix(d: int, tokens: int, dtype: torch.dtype) -> None:
    x = small_integers(tokens, d, dtype)
    square = triangle_of(x).square()
    assert square.dtype == torch.float64
    assert torch.equal(square, x.double().T @ x.double())


@pytest.mark.parametrize("d", ORDERS)
def test_grams_add_up(d: int) -> None:
    x, y = small_integers(9, d), small_integers(5, d, torch.float32, seed=1)
    assert torch.equal(triangle_of(x, y).square(), triangle_of(torch.cat([x, y.double()])).square())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", ORDERS)
def test_lower_is_the_lower_triangle_in_another_scale(d: int, dtype: torch.dtype) -> None:
    triangle = triangle_of(small_integers(9, d))
    assert torch.equal(triangle.lower(4.0, dtype).tril(), (triangle.square() / 4).to(dtype).tril())


@pytest.mark.parametrize("d", ORDERS)
def test_square_is_symmetric_to_the_bit(d: int) -> None:
    square = triangle_of(torch.randn(30, d)).square()
    assert torch.equal(square, square.T)


@pytest.mark.parametrize("d", ORDERS)
def test_diagonal_is_that_of_the_square(d: int) -> None:
    triangle = triangle_of(torch.randn(30, d))
    assert triangle.diagonal().shape == (d,)
    assert torch.equal(triangle.diagonal(), triangle.square().diagonal())


@pytest.mark.parametrize("d", ORDERS)
def test_norm_is_that_of_the_square(d: int) -> None:
    triangle = triangle_of(torch.randn(30, d, dtype=torch.float64))
    assert triangle.norm() == pytest.approx(float(triangle.square().norm()), rel=1e-14)


@pytest.mark.parametrize("d", ORDERS)
def test_adding_a_triangle_adds_its_matrix_and_leaves_it_alone(d: int) -> None:
    mine, theirs = triangle_of(small_integers(9, d)), triangle_of(small_integers(5, d, seed=1))
    expected, before = mine.square() + theirs.square(), theirs.square()
    mine.add_(theirs)
    mine.add_gram(small_integers(3, d, seed=2))
    expected += triangle_of(small_integers(3, d, seed=2)).square()
    assert torch.equal(mine.square(), expected)
    assert torch.equal(theirs.square(), before)


def test_the_sum_of_float32_products_is_held_in_float64() -> None:
    large, small = torch.full((1, 1), 2.0**12), torch.ones(1, 1)  # 2^24 + 1 is the first integer that float32 lacks
    assert triangle_of(large, small).square().item() == 2**24 + 1


def test_float64_products_are_taken_in_float64() -> None:
    x = torch.tensor([[1.0 + 2.0**-26]], dtype=torch.float64)
    assert triangle_of(x).square().item() == 1.0 + 2.0**-25 + 2.0**-52


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T.contiguous().T, lambda x: x[:, ::2], lambda x: x[::3], lambda x: x[:1].expand(7, -1)],
    ids=["column-major", "every other column", "every third row", "one row repeated"],
)
def test_strides_do_not_matter(view) -> None:
    x = view(small_integers(12, 2 * PANEL_ROWS + 6, torch.float32))
    assert torch.equal(triangle_of(x).square(), x.double().T @ x.double())


def test_square_is_a_copy() -> None:
    triangle = triangle_of(small_integers(4, 3))
    before = triangle.square().clone()
    triangle.square().zero_()
    assert torch.equal(triangle.square(), before)


@pytest.mark.parametrize("d", [1, PANEL_ROWS + 1, 600, 2048])
def test_memory_is_what_the_docstring_says(d: int) -> None:
    held = sum(8 * panel.numel() for _, _, panel in LowerTriangle(d)._panels)
    assert held <= 8 * (d * d + d * PANEL_ROWS) / 2


@pytest.mark.parametrize("d", ORDERS)
def test_rows_are_the_lower_triangle_and_come_back(d: int) -> None:
    triangle = triangle_of(torch.randn(30, d, dtype=torch.float64))
    rows = triangle.rows()
    at = torch.tril_indices(d, d)
    assert torch.equal(rows, triangle.square()[at[0], at[1]])
    again = LowerTriangle(d)
    again.set_rows(rows)
    assert torch.equal(again.square(), triangle.square())
    again.set_rows(rows.float())
    assert torch.equal(again.square(), triangle.square().float().double())


@pytest.mark.parametrize("beside", [0, 7, None])
@pytest.mark.parametrize("d", ORDERS)
def test_vectors_add_up_as_the_triangles_do(d: int, beside: int | None) -> None:
    mine, theirs = triangle_of(small_integers(9, d)), triangle_of(small_integers(5, d, seed=1))
    expected = mine.square() + theirs.square()
    memory = mine.packed.untyped_storage().data_ptr()
    own = torch.arange(d + BESIDE if beside is None else beside, dtype=torch.float64)
    vector = mine.compress(own)
    assert vector.shape == (d * (d + 1) // 2 + len(own),)
    assert vector.untyped_storage().data_ptr() == memory
    vector += theirs.compress(3 * own)
    assert torch.equal(mine.expand()[: len(own)], 4 * own)
    assert torch.equal(mine.square(), expected)
    mine.add_gram(small_integers(4, d, seed=2))  # and it goes on as a triangle
    assert torch.equal(mine.square(), expected + triangle_of(small_integers(4, d, seed=2)).square())
