"""`Covariance`: the second moment, whatever the dtype, the strides, the cuts, the padding and the outlier tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inputs import activations, randn
from nullspace.moments.covariance import Covariance
from nullspace.moments.sums import OUTLIER_RATIO, STAGE_TOKENS
from nullspace.moments.sums_torch import CHAIN_TOKENS, OUTLIER_ROWS
from nullspace.moments.triangle import PANEL_ROWS, LowerTriangle
from nullspace.solvers import bottom_eigenpairs, bottom_right_singular
from reference import excess_leak, leak, optimal_leak, relative_error, second_moment

PRECISIONS = ["auto", "fp64", "qr"]
# ‖error‖_F / ‖C‖_F. float32 chains were measured at 2e-8 to 2e-7, and at up to 9e-7 where d < 4 (sums taken one by one); TF32
# would show as 8e-6 at d = 1, bf16 as 6e-5, both as more than 1e-4 at larger d.
RESOLUTION = {"auto": 2e-6, "fp64": 1e-14, "qr": 1e-14}
# More than one chain, and a remainder.
LONG = 2 * CHAIN_TOKENS + STAGE_TOKENS // 2


def covariance_of(*updates: torch.Tensor, precision: str = "auto") -> Covariance:
    covariance = Covariance(updates[0].shape[-1], precision=precision)
    for x in updates:
        covariance.update(x)
    return covariance


def sums(covariance: Covariance) -> tuple[torch.Tensor, torch.Tensor, float, int, int]:
    # A root is kept as it is; a product of it may round otherwise in memory that is aligned otherwise.
    kept = covariance.root() if covariance.products == "qr" else covariance.matrix()
    return kept, covariance.mean(), covariance.trace, covariance.tokens, covariance.outliers


def assert_same_bits(actual: Covariance, expected: Covariance) -> None:
    for one, other in zip(sums(actual), sums(expected), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# ------------------------------------------------------------------------------------------------ what is summed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "leading", [(), (1,), (3, 5), (STAGE_TOKENS - 1,), (STAGE_TOKENS,), (2, 1, STAGE_TOKENS + 3), (LONG,)], ids=str
)
@pytest.mark.parametrize("d", [1, 3, PANEL_ROWS + 1])
def test_the_sums_are_those_of_the_tokens(d: int, leading: tuple[int, ...], dtype: torch.dtype, precision: str) -> None:
    x = randn(*leading, d, dtype=dtype)
    covariance = covariance_of(x, precision=precision)
    rows = x.reshape(-1, d).double()
    expected = rows.T @ rows
    resolution = RESOLUTION["fp64" if dtype == torch.float64 else precision]
    assert covariance.matrix().dtype == torch.float64
    assert relative_error(covariance.matrix(), expected) <= resolution
    assert covariance.trace == pytest.approx(float(expected.trace()), rel=resolution)
    assert covariance.tokens == len(rows)
    torch.testing.assert_close(covariance.mean(), rows.mean(0), rtol=0.0, atol=1e-15)  # never float32: no products are needed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 5)], ids=str)
def test_no_rows_are_no_tokens(leading: tuple[int, ...], precision: str) -> None:
    covariance = covariance_of(torch.zeros(*leading, 3), precision=precision)
    assert torch.equal(covariance.matrix(), torch.zeros(3, 3, dtype=torch.float64))
    assert (covariance.tokens, covariance.outliers, covariance.trace) == (0, 0, 0.0)
    assert covariance.mean().isnan().all()


@pytest.mark.parametrize("tokens", [6, STAGE_TOKENS + 6])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.T.contiguous().T,
        lambda x: x[::2],
        lambda x: x[:, None].expand(-1, 2, -1),
        lambda x: x[..., None, 1:],
    ],
    ids=["every other column", "column-major", "every other row", "repeated", "shifted"],
)
def test_strides_do_not_matter(view: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> None:
    x = view(randn(tokens, 20))
    assert_same_bits(covariance_of(x), covariance_of(x.clone(memory_format=torch.contiguous_format)))
    assert relative_error(covariance_of(x).matrix(), second_moment(x)) <= RESOLUTION["auto"]


def test_inputs_of_different_dtypes_lose_nothing_to_each_other() -> None:
    # 1 + 2^-10 is no bfloat16 number and 2^17 no float16 one; both have exact squares in float32.
    half = torch.zeros(STAGE_TOKENS // 2, 2, dtype=torch.float16)
    brain = torch.zeros(STAGE_TOKENS // 2, 2, dtype=torch.bfloat16)
    half[:, 0], brain[:, 1] = 1 + 2.0**-10, 2.0**17
    expected = STAGE_TOKENS // 2 * torch.tensor([(1 + 2.0**-10) ** 2, 2.0**34], dtype=torch.float64)
    torch.testing.assert_close(covariance_of(half, brain).matrix(), expected.diag(), rtol=RESOLUTION["auto"], atol=0.0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("d", [1, PANEL_ROWS - 1, PANEL_ROWS + 1])
def test_the_matrix_is_symmetric_to_the_bit(d: int, precision: str) -> None:
    matrix = covariance_of(randn(LONG, d), precision=precision).matrix()
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_inputs_give_equal_bits(precision: str) -> None:
    x = activations(LONG, PANEL_ROWS + 1, quietest=1e-2, massive=1e3)
    cuts = (700, 1, 30, LONG - 731)
    assert_same_bits(*(covariance_of(*x.split(cuts), precision=precision) for _ in range(2)))


def test_reading_the_sums_changes_nothing() -> None:
    covariance = covariance_of(randn(LONG, 5), randn(3, 5, seed=1))
    first = sums(covariance)
    covariance.matrix().zero_()
    covariance.mean().zero_()
    for one, other in zip(sums(covariance), first, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_no_graph_is_kept() -> None:
    covariance = covariance_of(randn(4, 3).requires_grad_(), randn(LONG, 3).requires_grad_())
    assert not covariance.matrix().requires_grad
    assert not covariance.mean().requires_grad


@pytest.mark.parametrize("tokens", [10, STAGE_TOKENS, LONG])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_the_model_may_overwrite_its_activation(tokens: int, dtype: torch.dtype, masked: bool) -> None:
    x = randn(tokens, 7, dtype=dtype)
    mask = torch.ones(tokens) if masked else None
    expected = covariance_of(x.clone())
    covariance = Covariance(7)
    covariance.update(x, mask)
    x.fill_(100.0)
    assert_same_bits(covariance, expected)


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("padding", [0.0, 7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("length", [1, 40, STAGE_TOKENS])
def test_padding_is_dropped(length: int, mask_dtype: torch.dtype, padding: float) -> None:
    x = randn(3, length, 5)
    mask = torch.ones(3, length, dtype=mask_dtype)
    mask[0], mask[1, length // 3 :] = 0, 0
    x[mask == 0] = padding
    covariance = Covariance(5)
    covariance.update(x, mask)
    assert_same_bits(covariance, covariance_of(x[mask != 0]))
    assert covariance.tokens == int(mask.sum())


def test_a_mask_is_read_in_the_order_of_the_rows() -> None:
    x = randn(2, 3, 4)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    for given_mask in (mask, mask.flatten(), mask[..., None], mask.T.contiguous().T):
        covariance = Covariance(4)
        covariance.update(x, given_mask)
        assert_same_bits(covariance, covariance_of(x[[0, 0, 1], [0, 2, 2]]))


def test_a_batch_of_padding_adds_nothing() -> None:
    covariance = covariance_of(randn(4, 3))
    covariance.update(torch.full((2, 5, 3), float("nan")), torch.zeros(2, 5))
    assert_same_bits(covariance, covariance_of(randn(4, 3)))


# ------------------------------------------------------------------------------------------------ outlier tokens


def unit_rows(tokens: int, d: int) -> torch.Tensor:
    return torch.nn.functional.normalize(randn(tokens, d, dtype=torch.float64)).float()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [0, 1, OUTLIER_ROWS - 1, OUTLIER_ROWS, OUTLIER_ROWS + 1])
@pytest.mark.parametrize("tokens", [STAGE_TOKENS - 1, LONG])
def test_outliers_are_the_tokens_beyond_8_medians(tokens: int, count: int, precision: str) -> None:
    x = unit_rows(tokens, 16)
    x[:count] *= 1.001 * OUTLIER_RATIO
    x[count : count + 10] *= 0.999 * OUTLIER_RATIO
    covariance = covariance_of(x[torch.randperm(tokens, generator=torch.Generator().manual_seed(1))], precision=precision)
    assert covariance.outliers == count
    assert covariance.tokens == tokens
    assert relative_error(covariance.matrix(), second_moment(x)) <= RESOLUTION[precision]
    torch.testing.assert_close(covariance.mean(), x.double().mean(0), rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("zeros", [LONG - 600, LONG - 1, LONG])
def test_zero_rows_count_as_tokens_and_make_no_outliers(zeros: int, precision: str) -> None:
    x = unit_rows(LONG, 16)
    x[:zeros] = 0.0
    covariance = covariance_of(x, precision=precision)
    assert (covariance.tokens, covariance.outliers) == (LONG, 0)
    torch.testing.assert_close(covariance.matrix(), second_moment(x), rtol=0.0, atol=(LONG - zeros) * RESOLUTION[precision])
    torch.testing.assert_close(covariance.mean(), x.double().sum(0) / LONG, rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outliers_among_zero_rows_are_found(precision: str) -> None:
    x = unit_rows(LONG, 16)
    x[: LONG // 2] = 0.0
    x[-3:] *= 100.0
    assert covariance_of(x, precision=precision).outliers == 3


# ------------------------------------------------------------------------------------------------ precision

D, RANK = 512, 32


class Steep(NamedTuple):
    """4,096 tokens, 32 of them scaled by `massive`, and the leak of their quietest 32 directions."""

    x: torch.Tensor
    massive: float
    optimum: float

    def excess(self, matrix: torch.Tensor) -> float:
        return leak(bottom_eigenpairs(matrix, RANK)[1], self.x) / self.optimum - 1


@pytest.fixture(scope="module", params=[1.0, 1e3, 1e4], ids=["plain", "massive 1e3", "massive 1e4"])
def steep(request: pytest.FixtureRequest) -> Steep:
    x = activations(4096, D, quietest=2e-3, massive=request.param)
    return Steep(x, request.param, optimal_leak(x, RANK))


def excess(matrix: torch.Tensor, x: torch.Tensor, rank: int) -> float:
    return excess_leak(bottom_eigenpairs(matrix, rank)[1], x)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_massive_tokens_do_not_drown_the_quiet_directions(steep: Steep, precision: str) -> None:
    covariance = covariance_of(steep.x, precision=precision)
    assert covariance.outliers == (0 if steep.massive == 1.0 else 32)
    # float32 chains see 1e-7 of the loudest ordinary direction, float64 products 1e-16 of the massive one.
    assert steep.excess(covariance.matrix()) <= {"auto": 1e-6, "fp64": 1e-8, "qr": 1e-8}[precision]


def test_float32_sums_drown_them_only_if_there_are_massive_tokens(steep: Steep) -> None:
    wide_master = sum((chain.T @ chain).double() for chain in steep.x.split(CHAIN_TOKENS))
    for matrix in (steep.x.T @ steep.x, wide_master):
        assert (steep.excess(matrix) > 1e-2) == (steep.massive > 1.0)


def test_the_error_does_not_grow_with_the_number_of_tokens() -> None:
    x = randn(2**18, 8)
    # One float32 chain over all of them was measured at 6e-5, short chains at 3e-8: their errors average out in the master.
    assert relative_error(covariance_of(x).matrix(), second_moment(x)) <= 5e-7


@pytest.mark.parametrize("reading", [lambda c: c.trace, lambda c: c.outliers, lambda c: c.mean(), lambda c: c.matrix()])
def test_sums_that_are_read_between_updates_do_not_degrade(reading: Callable[[Covariance], object]) -> None:
    x = activations(LONG, 64, quietest=1e-2, massive=1e4)
    covariance = Covariance(64)
    for part in x.split(128):
        covariance.update(part[:1])  # the massive token, with nothing beside it to tell it by
        reading(covariance)
        covariance.update(part[1:])
    assert excess(covariance.matrix(), x, 8) <= 1e-8


CUT_X = activations(1300, 33, quietest=1e-2, massive=1e3)
CUT_OPTIMUM = optimal_leak(CUT_X, 4)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    cuts=st.lists(st.one_of(st.integers(0, 1300), st.integers(0, 40)), max_size=40),
    reads=st.sets(st.integers(0, 40), max_size=5),
    precision=st.sampled_from(PRECISIONS),
)
def test_the_cuts_between_updates_do_not_matter(cuts: list[int], reads: set[int], precision: str) -> None:
    covariance = Covariance(33, precision=precision)
    for number, (start, stop) in enumerate(itertools.pairwise([0, *sorted(cuts), 1300])):
        covariance.update(CUT_X[start:stop])
        if number in reads:
            assert covariance.trace == pytest.approx(float(CUT_X[:stop].double().square().sum()), rel=1e-6)
    assert covariance.tokens == 1300
    assert relative_error(covariance.matrix(), second_moment(CUT_X)) <= RESOLUTION[precision]
    torch.testing.assert_close(covariance.mean(), CUT_X.double().mean(0), rtol=0.0, atol=1e-12)
    # The norm of C is that of its massive tokens and says nothing of the quiet directions.
    assert (
        leak(bottom_eigenpairs(covariance.matrix(), 4)[1], CUT_X) / CUT_OPTIMUM - 1
        <= {"auto": 1e-8, "fp64": 1e-10, "qr": 1e-10}[precision]
    )


def test_single_rows_give_what_one_update_gives() -> None:
    x = activations(LONG, 33, quietest=1e-2, massive=1e3)
    covariance = covariance_of(*x.split(1))
    assert covariance.outliers == covariance_of(x).outliers == len(x[::128])
    assert excess(covariance.matrix(), x, 4) <= 1e-8


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e-25, 1e-13, 1e-11, 1e13, 1e15, 1e25])
@pytest.mark.parametrize("tokens", [20, LONG])
def test_relative_accuracy_does_not_depend_on_the_scale(tokens: int, scale: float, precision: str) -> None:
    x = activations(tokens, 40, quietest=1e-2, massive=1e3, every=16) * scale
    covariance = covariance_of(x, precision=precision)
    expected = second_moment(x)
    assert relative_error(covariance.matrix(), expected) <= RESOLUTION[precision]
    assert covariance.trace == pytest.approx(float(expected.trace()), rel=RESOLUTION[precision])
    assert excess(covariance.matrix(), x, 4) <= 1e-8 if tokens > 40 else True


def matmul_settings() -> list[str]:
    backends = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return [torch.get_float32_matmul_precision()]
    return [backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision]


def _for_all_backends(precision: str) -> None:
    torch.backends.fp32_precision = precision


def _for_cuda(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def _for_cpu(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


@pytest.fixture
def own_matmul_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        for reset in (_for_all_backends, _for_cuda, _for_cpu):
            reset("none")


@pytest.mark.usefixtures("own_matmul_settings")
@pytest.mark.parametrize(
    ("allow", "value"),
    [
        (torch.set_float32_matmul_precision, "highest"),
        (torch.set_float32_matmul_precision, "high"),
        (torch.set_float32_matmul_precision, "medium"),
        (_for_all_backends, "tf32"),
        (_for_cuda, "tf32"),
        (_for_cpu, "bf16"),
    ],
)
def test_low_precision_float32_products_are_kept_out(
    allow: Callable[[str], None], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if allow is not torch.set_float32_matmul_precision and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("settings for one backend came with torch 2.9")
    x = randn(LONG, 40)
    expected = covariance_of(x)
    during = []
    add_gram = LowerTriangle.add_gram

    def spied(self: LowerTriangle, x_nd: torch.Tensor) -> None:
        # Many CPUs have no fast bf16 product and compute the same bits whatever is allowed: look at what is allowed.
        during.append(matmul_settings()[-1])
        add_gram(self, x_nd)

    monkeypatch.setattr(LowerTriangle, "add_gram", spied)
    allow(value)
    before = matmul_settings()
    covariance = covariance_of(x)
    assert_same_bits(covariance, expected)
    assert set(during) <= {"ieee", "highest"}
    assert during
    assert matmul_settings() == before


@pytest.mark.usefixtures("own_matmul_settings")
def test_a_setting_for_all_backends_still_reaches_the_products_afterwards() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("settings for one backend came with torch 2.9")
    _for_all_backends("tf32")
    covariance_of(randn(LONG, 4))
    _for_all_backends("ieee")
    assert matmul_settings() == ["ieee"] * 3


@pytest.mark.parametrize("tokens", [20, STAGE_TOKENS, LONG])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_around_an_update_changes_no_bit(low: torch.dtype, tokens: int) -> None:
    x = activations(tokens, 64, quietest=1e-2, massive=1e3)
    covariance = Covariance(64)
    with torch.autocast("cpu", low):
        covariance.update(x / 64)  # within the range of float16
        assert (x / 64).T.mm(x / 64).dtype == low
        read_inside = covariance.matrix()
    assert_same_bits(covariance, covariance_of(x / 64))
    assert torch.equal(read_inside, covariance.matrix())


def test_what_even_float64_products_lose_qr_keeps() -> None:
    # Planted so that no order of summation matters: float64 cannot add the squares of 1 to that of 2^30, whose last place is 2^8.
    massive, quiet = 2.0**30 * torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    x = torch.cat([quiet, massive, quiet]).double()  # the squared singular values are 2^61 and 4
    squared = covariance_of(x, precision="fp64").matrix()
    assert torch.equal(squared, 2.0**60 * torch.ones(2, 2, dtype=torch.float64))
    covariance = covariance_of(*x.split(1), precision="qr")
    assert covariance.products == "qr"
    squares, basis = bottom_right_singular(covariance.root(), 1)
    assert float(squares[0]) == pytest.approx(4.0, rel=1e-6)  # σ is known to some 2^30 units in the last place
    assert excess_leak(basis, x) <= 1e-6


def test_qr_keeps_what_massive_tokens_hide() -> None:
    # 32 of 16,384 tokens 1e5 times the others: squared, 1e10, and the quietest directions are 1e-6 of the ordinary ones.
    x = activations(16384, 256, quietest=1e-3, massive=1e5, every=512).double()
    covariance = covariance_of(*x.split(3000), precision="qr")
    assert excess_leak(bottom_right_singular(covariance.root(), 32)[1], x) <= 1e-6


def test_the_root_is_a_root() -> None:
    x = randn(700, 20)
    covariance = covariance_of(*x.split(90), precision="qr")
    root = covariance.root()
    assert torch.equal(root, root.triu())
    assert relative_error(root.T @ root, second_moment(x)) <= 1e-14
    root.zero_()
    assert relative_error(covariance.matrix(), second_moment(x)) <= 1e-14
    for precision in ("auto", "fp64"):
        with pytest.raises(ValueError, match='only precision="qr" keeps a root'):
            covariance_of(x, precision=precision).root()


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("mine", "theirs"), [(0, 0), (0, 5), (5, 0), (1, 1), (300, 300), (LONG, 7), (LONG, LONG)])
def test_merging_is_summing_all_tokens(mine: int, theirs: int, precision: str) -> None:
    x, y = (activations(tokens, 20, quietest=1e-2, massive=1e3, every=200, seed=seed) for seed, tokens in enumerate((mine, theirs)))
    covariance, other = covariance_of(x, precision=precision), covariance_of(y, precision=precision)
    alone = covariance_of(y, precision=precision)
    covariance.merge(other)
    both = torch.cat([x, y])
    assert covariance.tokens == mine + theirs
    assert covariance.outliers == covariance_of(x).outliers + alone.outliers
    torch.testing.assert_close(
        covariance.matrix(), second_moment(both), rtol=0.0, atol=RESOLUTION[precision] * float(second_moment(both).norm())
    )
    torch.testing.assert_close(covariance.mean(), both.double().mean(0), rtol=0.0, atol=1e-12, equal_nan=True)
    for one, untouched in zip(sums(other), sums(alone), strict=True):
        torch.testing.assert_close(one, untouched, rtol=0.0, atol=0.0, equal_nan=True)


def test_merged_covariances_go_their_own_ways_afterwards() -> None:
    covariance, other = covariance_of(randn(5, 3)), covariance_of(randn(6, 3, seed=1))
    covariance.merge(other)
    covariance.update(randn(7, 3, seed=2))
    other.update(randn(8, 3, seed=3))
    assert (covariance.tokens, other.tokens) == (18, 14)
    for merged, parts in ((covariance, [(5, 0), (6, 1), (7, 2)]), (other, [(6, 1), (8, 3)])):
        x = torch.cat([randn(tokens, 3, seed=seed) for tokens, seed in parts])
        assert relative_error(merged.matrix(), second_moment(x)) <= RESOLUTION["fp64"]  # too few tokens for float32 chains


def test_merging_with_itself_doubles() -> None:
    x = randn(LONG, 3)
    covariance, once = covariance_of(x), covariance_of(x)
    covariance.merge(covariance)
    assert torch.equal(covariance.matrix(), 2 * once.matrix())
    assert torch.equal(covariance.mean(), once.mean())
    assert covariance.tokens == 2 * once.tokens


@pytest.mark.parametrize("other", [Covariance(4), Covariance(1), Covariance(3, precision="fp64")])
def test_unlike_covariances_do_not_merge(other: Covariance) -> None:
    covariance = covariance_of(randn(5, 3))
    with pytest.raises(ValueError, match=f"width {other.d_in} and precision '{other.precision}'"):
        covariance.merge(other)
    assert_same_bits(covariance, covariance_of(randn(5, 3)))


# ------------------------------------------------------------------------------------------------ kept, and scaled


def restored(covariance: Covariance, dtype: torch.dtype = torch.float64) -> Covariance:
    facts, tensors = covariance.state(dtype)
    return Covariance.from_state(json.loads(json.dumps(facts)), tensors)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tokens", [0, 1, LONG])
@pytest.mark.parametrize("d", [1, 2, PANEL_ROWS + 1])
def test_what_is_restored_is_what_was_kept_to_the_bit(d: int, tokens: int, precision: str) -> None:
    covariance = covariance_of(activations(tokens, d, quietest=1e-2, massive=1e3, every=200), precision=precision)
    facts, tensors = covariance.state()
    assert max(t.numel() for t in tensors.values()) == max(d * (d + 1) // 2, d)
    again = restored(covariance)
    digits = 1e-15 if precision == "qr" else 0.0  # its root comes back to the bit, in another layout, which turns the order of sums
    for one, other in zip(sums(again), sums(covariance), strict=True):
        atol = digits * covariance.trace
        torch.testing.assert_close(one, other, rtol=digits, atol=atol, equal_nan=True)
    assert (again.mass, again.products) == (covariance.mass, covariance.products)
    assert again.error_norm == pytest.approx(covariance.error_norm, rel=digits)
    assert again.precision == {"auto": "fp64", "fp64": "fp64", "qr": "qr"}[precision]
    if precision == "qr":
        assert torch.equal(again.root(), covariance.root())
    for name, tensor in again.state()[1].items():
        assert torch.equal(tensor, tensors[name])
    assert again.state()[0] == facts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_state_does_not_change_with_what_comes_later(precision: str, dtype: torch.dtype) -> None:
    covariance = covariance_of(randn(40, 5), precision=precision)
    facts, tensors = covariance.state(dtype)
    before = json.dumps(facts), {name: tensor.clone() for name, tensor in tensors.items()}
    covariance.update(randn(LONG, 5, seed=1))
    covariance.scale(3.0)
    assert covariance.tokens == LONG + 40
    assert json.dumps(facts) == before[0]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name])
    again = Covariance.from_state(facts, tensors)
    again.update(randn(LONG, 5, seed=1))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[1][name])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_restored_goes_on(precision: str) -> None:
    x = activations(LONG, 20, quietest=1e-2, massive=1e3, every=200)
    again = restored(covariance_of(x[:700], precision=precision))
    again.update(x[700:1200])
    other = restored(covariance_of(x[1200:], precision=precision))
    again.merge(other)
    assert again.tokens == len(x)
    assert relative_error(again.matrix(), second_moment(x)) <= RESOLUTION[precision]
    torch.testing.assert_close(again.mean(), x.double().mean(0), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e12])
@pytest.mark.parametrize("massive", [1.0, 1e4])
def test_what_float32_loses_in_a_file_is_counted(precision: str, scale: float, massive: float) -> None:
    x = activations(LONG, 60, quietest=1e-2, massive=massive) * scale
    covariance = covariance_of(x, precision=precision)
    facts, tensors = covariance.state(torch.float32)
    assert sum(t.numel() for t in tensors.values() if t.dtype == torch.float32) == 60 * 61 // 2
    again = Covariance.from_state(json.loads(json.dumps(facts)), tensors)
    # Under "qr", the error is one of X: that of its root.
    kept, true = (again.root(), covariance.root()) if precision == "qr" else (again.matrix(), covariance.matrix())
    lost = float((kept - true).norm())
    added = again.error_norm - covariance.error_norm
    assert 0 < lost <= added * (1 + 1e-9)
    assert added <= 2 * lost
    if scale > 1e-19:  # below, squares are no normal numbers
        assert relative_error(kept, true) <= 1e-7
    torch.testing.assert_close(again.mean(), covariance.mean(), rtol=0, atol=0)
    # Once lost, it is not lost again, and not forgotten.
    twice = restored(again, torch.float32)
    assert torch.equal(twice.matrix(), again.matrix())
    assert twice.error_norm == again.error_norm
    twice.merge(again)
    assert twice.error_norm >= (2 if precision != "qr" else 1) * lost


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sums_beyond_the_range_of_float32_are_not_kept_as_infinity(precision: str) -> None:
    covariance = covariance_of(randn(40, 3).double() * 1e45, precision=precision)
    with pytest.raises(ValueError, match=r"exceed the range of torch\.float32"):
        covariance.state(torch.float32)
    assert_same_bits(restored(covariance), covariance)
    assert bool(restored(covariance).matrix().isfinite().all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weight", [1e-9, 0.3, 4.0, 1e9])
def test_a_weight_counts_every_token_so_often(precision: str, weight: float) -> None:
    x, y = randn(LONG, 7), randn(30, 7, seed=1)
    covariance = covariance_of(x, precision=precision)
    error, mean = covariance.error_norm, covariance.mean()
    covariance.scale(weight)
    assert relative_error(covariance.matrix(), weight * second_moment(x)) <= RESOLUTION[precision]
    torch.testing.assert_close(covariance.mean(), mean, rtol=1e-14, atol=1e-16)
    assert (covariance.tokens, covariance.mass) == (len(x), weight * len(x))
    assert covariance.error_norm == pytest.approx(error * (weight**0.5 if precision == "qr" else weight), rel=1e-9)
    covariance.update(y)  # later ones count once
    whole = weight * second_moment(x) + second_moment(y)
    assert relative_error(covariance.matrix(), whole) <= RESOLUTION[precision]
    total = weight * x.double().sum(0) + y.double().sum(0)
    torch.testing.assert_close(covariance.mean(), total / (weight * len(x) + len(y)), rtol=1e-12, atol=1e-14)
    assert covariance.mass == pytest.approx(weight * len(x) + len(y), rel=1e-15)


@pytest.mark.parametrize("weight", [1e-12, 1e12])
@pytest.mark.parametrize("quietest", [1e-5, 0.3])
def test_a_weight_on_the_first_tokens_does_not_change_what_they_show(weight: float, quietest: float) -> None:
    x = activations(2048, 128, quietest=quietest)
    plain, weighed = Covariance(128), Covariance(128)
    for covariance in (plain, weighed):
        covariance.update(x[:100])  # not enough to tell whether float32 will do
    weighed.scale(weight)
    plain.update(x[100:])
    weighed.update(x[100:] * weight**0.5)
    assert weighed.products == plain.products == ("fp64" if quietest == 1e-5 else "mixed")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    covariance = covariance_of(randn(5, 3))
    with pytest.raises(ValueError, match="a weight must be a positive number"):
        covariance.scale(weight)
    assert_same_bits(covariance, covariance_of(randn(5, 3)))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("tokens", "at"), [(1, 0), (30, 29), (LONG, 0), (LONG, LONG - 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nan_and_inf_are_refused_at_once(tokens: int, at: int, dtype: torch.dtype, value: float, precision: str) -> None:
    good = randn(40, 5)
    covariance = covariance_of(good, precision=precision)
    x = randn(tokens, 5, seed=1, dtype=dtype)
    x[at, 3] = value
    with pytest.raises(ValueError, match=rf"NaN or Inf in 1 of {tokens} tokens .* token {at}\)"):
        covariance.update(x)
    assert_same_bits(covariance, covariance_of(good, precision=precision))


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.zeros(2, 4), None, ValueError, r"width 3, got shape \(2, 4\)"),
        (torch.zeros(3, 1), None, ValueError, r"width 3, got shape \(3, 1\)"),
        (torch.zeros(2, 0), None, ValueError, r"width 3, got shape \(2, 0\)"),
        (torch.zeros(()), None, ValueError, r"width 3, got shape \(\)"),
        (torch.zeros(2, 5, 3), torch.ones(2, 4), ValueError, "the mask has 8 entries for 10 rows"),
        (torch.zeros(2, 5, 3), torch.ones(2), ValueError, "the mask has 2 entries for 10 rows"),
        (torch.zeros(2, 5, 3), torch.zeros(0), ValueError, "the mask has 0 entries for 10 rows"),
        (torch.zeros(2, 3, dtype=torch.int64), None, TypeError, "floating point, not torch.int64"),
        (torch.zeros(2, 3, dtype=torch.bool), None, TypeError, "floating point, not torch.bool"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    x: torch.Tensor, mask: torch.Tensor | None, error: type[Exception], message: str
) -> None:
    covariance = covariance_of(randn(4, 3))
    with pytest.raises(error, match=message):
        covariance.update(x, mask)
    assert_same_bits(covariance, covariance_of(randn(4, 3)))


@pytest.mark.parametrize("d_in", [0, -1])
def test_a_width_below_one_is_refused(d_in: int) -> None:
    with pytest.raises(ValueError, match="d_in must be at least 1"):
        Covariance(d_in)


def test_mixed_stays_with_float32_chains_where_auto_does_not() -> None:
    """A spectrum that float32 chains cannot resolve, with massive tokens in it."""
    x = randn(LONG, 64) * torch.logspace(0, -5, 64)
    x[::97] *= 1e3
    auto, mixed = covariance_of(x), covariance_of(x, precision="mixed")
    assert (auto.products, mixed.products) == ("fp64", "mixed")
    assert auto.outliers == mixed.outliers > 0
    c = second_moment(x)
    assert relative_error(auto.matrix(), c) <= RESOLUTION["fp64"]
    assert relative_error(mixed.matrix(), c) <= RESOLUTION["auto"]
    assert 0 < torch.linalg.matrix_norm(mixed.matrix() - c) <= mixed.error_norm


def test_rows_on_which_float32_chains_fail_are_summed_as_if_none_had_been_tried() -> None:
    x = randn(LONG, 64) * torch.logspace(0, -5, 64)
    x[5::97] *= 1e3
    auto, fp64 = covariance_of(x), covariance_of(x, precision="fp64")
    assert auto.products == "fp64"
    assert_same_bits(auto, fp64)
    assert (auto.outliers, auto.error_norm) == (fp64.outliers, fp64.error_norm)


@pytest.mark.parametrize("tiny", [0, 2])
def test_a_few_directions_below_the_noise_do_not_ask_for_float64(tiny: int) -> None:
    """Beside the others' their energy is nothing. With more of them, a basis could consist of nothing else."""
    x = randn(LONG, 256)
    x[:, :tiny] *= 1e-6
    assert covariance_of(x).products == "mixed"
    x[:, :128] *= 1e-6
    assert covariance_of(x).products == "fp64"


