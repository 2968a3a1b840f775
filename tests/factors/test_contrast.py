"""Contrast against scipy's generalised eigenvectors."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch

from nullspace import factors


def moments(d: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    scales = torch.logspace(0, -3, d, dtype=torch.float64)
    x_t, x_k = (torch.randn(4 * d, d, dtype=torch.float64) * scales[torch.randperm(d)] for _ in range(2))
    return x_t.mT @ x_t, x_k.mT @ x_k


def test_rows_are_the_leading_generalised_eigenvectors() -> None:
    c_t, c_k = moments(30)
    a, b = factors.contrast(c_t, 1e6 * c_k, 50, rank=5, damping=0.02)
    task, keep = c_t / c_t.trace(), c_k / c_k.trace() + 0.02 / 30 * torch.eye(30)
    values, vectors = scipy.linalg.eigh(task.numpy(), keep.numpy())
    best = torch.from_numpy(vectors[:, ::-1][:, :5].copy())
    assert torch.linalg.svdvals(torch.linalg.qr(a.mT).Q.mT @ torch.linalg.qr(best).Q).min() > 1 - 1e-9
    ratios = ((a @ task) * a).sum(1) / ((a @ keep) * a).sum(1)
    assert ratios.tolist() == pytest.approx(values[::-1][:5].tolist(), rel=1e-9)
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(b, torch.zeros(50, 5, dtype=torch.float64))


def test_the_response_to_the_task_is_that_of_loras_own_a() -> None:
    c_t, c_k = moments(30)
    a = factors.contrast(3 * c_t, c_k, 50, rank=5).A
    random = torch.empty(4000, 30, dtype=torch.float64).uniform_(-(30**-0.5), 30**-0.5)  # as PEFT draws it
    wanted = ((random @ c_t) * random).sum() * 5 / 4000
    assert float(((a @ c_t) * a).sum()) == pytest.approx(float(wanted), rel=0.05)


BAD = [({"rank": 9}, "rank"), ({"rank": 2, "damping": 0.0}, "damping"), ({"rank": 2, "c_keep": torch.eye(7)}, "two")]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_bad_input_is_refused(options: dict[str, Any], match: str) -> None:
    c_t, c_k = moments(8)
    given = {"c_task": c_t, "c_keep": c_k, "d_out": 20, **options}
    with pytest.raises(ValueError, match=match):
        factors.contrast(**given)


def test_inputs_of_the_task_that_are_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="task's inputs is zero"):
        factors.contrast(torch.zeros(8, 8), torch.eye(8), 20, rank=2)
