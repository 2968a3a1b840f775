"""Shards that jobs sum by themselves: merged in any order and grouping they are the whole, and the account of them is kept."""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler
from typer.testing import CliRunner

from models import random_batches, tiny
from nullspace import Covariances, compute_covariances
from nullspace.artifacts import records
from nullspace.artifacts.shard_account import Shards, joined, parse_shard, what_is_missing
from nullspace.cli import app
from reference import relative_error

# Sums of the same numbers in another order.
ROUNDING = 1e-12
TARGETS = ["q_proj", "down_proj"]
COUNT = 4


def compute(out: Path, loader: Any = None, shard: tuple[int, int] | None = None, **options: Any) -> Covariances:
    batches = random_batches(7, 2, 40, padding="right") if loader is None else loader
    return compute_covariances(tiny("llama"), batches, out, **{"shard": shard, "targets": TARGETS, "progress": False, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Covariances:
    return compute(tmp_path_factory.mktemp("shards") / "whole")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Covariances]:
    folder = tmp_path_factory.mktemp("shards")
    return [compute(folder / str(i), shard=(i, COUNT)) for i in range(1, COUNT + 1)]


def assert_same(found: Covariances, expected: Covariances) -> None:
    assert found.sites == expected.sites
    for site in expected.sites:
        ours, theirs = found[site.name], expected[site.name]
        assert (ours.tokens, ours.mass, ours.outliers) == (theirs.tokens, theirs.mass, theirs.outliers)
        assert relative_error(ours.matrix(), theirs.matrix()) <= ROUNDING
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=1e-9, atol=1e-12)


def test_a_shard_is_every_nth_batch(whole: Covariances, shards: list[Covariances]) -> None:
    batches = random_batches(7, 2, 40, padding="right")
    site = whole.sites[0].name
    assert [s[site].tokens for s in shards] == [
        sum(int(b["attention_mask"].sum()) for b in batches[i::COUNT]) for i in range(COUNT)
    ]
    assert [s.shards[0].numbers for s in shards] == [(1,), (2,), (3,), (4,)]
    assert {(s.shards[0].data, s.shards[0].count) for s in shards} == {(shards[0].shards[0].data, COUNT)}
    assert shards[0].shards[0].data[1] == 7
    assert whole.shards == ()


@pytest.mark.slow
def test_neither_order_nor_grouping_matters(tmp_path: Path, whole: Covariances, shards: list[Covariances]) -> None:
    for number, order in enumerate(itertools.permutations(shards)):
        a, b, c, d = order
        merged = Covariances.merge(order)
        assert merged.shards[0].numbers == (1, 2, 3, 4)
        pairs = Covariances.merge([Covariances.merge([a, b], partial=True), Covariances.merge([c, d], partial=True)])
        chain = functools.reduce(lambda x, y: Covariances.merge([x, y], partial=True), order)
        for found in (merged, pairs, chain):
            assert_same(found, whole)
        if number % 8 == 0:  # through files
            Covariances.merge([b, d], partial=True).save(tmp_path / f"{number} bd")
            Covariances.merge([Covariances.load(tmp_path / f"{number} bd", partial=True), c, a]).save(tmp_path / f"{number}")
            found = Covariances.load(tmp_path / f"{number}")
            assert_same(found, whole)
            assert found.shards == merged.shards


@pytest.mark.parametrize("precision", ["auto", "qr"])
def test_shards_of_any_precision_are_merged(tmp_path: Path, whole: Covariances, precision: str) -> None:
    parts = [compute(tmp_path / str(i), shard=(i, 3), precision=precision) for i in (1, 2, 3)]
    assert_same(Covariances.merge([parts[2], parts[0], parts[1]]), whole)


def test_a_loader_that_is_no_sequence_is_split_too(tmp_path: Path, whole: Covariances) -> None:
    class Again:
        def __iter__(self) -> Any:
            return iter(random_batches(7, 2, 40, padding="right"))

    assert_same(Covariances.merge([compute(tmp_path / str(i), Again(), (i, 2)) for i in (2, 1)]), whole)