@pytest.mark.parametrize("precision", ["fp32", "", "AUTO"])
def test_an_unknown_precision_is_refused(precision: str) -> None:
    with pytest.raises(ValueError, match="precision must be one of 'auto', 'mixed', 'fp64', 'qr'"):
        Covariance(3, precision=precision)


# ---- the trace that PEFT's CorDA has


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_trace_of_samples_divided_by_their_largest_entries(dtype: torch.dtype) -> None:
    x = torch.randn(4, 9, 5).mul(torch.tensor([1.0, 100.0, 1e-3, 1e3])[:, None, None]).to(dtype)
    x[2] = -x[2].abs()  # PEFT divides by the magnitude of the largest entry, not by the largest magnitude
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, :4], mask[1, 8:], mask[3] = False, False, False
    samples = [each[keep].double() for each, keep in zip(x, mask, strict=True) if keep.any()]
    wanted = sum(float(each.square().sum() / each.max() ** 2) for each in samples) / 3
    whole, parts, other = Covariance(5), Covariance(5), Covariance(5, precision="auto")
    x[~mask] = float("nan")
    whole.update(x, mask)
    for each in samples[:2]:
        parts.update(each)
    other.update(samples[2][None])
    parts.merge(other)
    for found in (whole, parts):
        assert found.peft_trace == pytest.approx(wanted, rel=1e-5)
        again = Covariance.from_state(*found.state())
        assert again.peft_trace == found.peft_trace
        again.scale(0.25)
        assert again.peft_trace == pytest.approx(wanted, rel=1e-5)
    total = whole.compress().clone()
    whole._sums.triangle._memory[: len(total)] = total * 2  # type: ignore[attr-defined]  # what two such processes add up to
    whole.expand()
    assert whole.peft_trace == pytest.approx(wanted, rel=1e-5)


def test_the_trace_of_samples_is_not_known_of_older_files_nor_of_what_has_none() -> None:
    covariance = covariance_of(torch.randn(40, 5))
    facts, tensors = covariance.state()
    del facts["samples"]
    assert Covariance.from_state(facts, tensors).peft_trace is None
    assert Covariance.from_matrix(torch.eye(5)).peft_trace is None
    assert covariance_of(torch.zeros(4, 5)).peft_trace is None
    beyond = covariance_of(torch.randn(4, 5, dtype=torch.float32) * 1e30)
    assert beyond.peft_trace is None
    assert Covariance.from_state(*beyond.state()).peft_trace is None
    with pytest.raises(ValueError, match="'samples' should be"):
        Covariance.from_state({**facts, "samples": [1.0, -1.0]}, tensors)
