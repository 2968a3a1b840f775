"""`GroupedCovariance`: each member is the covariance of its own tokens, by the grouped kernels and by PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import nullspace.moments.covariance as covariance_module
import nullspace.moments.precision as precision_module
from inputs import activations, randn
from nullspace import Covariance
from nullspace.moments.finite import FiniteCheck
from nullspace.moments.grouped import GroupedCovariance, pool_of
from nullspace.moments.sums_grouped import GroupedTritonSums
from nullspace.moments.sums_triton import TritonSums
from reference import relative_error, second_moment

D = 24
# Of three updates; the second group has none, the first fills its part of a launch, the last gets few.
COUNTS = [[400, 0, 40, 3], [150, 0, 30, 0], [30, 0, 2, 1]]
Make = Callable[..., GroupedCovariance]


def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(precision_module, "_has_kernels", lambda device, precision: precision in ("auto", "mixed"))
    monkeypatch.setattr(covariance_module, "new_sums", lambda d_in, device, precision: TritonSums(d_in, device))


@pytest.fixture(params=[pytest.param("PyTorch"), pytest.param("kernels", marks=pytest.mark.interpreter)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the sums are, by PyTorch's products or by the kernels."""
    if request.param == "kernels":
        by_kernels(monkeypatch)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cpu")


def updates(dtype: torch.dtype = torch.float32, massive: float = 1.0) -> list[torch.Tensor]:
    x = activations(sum(map(sum, COUNTS)), D, quietest=1e-2, massive=massive, every=50).to(dtype)
    return list(x.split([sum(counts) for counts in COUNTS]))


def parts_of(xs: list[torch.Tensor], number: int) -> list[torch.Tensor]:
    return [x.split(counts)[number] for x, counts in zip(xs, COUNTS, strict=True)]


def grouped(xs: list[torch.Tensor], device: torch.device, precision: str = "auto") -> GroupedCovariance:
    result = GroupedCovariance(4, D, device=device, precision=precision)
    for x, counts in zip(xs, COUNTS, strict=True):
        rows = x.clone().to(device)
        result.update(rows, counts)
        rows.fill_(7.0)  # the model may overwrite its activation
    return result


@pytest.mark.parametrize(("dtype", "massive"), [(torch.bfloat16, 1e3), (torch.float32, 1.0), (torch.float64, 1e3)])
def test_members_are_covariances_of_their_own_tokens(place: torch.device, dtype: torch.dtype, massive: float) -> None:
    xs = updates(dtype, massive)
    result = grouped(xs, place)
    for number, member in enumerate(result.members):
        own = torch.cat(parts_of(xs, number))
        alone = Covariance(D, device=place)
        for part in parts_of(xs, number):
            alone.update(part.to(place))
        assert member.tokens == len(own)
        assert member.peft_trace == (None if len(own) == 0 else pytest.approx(alone.peft_trace))
        if len(own) == 0:
            assert not member.matrix().any()
            continue
        assert relative_error(member.matrix().cpu(), second_moment(own)) <= (1e-13 if dtype == torch.float64 else 1e-6)
        assert member.trace == pytest.approx(float(own.double().square().sum()), rel=1e-6)
        torch.testing.assert_close(member.mean().cpu(), own.double().mean(0), rtol=1e-9, atol=1e-12)
        assert member.products == ("fp64" if dtype == torch.float64 or len(own) < 512 else member.products)
        if massive > 1.0:
            assert member.outliers == alone.outliers
            # Massive tokens never pass through a chain: what they are in float64 is all that they cost.
            ordinary = own.double()[own.double().norm(dim=1) < 100]
            exact = relative_error(member.matrix().cpu(), second_moment(own)) * second_moment(own).norm()
            assert exact <= 1e-6 * ordinary.square().sum() + 1e-13 * second_moment(own).norm()


def test_members_are_merged_kept_and_sent_like_any_other(place: torch.device) -> None:
    xs = updates(massive=1e3)
    result, again = grouped(xs, place), grouped(xs, place)
    member, expected = result.members[2], second_moment(torch.cat(parts_of(xs, 2)))
    kept = Covariance.from_state(*member.state(), device=place)
    assert torch.equal(kept.matrix(), member.matrix())
    vector = member.compress()
    vector += again.members[2].compress()
    member.expand()
    assert (member.tokens, member.outliers) == (2 * kept.tokens, 2 * kept.outliers)
    assert relative_error(member.matrix().cpu(), 2 * expected) <= 1e-6
    member.merge(result.members[0])
    other = second_moment(torch.cat(parts_of(xs, 0)))
    assert relative_error(member.matrix().cpu(), 2 * expected + other) <= 1e-6
    assert relative_error(result.members[0].matrix().cpu(), other) <= 1e-6  # as it was
    result.members[3].update(xs[0].to(place))  # and one alone goes on
    own = torch.cat([*parts_of(xs, 3), xs[0]])
    assert relative_error(result.members[3].matrix().cpu(), second_moment(own)) <= 1e-6
    pool = pool_of(again.members[:2] + again.members[3:])
    assert relative_error(pool.matrix.cpu(), other + second_moment(torch.cat(parts_of(xs, 3)))) <= 1e-6


