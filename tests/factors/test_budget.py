"""One budget over all layers: against every possible choice on small cases, and each method's gains against its start itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import scipy.linalg
import torch

from nullspace import NullSpace, factors
from nullspace.factors import LowRank, Offer, allocated, budget, caught, spared
from nullspace.moments.covariance import Covariance

D_IN, D_OUT, RANK = 14, 9, 6


def offers_of(seed: int, kind: str, *, equal: bool = False) -> dict[str, Offer]:
    """Two or three layers with up to four ranks each."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    offers = {}
    for index in range(1 + drawn(2)):
        values = torch.rand(drawn(4), generator=generator, dtype=torch.float64)
        values = {
            "plain": values,
            "heavy": values.pow(12),
            "ties": (3 * values).round() / 3,
            "zero": torch.zeros_like(values),
            "even": torch.ones_like(values),
            "tiny": values * 1e-300,
        }[kind]
        offers[f"layer {index}"] = Offer(values.sort(descending=True).values, 3 if equal else drawn(7))
    return offers


def bought(gains: Mapping[str, list[float]], ranks: Mapping[str, int]) -> float:
    return sum(sum(gains[name][:rank]) for name, rank in ranks.items())


def paid(offers: Mapping[str, Offer], ranks: Mapping[str, int]) -> int:
    return sum(offers[name].cost * rank for name, rank in ranks.items())


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("equal", [True, False], ids=["equal costs", "costs"])
@pytest.mark.parametrize("kind", ["plain", "heavy", "ties", "zero", "even", "tiny"])
def test_of_all_choices_within_the_budget_none_is_better_by_a_rank_and_no_uniform_one_at_all(
    kind: str, equal: bool, least: int
) -> None:
    for seed in range(5):
        offers = offers_of(seed, kind, equal=equal)
        gains = {name: each.gains.tolist() for name, each in offers.items()}
        smallest = {name: min(least, len(each.gains)) for name, each in offers.items()}
        largest = {name: len(each.gains) for name, each in offers.items()}
        for budget_ in range(paid(offers, smallest), paid(offers, largest) + 5, 5):
            result = allocated(offers, budget_, least=least)
            assert result.parameters == paid(offers, result.ranks) <= budget_
            assert all(smallest[name] <= rank <= largest[name] for name, rank in result.ranks.items())
            assert result.gain == pytest.approx(bought(gains, result.ranks), rel=1e-12)
            uniform = [{name: min(rank, most) for name, most in largest.items()} for rank in range(least, 5)]
            best_uniform = max(bought(gains, each) for each in uniform if paid(offers, each) <= budget_)
            assert result.uniform_gain == pytest.approx(best_uniform, rel=1e-12)
            assert result.gain >= result.uniform_gain
            every = (
                dict(zip(offers, ranks, strict=True))
                for ranks in itertools.product(*(range(smallest[name], largest[name] + 1) for name in offers))
            )
            optimum = max(bought(gains, each) for each in every if paid(offers, each) <= budget_)
            one_rank = 0.0 if equal else max(float(each.gains[0]) for each in offers.values())
            assert optimum - one_rank <= result.gain * (1 + 1e-12)
            assert result.gain <= optimum * (1 + 1e-12)


def test_where_the_rank_of_most_gain_for_its_cost_would_crowd_out_a_better_one_uniform_ranks_are_kept() -> None:
    offers = {"cheap": Offer(torch.tensor([2.0, 2.0]), 1), "costly": Offer(torch.tensor([90.0]), 100)}
    result = allocated(offers, 101, least=0)  # the two cheap ranks would leave 99
    assert result.ranks == {"cheap": 1, "costly": 1}
    assert result.gain == result.uniform_gain == 92


def test_equal_gains_go_to_the_first_layer_and_layers_of_one_rank_are_one_offer() -> None:
    gains = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert allocated({"b": Offer(gains, 2), "a": Offer(gains, 2)}, 6).ranks == {"b": 2, "a": 1}
    joined = budget.together([Offer(gains, 2), Offer(2 * gains[:1], 3)])
    assert joined.cost == 5
    assert joined.gains.tolist() == [1.5]


