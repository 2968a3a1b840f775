"""The analyses against what they mean: explicit activations, explicit products, full decompositions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from calibrated import RANK, covariances_for, spaces_for
from torch import nn

from inputs import activations, randn
from models import random_batches, tiny
from nullspace import Covariance, Covariances, NullSpaces, Site, analysis, solvers
from nullspace.analysis import INITIAL, Course, State
from nullspace.factors import LowRank, lora_null
from nullspace.model.sites import find_targets

TOKENS, D_IN, D_OUT, R = 300, 40, 24, 6


@pytest.fixture
def x_nd() -> torch.Tensor:
    return activations(TOKENS, D_IN, quietest=1e-3).double()


@pytest.fixture
def weight() -> torch.Tensor:
    return randn(D_OUT, D_IN, seed=1, dtype=torch.float64)


def pair(seed: int) -> LowRank:
    return LowRank(randn(R, D_IN, seed=seed, dtype=torch.float64), randn(D_OUT, R, seed=seed + 1, dtype=torch.float64))


def linear_layers(family: str) -> dict[str, nn.Module]:
    return find_targets(tiny(family))


def test_leak_is_what_the_row_space_hears(x_nd: torch.Tensor) -> None:
    a = pair(2).A
    q = torch.linalg.qr(a.T).Q
    expected = float((x_nd @ q).norm() / x_nd.norm())
    c = x_nd.T @ x_nd
    assert analysis.leak(a, c) == pytest.approx(expected, rel=1e-12)
    mixed = randn(R, R, seed=9, dtype=torch.float64) @ a  # other rows, the same space
    assert analysis.leak(mixed, c) == pytest.approx(expected, rel=1e-9)
    assert analysis.leak(torch.cat([a, a[:2]]), c) == pytest.approx(expected, rel=1e-9)  # rank R, not R + 2
    assert analysis.leak(torch.eye(D_IN), c) == pytest.approx(1.0)


def test_leak_of_nothing_is_nothing(x_nd: torch.Tensor) -> None:
    assert analysis.leak(torch.zeros(R, D_IN), x_nd.T @ x_nd) == 0.0
    assert analysis.leak(pair(2).A, torch.zeros(D_IN, D_IN)) == 0.0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-9])
def test_drift_is_the_change_of_the_output(x_nd: torch.Tensor, weight: torch.Tensor, frozen: bool, size: float) -> None:
    start, move = pair(2), pair(4)
    trained = LowRank(start.A if frozen else start.A + size * move.A, start.B + size * move.B)
    # The update by its parts: B A - B0 A0 itself has lost its digits where the parts are 1e-9 of the whole.
    delta = (trained.B - start.B) @ trained.A + start.B @ (trained.A - start.A)
    expected = float((x_nd @ delta.T).norm() / (x_nd @ weight.T).norm())
    c = x_nd.T @ x_nd
    found = analysis.update(start, trained)
    assert len(found.A) == (R if frozen else 2 * R)
    assert analysis.drift(weight, c, found) == pytest.approx(expected, rel=1e-9)
    if size == 1.0:
        assert torch.allclose(found.B @ found.A, trained.B @ trained.A - start.B @ start.A)


def test_no_update_no_drift(x_nd: torch.Tensor, weight: torch.Tensor) -> None:
    c = x_nd.T @ x_nd
    assert analysis.drift(weight, c, analysis.update(pair(2), pair(2))) == 0.0
    with pytest.raises(ValueError, match="was zero"):
        analysis.drift(torch.zeros_like(weight), c, pair(2))


def test_an_update_from_b_zero_is_the_product(weight: torch.Tensor) -> None:
    start, trained = LowRank(pair(2).A, torch.zeros(D_OUT, R, dtype=torch.float64)), pair(4)
    found = analysis.update(start, trained)
    assert torch.equal(found.A, trained.A)
    assert torch.equal(found.B, trained.B)


def test_shares_are_those_of_the_norm_of_a(x_nd: torch.Tensor) -> None:
    _, directions = torch.linalg.eigh(x_nd.T @ x_nd)
    a = pair(2).A
    shares = analysis.shares_read(a, directions)
    assert float(shares.square().sum()) == pytest.approx(1.0)
    assert float(shares[3]) == pytest.approx(float((a @ directions[:, 3]).norm() / a.norm()))
    assert not bool(analysis.shares_read(torch.zeros_like(a), directions).any())


@pytest.mark.parametrize("d", [7, 40, 100, 1000])
def test_bins_keep_the_whole_whatever_the_width(d: int) -> None:
    shares = torch.rand(d, dtype=torch.float64)
    shares /= shares.norm()
    bins = torch.tensor(analysis.binned(shares), dtype=torch.float64)
    assert float(bins.square().mean()) == pytest.approx(1.0)
    even = torch.full((d,), d**-0.5, dtype=torch.float64)
    assert analysis.binned(even) == pytest.approx([1.0] * analysis.BINS)


def test_change_and_what_of_it_is_outside() -> None:
    a = pair(2).A
    turned = torch.linalg.qr(randn(R, R, seed=3, dtype=torch.float64)).Q @ a
    assert analysis.change(a, a) == 0.0
    assert analysis.change(2 * a, a) == pytest.approx(1.0)
    assert analysis.change(turned, a) > 0.1
    assert analysis.outside(turned, a) < 1e-12
    away = randn(1, D_IN, seed=5, dtype=torch.float64)
    q = torch.linalg.qr(a.T).Q
    away -= (away @ q) @ q.T
    moved = a + away
    assert analysis.outside(moved, a) == pytest.approx(float((R**0.5) * away.norm() / moved.norm()))
    assert analysis.change(a, torch.zeros_like(a)) == math.inf


def test_singular_values_of_a_weight(weight: torch.Tensor) -> None:
    for each in (weight, weight.T):
        assert torch.allclose(analysis.singular_values(each.float()), torch.linalg.svdvals(each), rtol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: analysis.leak(torch.ones(3, D_IN + 1), x.T @ x),
        lambda x, w: analysis.leak(torch.ones(D_IN), x.T @ x),
        lambda x, w: analysis.leak(torch.ones(3, D_IN), x),
        lambda x, w: analysis.drift(w.T, x.T @ x, pair(2)),
        lambda x, w: analysis.update(pair(2), LowRank(pair(2).A[:3], pair(2).B[:, :3])),
        lambda x, w: analysis.change(pair(2).A, pair(2).A[:3]),
        lambda x, w: analysis.outside(pair(2).A, pair(2).A[:, :3]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, x_nd: torch.Tensor, weight: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"\("):
        call(x_nd, weight)


def course(family: str, *, freeze: bool, size: float = 0.1) -> Course:
    """LoRA-Null's start, and noise for training."""
    spaces, modules = spaces_for(family), linear_layers(family)
    start = {name: lora_null(modules[name].weight.detach().double(), spaces[name].basis) for name in spaces}
    trained = {}
    for index, (name, (a, b)) in enumerate(start.items()):
        noise = size * randn(*a.shape, seed=index, dtype=torch.float64)
        trained[name] = LowRank(a if freeze else a + noise, b + size * randn(*b.shape, seed=-index - 1, dtype=torch.float64))
    return Course("v2" if freeze else "v1", start, (State("step 5", 5, trained),))