@pytest.mark.interpreter
def test_equal_inputs_give_equal_bits_and_one_launch_serves_all(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernels(monkeypatch)
    import nullspace.csrc_triton as csrc_triton

    launches: list[int] = []
    launch = csrc_triton.syrk_accumulate_grouped

    def counted(*args, **kwargs) -> None:
        launches.append(len(args[1]))
        launch(*args, **kwargs)

    monkeypatch.setattr(csrc_triton, "syrk_accumulate_grouped", counted, raising=False)
    xs = updates(torch.bfloat16, massive=1e3)
    one, other = grouped(xs, device), grouped(xs, device)
    for a, b in zip(one.members, other.members, strict=True):
        assert torch.equal(a.matrix(), b.matrix())
        assert torch.equal(a.total(), b.total())
    assert one.members[0].products == "mixed"
    assert launches == [sum(map(sum, COUNTS))] * 2  # all updates, all groups


@pytest.mark.interpreter
def test_a_full_buffer_is_summed_and_dtypes_may_change(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    by_kernels(monkeypatch)
    monkeypatch.setattr(GroupedTritonSums, "launch_tokens", property(lambda self: 560, lambda self, value: None), raising=False)
    xs = updates()
    xs[1] = xs[1].bfloat16()
    result = grouped(xs, device)
    for number, member in enumerate(result.members):
        own = torch.cat([part.double() for part in parts_of(xs, number)])
        if len(own):
            assert relative_error(member.matrix().cpu(), second_moment(own)) <= 1e-6


def test_nan_is_an_error_of_its_group(place: torch.device) -> None:
    result = GroupedCovariance(3, D, device=place)
    result.update(randn(600, D).to(place), [590, 10, 0])
    x = randn(30, D)
    x[25, 3] = float("nan")
    try:
        result.update(x.to(place), [5, 22, 3])
    except ValueError as error:  # PyTorch's sums look at once, and nothing was added
        assert "NaN or Inf in 1 of 30 tokens (the first one is token 25)" in str(error)  # noqa: PT017
        assert [member.tokens for member in result.members] == [590, 10, 0]
        return
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 32 tokens"):
        result.members[1].matrix()
    assert relative_error(result.members[2].matrix().cpu(), second_moment(x[27:])) <= 1e-14
    result.update(x.to(place), [5, 22, 3])
    named = {str(number): member for number, member in enumerate(result.members)}
    assert FiniteCheck(named).failure() == ("1", "NaN or Inf in 1 of 22 tokens (the first one is token 20)")


def test_one_group_decides_for_all_whether_float32_suffices() -> None:
    result = GroupedCovariance(2, D)
    result.update(randn(40 + 3, D), [40, 3])
    result.update(randn(600, D), [0, 600])  # 1.25 · d of the second group are in float64, and the rest need not be
    result.update(randn(600, D), [600, 0])
    assert [member.products for member in result.members] == ["mixed", "mixed"]
    steep = GroupedCovariance(2, D)
    steep.update(activations(1200, D, quietest=1e-7), [1200, 0])
    steep.update(randn(600, D), [0, 600])
    assert [member.products for member in steep.members] == ["fp64", "fp64"]


@pytest.mark.parametrize("precision", ["fp64", "qr"])
def test_other_precisions(precision: str) -> None:
    xs = updates()
    result = grouped(xs, torch.device("cpu"), precision)
    for number in (0, 2, 3):
        own = torch.cat(parts_of(xs, number))
        assert relative_error(result.members[number].matrix(), second_moment(own)) <= 1e-12
        assert result.members[number].products == precision


@pytest.mark.parametrize(
    ("rows", "counts", "error", "message"),
    [
        (torch.zeros(3, D, dtype=torch.int32), [3, 0], TypeError, "must be floating point"),
        (torch.zeros(3, D + 1), [3, 0], ValueError, f"rows of width {D}, got shape"),
        (torch.zeros(3, D), [3], ValueError, "3 rows of 2 groups, but counts of 3 in 1"),
        (torch.zeros(3, D), [2, 2], ValueError, "3 rows of 2 groups, but counts of 4 in 2"),
        (torch.zeros(3, D), [4, -1], ValueError, "3 rows of 2 groups"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: torch.Tensor, counts: list[int], error: type[Exception], message: str) -> None:
    result = GroupedCovariance(2, D)
    with pytest.raises(error, match=message):
        result.update(rows, counts)
    assert [member.tokens for member in result.members] == [0, 0]


def test_bad_arguments() -> None:
    for arguments, message in (((0, 3), "groups"), ((2, 0), "d_in must be at least 1, not 0")):
        with pytest.raises(ValueError, match=message):
            GroupedCovariance(*arguments)
    with pytest.raises(ValueError, match="precision must be one of"):
        GroupedCovariance(2, 3, precision="fp32")


def test_a_group_of_zeros_leaves_the_samples_of_the_others() -> None:
    rows = [torch.zeros(3, 4), randn(5, 4, seed=1), randn(2, 4, seed=2)]
    grouped = GroupedCovariance(3, 4)
    grouped.update(torch.cat(rows), [3, 5, 2])
    for member, own in zip(grouped.members, rows, strict=True):
        alone = Covariance(4)
        alone.update(own)
        assert member.peft_trace == (None if alone.peft_trace is None else pytest.approx(alone.peft_trace, rel=1e-6))
    assert grouped.members[2].peft_trace is not None


def test_what_is_completed_keeps_the_account_of_rounding() -> None:
    grouped = GroupedCovariance(3, 8, precision="mixed")
    counts = [700, 5, 0]
    grouped.update(randn(705, 8, seed=3), counts)
    pool = pool_of(grouped.members)
    assert pool.tokens == 705
    assert pool.lost >= grouped.members[0].error_norm > 0
    for member, count in zip(grouped.members, counts, strict=True):
        member.pool = pool
        completed = member.completed(12)
        assert completed.tokens == max(count, 12)
        assert completed.products == "mixed"  # so that "auto" sums it again in float64 where that is needed
        assert completed.error_norm > 0.9 * (completed.tokens - count) / 705 * pool.lost
        assert relative_error(completed.matrix(), member.matrix() + (completed.tokens - count) / 705 * pool.matrix) < 1e-14