def test_shares_are_sorted_and_those_to_be_spared_count_by_what_they_leave() -> None:
    shares = torch.tensor([0.1, -1e-17, 0.3], dtype=torch.float64)
    assert caught(shares, 7).gains.tolist() == [0.3, 0.1, 0.0]
    assert spared(shares, 10).gains.tolist() == [10.0, 9.0, 7.0]


@pytest.mark.parametrize(
    ("offers", "options", "message"),
    [
        ({"up": Offer(torch.tensor([1.0, 2.0]), 1)}, {}, "gains of 'up'"),
        ({"up": Offer(torch.tensor([-1.0]), 1)}, {}, "gains of 'up'"),
        ({"up": Offer(torch.tensor([float("nan")]), 1)}, {}, "gains of 'up'"),
        ({"up": Offer(torch.tensor([float("inf")]), 1)}, {}, "gains of 'up'"),
        ({"up": Offer(torch.ones(2, 2), 1)}, {}, "gains of 'up'"),
        ({"up": Offer(torch.ones(2), 0)}, {}, "cost of 'up'"),
        ({"up": Offer(torch.ones(2), 6)}, {"budget": 5}, "6 parameters, and the budget is 5"),
        ({"up": Offer(torch.ones(2), 1)}, {"budget": -1}, "budget"),
        ({"up": Offer(torch.ones(2), 1)}, {"least": -1}, "least"),
        ({}, {}, "no layer"),
    ],
)
def test_errors(offers: dict[str, Offer], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocated(offers, **{"budget": 10, **options})


def inputs(kind: str, tokens: int, seed: int) -> torch.Tensor:
    """X (d_in, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(D_IN, tokens, generator=generator, dtype=torch.float64)
    if kind == "rank-deficient":
        return x[:, :4] @ torch.randn(4, tokens, generator=generator, dtype=torch.float64)
    if kind == "repeated":
        return torch.linalg.qr(x)[0][:, : min(D_IN, tokens)] if tokens <= D_IN else torch.linalg.qr(x.mT)[0].mT
    return x * torch.logspace(3, -3, D_IN, dtype=torch.float64)[:, None] if kind == "steep" else x


def energy(update: LowRank, x: torch.Tensor | None = None) -> float:
    """‖B A X‖²."""
    product = update.B @ update.A
    return float((product if x is None else product @ x).square().sum())


KINDS = ["plain", "steep", "rank-deficient", "repeated"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [True, False], ids=["d_in > d_out", "d_in < d_out"])
def test_gains_are_what_the_starts_take_of_the_objective(kind: str, wide: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(D_OUT if wide else 2 * D_IN, D_IN, generator=generator, dtype=torch.float64)
    x = inputs(kind, 40, 1)
    c, weight_energy = x @ x.mT, float(w.square().sum())
    damped = c / c.diagonal().mean() + 0.01 * torch.eye(D_IN, dtype=torch.float64)
    root = torch.linalg.cholesky(damped @ damped)  # ‖M C‖ = ‖M root‖
    of_x, of_c = float((w @ x).square().sum()), float((w @ root).square().sum())
    mean = x.mean(1)
    centred = x - mean[:, None]
    for rank in (1, RANK, min(w.shape)):
        starts = {end: start(w, rank=rank) for end, start in (("top", factors.pissa), ("bottom", factors.milora))}
        cases = [(budget.output_shares(start, w), energy(start) / weight_energy) for start in starts.values()]
        for mode in ("ipm", "kpm"):
            corda, exact = (start(w, c, rank=rank, mode=mode) for start in (factors.corda, factors.corda_exact))
            cases.append((budget.output_shares(corda, w, damped @ damped), energy(corda, root) / of_c))
            cases.append((budget.output_shares(exact, w, c), energy(exact, x) / of_x))
        eva = factors.eva(c, mean, 40, w.shape[0], rank=rank)
        explained = float((eva.A @ centred).square().sum() / centred.square().sum())
        cases.append((budget.input_shares(eva, centred @ centred.mT), explained))
        for shares, wanted in cases:
            assert len(shares) == rank
            assert float(shares.sum()) == pytest.approx(wanted, rel=1e-7, abs=1e-12)


KEPT = torch.diag(torch.arange(1.0, D_IN + 1, dtype=torch.float64))
W = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SHARES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "pissa": lambda _, rank: budget.output_shares(factors.pissa(W, rank=rank), W),
    "milora": lambda _, rank: budget.output_shares(factors.milora(W, rank=rank), W),
    "corda": lambda c, rank: budget.output_shares(factors.corda(W, c, rank=rank), W, c @ c),
    "corda_exact": lambda c, rank: budget.output_shares(factors.corda_exact(W, c, rank=rank, mode="ipm"), W, c),
    "eva": lambda c, rank: budget.input_shares(factors.eva(c, 0 * c[0], 40, D_OUT, rank=rank), c),
    "contrast": lambda c, rank: budget.input_ratios(factors.contrast(c, KEPT, D_OUT, rank=rank), c, KEPT, damping=0.01),
}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_takes_some_of_the_directions_of_a_start_of_more_ranks(
    shares: Callable[[torch.Tensor, int], torch.Tensor], kind: str
) -> None:
    x = inputs(kind, 40, 1)
    more, fewer = (shares(x @ x.mT, rank) for rank in (RANK, 2))
    assert torch.cdist(fewer[:, None], more[:, None]).amin(1).max() <= 1e-7 * more.max()


@pytest.mark.parametrize("kind", KINDS)
def test_gains_of_two_data_sets_are_those_of_the_rows(kind: str) -> None:
    x, kept = inputs(kind, 40, 1), inputs("plain", 50, 2)
    task, keep = x @ x.mT, kept @ kept.mT
    damped = keep / keep.trace() + 0.01 / D_IN * torch.eye(D_IN, dtype=torch.float64)
    wanted = torch.from_numpy(scipy.linalg.eigh(task / task.trace(), damped, eigvals_only=True)[::-1][:RANK].copy())
    ratios = budget.input_ratios(factors.contrast(task, keep, D_OUT, rank=RANK), task, keep, damping=0.01)
    assert torch.allclose(ratios, wanted, rtol=1e-6, atol=1e-9 * float(wanted[0]))
    w = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    update = factors.sc_lora(w, task / 40, keep / 50, rank=RANK, beta=0.4)
    plus, minus = (update.B.mT @ w @ x).square().sum(1) * 0.6 / 40, (update.B.mT @ w @ kept).square().sum(1) * 0.4 / 50
    total = 0.6 / 40 * (w @ x).square().sum() + 0.4 / 50 * (w @ kept).square().sum()
    both = 0.6 / 40 * task, 0.4 / 50 * keep
    shares = budget.output_shares(update, w, both[0] - both[1], total=both[0] + both[1])
    assert torch.allclose(shares, (plus - minus) / total, rtol=1e-8, atol=1e-12)


def test_gains_of_a_null_space_are_its_leak() -> None:
    x = inputs("steep", 40, 1)
    covariance = Covariance(D_IN, precision="fp64")
    covariance.update(x.mT)
    space = NullSpace.from_covariance(covariance, RANK)
    for rank in range(1, RANK + 1):
        leak = float((space.basis[:, :rank].mT @ x).square().sum() / x.square().sum())
        offer = spared(space.eigenvalues[:rank] / space.trace, 5)
        assert 5 * rank - float(offer.gains.sum()) == pytest.approx(5 * leak, rel=1e-9, abs=1e-14)


def test_of_zero_every_share_is_zero() -> None:
    zero, w = torch.zeros(D_IN, D_IN, dtype=torch.float64), torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    start = factors.pissa(torch.ones(D_OUT, D_IN), rank=2)  # of rank 1: B has a column of zeros
    assert budget.output_shares(start, torch.ones(D_OUT, D_IN)).tolist() == pytest.approx([1, 0], abs=1e-12)
    assert budget.output_shares(start, w).tolist() == [0, 0]
    assert budget.output_shares(start, torch.ones(D_OUT, D_IN), zero).tolist() == [0, 0]
    eva = factors.eva(torch.eye(D_IN), torch.zeros(D_IN), 1, D_OUT, rank=2)
    assert budget.input_shares(eva, zero).tolist() == [0, 0]
