"""What n ranks cost: bytes as they are sent, eigenproblems as they are dealt, and a page that leaves nothing out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling_model import Chain, Cluster, Cost, Gloo, Network, cost, h100, makespan, site_bytes, worth_having
from models import random_batches, tiny
from nullspace import Covariance, stream_covariances
from nullspace.planning.plan import Workload
from nullspace.planning.survey import Survey
from nullspace.solvers import decomposition_cost
from processes import outcomes

WORK = Workload(samples=8, length=32, batch_size=1, rank=8)
STRATEGIES = ("resident", "layerwise")
GLOO = Gloo(start=1e-4, hop=2e-4, ring=1e9, gather=2e9)
NETWORKS = (h100().network, GLOO)
SHARED = replace(h100(), network=GLOO, panel=2e-6, copy=3e9, exchange=5e-4, exchange_site=2e-6, cores=2)


@pytest.fixture(scope="module")
def survey() -> Survey:
    return Survey(tiny("llama"), batch_size=1, length=32)


# ---- bytes


@pytest.mark.parametrize("d", [1, 2, 63, 300])
@pytest.mark.parametrize("precision", ["auto", "fp64"])
def test_bytes_of_a_site_are_those_of_its_vector(d: int, precision: str) -> None:
    covariance = Covariance(d, precision=precision)
    covariance.update(torch.randn(5, d))
    assert covariance.compress().nbytes == site_bytes(d)
    assert site_bytes(d) - 8 * d * (d + 1) // 2 == 8 * (d + 9)


def check_bytes(rank: int, count: int, folder: Path) -> None:
    model = tiny("llama")
    expected = Survey(model, batch_size=1, length=32)
    plain, sent = dist.reduce, []

    def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return plain(tensor, *args, **kwargs)

    dist.reduce = reduce
    for strategy in STRATEGIES:
        sent.clear()
        for _ in stream_covariances(model, random_batches(4, 1, 32), strategy=strategy, progress=False):
            pass
        found = cost(expected, WORK, count, h100(), strategy=strategy)
        assert sorted(sent) == sorted(found.site_bytes[site.d_in] for site in expected.sites)  # one a site
        assert sum(sent) == found.reduced


@pytest.mark.slow
@pytest.mark.processes
def test_bytes_reduced_are_those_that_are_sent(tmp_path: Path) -> None:
    said = outcomes(__file__, 2, ["check_bytes"], tmp_path / "together")
    assert said == {"check_bytes": ["", ""]}, said


# ---- eigenproblems


def cubes(d: int) -> float:
    return float(d) ** 3


@given(widths=st.lists(st.sampled_from([48, 64, 112, 256]), min_size=1, max_size=20), ranks=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_makespan(widths: list[int], ranks: int) -> None:
    whole, found = sum(map(cubes, widths)), makespan(widths, ranks, cubes)
    assert makespan(widths, 1, cubes) == whole
    assert max(cubes(max(widths)), whole / ranks) <= found <= whole
    assert makespan(widths, ranks + 1, cubes) <= found
    assert makespan(widths, len(widths), cubes) == cubes(max(widths))


def test_loads_are_remembered_from_block_to_block() -> None:
    loads = [0.0, 0.0]
    first = makespan([112, 48], 2, cubes, loads=loads)
    assert first == cubes(112)
    assert sorted(loads) == [cubes(48), cubes(112)]
    makespan([112], 2, cubes, loads=loads)  # to the other one
    assert sorted(loads) == [cubes(112), cubes(112) + cubes(48)]


@given(seconds=st.lists(st.floats(0, 100), min_size=1, max_size=12), cores=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_cores_are_shared_evenly(seconds: list[float], cores: int) -> None:
    found = replace(h100(), cores=cores).last(seconds)
    assert found >= max(max(seconds), sum(seconds) / cores) * (1 - 1e-9)
    assert found <= sum(seconds) * (1 + 1e-9) + 1e-300
    if cores >= len(seconds):
        assert found == pytest.approx(max(seconds))


# ---- seconds


@pytest.mark.parametrize("network", NETWORKS, ids=["chain", "gloo"])
def test_one_rank_sends_nothing_and_more_bytes_and_ranks_take_longer(network: Network) -> None:
    assert network.reduce_seconds(1e6, 1) == 0
    for ranks in (2, 8, 9, 64):
        assert network.reduce_seconds(1e6, ranks) < network.reduce_seconds(2e6, ranks)
        assert network.reduce_seconds(1e6, ranks) <= network.reduce_seconds(1e6, ranks + 1)
        assert network.reduce_seconds(0, ranks) == network.latency(ranks) > 0


@pytest.mark.parametrize("field", ["within", "between", "ring", "gather"])
def test_bandwidth_never_makes_it_slower(field: str) -> None:
    network = next(n for n in NETWORKS if hasattr(n, field))
    for ranks in (2, 8, 16, 1024):
        seconds = [replace(network, **{field: rate}).reduce_seconds(1e9, ranks) for rate in (1e9, 1e10, 1e11)]  # type: ignore[type-var]
        assert seconds == sorted(seconds, reverse=True)
        if field != "between" or ranks > 8:
            assert seconds[-1] < seconds[0]


def test_between_nodes_the_narrower_bandwidth_counts() -> None:
    network = Chain(ranks_a_node=8, within=100.0, between=10.0, start=0.0, hop_within=1.0, hop_between=5.0)
    assert network.reduce_seconds(1000, 8) == 7 * 1.0 + 10
    assert network.reduce_seconds(1000, 16) == 14 * 1.0 + 5.0 + 100


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cluster", [h100(), SHARED], ids=["h100", "shared cores"])
def test_cost_of_ranks(survey: Survey, cluster: Cluster, strategy: str) -> None:
    costs = {n: cost(survey, WORK, n, cluster, strategy=strategy) for n in (1, 2, 4, 8, 16)}
    one = costs[1]
    assert (one.reduced, one.hidden, one.seconds["reductions"], one.seconds["exchanges"], one.seconds["bases"]) == (0, 0, 0, 0, 0)
    each = [decomposition_cost(site.d_in, WORK.rank, "cuda")[2] / cluster.rates.decomposition for site in survey.sites]
    assert one.seconds["eigenproblems"] == pytest.approx(sum(each))
    for n, found in costs.items():
        assert found.total_seconds == pytest.approx(sum(found.seconds.values()))
        assert all(seconds >= 0 for seconds in found.seconds.values())
        at_once = min(n, cluster.cores or n)
        assert found.seconds["eigenproblems"] >= max(*each, sum(each) / at_once) * (1 - 1e-9)
        assert found.seconds["forward"] == pytest.approx(one.seconds["forward"] / min(at_once, WORK.samples))
        assert found.busy == min(n, WORK.samples)
    if strategy == "resident":  # within a block, sites that are dealt by d³ may go unevenly: a small solve is mostly launches
        solving = [found.seconds["eigenproblems"] for found in costs.values()]
        assert solving == pytest.approx(sorted(solving, reverse=True))
    assert cost(survey, WORK, 4, cluster, strategy=strategy, solved=False).seconds["eigenproblems"] == 0


def test_layerwise_would_wait_for_every_block_unless_blocks_are_solved_together(survey: Survey) -> None:
    def solving(strategy: str, together: int | None = None, ranks: int = 12) -> float:
        return cost(survey, WORK, ranks, h100(), strategy=strategy, together=together).seconds["eigenproblems"]

    widest = decomposition_cost(112, WORK.rank, "cuda")[2] / h100().rates.decomposition
    assert solving("resident") == pytest.approx(widest)
    assert solving("layerwise", 1) == pytest.approx(3 * widest)
    assert solving("layerwise", 2) == pytest.approx(2 * widest)
    assert solving("layerwise") == solving("layerwise", 3) == solving("resident")
    assert solving("layerwise", ranks=2) == solving("layerwise", 2, ranks=2)


def test_what_is_hidden_is_not_seen(survey: Survey) -> None:
    def found(cluster: Cluster, strategy: str = "layerwise", **more: Any) -> Cost:
        return cost(survey, WORK, 4, cluster, strategy=strategy, **more)

    # No forward pass, or packing, takes any time; or a forward pass has time for everything, but for the last block's sums.
    nothing = {"panel": 0.0, "copy": math.inf}
    fast, slow = (replace(h100(), **nothing, rates=replace(h100().rates, forward=rate, sums=math.inf)) for rate in (math.inf, 1.0))
    for cluster in (h100(), slow):
        seen, plain = found(cluster), found(cluster, overlapped=False)
        assert plain.hidden == 0 < seen.hidden
        assert seen.seconds["reductions"] + seen.hidden == pytest.approx(plain.seconds["reductions"])
    travel = sum(h100().travel_seconds(site.d_in, 4) for site in survey.sites)
    assert found(slow).hidden == pytest.approx(2 / 3 * travel)
    assert found(fast).hidden == found(slow, "resident").hidden == 0
    assert found(fast).seconds["reductions"] == pytest.approx(travel)
    assert 0 < found(h100(), "resident").hidden <= travel  # behind the packing of others
    assert found(SHARED).hidden == 0  # nobody is idle


def test_weights_come_while_the_block_before_computes(survey: Survey) -> None:
    def waited(weights: str, **rates: float) -> float:
        cluster = replace(h100(), rates=replace(h100().rates, **rates))
        return cost(survey, WORK, 8, cluster, strategy="layerwise", weights=weights).seconds["weights"]

    first = survey.block_weights[0] / h100().rates.transfer
    assert waited("device") == 0
    assert waited("host", forward=1.0) == pytest.approx(first)
    assert waited("host", transfer=1.0) == pytest.approx(sum(survey.block_weights), rel=1e-3)
    assert waited("gathered", transfer=1.0) < 1


def test_worth_having() -> None:
    assert worth_having(lambda n: 1.0) == 1
    assert worth_having(lambda n: 1 / min(n, 40)) == 64
    assert worth_having(lambda n: 1 / n, most=100) == 64
    assert worth_having(lambda n: 1 / n + 0.01 * n) == 8


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"together": 0}, {"strategy": "sideways"}, {"weights": "cloud"}])
def test_wrong_arguments(survey: Survey, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|there is no strategy"):
        cost(survey, WORK, **{"ranks": 2, "cluster": h100(), **wrong})


# ---- the benchmark and its page


@pytest.fixture(scope="module")
def made_up() -> dict[str, Any]:
    """What the benchmark would write if the machine were as the model has it."""
    pytest.importorskip("benchmarks.scaling", reason="needs the repository's root on the path: python -m pytest")
    from benchmarks import scaling, shapes

    sizes = scaling.QUICK
    work = Workload(samples=sizes["samples"], length=sizes["length"], batch_size=1, rank=sizes["rank_of_bases"], device="cpu")
    here = replace(SHARED, rates=replace(SHARED.rates, forward=1e10, sums=1e10, decomposition=2e9, transfer=math.inf))
    runs: list[dict[str, Any]] = []
    for n in (2, 4):
        for d in sizes["widths"]:
            size = site_bytes(d)
            parts = {
                "pack": here.packing_seconds(d, n),
                "reduce": here.travel_seconds(d, n),
                "unpack": here.unpacking_seconds(d, n),
                "message": 1e-4 + size / 2e9,
            }
            runs.append({"ranks": n, "d": d, "bytes": size, **parts})
        crowd = here.crowd(n)
        for sites in (0, sizes["sites"]):
            seconds = here.exchange * crowd + 2 * here.network.latency(n, crowd) + here.exchange_site * crowd * n * sites
            runs.append({"ranks": n, "sites": sites, "exchange": seconds})
    shape = Survey(shapes.empty(sizes["model"], dtype=torch.float32), batch_size=1, length=sizes["length"], device="cpu")
    for n in scaling.COUNTS:
        for strategy in scaling.STRATEGIES:
            runs.append({"ranks": n, "strategy": strategy, "peak_bytes": 1_000_000 // n})
            for call in scaling.CALLS:
                said = cost(shape, work, n, here, strategy=strategy, solved=call == scaling.CALLS[1])
                seconds = {"seconds": said.total_seconds, "bytes": said.reduced}
                runs.append({"ranks": n, "strategy": strategy, "call": call, **seconds})
    return {
        "environment": {"cpu": "a CPU", "commit": "0" * 40, "uncommitted_changes": False, "versions": {"torch": "2"}},
        "workload": {**sizes, "rounds": 1, "cores": 2},
        "summary": scaling.summarise(runs, sizes, 2),
    }


def test_a_machine_that_is_as_the_model_has_it_is_found(made_up: dict[str, Any]) -> None:
    summary = made_up["summary"]
    cluster = summary["cluster"]
    assert [cluster[name] for name in ("panel", "copy", "exchange", "exchange_site")] == pytest.approx(
        [2e-6, 3e9, 5e-4, 2e-6], rel=1e-3
    )
    assert [cluster["network"][name] for name in ("start", "hop", "ring", "gather")] == pytest.approx(
        [1e-4, 2e-4, 1e9, 2e9], rel=1e-3
    )
    for part in summary["reductions"]:
        assert max(map(abs, part["error"].values())) < 1e-3
    for part in summary["calibrations"]:
        assert abs(part["error"]) < 0.01
        assert part["bytes_counted"] == [part["bytes_model"]]


@pytest.mark.slow
def test_the_page_leaves_nothing_out(made_up: dict[str, Any]) -> None:
    from benchmarks.scaling_page import CASES, RANKS, page, surveyed

    text = page(made_up)
    assert {name for name, *_ in CASES} == {"Llama-3-8B", "Llama-3-70B", "Llama-3.1-405B"}
    assert RANKS == (8, 64, 1024)
    for name, strategy, _ in CASES:
        part = text.split(f"## {name}, {strategy}")[1].split("\n## ")[0]
        for ranks in RANKS:
            assert f"\n| {ranks:,} | " in part
        for d in {site.d_in for site in surveyed(name)[0].sites}:
            assert f"d = {d:,}" in part
    assert "was measured" in text
    assert "nan" not in text
    assert all(line.count("|") == table.splitlines()[0].count("|") for table in tables(text) for line in table.splitlines())
    assert page(made_up) == text


def test_a_few_blocks_stand_for_all() -> None:
    pytest.importorskip("benchmarks.shapes", reason="needs the repository's root on the path: python -m pytest")
    from benchmarks import shapes
    from benchmarks.scaling_page import deepened

    few, all_of_them = (Survey(shapes.empty("tiny", blocks=blocks), batch_size=1, length=32) for blocks in (2, 4))
    found, expected = vars(deepened(few, 4)), vars(all_of_them)
    assert found.pop("reached") < expected.pop("reached")  # names, of the few
    assert [site._replace(name="") for site in found.pop("sites")] == [s._replace(name="") for s in expected.pop("sites")]
    of_modules = ("blocks", "block_calls")  # the few blocks themselves
    few, all_of_them = ({k: v for k, v in each.items() if k not in of_modules and k[0] != "_"} for each in (found, expected))
    assert few == all_of_them


def tables(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if part.startswith("|")]
