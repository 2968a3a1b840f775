"""`Covariance` on the kernels: the same sums as PyTorch's, and nothing on the way that waits for the device."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import nullspace.csrc_triton as csrc_triton
import nullspace.moments.covariance as covariance_module
import nullspace.moments.precision as precision_module
from inputs import activations, randn
from models import random_batches, tiny
from nullspace import Covariance, stream_covariances
from nullspace.moments.finite import FiniteCheck
from nullspace.moments.grouped import GroupedCovariance
from nullspace.moments.sums import OUTLIER_RATIO, STAGE_TOKENS, TokenMask
from nullspace.moments.sums_torch import TorchSums
from nullspace.moments.sums_triton import Float64Sums, TritonSums, new_buffer
from nullspace.solvers import bottom_eigenpairs
from reference import excess_leak, recorded_inputs, relative_error, second_moment

pytest.importorskip("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Covariances on the kernels, wherever they live."""
    monkeypatch.setattr(covariance_module, "new_sums", lambda d_in, device, precision: TritonSums(d_in, device))


def covariance_of(*updates: torch.Tensor, device: torch.device) -> Covariance:
    covariance = Covariance(updates[0].shape[-1], device=device)
    for x in updates:
        covariance.update(x.to(device))
    return covariance


def unit_rows(tokens: int, d: int) -> torch.Tensor:
    return torch.nn.functional.normalize(randn(tokens, d, dtype=torch.float64)).float()


# ------------------------------------------------------------------------------------------------ what is summed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("leading", [(), (1,), (3, 5), (STAGE_TOKENS,), (2, 1, STAGE_TOKENS + 3)], ids=str)
@pytest.mark.parametrize("d", [1, 70])
def test_the_sums_are_those_of_the_tokens(d: int, leading: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = randn(*leading, d, dtype=dtype)
    covariance = covariance_of(x, device=device)
    matrix = covariance.matrix().cpu()
    assert torch.equal(matrix, matrix.T)
    assert relative_error(matrix, second_moment(x)) <= (1e-14 if dtype == torch.float64 else 1e-6)
    assert covariance.tokens == x.numel() // d
    assert covariance.trace == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    torch.testing.assert_close(covariance.mean().cpu(), x.reshape(-1, d).double().mean(0), rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_buffers_and_a_remainder(dtype: torch.dtype, device: torch.device) -> None:
    x = randn(3 * STAGE_TOKENS + 40, 33, dtype=dtype)
    covariance = covariance_of(x, device=device)
    assert relative_error(covariance.matrix().cpu(), second_moment(x)) <= 1e-6
    assert covariance.products == "mixed"


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.T.contiguous().T,
        lambda x: x[::2],
        lambda x: x[:, None].expand(-1, 2, -1),
        lambda x: x[..., 1:],
    ],
    ids=["every other column", "column-major", "every other row", "repeated", "shifted"],
)
def test_strides_do_not_matter(view: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
    x = view(randn(STAGE_TOKENS + 6, 20, dtype=torch.bfloat16))
    assert relative_error(covariance_of(x, device=device).matrix().cpu(), second_moment(x)) <= 1e-6


def test_inputs_of_different_dtypes_lose_nothing_to_each_other(device: torch.device) -> None:
    # 1 + 2^-10 is no bfloat16 number and 2^17 no float16 one.
    half = torch.zeros(STAGE_TOKENS, 2, dtype=torch.float16)
    brain = torch.zeros(STAGE_TOKENS, 2, dtype=torch.bfloat16)
    half[:, 0], brain[:, 1] = 1 + 2.0**-10, 2.0**17
    covariance = covariance_of(half, brain, half[:7], brain.double(), device=device)
    expected = torch.tensor([(STAGE_TOKENS + 7) * (1 + 2.0**-10) ** 2, 2 * STAGE_TOKENS * 2.0**34], dtype=torch.float64)
    torch.testing.assert_close(covariance.matrix().cpu(), expected.diag(), rtol=1e-6, atol=0.0)
    assert covariance.tokens == 3 * STAGE_TOKENS + 7


@settings(
    max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.one_of(st.integers(0, 1300), st.integers(0, 40)), max_size=10), reads=st.sets(st.integers(0, 10), max_size=2)
)
def test_the_cuts_between_updates_do_not_matter(cuts: list[int], reads: set[int], device: torch.device) -> None:
    x = activations(1300, 33, quietest=1e-2, massive=1e3)
    covariance = Covariance(33, device=device)
    bounds = [0, *sorted(cuts), 1300]
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        covariance.update(x[start:stop].to(device))
        if number in reads:
            assert covariance.trace == pytest.approx(float(x[:stop].double().square().sum()), rel=1e-6)
    assert covariance.tokens == 1300
    torch.testing.assert_close(covariance.mean().cpu(), x.double().mean(0), rtol=0.0, atol=1e-12)
    assert excess_leak(bottom_eigenpairs(covariance.matrix().cpu(), 4)[1], x) <= 1e-6