def heard(family: str) -> dict[str, torch.Tensor]:
    """Every layer's input over the batches of `calibrated`, one token a row."""
    model, found = tiny(family), {}
    for name, module in find_targets(model).items():
        module.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in random_batches():
            model(**batch)
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def test_analyse_says_what_explicit_activations_say() -> None:
    modules, inputs = linear_layers("llama"), heard("llama")
    one = course("llama", freeze=False)
    found = analysis.analyse(covariances_for("llama"), spaces_for("llama"), modules=modules, courses=[one], progress=False)
    assert json.loads(json.dumps(found._asdict())) == found._asdict()
    assert [row["site"] for row in found.inputs] == [site.name for site in covariances_for("llama").sites]
    for row in found.inputs:
        x = inputs[row["site"]]
        sigma = torch.linalg.svdvals(x)
        assert row["effective_rank"] == pytest.approx(solvers.effective_rank(sigma), rel=1e-4)
        assert row["spectrum"][0] == 1.0
        assert row["spectrum"][-1] == pytest.approx(float(sigma[-1] / sigma[0]), abs=1e-6)
        assert (row["tokens"], row["rank"]) == (len(x), RANK)
        assert row["leak"] == spaces_for("llama")[row["site"]].leak
    for row in found.weights:
        sigma = torch.linalg.svdvals(modules[row["layer"]].weight.detach().double())
        assert row["effective_rank"] == pytest.approx(solvers.effective_rank(sigma), rel=1e-6)
    assert len(found.adapters) == 2 * len(modules)
    for row in found.adapters:
        x, weight = inputs[row["layer"]], modules[row["layer"]].weight.detach().double()
        start, now = one.initial[row["layer"]], (one.initial if row["state"] == INITIAL else one.trained[0].factors)[row["layer"]]
        q = torch.linalg.qr(now.A.T).Q
        assert row["leak"] == pytest.approx(float((x @ q).norm() / x.norm()), rel=1e-3, abs=1e-6)
        delta = now.B @ now.A - start.B @ start.A
        assert row["drift"] == pytest.approx(float((x @ delta.T).norm() / (x @ weight.T).norm()), rel=1e-4, abs=1e-12)
        assert float(torch.tensor(row["read"]).square().mean()) == pytest.approx(1.0, rel=1e-5)
        if row["state"] == INITIAL:
            assert (row["change"], row["outside"], row["drift"]) == (0.0, 0.0, 0.0)
            assert row["leak"] == pytest.approx(spaces_for("llama")[row["layer"]].leak, rel=1e-3, abs=1e-6)


