"""`syrk_accumulate` against `naive.py`, its specification.

Where and what is added is tested on small integers, whose products and sums are exact in float32 in any order: there the two must
be equal. How well real numbers are summed is tested against float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tensor_core
from inputs import activations, randn, small_integers
from nullspace.csrc_triton import naive, syrk_accumulate, syrk_accumulate_rows
from nullspace.csrc_triton.tiles import HALF, HALF_DEFAULT, SINGLE, Tiling
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle
from nullspace.solvers import bottom_eigenpairs
from reference import entrywise_error, excess_leak

pytest.importorskip("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# None is the table's own choice. The two others have the block shapes of the table's 16-bit entries and another pipeline.
TILINGS = [
    None,
    Tiling(block=64, block_k=32, window=64, warps=4, stages=2, descriptor=True),
    Tiling(block=128, block_k=64, window=128, warps=8, stages=3, descriptor=True),
]
TILING_IDS = ["table", "64", "128"]
# Nothing, one row and column, part of a tile, tiles and their neighbours, more than one panel.
SHAPES = [(0, 5), (1, 1), (1, 300), (7, 3), (40, 64), (65, 65), (130, 127), (128, 128), (129, 129), (70, PANEL_ROWS + 1)]


def numbered(d: int, device: torch.device) -> torch.Tensor:
    return torch.arange(d * d, dtype=torch.float64, device=device).reshape(d, d)


def expected_sum(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    result = g.clone()
    naive.syrk_accumulate(result, x)
    return result


# ------------------------------------------------------------------------------------------------ what is added where


@pytest.mark.parametrize("tiling", TILINGS, ids=TILING_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "d"), SHAPES)
def test_adds_the_lower_triangle(tokens: int, d: int, dtype: torch.dtype, tiling: Tiling | None, device: torch.device) -> None:
    x = small_integers(tokens, d, dtype).to(device)
    g = numbered(d, device)
    expected = expected_sum(g, x)
    assert syrk_accumulate(g, x, tiling=tiling) is None
    assert torch.equal(g, expected)


# Tiles depend on the width and on the size of a number: float16 has those of bfloat16.
@pytest.mark.parametrize(
    ("d", "dtype"),
    [(d, dtype) for d in (3, PANEL_ROWS - 1, PANEL_ROWS + 1) for dtype in (torch.bfloat16, torch.float32)]
    + [(PANEL_ROWS, torch.float16), (2 * PANEL_ROWS + 65, torch.bfloat16)],
)
def test_adds_to_packed_panels(d: int, dtype: torch.dtype, device: torch.device) -> None:
    triangle, expected = LowerTriangle(d, device=device), torch.zeros(d, d, dtype=torch.float64, device=device)
    for seed, tokens in enumerate((30, 0, 1)):
        x = small_integers(tokens, d, dtype, seed=seed).to(device)
        syrk_accumulate(triangle.packed, x, panel_rows=PANEL_ROWS)
        naive.syrk_accumulate(expected, x)
    assert torch.equal(triangle.square().tril(), expected)


@settings(
    max_examples=24, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tokens=st.integers(0, 150), d=st.integers(1, 140), wider=st.integers(0, 9), step=st.integers(1, 3), shift=st.integers(0, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_stride(
    dtype: torch.dtype, tokens: int, d: int, wider: int, step: int, shift: int, device: torch.device
) -> None:
    x = small_integers(step * tokens, d + wider + shift, dtype).to(device)[::step, shift : shift + d]
    g = numbered(d, device)
    expected = expected_sum(g, x)
    syrk_accumulate(g, x, tiling=TILINGS[1])
    assert torch.equal(g, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 8:],  # aligned to 16 bytes, as a descriptor wants it
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x[:1].expand(50, -1),
        lambda x: x.reshape(-1)[: 40 * 70].as_strided((40, 60), (70, 1)),
        lambda x: x[:, ::2][:, :1],
    ],
    ids=["shifted", "unaligned", "every other row", "one row repeated", "odd step", "one column of many"],
)
def test_rows_may_be_strided(view: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, device: torch.device) -> None:
    x = view(small_integers(70, 136, dtype).to(device))
    g = numbered(x.shape[1], device)
    expected = expected_sum(g, x)
    syrk_accumulate(g, x, tiling=TILINGS[2])
    assert torch.equal(g, expected)


def test_g_may_be_a_part_of_a_matrix(device: torch.device) -> None:
    whole = numbered(200, device)
    before = whole.clone()
    x = small_integers(30, 70, torch.bfloat16).to(device)
    syrk_accumulate(whole[5:75, 9:79], x)
    assert torch.equal(whole[5:75, 9:79], expected_sum(before[5:75, 9:79], x))
    before[5:75, 9:79] = whole[5:75, 9:79] = 0
    assert torch.equal(whole, before)


def test_what_the_upper_triangle_holds_does_not_matter(device: torch.device) -> None:
    g = torch.full((150, 150), float("nan"), dtype=torch.float64, device=device).triu(1)
    syrk_accumulate(g, torch.ones(2, 150, dtype=torch.float16, device=device))
    assert torch.equal(g.tril(), torch.full_like(g, 2.0).tril())
    assert g[torch.ones_like(g).triu(1).bool()].isnan().all()


def test_what_lies_behind_the_input_does_not_matter(device: torch.device) -> None:
    around = torch.full((80, 160), float("nan"), dtype=torch.bfloat16, device=device)
    x = around[:70, 8:140]
    x.copy_(small_integers(70, 132))
    g = torch.zeros(132, 132, dtype=torch.float64, device=device)
    syrk_accumulate(g, x, tiling=TILINGS[2])
    assert torch.equal(g, expected_sum(torch.zeros_like(g), x))


def test_rows_may_be_more_than_2_to_the_31_elements_apart(device: torch.device) -> None:
    far = torch.empty(2**31 + 32, dtype=torch.float16, device=device)  # 4 GiB, of which two pages are touched
    x = far.as_strided((2, 16), (2**31 + 8, 1))
    x.copy_(small_integers(2, 16))
    g = numbered(16, device)
    expected = expected_sum(g, x)
    syrk_accumulate(g, x, tiling=TILINGS[1])
    assert torch.equal(g, expected)
    rows, count = torch.tensor([1], device=device), torch.tensor(1, device=device)
    syrk_accumulate_rows(g, x, rows, count)
    assert torch.equal(g, expected_sum(expected, x[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "index_dtype", "packed"),
    [(0, torch.int64, True), (1, torch.int32, False), (15, torch.int64, False), (16, torch.int64, True), (50, torch.int32, True)],
)
def test_selected_rows(count: int, dtype: torch.dtype, index_dtype: torch.dtype, packed: bool, device: torch.device) -> None:
    d = PANEL_ROWS + 9
    x = randn(50, d + 3, dtype=dtype).to(device)[:, 3:]
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(device, index_dtype)
    triangle, g = LowerTriangle(d, device=device), torch.zeros(d, d, dtype=torch.float64, device=device)
    expected = g.clone()
    naive.syrk_accumulate_rows(expected, x, rows, torch.tensor(count))
    on_device = torch.tensor(count, dtype=index_dtype, device=device)
    if packed:
        syrk_accumulate_rows(triangle.packed, x, rows, on_device, panel_rows=PANEL_ROWS)
        g = triangle.square().tril()
    else:
        syrk_accumulate_rows(g, x, rows, on_device)
    # float64 products, and nothing in between: the order of the sum is all that may differ.
    torch.testing.assert_close(g, expected, rtol=0.0, atol=50 * 16 * torch.finfo(torch.float64).eps)


# ------------------------------------------------------------------------------------------------ how well it is summed


@pytest.mark.parametrize("tiling", TILINGS, ids=TILING_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_is_right(dtype: torch.dtype, tiling: Tiling | None, device: torch.device) -> None:
    x = randn(400, 150, dtype=dtype).to(device) * torch.logspace(-3, 3, 150, device=device).to(dtype)
    g = torch.zeros(150, 150, dtype=torch.float64, device=device)
    syrk_accumulate(g, x, tiling=tiling)
    # Relative to √(g_ii g_jj): one TF32 product would show as 1e-4, one sum in bfloat16 as 1e-2.
    assert entrywise_error((g + g.tril(-1).T).cpu(), x.cpu()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_inputs_give_equal_bits(dtype: torch.dtype, device: torch.device) -> None:
    x = randn(300, 200, dtype=dtype).to(device)
    rows, count = torch.arange(0, 300, 7, device=device), torch.tensor(40, device=device)
    results = []
    for _ in range(2):
        g = torch.zeros(200, 200, dtype=torch.float64, device=device)
        syrk_accumulate(g, x)
        syrk_accumulate_rows(g, x, rows, count)
        results.append(g)
    assert torch.equal(*results)


def test_the_sum_is_held_in_float64(device: torch.device) -> None:
    g = torch.full((1, 1), 2.0**40, dtype=torch.float64, device=device)
    syrk_accumulate(g, torch.full((1, 1), 2.0**-5, dtype=torch.float16, device=device))
    assert g.item() == 2.0**40 + 2.0**-10


def test_a_launch_sums_more_than_float32_holds(device: torch.device) -> None:
    # The first window's 2^24 is where float32 ends: a plain float32 sum would lose every other 1 that follows.
    x = torch.ones(128 + 4096, 1, dtype=torch.float16, device=device)
    x[0] = 2.0**12
    x[1:128] = 0
    g = torch.zeros(1, 1, dtype=torch.float64, device=device)
    syrk_accumulate(g, x, tiling=Tiling(block=64, block_k=32, window=64, warps=4, stages=2, descriptor=False))
    assert g.item() == 2**24 + 4096
    x[128::64, 0] = 2.0  # windows of 67, which float32 cannot add to 2^24 without rounding
    g.zero_()
    syrk_accumulate(g, x, tiling=Tiling(block=64, block_k=32, window=64, warps=4, stages=2, descriptor=False))
    assert g.item() == 2**24 + 64 * 67


def resolution(g: torch.Tensor, x: torch.Tensor) -> float:
    """‖E − αG‖ / ‖G‖ with the α that makes it smallest: what of the error is not proportional to the result."""
    exact = x.double().T @ x.double()
    error = g + g.tril(-1).T - exact
    return float((error - (error * exact).sum() / exact.square().sum() * exact).norm() / exact.norm())


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nothing is interpreted")
@pytest.mark.parametrize(
    ("core", "window"),
    [(tensor_core.HOPPER, HALF[9, 0][1].window), (tensor_core.AMPERE, HALF_DEFAULT[1].window)],
    ids=["Hopper", "Ampere"],
)
@pytest.mark.parametrize("quietest", [1.0, 1e-3])
def test_short_chains_withstand_rounding_toward_zero(
    quietest: float, core: tensor_core.TensorCore, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle(core.dot(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    x = activations(4096, 48, quietest=quietest).bfloat16()
    losses = {}
    for tokens in (window, 4096):
        g = torch.zeros(48, 48, dtype=torch.float64)
        syrk_accumulate(g, x, tiling=Tiling(block=64, block_k=32, window=tokens, warps=4, stages=2, descriptor=False))
        losses[tokens] = resolution(g, x)
    assert losses[window] <= 3e-8
    assert losses[4096] > 1e-7  # one chain over all tokens: the model rounds as it should, and the windows are what helps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quietest", [1.0, 1e-3])
def test_resolution_on_the_device(quietest: float) -> None:
    x = activations(16384, 512, quietest=quietest).bfloat16().cuda()
    g = torch.zeros(512, 512, dtype=torch.float64, device="cuda")
    syrk_accumulate(g, x)
    # Of 48 such columns an H100 loses 1.6e-8 and 2.6e-8, of 1,024 of them 5.0e-8 and 3.6e-8.
    assert resolution(g, x) <= 5e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_steep_spectrum_survives(dtype: torch.dtype, device: torch.device) -> None:
    x = activations(2048, 128, quietest=1e-3).to(dtype).to(device)
    g = torch.zeros(128, 128, dtype=torch.float64, device=device)
    syrk_accumulate(g, x)
    basis = bottom_eigenpairs((g + g.tril(-1).T).cpu(), 16)[1]
    assert excess_leak(basis, x.cpu()) <= 1e-4


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("g", "x", "panel_rows", "error", "message"),
    [
        ((3, 3), torch.zeros(2, 3, dtype=torch.float64), None, TypeError, "bfloat16, float16 or float32, not torch.float64"),
        ((3, 3), torch.zeros(2, 3, dtype=torch.int32), None, TypeError, "not torch.int32"),
        ((3, 3), torch.zeros(3), None, ValueError, r"\(tokens, d\) with d ≥ 1, not \(3,\)"),
        ((0, 0), torch.zeros(3, 0), None, ValueError, r"not \(3, 0\)"),
        ((3, 3), torch.zeros(3, 2).T, None, ValueError, r"last axis of x must be contiguous; its strides are \(1, 2\)"),
        ((3, 3), torch.zeros(2, 4), None, ValueError, r"g must be \(4, 4\).* it is \(3, 3\)"),
        ((9,), torch.zeros(2, 3), None, ValueError, r"g must be \(3, 3\)"),
        ((9,), torch.zeros(2, 3), 2, ValueError, r"g must be 7 numbers \(d = 3, 2 rows a panel\), not \(9,\)"),
        ((3, 3), torch.zeros(2, 3), 256, ValueError, "g must be 9 numbers"),
        ((9,), torch.zeros(2, 3), 100, ValueError, "a panel of 100 rows is not made of whole tiles of"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    g: tuple[int, ...], x: torch.Tensor, panel_rows: int | None, error: type[Exception], message: str
) -> None:
    into = torch.zeros(g, dtype=torch.float64)
    with pytest.raises(error, match=message):
        syrk_accumulate(into, x, panel_rows=panel_rows)
    assert not into.any()


def test_a_float32_sum_is_refused() -> None:
    with pytest.raises(TypeError, match=r"g must be float64, not torch\.float32"):
        syrk_accumulate(torch.zeros(3, 3), torch.zeros(2, 3))


def test_a_window_of_broken_steps_is_refused() -> None:
    tiling = Tiling(block=64, block_k=64, window=32, warps=4, stages=2, descriptor=False)
    with pytest.raises(ValueError, match="a window of 32 tokens is not made of whole steps of 64"):
        syrk_accumulate(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 3), tiling=tiling)


@pytest.mark.parametrize("tiling", [*(t for table in (*HALF.values(), HALF_DEFAULT) for t in table.values()), SINGLE])
def test_windows_are_whole_steps_and_panels_whole_tiles(tiling: Tiling) -> None:
    assert tiling.window % tiling.block_k == 0
    assert PANEL_ROWS % tiling.block == 0
