"""The filter, and several changes in one, against least squares on the inputs themselves; and the filter's forecasts."""

from __future__ import annotations

import itertools

import pytest
import torch

from nullspace.factors import Filter, LowRank, combined, filtered

STRENGTHS = [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e6]
ACCURACY = 1e-9
RIDGE = 1e-3
KINDS = ["full", "few of the task", "few to keep", "few of both", "massive"]


def inputs(kind: str, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a task and of what must be kept, tokens in rows: of full rank, of few tokens, or with massive activations."""
    torch.manual_seed(seed)
    few = kind == "few of both"
    n_t = d // 3 + 1 if few or kind == "few of the task" else 4 * d
    n_k = d // 4 + 1 if few or kind == "few to keep" else 4 * d
    scales = torch.logspace(0, -3, d, dtype=torch.float64)
    x_t = torch.randn(n_t, d, dtype=torch.float64) * scales
    x_k = torch.randn(n_k, d, dtype=torch.float64) * scales[torch.randperm(d)]
    if kind == "massive":
        x_t[0, d // 2], x_k[0, d // 2] = 3e4, 1e4
    elif kind != "full":
        turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
        x_t, x_k = x_t @ turn, x_k @ turn
    return x_t, x_k


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.mT @ x


def change(d: int, d_out: int = 7, rank: int = 3) -> LowRank:
    torch.manual_seed(1)
    return LowRank(torch.randn(rank, d, dtype=torch.float64), torch.randn(d_out, rank, dtype=torch.float64))


def rows_of(x_t: torch.Tensor, x_k: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the least-squares problem: of the task with the ridge, and of what must be kept."""
    d = x_t.shape[1]
    ridge = (RIDGE / d) ** 0.5 * torch.eye(d, dtype=torch.float64)
    return torch.cat([x_t / x_t.norm(), ridge]), strength**0.5 * x_k / x_k.norm()


def least_squares(delta: torch.Tensor, x_t: torch.Tensor, x_k: torch.Tensor, strength: float) -> torch.Tensor:
    """argmin ‖(ΔW′ − ΔW) X_t‖² + μ ‖ΔW′ X_k‖² by a QR decomposition of the inputs: nothing is squared."""
    task, keep = rows_of(x_t, x_k, strength)
    q, r = torch.linalg.qr(torch.cat([task, keep]))
    wanted = torch.cat([task @ delta.mT, keep.new_zeros(len(keep), len(delta))])
    return torch.linalg.solve_triangular(r, q.mT @ wanted, upper=True).mT


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 24, 65])
def test_the_filter_solves_the_least_squares_problem(d: int, kind: str, strength: float) -> None:
    x_t, x_k = inputs(kind, d)
    a, b = change(d)
    delta = b @ a
    ours = filtered(LowRank(a, b), moment(x_t), moment(x_k), strength=strength)
    expected = least_squares(delta, x_t, x_k, strength)
    assert torch.linalg.matrix_norm(ours.B @ ours.A - expected) <= ACCURACY * torch.linalg.matrix_norm(delta)
    task, keep = rows_of(x_t, x_k, strength)

    def objective(candidate: torch.Tensor) -> float:
        return float((task @ (candidate - delta).mT).square().sum() + (keep @ candidate.mT).square().sum())

    assert objective(ours.B @ ours.A) <= objective(expected) * (1 + ACCURACY)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_whole_weight_the_filter_is_the_same(kind: str) -> None:
    x_t, x_k = inputs(kind, 24)
    delta = torch.randn(31, 24)
    ours = Filter(moment(x_t), moment(x_k)).apply(delta, 2.0)
    assert ours.dtype == torch.float64
    expected = least_squares(delta.double(), x_t, x_k, 2.0)
    assert torch.linalg.matrix_norm(ours - expected) <= ACCURACY * torch.linalg.matrix_norm(expected)


def test_without_strength_a_change_is_as_it_was_to_the_bit() -> None:
    x_t, x_k = inputs("full", 24)
    a, b = (t.float() for t in change(24))
    ours = filtered(LowRank(a, b), moment(x_t), moment(x_k), strength=0)
    assert torch.equal(ours.A, a.double())
    assert torch.equal(ours.B, b.double())