def test_a_missing_shard_is_named(tmp_path: Path, shards: list[Covariances]) -> None:
    with pytest.raises(ValueError, match=r"not a merge of all data: shard 3 of 4 missing.*partial=True"):
        Covariances.merge([shards[0], shards[3], shards[1]])
    with pytest.raises(ValueError, match=r"shards 2, 4 of 4 missing"):
        Covariances.merge([shards[0], shards[2]])
    Covariances.merge([shards[2], shards[0]], partial=True).save(tmp_path / "some")
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'some'))} .*shards 2, 4 of 4 missing"):
        Covariances.load(tmp_path / "some")
    assert Covariances.load(tmp_path / "some", partial=True).shards[0].numbers == (1, 3)


def test_a_doubled_shard_is_named(shards: list[Covariances]) -> None:
    with pytest.raises(ValueError, match=r"shard 2/4 is in runs 2 and 4"):
        Covariances.merge([shards[0], shards[1], shards[2], shards[1]], partial=True)
    some = Covariances.merge([shards[1], shards[3]], partial=True)
    with pytest.raises(ValueError, match=r"shard 4/4 is in runs 1 and 2"):
        Covariances.merge([some, Covariances.merge([shards[3], shards[0]], partial=True)], partial=True)
    every = Covariances.merge(shards)
    with pytest.raises(ValueError, match=r"shard 1/4 is in runs 1 and 2"):
        Covariances.merge([every, shards[0]])


def test_other_data_are_other_shards(tmp_path: Path, whole: Covariances, shards: list[Covariances]) -> None:
    of_another_split = compute(tmp_path / "split", shard=(1, 2))
    with pytest.raises(ValueError, match=r"runs 1 and 2 are of the same data, split into 4 shards and into 2"):
        Covariances.merge([shards[0], of_another_split], partial=True)
    others = [compute(tmp_path / f"other {i}", random_batches(3, 2, 40, seed=9), (i, 2)) for i in (1, 2)]
    with pytest.raises(ValueError, match=r"shard 4 of 4 \(data \w+\); shard 2 of 2 \(data \w+\) missing"):
        Covariances.merge([*shards[:3], others[0]])
    both = Covariances.merge([*shards, *others])
    assert len(both.shards) == 2
    weighed = Covariances.merge([Covariances.merge(shards), Covariances.merge(others), whole], weights=[1, 2, 1])
    assert len(weighed.shards) == 2


def test_a_part_is_neither_weighed_nor_normalised(shards: list[Covariances]) -> None:
    some = Covariances.merge(shards[:3], partial=True)
    for options in ({"normalise": True}, {"weights": [1.0, 2.0]}):
        with pytest.raises(ValueError, match=r"run 1 is a part of its data: merge its shards first"):
            Covariances.merge([some, shards[3]], **options)
    assert_same(Covariances.merge([some, shards[3]], weights=[1.0, 1.0]), Covariances.merge(shards))