def test_equal_inputs_give_equal_bits(device: torch.device) -> None:
    x = activations(2 * STAGE_TOKENS + 90, 70, quietest=1e-2, massive=1e3).bfloat16()
    one, other = (covariance_of(*x.split((700, 1, 30, len(x) - 731)), device=device) for _ in range(2))
    assert torch.equal(one.matrix(), other.matrix())
    assert torch.equal(one.mean(), other.mean())


def test_the_model_may_overwrite_its_activation(device: torch.device) -> None:
    x = randn(STAGE_TOKENS + 10, 7, dtype=torch.bfloat16).to(device)
    expected = covariance_of(x, device=device).matrix()
    covariance = Covariance(7, device=device)
    covariance.update(x)
    x.fill_(100.0)
    assert torch.equal(covariance.matrix(), expected)


def test_8_bit_inputs_are_taken_as_float32(device: torch.device) -> None:
    x = randn(STAGE_TOKENS + 10, 6).to(torch.float8_e4m3fn)
    assert relative_error(covariance_of(x, device=device).matrix().cpu(), second_moment(x.float())) <= 1e-6


def test_the_buffer_is_gone_once_the_sums_are_read_and_comes_back(device: torch.device) -> None:
    x = randn(30, 6).to(device)
    covariance = covariance_of(x, device=device)
    assert covariance._sums._buffer is not None
    covariance.matrix()
    assert covariance._sums._buffer is None
    covariance.update(x)
    assert relative_error(covariance.matrix().cpu(), 2 * second_moment(x.cpu())) <= 1e-14


@pytest.mark.parametrize("d", [64, 4096])
def test_the_buffer_is_no_larger_than_the_triangle(d: int) -> None:
    sums = TritonSums(d, torch.device("meta"))
    buffer = new_buffer(sums.launch_tokens, torch.empty(1, d, dtype=torch.bfloat16, device="meta"))
    assert buffer.untyped_storage().nbytes() <= max(8 * len(sums.triangle.packed), 2 * d * STAGE_TOKENS)


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("padding", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("length", [40, STAGE_TOKENS])
def test_padding_is_dropped(length: int, padding: float, device: torch.device) -> None:
    x = randn(3, length, 5, dtype=torch.bfloat16)
    mask = torch.ones(3, length)
    mask[0], mask[1, length // 3 :] = 0, 0
    x[mask == 0] = padding
    covariance, again = Covariance(5, device=device), Covariance(5, device=device)
    shared = TokenMask(mask.to(device))
    covariance.update(x.to(device), mask.to(device))
    again.update(x.to(device), shared)
    again.update(x.to(device), shared)
    expected = covariance_of(x[mask != 0], device=device)
    assert torch.equal(covariance.matrix(), expected.matrix())
    assert torch.equal(covariance.mean(), expected.mean())
    assert (covariance.tokens, again.tokens) == (int(mask.sum()), 2 * int(mask.sum()))
    assert relative_error(again.matrix(), 2 * expected.matrix()) <= 1e-6


def test_a_batch_of_padding_adds_nothing(device: torch.device) -> None:
    covariance = Covariance(3, device=device)
    covariance.update(torch.full((2, 5, 3), float("nan"), device=device), torch.zeros(2, 5, device=device))
    assert covariance.tokens == 0
    assert not covariance.matrix().any()


# ------------------------------------------------------------------------------------------------ outlier tokens and precision


@pytest.mark.parametrize("count", [0, 1, 30, 200])
def test_outliers_are_the_tokens_beyond_8_medians(count: int, device: torch.device) -> None:
    x = unit_rows(2 * STAGE_TOKENS, 16)
    x[:count] *= 1.001 * OUTLIER_RATIO
    x[count : count + 10] *= 0.999 * OUTLIER_RATIO
    covariance = covariance_of(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))], device=device)
    assert covariance.outliers == count
    assert relative_error(covariance.matrix().cpu(), second_moment(x)) <= 1e-6


