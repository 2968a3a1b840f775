"""`confine`: after any optimizer's steps, A has changed only in the directions that it is confined to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import transformers
from calibrated import covariances_for, spaces_for
from guarded import CONFIG, LEAK, adapted, outside, quiet, rows, step, trained
from peft import LoraConfig

from models import random_batches, tiny
from nullspace import Covariances, NullSpaces, analysis
from nullspace.integrations.peft import confine, freeze_a, inject_adapters

BATCH = random_batches(1, 2, 24, seed=7)[0]

OPTIMIZERS: dict[str, Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name: str) -> None:
    model, covariances = adapted(), covariances_for("llama")
    optimizer = OPTIMIZERS[name](trained(model))
    with torch.no_grad():
        before = model(**BATCH).logits
    confinement = confine(model, covariances, LEAK, optimizer=optimizer)
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, before)
    start = rows(model)
    step(model, optimizer)
    assert outside(rows(model), start) <= 1e-6
    for name, a in rows(model).items():
        allowed = confinement.allowed[name]
        assert allowed.directions == quiet(covariances[name].matrix()).shape[1]
        assert analysis.leak(a, covariances[name].matrix()) <= allowed.leak + 1e-6
        assert allowed.leak <= LEAK


def test_rows_of_a_plain_start_keep_their_norms() -> None:
    model = adapted()
    before = rows(model)
    confine(model, covariances_for("llama"), LEAK)
    for name, a in rows(model).items():
        torch.testing.assert_close(a.norm(dim=1), before[name].norm(dim=1))


def test_of_another_start_the_change_alone_is_confined() -> None:
    covariances = covariances_for("llama")
    model = inject_adapters(tiny("llama"), LoraConfig(**CONFIG), method="corda-kpm", covariances=covariances)
    start = rows(model)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with confine(model, covariances, LEAK, optimizer=optimizer):
        assert all(torch.equal(a, start[name]) for name, a in rows(model).items())
        step(model, optimizer)
    assert outside(rows(model), start) <= 1e-6
    confined = rows(model)
    step(model, optimizer)  # no longer
    assert outside(rows(model), confined) > 1e-3


def test_null_spaces_are_used_as_far_as_they_are_within_the_budget() -> None:
    model, spaces = adapted(), spaces_for("llama")
    confinement = confine(model, spaces, LEAK)
    for name, a in rows(model).items():
        k = confinement.allowed[name].directions
        basis = spaces[name].basis[:, :k]
        assert k == int((spaces[name].eigenvalues.cumsum(0) <= LEAK**2 * spaces[name].trace).sum())
        assert (a.double() - a.double() @ basis @ basis.mT).norm() <= 1e-6 * a.norm()
    with pytest.raises(ValueError, match="adapters have rank 12: give covariances, or null spaces of a larger rank"):
        confine(adapted(r=12), spaces, 0.9)


@pytest.mark.parametrize("directions", [spaces_for, covariances_for])
def test_a_budget_that_is_too_small_for_the_rank_is_said(directions: Callable[..., Covariances | NullSpaces]) -> None:
    model, covariances = adapted(), covariances_for("llama")
    with pytest.warns(UserWarning, match=r"leak=0.001 is less than r directions have at \d+ of 12 sites: .* 4 of \d+\)"):
        confinement = confine(model, directions("llama"), 1e-3)
    for name, a in rows(model).items():
        assert confinement.allowed[name].directions == 4
        assert analysis.leak(a, covariances[name].matrix()) == pytest.approx(confinement.allowed[name].leak, rel=1e-3)


def test_frozen_rows_are_left_alone() -> None:
    model = adapted()
    freeze_a(model)
    before = rows(model)
    with pytest.warns(UserWarning, match=r"A does not train \(freeze_a\) in 21 layers, .*there is nothing to confine"):
        confinement = confine(model, covariances_for("llama"), LEAK)
    assert not confinement.allowed
    assert all(torch.equal(a, before[name]) for name, a in rows(model).items())