@pytest.mark.parametrize(
    ("shard", "loader", "says"),
    [
        ((0, 4), None, "shard 0/4 does not exist"),
        ((5, 4), None, "shard 5/4 does not exist"),
        ((3, 3), random_batches(2), r"shard 3/3 has no batch: there are 2"),
        ((1, 2), iter(random_batches(2)), "read more than once"),
        ((1, 2), DataLoader([1, 2], sampler=DistributedSampler([1, 2], num_replicas=2, rank=0)), "splits the data already"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(tmp_path: Path, shard: tuple[int, int], loader: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compute(tmp_path / "run", loader, shard)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_was_cut_off_goes_on_and_another_does_not(tmp_path: Path) -> None:
    first = compute(tmp_path / "a", shard=(1, 2), checkpoint=tmp_path / "kept")
    assert_same(compute(tmp_path / "b", shard=(1, 2), checkpoint=tmp_path / "kept"), first)
    with pytest.raises(ValueError, match="data: "):
        compute(tmp_path / "c", shard=(2, 2), checkpoint=tmp_path / "kept")


def test_what_is_missing_is_written_out() -> None:
    assert what_is_missing([]) is None
    assert what_is_missing([Shards(("a", 9), 1, (1,))]) is None
    assert what_is_missing([Shards(("a", 99), 20, (20,))]) == "shards 1, 2, 3, 4, 5, 6, 7, 8 and 11 more of 20"
    assert joined([]) == ()
    assert Shards.from_json(json.loads(json.dumps(Shards(("a", 9), 3, (1, 3)).as_json()))) == Shards(("a", 9), 3, (1, 3))


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1.5/2"])
def test_a_shard_is_written_i_of_n(text: str) -> None:
    assert parse_shard("2/8") == (2, 8)
    with pytest.raises(ValueError, match="i/n"):
        parse_shard(text)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_splits_and_merges(tiny_checkpoint: Path, tmp_path: Path, prose: list[str]) -> None:
    data = tmp_path / "data.txt"
    data.write_text("\n\n".join(prose[:3]))
    small = ["--samples", "6", "--length", "64", "--batch-size", "1", "--targets", "q_proj", "--json"]
    for shard in ("1/3", "2/3", "3/3"):
        result = run("covariances", tiny_checkpoint, "--data", data, "--shard", shard, "--out", tmp_path / shard[0], *small)
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shards"][0]["numbers"] == [3]
    refused = run("merge", tmp_path / "1", tmp_path / "3", "--out", tmp_path / "some")
    assert refused.exit_code == 2
    assert "shard 2 of 3 missing" in refused.output
    assert run("merge", tmp_path / "3", tmp_path / "1", "--out", tmp_path / "some", "--partial", "-q").exit_code == 0
    assert "shard 2 of 3 missing" in run("inspect", tmp_path / "some").output
    for command in (["compute"], ["init", tiny_checkpoint, "--targets", "q_proj"]):
        use = [*command, "--covariances", tmp_path / "some", "--rank", "4", "-q"]
        assert "shard 2 of 3 missing" in run(*use, "--out", tmp_path / "no").output
        assert not (tmp_path / "no").exists()
        assert run(*use, "--out", tmp_path / command[0], "--partial").exit_code == 0
    assert "shard 3/3 is in runs 1 and 2" in run("merge", tmp_path / "some", tmp_path / "3", "--out", tmp_path / "all").output
    assert run("merge", tmp_path / "2", tmp_path / "some", "--out", tmp_path / "all", "-q").exit_code == 0
    assert run("covariances", tiny_checkpoint, "--data", data, "--out", tmp_path / "whole", *small).exit_code == 0
    assert_same(Covariances.load(tmp_path / "all"), Covariances.load(tmp_path / "whole"))
    assert "i/n" in run("covariances", tiny_checkpoint, "--data", data, "--shard", "4/3", "--out", tmp_path / "no", *small).output


def test_an_account_of_a_billion_shards_costs_nothing() -> None:
    part = Shards(("a", 9), 10**9, (1, 3))
    assert what_is_missing([part]) == "shards 2, 4, 5, 6, 7, 8, 9, 10 and 999999990 more of 1000000000"
    assert part.missing == 10**9 - 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"of": 1e9}, "'of' should be an integer"),
        ({"of": True}, "'of' should be an integer"),
        ({"of": 0}, "'of' should be an integer"),
        ({"numbers": [3, 1]}, "are not shards from 1 to 3, ascending"),
        ({"numbers": [1, 4]}, "are not shards from 1 to 3, ascending"),
        ({"numbers": [1, 1]}, "'numbers' should be a list"),
        ({"numbers": []}, "'numbers' should be a list"),
        ({"content": None}, "'content' should be a string"),
    ],
)
def test_an_account_that_cannot_be_is_refused_by_name(
    change: dict[str, Any], words: str, shards: list[Covariances], tmp_path: Path
) -> None:
    shards[0].save(tmp_path / "run")
    path = tmp_path / "run" / records.MANIFEST
    body = records.read_sealed(path)
    body["shards"] = [{**body["shards"][0], "of": 3, **change}]
    path.write_text(records.sealed(body))
    with pytest.raises(ValueError, match=words) as error:
        Covariances.load(tmp_path / "run", partial=True)
    assert str(path) in str(error.value)