@pytest.mark.parametrize("kind", KINDS)
def test_drift_and_response_fall_with_the_strength_and_the_loss_rises(kind: str) -> None:
    x_t, x_k = inputs(kind, 40)
    path = Filter(moment(x_t), moment(x_k)).path(change(40), [0.0, *torch.logspace(-6, 6, 60).tolist()])
    for before, after in itertools.pairwise(path):
        assert after.drift <= before.drift
        assert after.response <= before.response
        assert after.lost >= before.lost
    assert (path[0].drift, path[0].response, path[0].lost) == (1.0, 1.0, 0.0)
    assert path[-1].drift < 0.01


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_forecasts_are_what_the_filtered_change_does(kind: str, strength: float) -> None:
    x_t, x_k = inputs(kind, 40)
    given = change(40)
    once = Filter(moment(x_t), moment(x_k))
    [forecast] = once.path(given, [strength])
    task, keep = rows_of(x_t, x_k, 1.0)
    before, after = given.B @ given.A, given.B @ once.apply(given.A, strength)
    for said, rows, delta in (
        (forecast.drift, keep, after),
        (forecast.response, task, after),
        (forecast.lost, task, after - before),
    ):
        assert said == pytest.approx(float((rows @ delta.mT).norm() / (rows @ before.mT).norm()), rel=1e-6, abs=1e-10)
    norms = [float((rows @ before.mT).norm()) for rows in (task, keep)]
    assert once.norms(given) == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize("strength", [1e-6, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
def test_one_strength_alone_is_as_good_as_all_of_them(kind: str, strength: float) -> None:
    x_t, x_k = inputs(kind, 40)
    given, tokens = change(40), (len(x_t), len(x_k))
    alone, of_all = (Filter(moment(x_t), moment(x_k), noise=1e-13, tokens=tokens) for _ in range(2))
    of_all.curve(given)  # decomposes
    one, other = (each.apply(given.A, strength) for each in (alone, of_all))
    assert torch.linalg.matrix_norm(one - other) <= ACCURACY * torch.linalg.matrix_norm(given.A)
    [_, said], [_, expected] = (each.path(given, [0.0, strength]) for each in (alone, of_all))
    assert alone._every is None
    assert said == pytest.approx(expected, rel=1e-6, abs=1e-10)


def test_a_change_that_is_zero_stays_zero() -> None:
    x_t, x_k = inputs("full", 24)
    a, b = change(24)
    once = Filter(moment(x_t), moment(x_k))
    for forecast in once.path(LowRank(a, 0 * b), [0.0, 10.0]):
        assert (forecast.drift, forecast.response, forecast.lost, forecast.rounding) == (1.0, 1.0, 0.0, 0.0)


def test_scales_of_the_moments_do_not_matter() -> None:
    x_t, x_k = inputs("full", 24)
    given = change(24)
    one = filtered(given, moment(x_t), moment(x_k), strength=3.0)
    other = filtered(given, 1e-7 * moment(x_t), 1e9 * moment(x_k), strength=3.0)
    assert torch.linalg.matrix_norm(one.A - other.A) <= 1e-11 * torch.linalg.matrix_norm(one.A)


def test_directions_that_neither_data_have_keep_their_change() -> None:
    x_t, x_k = inputs("full", 24)
    x_t[:, 20:] = x_k[:, 20:] = 0
    x_t[:, :4] = 0  # only what must be kept has these
    a = torch.eye(24, dtype=torch.float64)
    ours = Filter(moment(x_t), moment(x_k)).apply(a, 1e3)
    assert torch.allclose(ours[20:], a[20:], atol=1e-12)
    assert ours[:4, :4].abs().max() < 0.1


def test_errors_of_a_moment_are_not_taken_for_inputs() -> None:
    """What must be kept spans 13 of 48 directions. Its sum is off by 1e-9 of its norm, so that it seems to span all."""
    x_t, x_k = inputs("few of both", 48)
    torch.manual_seed(2)
    error = torch.randn(48, 48, dtype=torch.float64)
    error = error @ error.mT
    error *= 1e-9 * moment(x_k).norm() / error.norm()
    a = torch.randn(4, 48, dtype=torch.float64)
    expected = least_squares(a, x_t, x_k, 1e5)
    with_noise, without = (
        float((Filter(moment(x_t), moment(x_k) + error, noise=noise).apply(a, 1e5) - expected).norm() / a.norm())
        for noise in (float(error.norm()), 0.0)
    )
    assert with_noise < 1e-3 < 0.1 < without


def test_the_bound_of_rounding_holds() -> None:
    x_t, x_k = inputs("massive", 40)
    given, c = change(40), moment(x_k)
    torch.manual_seed(3)
    for size in (1e-12, 1e-8, 1e-5):
        error = torch.randn(40, 40, dtype=torch.float64)
        error = (error + error.mT) * (size * c.norm() / (error + error.mT).norm())
        once = Filter(moment(x_t), c + 1.01 * error.norm() * torch.eye(40) + error, noise=2.1 * float(error.norm()))
        for forecast in once.path(given, [0.0, 0.1, 10.0]):
            after = given.B @ once.apply(given.A, forecast.strength)
            true = float((x_k @ after.mT).norm() / (x_k @ (given.B @ given.A).mT).norm())
            assert abs(forecast.drift - true) <= 1.1 * forecast.rounding + 1e-9


def test_drift_on_unseen_text_is_estimated() -> None:
    """With 2 d tokens to keep, a strong filter leaves about twice as much on other tokens of the kind as on these."""
    d = 60
    torch.manual_seed(4)
    root = torch.randn(d, d, dtype=torch.float64)
    fresh = torch.randn(20_000, d, dtype=torch.float64) @ root
    ratios = []
    for _ in range(5):
        x_t, x_k = torch.randn(6 * d, d, dtype=torch.float64), torch.randn(2 * d, d, dtype=torch.float64) @ root
        given = change(d, d_out=40, rank=20)
        once = Filter(moment(x_t), moment(x_k), tokens=(6 * d, 2 * d))
        [forecast] = once.path(given, [30.0])
        after, before = given.B @ once.apply(given.A, 30.0), given.B @ given.A
        true = float((fresh @ after.mT).norm() / (fresh @ before.mT).norm())
        assert true > 1.25 * forecast.drift
        ratios.append(true / forecast.unseen_drift)
    assert 0.8 < sum(ratios) / 5 < 1.25


def test_too_few_tokens_to_say() -> None:
    x_t, x_k = inputs("few of both", 24)
    [forecast] = Filter(moment(x_t), moment(x_k), tokens=(len(x_t), 3)).path(change(24), [1e6])
    assert forecast.unseen_drift == float("inf")


@pytest.mark.parametrize("bad", ["nan", "zero", "width", "rows", "strength", "ridge", "negative"])
def test_bad_input_is_refused(bad: str) -> None:
    x_t, x_k = inputs("full", 8)
    c_t, c_k, given, options = moment(x_t), moment(x_k), change(8), {"strength": 1.0}
    if bad == "nan":
        c_k[0, 0] = float("nan")
    elif bad == "zero":
        c_t = torch.zeros(8, 8)
    elif bad == "width":
        c_k = torch.eye(7)
    elif bad == "rows":
        given = change(9)
    elif bad == "negative":
        c_k = -c_k
    else:
        options[bad] = {"strength": float("inf"), "ridge": 0.0}[bad]
    with pytest.raises(ValueError, match=r"second moment|rows of width|strength|ridge"):
        filtered(given, c_t, c_k, **options)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1e3])