@pytest.mark.parametrize("zeros", [STAGE_TOKENS - 100, STAGE_TOKENS - 1, STAGE_TOKENS])
def test_zero_rows_count_as_tokens_and_make_no_outliers(zeros: int, device: torch.device) -> None:
    x = unit_rows(STAGE_TOKENS, 16)
    x[:zeros] = 0.0
    covariance = covariance_of(x, device=device)
    assert (covariance.tokens, covariance.outliers) == (STAGE_TOKENS, 0)
    torch.testing.assert_close(covariance.matrix().cpu(), second_moment(x), rtol=0.0, atol=(STAGE_TOKENS - zeros) * 1e-6)


@pytest.mark.parametrize("massive", [1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_massive_tokens_do_not_drown_the_quiet_directions(dtype: torch.dtype, massive: float, device: torch.device) -> None:
    # λ_r / λ_max about 1e-6; 16 of the tokens massive, as in the down projections of Llama models.
    x = (activations(1024, 96, quietest=1e-3, massive=massive, every=64) * (0.1 if dtype == torch.float16 else 1.0)).to(dtype)
    covariance = covariance_of(x, device=device)
    assert covariance.outliers == (0 if massive == 1.0 else 16)
    assert excess_leak(bottom_eigenpairs(covariance.matrix().cpu(), 16)[1], x) <= 1e-4
    if massive > 1.0 and dtype != torch.float16:
        drowned = sum((part.float().T @ part.float()).double() for part in x.split(128))
        assert excess_leak(bottom_eigenpairs(drowned, 16)[1], x) > 1e-2


@pytest.mark.parametrize("scale", [1e-25, 1e-13, 1e-11, 1e13, 1e15, 1e25])
@pytest.mark.parametrize("tokens", [20, STAGE_TOKENS])
def test_relative_accuracy_does_not_depend_on_the_scale(tokens: int, scale: float, device: torch.device) -> None:
    x = randn(tokens, 8) * scale
    covariance = covariance_of(x, device=device)
    assert relative_error(covariance.matrix().cpu(), second_moment(x)) <= 1e-6
    assert covariance.outliers == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("massive", [1.0, 1e4])
def test_the_error_is_known(dtype: torch.dtype, massive: float, device: torch.device) -> None:
    x = (activations(4 * STAGE_TOKENS, 64, quietest=1e-2, massive=massive, every=STAGE_TOKENS) * 0.1).to(dtype)
    covariance = covariance_of(x, device=device)
    ordinary = x.double()[x.double().norm(dim=1) < 100]
    error = covariance.matrix().cpu() - second_moment(x)
    exact = second_moment(ordinary)
    rest = error - (error * exact).sum() / exact.square().sum() * exact  # what is proportional to C moves no eigenvector
    assert float(rest.norm()) <= 2 * covariance.error_norm
    # Massive tokens do not pass through a chain, and do not count as if they did.
    assert covariance.error_norm <= 1e-6 * float(ordinary.square().sum()) + 1e-14 * float(second_moment(x).norm())


def test_few_tokens_are_summed_in_float64(device: torch.device) -> None:
    x = activations(STAGE_TOKENS - 1, 20, quietest=1e-3)
    covariance = covariance_of(x, device=device)
    assert covariance.products == "fp64"
    assert relative_error(covariance.matrix().cpu(), second_moment(x)) <= 1e-14


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize(
    "theirs", [TritonSums, lambda d, device: TorchSums(d, device, mixed=True, probe=True)], ids=["kernels", "PyTorch"]
)
def test_merging_is_summing_all_tokens(theirs: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (activations(tokens, 20, quietest=1e-2, massive=1e3, every=200, seed=seed) for seed, tokens in enumerate((900, 700)))
    covariance = covariance_of(x, device=device)
    monkeypatch.setattr(covariance_module, "new_sums", lambda d_in, device, precision: theirs(d_in, device))
    other = covariance_of(y, device=device)
    before, error = other.matrix(), covariance.error_norm
    covariance.merge(other)
    both = torch.cat([x, y])
    assert (covariance.tokens, covariance.outliers) == (1600, 9)
    assert relative_error(covariance.matrix().cpu(), second_moment(both)) <= 1e-6
    torch.testing.assert_close(covariance.mean().cpu(), both.double().mean(0), rtol=0.0, atol=1e-12)
    assert covariance.error_norm >= error
    assert torch.equal(other.matrix(), before)


def test_a_probe_that_has_not_ended_ends_when_others_tokens_come(device: torch.device) -> None:
    mine = TorchSums(20, torch.device("cpu"), mixed=True, probe=True)
    theirs = TritonSums(20, device)
    theirs.add(randn(STAGE_TOKENS + 100, 20).to(device), None)
    mine.merge(theirs)
    loss = mine._mixed_energy
    mine.add(randn(4 * STAGE_TOKENS, 20), None)
    mine.flush()
    assert mine._mixed_energy == loss  # what came later was summed in float64


# ------------------------------------------------------------------------------------------------ NaN and Inf


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tokens", "at"), [(1, 0), (30, 29), (STAGE_TOKENS + 100, STAGE_TOKENS + 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nan_and_inf_are_raised_by_whoever_reads(
    tokens: int, at: int, dtype: torch.dtype, value: float, device: torch.device
) -> None:
    x = randn(tokens, 5, seed=1, dtype=dtype)
    x[at, 3] = value
    covariance = covariance_of(x, device=device)
    for reading in (Covariance.matrix, lambda c: c.trace, Covariance.mean):
        with pytest.raises(ValueError, match=rf"NaN or Inf in 1 of {tokens} tokens .* token {at}\)"):
            reading(covariance)


def test_all_covariances_are_searched_at_once(device: torch.device) -> None:
    covariances = [covariance_of(randn(40, 5), device=device) for _ in range(3)]
    named = dict(zip("abc", covariances, strict=True))
    assert FiniteCheck(named).failure() is None
    assert FiniteCheck({}).failure() is None
    covariances[1].update(torch.full((2, 5), float("nan"), device=device))
    covariances[2].update(randn(3, 5).to(device))
    check = FiniteCheck(named)
    covariances[0].update(torch.full((2, 5), float("nan"), device=device))  # after the check has begun
    found = check.failure()
    assert found is not None
    assert found[0] == "b"
    assert "NaN or Inf in 2 of 2 tokens" in found[1]  # those that came since the last search
    found = FiniteCheck(named).failure()
    assert found is not None
    assert found[0] == "a"


# ------------------------------------------------------------------------------------------------ float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_product_of_float64_sums_is_in_float64(dtype: torch.dtype, device: torch.device) -> None:
    x = activations(1500, 20, quietest=1e-4, massive=1e3).to(dtype)
    mask = torch.arange(len(x)) % 3 > 0
    sums = Covariance.of_sums(Float64Sums(20, device), device, "fp64")
    sums.update(x.to(device), mask.to(device))
    sums.launch()
    here = torch.device("cpu")
    expected = Covariance.of_sums(TorchSums(20, here, mixed=False, probe=False), here, "fp64")
    expected.update(x, mask)
    assert relative_error(sums.matrix().cpu(), expected.matrix()) <= 1e-14
    assert (sums.tokens, sums.products, sums.outliers) == (int(mask.sum()), "fp64", expected.outliers)
    assert sums.error_norm == pytest.approx(expected.error_norm)
    sums.update(torch.full((1, 20), float("nan"), device=device))
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 1 tokens"):
        sums.mean()


# ------------------------------------------------------------------------------------------------ nothing waits


class Waits(TorchDispatchMode):
    """Notes the operations that bring a number from the device to the host, or whose result's shape depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if any(
            word in name
            for word in ("_local_scalar_dense", "nonzero", "masked_select", "aten::equal", "unique", "is_nonzero", "nanmedian")
        ):
            self.seen.append(name)
        if name in ("aten::index.Tensor", "aten::index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


def test_updates_do_not_wait_for_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(2 * STAGE_TOKENS, 40, quietest=1e-2, massive=1e3).bfloat16().to(device)
    mask = TokenMask(torch.arange(len(x), device=device) % 3 > 0)
    covariance = Covariance(40, device=device)
    covariance.update(x)  # compiles
    monkeypatch.setattr(precision_module, "_has_kernels", lambda device, precision: True)
    grouped = GroupedCovariance(2, 40, device=device)
    monkeypatch.setattr(grouped._kernels, "launch_tokens", len(x))  # so that an update is a launch too
    counts = [len(x) - 100, 100]
    grouped.update(x, counts)
    kernels = {name: getattr(csrc_triton, name) for name in csrc_triton.__all__ if name != "unavailable"}
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            covariance.update(x)
            covariance.update(x, mask)
            grouped.update(x, counts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    watch = Waits()
    for name, kernel in kernels.items():  # the interpreter itself looks at everything

        def unwatched(*args: Any, kernel: Any = kernel, **kwargs: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                return kernel(*args, **kwargs)

        monkeypatch.setattr(csrc_triton, name, unwatched, raising=False)
    with watch:
        covariance.update(x)
        covariance.update(x, mask)
        grouped.update(x, counts)
    assert watch.seen == []
    with watch:
        covariance.trace  # noqa: B018
    assert "aten::_local_scalar_dense" in watch.seen  # reading does: the watch sees what it should


# ------------------------------------------------------------------------------------------------ in a model


def batches_on(device: torch.device, **options: Any) -> list[dict[str, torch.Tensor]]:
    return [{key: value.to(device) for key, value in batch.items()} for batch in random_batches(**options)]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_model_is_streamed(padding: str | None, device: torch.device) -> None:
    model, batches = tiny("llama").to(device), batches_on(device, batches=4, padding=padding)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    inputs = recorded_inputs(model, batches, names)
    found = dict(stream_covariances(model, batches, targets=names, progress=False))
    assert len(found) == 2
    for site, covariance in found.items():
        assert covariance.tokens == len(inputs[site.name])
        assert relative_error(covariance.matrix(), second_moment(inputs[site.name])) <= 1e-6


def test_nan_in_a_model_is_named_with_its_batch(device: torch.device) -> None:
    model, batches = tiny("llama").to(device), batches_on(device, batches=3)
    calls = itertools.count(1)

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if next(calls) == 2 else output

    model.model.layers[1].mlp.act_fn.register_forward_hook(poison)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj, batch 2: NaN or Inf in"):
        list(stream_covariances(model, batches, targets=["down_proj"], progress=False))


# ------------------------------------------------------------------------------------------------ where the kernels cannot run


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Which sums a covariance of a given precision would get on a CUDA device."""
    monkeypatch.undo()
    monkeypatch.setattr(precision_module, "TritonSums", lambda d_in, device: "kernels")
    monkeypatch.setattr(precision_module, "Float64Sums", lambda d_in, device: "float64")
    monkeypatch.setattr(precision_module, "TorchSums", lambda d_in, device, mixed, probe: f"PyTorch, {mixed=}, {probe=}")
    precision_module._warn_of_fallback.cache_clear()
    return lambda precision: precision_module.new_sums(8, torch.device("cuda"), precision)


def test_the_kernels_are_used_where_they_can_be(choice: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csrc_triton, "unavailable", lambda device: None)
    assert choice("auto") == "kernels"
    assert choice("fp64") == "float64"
    assert precision_module.new_sums(8, torch.device("cpu"), "fp64") == "PyTorch, mixed=False, probe=False"
    assert precision_module.new_sums(8, torch.device("cpu"), "auto") == "PyTorch, mixed=True, probe=True"
    assert precision_module.new_sums(8, torch.device("cpu"), "mixed") == "PyTorch, mixed=True, probe=False"


def test_elsewhere_pytorch_is_and_says_so_once(choice: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csrc_triton, "unavailable", lambda device: "compute capability 7.0 is below 8.0")
    with pytest.warns(UserWarning, match=r"compute capability 7\.0 is below 8\.0: second moments are summed by PyTorch") as caught:
        assert choice("auto") == "PyTorch, mixed=True, probe=False"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice("auto")
        choice("fp64")


def test_what_keeps_the_kernels_from_running_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    cuda = torch.device("cuda")
    assert csrc_triton.unavailable(torch.device("cpu")) == "cpu is not a CUDA device"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(csrc_triton, "_launch_failure", lambda device: None if device.index == 3 else "no C compiler")
    assert csrc_triton.unavailable(cuda) is None
    assert csrc_triton.unavailable(torch.device("cuda:1")) == "no C compiler"
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    assert csrc_triton.unavailable(cuda) == "Triton 3.4.0 is older than 3.5"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in (csrc_triton.unavailable(cuda) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert csrc_triton.unavailable(cuda) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in (csrc_triton.unavailable(cuda) or "")


def test_a_launch_that_fails_is_an_obstacle_and_no_crash(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from nullspace.csrc_triton import stage

    launch = csrc_triton._launch_failure.__wrapped__
    assert launch(device) is None

    def no_compiler(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(stage, "zero_rows", no_compiler)
    assert launch(device) == (
        "Triton cannot launch zero_rows on bfloat16 "
        "(RuntimeError: Failed to find C compiler. Please specify via CC environment variable.)"
    )