def test_training_does_not_change_the_leak_where_a_is_frozen() -> None:
    courses = [course("llama", freeze=freeze) for freeze in (True, False)]
    found = analysis.analyse(covariances_for("llama"), courses=courses, progress=False)
    leaks = {(row["adapter"], row["state"], row["layer"]): row["leak"] for row in found.adapters}
    for layer in courses[0].initial:
        assert leaks["v2", "step 5", layer] == leaks["v2", INITIAL, layer]
        assert leaks["v1", "step 5", layer] > 1.2 * leaks["v1", INITIAL, layer]
    summary = {(row["adapter"], row["state"]): row for row in analysis.adapter_summary(found)}
    assert summary["v2", "step 5"]["change"] == summary["v2", "step 5"]["outside"] == 0.0
    assert summary["v1", "step 5"]["change"] > summary["v1", "step 5"]["outside"] > 0.0
    assert summary["v1", "step 5"]["drift"] is None  # the model was not given
    assert summary["v1", "step 5"]["step"] == 5


def test_qr_keeps_the_digits_that_squares_lose() -> None:
    x = activations(400, 24, quietest=1e-11)
    site = Site(("h.0.fc",), 24)
    covariance = Covariance(24, precision="qr")
    covariance.update(x)
    found = analysis.analyse(Covariances([(site, covariance)]), progress=False)
    sigma = torch.linalg.svdvals(x.double())
    assert found.inputs[0]["spectrum"][-1] == pytest.approx(float(sigma[-1] / sigma[0]), rel=1e-3)


def test_spaces_alone_tell_what_they_know() -> None:
    found = analysis.analyse(spaces=spaces_for("gpt2"), progress=False)
    assert found.weights == found.adapters == []
    for row in found.inputs:
        assert row["effective_rank"] is row["spectrum"] is None
        assert row["leak"] == spaces_for("gpt2")[row["site"]].leak
    spectral = NullSpaces.from_covariances(covariances_for("gpt2"), rank=4, spectrum=True, progress=False)
    exact = analysis.analyse(covariances_for("gpt2"), progress=False)
    told = analysis.analyse(spaces=spectral, progress=False)
    assert [r["effective_rank"] for r in told.inputs] == pytest.approx([r["effective_rank"] for r in exact.inputs])


def test_weights_stored_transposed_are_read_as_they_compute() -> None:
    found = analysis.analyse(covariances_for("gpt2"), modules=linear_layers("gpt2"), progress=False)
    shapes = {row["layer"]: (row["d_out"], row["d_in"]) for row in found.weights}
    assert shapes["transformer.h.0.mlp.c_fc"] == (192, 48)


def test_rank_summary_counts_and_averages() -> None:
    found = analysis.analyse(covariances_for("llama"), modules=linear_layers("llama"), progress=False)
    summary = {row["layers"]: row for row in analysis.rank_summary(found)}
    of_site = {row["site"]: row["effective_rank"] for row in found.inputs}
    q = [row for row in found.weights if row["projection"] == "q_proj"]
    assert summary["q_proj"]["count"] == len(q) == 3
    assert summary["q_proj"]["w"] == pytest.approx(sum(row["effective_rank"] for row in q) / 3)
    assert summary["q_proj"]["below"] == sum(of_site[row["site"]] < row["effective_rank"] for row in q)
    assert summary["all of attention"]["count"] == 4 * 3
    assert summary["all"]["count"] == 7 * 3
    assert analysis.rank_summary(analysis.analyse(covariances_for("llama"), progress=False)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"courses": [Course("mine", {"model.layers.9.x": pair(2)})]}, r"'mine' is on 'model\.layers\.9\.x'.*no covariance"),
        ({"courses": [Course("mine", {"model.layers.0.mlp.up_proj": pair(2)})]}, "'mine' reads inputs of width 40.*of width 48"),
        ({"modules": {"other": nn.Linear(3, 3)}}, r"no linear layer 'model\.layers\.0\.self_attn\.q_proj'"),
        ({"modules": find_targets(tiny("llama", seed=5))}, "of another model"),
        ({"courses": [Course("mine", {}, (State("a", None, {}), State("a", None, {})))]}, "'mine': its states need .* labels"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_named(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        analysis.analyse(covariances_for("llama"), progress=False, **change)


def test_an_adapter_of_another_model_is_named() -> None:
    a, b = randn(2, 48), randn(5, 2)
    with pytest.raises(ValueError, match=r"'mine' is for a weight \(5, 48\).*\(48, 48\)"):
        analysis.analyse(
            covariances_for("llama"),
            modules=linear_layers("llama"),
            courses=[Course("mine", {"model.layers.0.self_attn.q_proj": LowRank(a, b)})],
            progress=False,
        )