@pytest.mark.parametrize("kind", KINDS)
def test_combined_changes_solve_the_least_squares_problem(kind: str, strength: float) -> None:
    d, d_out = 24, 17
    x_ts = [inputs(kind, d, seed)[0] for seed in range(3)]
    changes = [change(d, d_out, rank) for rank in (2, 3, 4)]
    x_k = inputs(kind, d)[1]
    moments = [moment(x) for x in x_ts]
    ours = combined(changes, moments, moment(x_k), strength=strength)
    tasks, keep = [rows_of(x, x_k, strength)[0] for x in x_ts], rows_of(x_k, x_k, strength)[1]
    wanted = [task @ (b @ a).mT for task, (a, b) in zip(tasks, changes, strict=True)]
    rows, goal = torch.cat([*tasks, keep]), torch.cat([*wanted, keep.new_zeros(len(keep), d_out)])
    expected = torch.linalg.lstsq(rows, goal, driver="gelsd").solution.mT
    assert ours.A.shape == (9, d)
    assert torch.linalg.matrix_norm(ours.B @ ours.A - expected) <= ACCURACY * torch.linalg.matrix_norm(expected)
    # Of rank 4: the best one in the norm of all rows together, by a dense SVD.
    cut = combined(changes, moments, moment(x_k), strength=strength, rank=4)
    r = torch.linalg.qr(rows).R
    sigma = torch.linalg.svdvals(expected @ r.mT)
    off = torch.linalg.matrix_norm((cut.B @ cut.A - expected) @ r.mT)
    assert float(off) == pytest.approx(float(sigma[4:].norm()), rel=1e-6, abs=1e-9 * float(sigma[0]))
    assert (cut.A.gather(1, cut.A.abs().argmax(1, keepdim=True)) > 0).all()


def test_one_change_combined_is_the_filtered_one() -> None:
    x_t, x_k = inputs("full", 24)
    given = change(24)
    one = combined([given], [moment(x_t)], moment(x_k), strength=2.0)
    other = filtered(given, moment(x_t), moment(x_k), strength=2.0)
    assert torch.linalg.matrix_norm(one.B @ one.A - other.B @ other.A) <= ACCURACY * torch.linalg.matrix_norm(other.B @ other.A)


def test_combining_refuses_what_does_not_fit() -> None:
    x_t, x_k = inputs("full", 24)
    c_t, c_k = moment(x_t), moment(x_k)
    with pytest.raises(ValueError, match="0 changes"):
        combined([], [], c_k, strength=1.0)
    with pytest.raises(ValueError, match="2 changes, 1 second"):
        combined([change(24)] * 2, [c_t], c_k, strength=1.0)
    with pytest.raises(ValueError, match="change 2"):
        combined([change(24), change(24, d_out=8)], [c_t, c_t], c_k, strength=1.0)
    with pytest.raises(ValueError, match="rank"):
        combined([change(24)], [c_t], c_k, strength=1.0, rank=4)
