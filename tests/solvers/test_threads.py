"""Pools whose workers compute with one thread, and how many matrices are solved at once."""

from __future__ import annotations

import contextlib

import pytest
import torch
from matrices import psd

from nullspace import solvers
from nullspace.solvers import cost
from nullspace.solvers.threads import OneBlasThread, blas


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_pool_gives_the_bits_of_lone_calls(workers: int) -> None:
    matrices = [psd(d, seed) for seed, d in enumerate([3, 40, 130, 200, 200, 576, 576, 130])]
    alone = [solvers.partial_eigh(c, 3, method="lapack-subset") for c in matrices]
    with solvers.one_thread_each(workers) as pool:
        together = list(pool.map(lambda c: solvers.partial_eigh(c, 3, method="lapack-subset"), matrices))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in blas().info() if library["user_api"] == "blas"]


def test_workers_compute_with_one_thread_and_leave_none_behind() -> None:
    torch_threads, blas = torch.get_num_threads(), blas_threads()
    with solvers.one_thread_each(3) as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(9))) == [1] * 9
        solvers.partial_eigh(psd(200), 3)  # which sets and lifts a limit itself
        list(pool.map(lambda c: solvers.partial_eigh(c, 3), [psd(200)] * 4))
        assert set(blas_threads()) <= {1}
    assert (torch.get_num_threads(), blas_threads()) == (torch_threads, blas)


def test_an_error_in_a_worker_comes_out_and_lifts_the_limit() -> None:
    torch_threads, blas = torch.get_num_threads(), blas_threads()
    with pytest.raises(ValueError, match="NaN or Inf"), solvers.one_thread_each(2) as pool:
        list(pool.map(lambda c: solvers.partial_eigh(c, 1), [psd(200), torch.full((200, 200), torch.nan)]))
    assert (torch.get_num_threads(), blas_threads()) == (torch_threads, blas)


def test_limits_may_overlap_in_any_order() -> None:
    before = blas_threads()
    limit = OneBlasThread()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(limit)
        second.enter_context(limit)
        first.close()
        assert set(blas_threads()) <= {1}
    assert blas_threads() == before


def test_as_many_sites_as_threads_are_decomposed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert solvers.side_by_side(576) == solvers.side_by_side(1536, torch.device("cpu")) == 16
    assert solvers.side_by_side(2880) == 8  # 1 GiB
    assert solvers.side_by_side(cost.INVERT_MIN_D) == solvers.side_by_side(100_000) == 1
    assert solvers.side_by_side(576, "cuda") == solvers.side_by_side(576, torch.device("cuda", 1)) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert solvers.side_by_side(576) == 1
