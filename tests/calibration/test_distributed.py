"""Several processes find what one finds: whatever their shares are, with one reduction a site, and without anybody left waiting.

The checks run in groups of two and three processes (`processes.outcomes`); the tests report what became of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from mixtures import mixture
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from typer.testing import CliRunner

from models import random_batches, tiny, write_checkpoint
from nullspace import Covariance, Covariances, NullSpaces, compute_covariances, compute_null_spaces, solvers, stream_covariances
from nullspace.artifacts import locks, records, shared_writes, store
from nullspace.calibration.totals import deal
from nullspace.cli import app
from nullspace.distributed import Job
from nullspace.distributed.job import default_store
from nullspace.distributed.loaders import is_share
from nullspace.integrations.peft import (
    export_lora,
    filter_adapter,
    filter_checkpoint,
    initialize_lora_nullspace_weights,
    inject_adapters,
    lora_layers,
    prepare,
    save_init,
    write_init,
)
from nullspace.moments.triangle import LowerTriangle
from nullspace.solvers import decomposition_cost
from patience import run
from processes import Checks
from reference import relative_error
from together import alone, assert_as_good, compute, counting_questions, refused, stream

pytestmark = pytest.mark.processes

STRATEGIES = ("resident", "layerwise")
PRECISIONS = ("auto", "fp64", "qr")
# Sums of the same numbers in another order.
ROUNDING = 1e-12
UP = "model.layers.1.mlp.up_proj"
check = Checks(__file__)


# ---- what they compute


def shares(kind: str, count: int) -> list[dict[str, torch.Tensor]]:
    batches = {
        "uneven": lambda: random_batches(count + 1, 2, 40),
        "empty": lambda: random_batches(1, 4, 40),
        "padded": lambda: random_batches(2 * count, 2, 40, padding="right"),
    }
    return batches[kind]()


def every_share_is_as_good(strategy: str, precision: str, count: int) -> None:
    model = tiny("llama")
    for kind in ("uneven", "empty", "padded"):
        batches, options = shares(kind, count), {"strategy": strategy, "precision": precision}
        assert_as_good(compute(model, batches, **options), model, batches, **options)


@check(2, 3)
def resident_auto(rank: int, count: int, folder: Path) -> None:
    every_share_is_as_good("resident", "auto", count)


@check(2)
def resident_fp64(rank: int, count: int, folder: Path) -> None:
    every_share_is_as_good("resident", "fp64", count)


@check(2, 3)
def resident_qr(rank: int, count: int, folder: Path) -> None:
    every_share_is_as_good("resident", "qr", count)


@check(2)
def layerwise_auto(rank: int, count: int, folder: Path) -> None:
    every_share_is_as_good("layerwise", "auto", count)


@check(2, 3)
def layerwise_fp64(rank: int, count: int, folder: Path) -> None:
    every_share_is_as_good("layerwise", "fp64", count)


@check(2)
def layerwise_qr(rank: int, count: int, folder: Path) -> None:
    every_share_is_as_good("layerwise", "qr", count)


@check(2)
def what_was_not_good_enough_is_summed_again_by_all(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(20)
    assert "mixed" in {total.products for total in stream(model, batches).values()}
    found = compute(model, batches, tolerance=1e-14)
    assert {found[site.name].precision for site in found.sites} == {"fp64"}
    assert_as_good(found, model, batches, precision="fp64")


@check(2)
def one_iterator_each_is_enough(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count + 1, 2, 40)
    for strategy in STRATEGIES:
        assert_as_good(compute(model, iter(batches), strategy=strategy, precision="fp64"), model, batches, precision="fp64")


@check(2, 3)
def experts_are_summed_and_completed_over_all_processes(rank: int, count: int, folder: Path) -> None:
    model = mixture("qwen3_moe")
    generator = torch.Generator().manual_seed(7)
    batches = [{"input_ids": torch.randint(5, 200, (1, 12), generator=generator)} for _ in range(count)]  # few tokens an expert
    for options in ({"strategy": "resident"}, {"strategy": "layerwise"}, {"precision": "qr"}, {"experts": "pooled"}):
        options = {"experts": "each", "precision": "fp64", **options}
        totals, expected = stream(model, batches, **options), stream(model, batches, **options, job=Job.alone())
        assert any(total.pool is not None for total in totals.values()) or options["experts"] == "pooled"
        for site, total in totals.items():
            assert total.tokens == expected[site].tokens
            assert relative_error(total.completed(40).matrix(), expected[site].completed(40).matrix()) < ROUNDING
        names = [name for names in Job().exchange([site.name for site in totals]) for name in names]
        assert sorted(names) == sorted(site.name for site in expected)


@check(2, 3)
def what_is_ahead_of_the_blocks_and_behind_them_is_summed_too(rank: int, count: int, folder: Path) -> None:
    config = tiny("opt").config
    config.word_embed_proj_dim = 32
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    for batches in (random_batches(count, padding="right"), random_batches(1)):
        found = stream(model, batches, strategy="layerwise", precision="fp64")
        expected = stream(model, batches, precision="fp64", job=Job.alone())
        names = [name for names in Job().exchange([site.name for site in found]) for name in names]
        assert sorted(names) == sorted(site.name for site in expected)
        for site, total in found.items():
            assert_same_sums(total, expected[site])


# ---- sums and their owners


def assert_same_sums(found: Covariance, expected: Covariance) -> None:
    assert (found.tokens, found.mass, found.outliers) == (expected.tokens, expected.mass, expected.outliers)
    assert found.precision == expected.precision
    assert relative_error(found.matrix(), expected.matrix()) <= ROUNDING
    torch.testing.assert_close(found.mean(), expected.mean(), rtol=1e-9, atol=1e-12)


@check(2, 3)
def every_site_is_one_processs_alone(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("gemma3"), random_batches(2 * count + 1, padding="left")
    for strategy, precision in itertools.product(STRATEGIES, ("fp64", {".*o_proj": "qr", ".*": "fp64"})):
        found = stream(model, batches, strategy=strategy, precision=precision)
        expected = stream(model, batches, strategy=strategy, precision=precision, job=Job.alone())
        everyones = Job().exchange(list(found))
        assert sorted(map(str, itertools.chain(*everyones))) == sorted(map(str, expected))
        assert all(everyones)
        for site, total in found.items():
            assert_same_sums(total, expected[site])


@check(2)
def what_is_added_to_a_sum_afterwards_counts(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count, 1, 16)  # few tokens: the probe of "auto" has not come to an end
    expected = stream(model, batches, job=Job.alone())
    for site, total in stream(model, batches).items():
        x = torch.randn(600, site.d_in, generator=torch.Generator().manual_seed(0))
        for each in (total, expected[site]):
            each.update(x)
        assert (total.tokens, total.precision) == (expected[site].tokens, "auto")
        assert relative_error(total.matrix(), expected[site].matrix()) <= 1e-6


@contextlib.contextmanager
def counting(*names: str) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """What is handed to functions of `torch.distributed` inside."""
    called: list[tuple[str, torch.Tensor]] = []
    before = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        return lambda tensor, *args, **kwargs: called.append((name, tensor)) or before[name](tensor, *args, **kwargs)

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield called
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


@check(2, 3)
def a_site_is_reduced_once_and_only_its_triangle(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count)
    sites = list(stream(model, batches, job=Job.alone()))
    for strategy in STRATEGIES:
        with counting("reduce", "send", "recv", "all_reduce", "gather", "all_gather", "broadcast") as called:
            owned = stream(model, batches, strategy=strategy)
        assert {name for name, _ in called if name != "all_gather"} == {"reduce"}  # exchanges gather small objects
        vectors = [vector for name, vector in called if name == "reduce"]
        assert {v.dtype for v in vectors} == {torch.float64}
        assert [v.nbytes for v in vectors] == [8 * (s.d_in * (s.d_in + 1) // 2 + s.d_in + 9) for s in sites]
        assert 0 < len(owned) < len(sites)


@check(2, 3)
def a_blocks_reductions_run_during_the_next_blocks_forward_pass(rank: int, count: int, folder: Path) -> None:
    model, batches, events = tiny("llama"), random_batches(2 * count), []
    blocks = model.model.layers
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: events.append(("forward", index)))
    begin = dist.reduce

    class Watched:
        def __init__(self, work: Any, index: int) -> None:
            self._work, self._index = work, index

        def wait(self) -> None:
            events.append(("wait", self._index))
            self._work.wait()

    def reduce(*args: Any, **kwargs: Any) -> Watched:
        index = sum(event == "reduce" for event, _ in events) // 4  # sites a block
        events.append(("reduce", index))
        return Watched(begin(*args, **kwargs), index)

    dist.reduce = reduce
    try:
        stream(model, batches, strategy="layerwise")
    finally:
        dist.reduce = begin
    events = events[max(i for i, event in enumerate(events) if event == ("forward", 0)) :]  # behind the prologue's own calls
    expected: list[tuple[str, int]] = []
    for index in range(len(blocks)):
        expected += [("forward", index)] * (2 if index else 1)
        if index % count:
            expected += [("wait", index - 1)] * 4
        expected += [("reduce", index)] * 4
        if (index + 1) % count == 0:  # each process has been dealt as much as a whole block: it is worked on now
            expected += [("wait", index)] * 4
    if len(blocks) % count:
        expected += [("wait", len(blocks) - 1)] * 4
    assert events == expected


@check(2, 3)
def sites_are_worked_on_when_every_process_has_as_much_as_a_block(rank: int, count: int, folder: Path) -> None:
    """Or the others would wait for each eigenproblem of each block in turn."""
    model, batches, seen = tiny("llama"), random_batches(count), []
    blocks = model.model.layers
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: seen.append(index))
    for site, _ in stream_covariances(model, batches, strategy="layerwise", progress=False):
        done = seen[-1] + 1  # blocks that have run
        assert done % count == 0 or done == len(blocks)
        assert int(site.name.split(".")[2]) >= (done - 1) // count * count


@check(2, 3)
def no_process_holds_more_than_one_alone_when_it_solves(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(2 * count)
    alive: weakref.WeakSet[LowerTriangle] = weakref.WeakSet()
    begin, solve = LowerTriangle.__init__, solvers.partial_eigh
    held: list[int] = []

    def counted(self: LowerTriangle, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        alive.add(self)

    def watched(c: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        held.append(decomposition_cost(len(c), 8, "cpu")[0] + sum(triangle.packed.nbytes for triangle in alive))
        return solve(c, *args, **kwargs)

    def most(**options: Any) -> int:
        held.clear()
        compute(model, batches, strategy="layerwise", precision="fp64", **options)
        return max(held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowerTriangle, "__init__", counted)
        patch.setattr(solvers, "partial_eigh", watched)
        patch.setattr("nullspace.solvers.together.TOGETHER_BYTES", 1)  # one after the other
        single = most(job=Job.alone())
        assert most() <= single


@check(2, 3)
def a_root_goes_from_each_process_once(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count)
    with counting("reduce", "send", "recv") as called:
        owned = stream(model, batches, targets=["o_proj"], precision="qr")
    assert not [name for name, _ in called if name == "reduce"]
    sent = [vector for name, vector in called if name == "send"]
    assert len(sent) == 3 - len(owned)
    assert all(vector.nbytes == 8 * (48 * 49 // 2 + 48 + 4) for vector in sent)


# ---- shares that are shares already


def assert_sums_of(model: nn.Module, loader: Any, plain: Any, strategy: str = "resident") -> None:
    """The sums of all shares are those of the plain loader: to float32 rounding, as samples may meet in other batches."""
    found, expected = stream(model, loader, strategy=strategy), stream(model, plain, precision="fp64", job=Job.alone())
    assert sorted(map(str, itertools.chain(*Job().exchange(list(found))))) == sorted(map(str, expected))
    for site, total in found.items():
        assert total.tokens == expected[site].tokens
        assert relative_error(total.matrix(), expected[site].matrix()) <= 1e-5


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self._ids = torch.randint(3, 211, (count, 24), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index]}


@check(2, 3)
def a_distributed_sampler_is_respected_and_repeats_nothing(rank: int, count: int, folder: Path) -> None:
    model = tiny("llama")
    for rows, size in ((2 * count + 1, 2), (2 * count, 2), (count - 1, 1), (1, 3), (3 * count - 1, 1)):
        data = Rows(rows)
        plain = DataLoader(data, batch_size=2)
        loader = DataLoader(data, batch_size=size, sampler=DistributedSampler(data, shuffle=True, seed=3))
        for strategy in STRATEGIES:
            assert_sums_of(model, loader, plain, strategy)
        single = DataLoader(data, batch_size=None, sampler=DistributedSampler(data))
        assert sum(Job().exchange(sum(1 for _ in Job().share(single)))) == rows
    dropped = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, drop_last=True))
    found = compute(model, dropped, precision="fp64")
    assert found[UP].tokens == 24 * (len(data) // count * count)


@check(2)
def what_accelerate_prepares_is_respected(rank: int, count: int, folder: Path) -> None:
    model, data = tiny("llama"), Rows(3 * count + 1)
    plain = DataLoader(data, batch_size=2)
    for split, shuffle in itertools.product((False, True), (False, True)):
        inner = DataLoader(data, batch_size=2 * count if split else 2, shuffle=shuffle)
        loader = prepare_data_loader(inner, num_processes=count, process_index=rank, split_batches=split)
        assert is_share(loader)
        assert_sums_of(model, loader, plain)
        assert loader.batch_sampler.even_batches


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data: Rows) -> None:
        self._data = data

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self._data[i] for i in range(len(self._data)))


@check(2, 3)
def what_accelerate_makes_of_a_stream_is_respected_and_repeats_nothing(rank: int, count: int, folder: Path) -> None:
    model = tiny("llama")
    for rows, split in itertools.product((1, 2 * count, 3 * count + 1, 5 * count - 1), (False, True)):
        inner = DataLoader(Stream(Rows(rows)), batch_size=2 * count if split else 2)
        loader = prepare_data_loader(inner, num_processes=count, process_index=rank, split_batches=split, dispatch_batches=False)
        assert is_share(loader)
        for strategy in STRATEGIES:
            assert_sums_of(model, loader, DataLoader(Rows(rows), batch_size=2), strategy)
        assert type(loader.dataset).__name__ == "IterableDatasetShard"


@check(2)
def a_loader_that_one_process_reads_for_all_is_respected(rank: int, count: int, folder: Path) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    launched = {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": 1, "ACCELERATE_USE_CPU": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launched.items():
            patch.setenv(name, str(value))
        PartialState._reset_state()  # whoever has asked before was told that there is one process
        PartialState(cpu=True)
    model, data = tiny("llama"), Rows(4 * count)
    loader = prepare_data_loader(DataLoader(data, batch_size=2), torch.device("cpu"), put_on_device=True, dispatch_batches=True)
    assert type(loader).__name__ == "DataLoaderDispatcher"
    assert is_share(loader)
    for strategy in STRATEGIES:
        assert_sums_of(model, loader, DataLoader(data, batch_size=2), strategy)


@check(2)
def a_share_that_does_not_look_like_one_can_be_said_to_be(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count, 2, 40)
    own = batches[rank:][:1]
    assert_as_good(compute(model, own, precision="fp64", job=Job(split=False)), model, batches, precision="fp64")
    refused(ValueError, "different batches, .*DistributedSampler", lambda: compute(model, own))
    refused(ValueError, "different batches after the first one", lambda: compute(model, iter([batches[0], *own])))
    refused(ValueError, "different batches", lambda: compute(model, batches if rank else batches[:-1]))
    refused(ValueError, "different batches", lambda: compute(model, [] if rank else batches))
    other = DataLoader(Rows(9), sampler=DistributedSampler(Rows(9), num_replicas=5, rank=rank))
    refused(ValueError, f"divides its data between 5 processes, and this job has {count}", lambda: compute(model, other))


# ---- what goes wrong


@check(2, 3)
def an_error_of_one_process_is_raised_by_all(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count + 1, 2, 24)
    last = count - 1

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output.fill_(float("nan")) if rank == last else None

    handle = model.model.layers[1].input_layernorm.register_forward_hook(spoil)
    for strategy in STRATEGIES:
        for loader in (batches, random_batches(count, 2, 24)):
            refused(
                ValueError,
                rf"^rank {last}: model\.layers\.1\.self_attn\.q_proj, batch {last + 1}: NaN or Inf",
                lambda loader=loader, strategy=strategy: compute(model, loader, strategy=strategy),
            )
    handle.remove()
    bad = [*batches[:1], {"input_ids": torch.full((1, 4), 10**6)}]
    for strategy in STRATEGIES:
        refused(ValueError, "^rank 1: ", lambda strategy=strategy: compute(model, bad, strategy=strategy))
        refused(ValueError, "^rank 1: ", lambda strategy=strategy: stream(model, bad, strategy=strategy))
        out = folder / f"{strategy}-{count}"
        refused(
            ValueError,
            "^rank 1: ",
            lambda strategy=strategy, out=out: compute_covariances(model, bad, out, strategy=strategy, progress=False),
        )
        Job().exchange(None)
        assert list(folder.glob(f"{out.name}*")) == []
    bad = [*batches[:1], "text"]
    refused(TypeError, "^rank 1: batch 2 is str", lambda: compute(model, bad))
    assert_as_good(compute(model, batches), model, batches)  # nobody is left behind


@check(2)
def an_error_in_solving_is_raised_by_all(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count)

    def stop(stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage == "null spaces" and rank == 1:
            raise OSError("the disk is full")

    for strategy, kept in itertools.product(STRATEGIES, (None, folder / "kept")):
        options = {"strategy": strategy, "checkpoint": kept and kept / strategy, "progress": stop}
        refused(OSError, "^rank 1: the disk is full", lambda options=options: compute(model, batches, **options))
        if kept:
            assert_as_good(compute(model, batches, **{**options, "progress": False}), model, batches)


@check(2)
def what_all_find_out_by_themselves_is_said_as_by_one(rank: int, count: int, folder: Path) -> None:
    model = tiny("llama")
    masked = [{"input_ids": torch.ones(1, 9, dtype=torch.long), "attention_mask": torch.zeros(1, 9, dtype=torch.long)}]
    for strategy in STRATEGIES:
        for loader in ([], iter([])):
            refused(
                ValueError,
                "^the loader is empty",
                lambda loader=loader, strategy=strategy: compute(model, loader, strategy=strategy),
            )
        refused(ValueError, "^no tokens at .*masked", lambda strategy=strategy: compute(model, masked, strategy=strategy))
    refused(ValueError, "^rank 48 does not leave", lambda: compute(model, masked, rank=48))
    refused(ValueError, "^target 'nothing' matches", lambda: compute(model, masked, targets=["nothing"]))


@check(2)
def processes_that_do_not_fit_together_are_refused(rank: int, count: int, folder: Path) -> None:
    batches = random_batches(count)
    refused(
        ValueError,
        "^weights is not the same on all ranks: .* on rank 0, .* on rank 1",
        lambda: compute(tiny("llama", rank), batches),
    )
    model = tiny("llama")
    refused(ValueError, "^targets is not the same", lambda: compute(model, batches, targets=["q_proj" if rank else "k_proj"]))
    refused(ValueError, "^precision is not the same", lambda: stream(model, batches, precision="fp64" if rank else "auto"))
    refused(ValueError, "^strategy is not the same", lambda: compute(model, batches, strategy=STRATEGIES[rank > 0]))


class Shifting(nn.Module):
    """Two layers that share their input, or do not; a third one that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x if x[0, 0] >= 0 else x.clone()
        y = self.a(x) + self.b(own)
        return self.c(y) if x[0, 1] > 0 else y


def rows(*signs: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(30, 8, generator=generator) for _ in signs]
    for batch, (shared, reaches) in zip(batches, signs, strict=True):
        batch[0, 0], batch[0, 1] = shared, reaches
    return batches


@check(2)
def an_input_that_is_shared_in_one_process_alone_is_named(rank: int, count: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = Shifting()
    refused(
        ValueError,
        "^'a' shares its input with 'b' on rank 0, and with no other layer on rank 1",
        lambda: stream(model, rows((1, 1), (-1, 1), (1, 1))),
    )


@check(2, 3)
def a_layer_that_only_one_process_reaches_is_summed(rank: int, count: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = Shifting()
    for batches in (rows((1, 1), *[(1, -1)] * count), rows(*[(1, -1)] * (count - 1), (1, 1))):
        for precision in PRECISIONS:
            found = stream(model, batches, precision=precision)
            expected = stream(model, batches, precision=precision, job=Job.alone())
            assert set(itertools.chain(*Job().exchange(list(found)))) == set(expected)
            for site, total in found.items():
                assert_same_sums(total, expected[site])
    refused(ValueError, "^target 'c' was never called", lambda: stream(model, rows(*[(1, -1)] * count), targets=["a", "b", "c"]))


@check(2, 3)
def one_may_work_for_itself_and_some_together(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(3)
    if rank == 1:
        found = compute(model, batches, job=Job.alone())
        assert found[UP].tokens == 3 * 4 * 64
    pair = dist.new_group([count - 1, 0])
    if rank in (0, count - 1):
        job = Job(pair)
        assert (job.count, job.number) == (2, 0 if rank == 0 else 1)
        assert_as_good(compute(model, batches, precision="fp64", job=job), model, batches, precision="fp64")
        assert_as_good(compute(model, batches, precision="qr", job=job), model, batches, precision="qr")
    else:
        with pytest.raises(ValueError, match="not in the group"):
            Job(pair)


# ---- the store


@check(2)
def each_writes_its_own_sites(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count + 1, padding="right")
    expected = compute_covariances(model, batches, folder / f"one-{rank}", progress=False, job=Job.alone())
    written: list[str] = []
    before = records.write_tensors
    records.write_tensors = lambda path, *args, **kwargs: written.append(path.name) or before(path, *args, **kwargs)
    try:
        for strategy in STRATEGIES:
            written.clear()
            found = compute_covariances(model, batches, folder / strategy, strategy=strategy, progress=False)
            assert 0 < len(written) < len(expected.sites)
            everyones = sorted(itertools.chain(*Job().exchange(list(written))))
            assert everyones == sorted(p.name for p in (folder / strategy).glob("*.safetensors"))
            assert found.sites == Covariances.load(folder / strategy).sites == expected.sites
            for site in expected.sites:
                assert relative_error(found[site.name].matrix(), expected[site.name].matrix()) <= ROUNDING
                assert found[site.name].tokens == expected[site.name].tokens
                found.check(site.name, model.get_submodule(site.name))
    finally:
        records.write_tensors = before


@check(2)
def a_shard_is_split_between_them(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(5, padding="right")
    parts = [compute_covariances(model, batches, folder / str(i), shard=(i, 2), progress=False) for i in (1, 2)]
    assert [part.shards[0].numbers for part in parts] == [(1,), (2,)]
    found, expected = Covariances.merge(parts), stream(model, batches, precision="fp64", job=Job.alone())
    for site, total in expected.items():
        assert found[site.name].tokens == total.tokens
        assert relative_error(found[site.name].matrix(), total.matrix()) <= ROUNDING


@check(2, 3)
def a_checkpoint_is_filled_together_and_read_by_all(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(10)
    for strategy, tolerance in (("resident", 1e-14), ("layerwise", 1e-4)):  # with and without a second pass
        kept = folder / f"{strategy} {tolerance}"
        options = {"strategy": strategy, "checkpoint": kept, "tolerance": tolerance}
        found = compute(model, batches, **options)
        assert len(list(kept.glob("*.safetensors"))) == len(found.sites) == 12
        assert_as_good(found, model, batches, strategy=strategy, tolerance=tolerance)
        handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
        again, one = compute(model, batches, **options), alone(model, batches, **options)  # another number of processes
        handle.remove()
        for site in found.sites:
            assert found[site.name].facts() == again[site.name].facts() == one[site.name].facts()
            assert torch.equal(found[site.name].basis, again[site.name].basis)
            assert torch.equal(found[site.name].basis, one[site.name].basis)
        assert found[UP] is found["model.layers.1.mlp.gate_proj"]
        Job().exchange(None)
        if rank == 0:
            path = kept / "00003.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        Job().exchange(None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            repaired = compute(model, batches, **options)
        said = [str(each.message) for each in caught if "damaged: its site is computed again" in str(each.message)]
        assert len(said) == (rank == 0), said
        assert_as_good(repaired, model, batches, strategy=strategy, tolerance=tolerance)
        assert len(list(kept.glob("*.safetensors"))) == 12
        Job().exchange(None)


@check(2)
def nothing_is_asked_twice(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count)
    settings = {"model", "data", "device", "versions"}
    for strategy in STRATEGIES:
        options = {"strategy": strategy, "progress": False}
        with counting_questions(model) as spaces:
            compute_null_spaces(model, batches, rank=8, checkpoint=folder / f"{strategy} a", **options)
        with counting_questions(model) as covariances:
            compute_covariances(model, batches, folder / f"{strategy} out", checkpoint=folder / f"{strategy} b", **options)
        for asked, own in ((spaces, {"rank", "tolerance", "spectrum", "avoid"}), (covariances, {"keeps", "dtype"})):
            assert set(asked.values()) == {1}, asked
            facts = {"strategy", "precision", "targets", "weights"} | settings | own
            assert {key for key in asked if isinstance(key, str)} == facts


@check(2, 3)
def another_number_of_processes_goes_on(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(count)

    def cut(stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage in ("null spaces", "covariances") and done > 4:
            raise OSError("cut off")

    for strategy in STRATEGIES:
        options = {"strategy": strategy, "checkpoint": folder / strategy}
        if rank == 0:
            with pytest.raises(OSError, match="cut off"):
                alone(model, batches, progress=cut, **options)
        Job().exchange(None)
        assert len(list((folder / strategy).glob("*.safetensors"))) < 12
        assert_as_good(compute(model, batches, **options), model, batches, strategy=strategy)
        options, out = {"strategy": strategy, "checkpoint": folder / f"{strategy} kept"}, folder / f"{strategy} sums"

        def accumulate(progress: Any, out: Path = out, options: dict[str, Any] = options) -> Covariances:
            return compute_covariances(model, batches, out, progress=progress, **options)

        refused(OSError, "cut off", functools.partial(accumulate, cut))
        found = accumulate(False)
        expected = stream(model, batches, precision="fp64", job=Job.alone())
        assert set(found.sites) == set(expected)
        for site, total in expected.items():
            assert relative_error(found[site.name].matrix(), total.matrix()) <= ROUNDING


@check(2)
def all_or_one_may_save_and_one_writes(rank: int, count: int, folder: Path) -> None:
    model, batches = tiny("llama"), random_batches(4)
    found, sums = compute(model, batches), Covariances(stream(model, batches).items())
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    moments = Covariances(stream(model, batches, job=Job.alone()).items())
    adapted = inject_adapters(tiny("llama"), config, found)
    saves: dict[str, Callable[[Path, bool], Any]] = {
        "spaces": lambda out, overwrite: found.save(out, overwrite=overwrite),
        "covariances": lambda out, overwrite: sums.save(out, overwrite=overwrite),
        "save_init": lambda out, overwrite: save_init(out, adapted, found, overwrite=overwrite),
        "write_init": lambda out, overwrite: write_init(out, model, config, found, overwrite=overwrite, progress=False),
        "export": lambda out, overwrite: export_lora(
            folder / "save_init" / "adapter", folder / "save_init", out, base="theirs", overwrite=overwrite
        ),
        "filter": lambda out, overwrite: filter_adapter(
            folder / "export", moments, moments, out, strength=1.0, overwrite=overwrite, progress=False
        ),
        "checkpoint": lambda out, overwrite: filter_checkpoint(
            folder / "model",
            folder / "model",
            moments,
            moments,
            out,
            strength=1.0,
            overwrite=overwrite,
            progress=False,
        ),
    }
    if rank == 0:
        model.save_pretrained(folder / "model")

    for name, save in saves.items():
        for out in (folder / name, folder / "new" / name):
            for overwrite in (False, True):
                save(out, overwrite)
                assert records.kind_of(out) is not None  # it is there for everybody who has saved it
                # transformers saves a model's weights in rank 0 alone, and another one may have written.
                assert "init" not in name or (out / "base" / "model.safetensors").stat().st_size > 100_000
                Job().exchange(None)  # before one of them overwrites it: while it is replaced it has no name
            # Another one's is refused, on all ranks and by the rank that has found it.
            for other in (folder / "all", folder / "new" / "all"):
                other.mkdir(parents=True, exist_ok=True)
                (other / "thesis.txt").touch()
                refused(FileExistsError, r"^rank [01]: .*/all ", lambda other=other, save=save: save(other, True))
    for only in range(count):  # what one process does alone waits for nobody
        if rank == only:
            found.save(folder / f"by {only}")
            save_init(folder / f"init by {only}", adapted, found)
            write_init(folder / f"written by {only}", model, config, found, progress=False)
            known = load_file(folder / "save_init" / "base" / "model.safetensors").keys()
            for init in (folder / f"init by {only}", folder / f"written by {only}"):
                assert load_file(init / "base" / "model.safetensors").keys() == known
            refused(FileExistsError, f"rank {only}: .*by {only} exists", lambda only=only: found.save(folder / f"by {only}"))
    Job().exchange(None)
    assert not [path for path in folder.rglob("*") if path.name.endswith((".part", locks.SUFFIX))]
    Job().exchange(None)
    shared_writes.HANDOVER = 0.5
    if rank == 0:
        with locks.locked(folder / "held"):
            Job().exchange(None)
            Job().exchange(None)
    else:
        Job().exchange(None)
        # The lock says that a process of this very group holds it, which has no save under way.
        refused(FileExistsError, "held is being written by another run", lambda: found.save(folder / "held"))
        Job().exchange(None)


@check(2)
def a_save_is_finished_by_another_process_if_the_first_dies(rank: int, count: int, folder: Path) -> None:
    found, lost = compute(tiny("llama"), random_batches(2)), folder / "lost"
    shared = default_store()
    assert shared is not None
    if rank == 0:  # what a process that is killed while it writes leaves: its word that it writes, and a part
        shared.set(f"nullspace/writing/{lost}", "yes")
        (folder / "lost.0123abcd.part" / "new").mkdir(parents=True)
        (folder / "lost.0123abcd.part" / store.PART).write_text("{}")
    Job().exchange(None)
    found.save(lost)
    assert NullSpaces.load(lost).sites == found.sites
    Job().exchange(None)
    assert os.listdir(folder) == ["lost"]


@check(2)
def prepare_sums_over_all_and_starts_all_alike(rank: int, count: int, folder: Path) -> None:
    data: dict[str, Any] = {"task": random_batches(3, seed=3, padding="right"), "keep": random_batches(4, seed=4)}
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    message = "rank 1.*keep must be data.*not int" if rank == 0 else "keep must be data.*not int"
    refused(TypeError, message, lambda: prepare(tiny("llama"), None, config, **{**data, **({"keep": 5} if rank else {})}))
    kinds = {"covariances": "task", "preserve": "keep"}
    moments = {name: Covariances(stream(tiny("llama"), data[of], job=Job.alone()).items()) for name, of in kinds.items()}
    expected = lora_layers(inject_adapters(tiny("llama"), config, method="contrast", **moments), "default")
    wrapped = get_peft_model(tiny("llama"), config)
    initialize_lora_nullspace_weights(wrapped, **data, progress=False)
    for model in (prepare(tiny("llama"), None, config, **data, progress=False), wrapped):
        for name, layer in lora_layers(model, "default").items():
            a = layer.lora_A["default"].weight.detach()
            assert all(torch.equal(a, theirs) for theirs in Job().exchange(a)), name
            assert relative_error(a, expected[name].lora_A["default"].weight) <= 1e-4, name


@check(2)  # the last one: it leaves the group
def the_command_line_speaks_with_one_voice(rank: int, count: int, folder: Path) -> None:
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("localhost", 0))
        ports = iter(Job().exchange([each.getsockname()[1] for each in sockets])[0])  # one for each time that they meet
    dist.destroy_process_group()
    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
    model, data = folder / f"model-{rank}", folder / f"data-{rank}.txt"
    write_checkpoint(model)
    data.write_text("All that is gold does not glitter. " * 30)

    def run(*arguments: Any) -> Any:
        os.environ["MASTER_PORT"] = str(next(ports))
        small = ["--data", data, "--samples", "5", "--length", "64", "--batch-size", "1", "--targets", "q_proj"]
        result = CliRunner().invoke(app, list(map(str, [arguments[0], model, *small, *arguments[1:]])))
        assert rank == 0 or result.output == ""
        return result

    for command in ("compute", "covariances"):
        options = ["--rank", "4"] if command == "compute" else []
        done = run(command, "--out", folder / command, "--json", *options)
        assert done.exit_code == 0
        assert rank != 0 or {site["tokens"] for site in json.loads(done.stdout)["sites"]} == {5 * 64}
    if rank == 1:
        data.write_text("Not all those who wander are lost. " * 30)
    done = run("compute", "--out", folder / "no", "--rank", "4")
    assert done.exit_code == 2
    assert rank != 0 or " ".join(done.output.split()).count("data is not the same on all ranks") == 1
    assert CliRunner().invoke(app, ["inspect", str(folder / "compute")]).output == "" or rank == 0
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(("count", "name"), check.all)
def test_together(tmp_path_factory: pytest.TempPathFactory, name: str, count: int) -> None:
    check.report(count, name, tmp_path_factory)


# ---- without processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_dealing_is_by_the_cube_of_the_width(count: int) -> None:
    widths = [4096] * 3 + [14336] + [4096, 11008, 1024, 8192]
    owners = deal(widths, count)
    loads = [sum(w**3 for w, owner in zip(widths, owners, strict=True) if owner == k) for k in range(count)]
    best = max(max(widths) ** 3, sum(w**3 for w in widths) / count)
    assert sum(loads) == sum(w**3 for w in widths)
    assert max(loads) <= 4 / 3 * best
    assert deal([], count) == []
    assert deal(widths, count) == owners


def test_whoever_has_been_dealt_more_gets_less() -> None:
    assert deal([10, 10, 10], 3) == [0, 1, 2]
    assert deal([10, 10], 3, [1e3, 0, 0]) == [1, 2]
    assert deal([10], 2, [1.0, 0.0]) == [1]
    assert deal([48, 48, 48, 112], 2) == [1, 1, 1, 0]


def test_without_a_group_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("reduce", "send", "recv", "broadcast", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("something was sent"))
    assert (Job().count, Job().number, Job().first) == (1, 0, True)
    assert_as_good(compute(tiny("llama"), random_batches(2), checkpoint=tmp_path / "kept"), tiny("llama"), random_batches(2))


def test_a_group_of_one_sends_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        test_without_a_group_nothing_is_sent(monkeypatch, tmp_path)
    finally:
        dist.destroy_process_group()


# ---- the command line


def torchrun(*arguments: Any, count: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "nullspace"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return run([*command, *map(str, arguments)], env=environment)


def products(adapter: Path) -> dict[str, torch.Tensor]:
    """Layer → B A."""
    factors = load_file(adapter / "adapter_model.safetensors")
    return {name: factors[name.replace("lora_A", "lora_B")] @ a for name, a in factors.items() if "lora_A" in name}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of every byte: no basis is a matter of chance."""
    data, chance = tmp_path_factory.mktemp("letters") / "data.txt", random.Random(0)
    data.write_text("".join(chr(chance.randrange(32, 0x3000)) for _ in range(1000)))
    return data


# Float32 chains are of other tokens in each process, and turn the basis by their rounding.
SMALL = ["--samples", "15", "--length", "128", "--rank", "8", "--batch-size", "2", "--json", "--precision", "fp64"]


def assert_as_of_one_process(told: str, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """What several processes have said of `tmp_path / "out"`, and what is in it."""
    one = CliRunner().invoke(app, ["init", str(checkpoint), "--out", str(tmp_path / "one"), "--data", str(data), *SMALL])
    assert one.exit_code == 0, one.output
    assert [site["tokens"] for site in json.loads(told)["sites"]] == [site["tokens"] for site in json.loads(one.stdout)["sites"]]
    ours, theirs = products(tmp_path / "out" / "adapter"), products(tmp_path / "one" / "adapter")
    assert ours.keys() == theirs.keys()
    assert max(relative_error(ours[name], product) for name, product in theirs.items()) <= 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]  # no checkpoint, no parts
    assert NullSpaces.load(tmp_path / "out" / "spaces").sites == NullSpaces.load(tmp_path / "one" / "spaces").sites


# Two machines, with two processes and with one: network namespaces, each of which has nothing but its end of a cable and a file
# system that both see.
CABLE = """
set -e
mount -t tmpfs none /run
mkdir /run/netns
ip netns add a
ip netns add b
ip link add left netns a type veth peer name right netns b
ip -n a addr add 10.0.0.1/24 dev left
ip -n b addr add 10.0.0.2/24 dev right
for end in "a left" "b right"; do set -- $end; ip -n $1 link set $2 up; ip -n $1 link set lo up; done
"""
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-c"]


def has_namespaces() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([*NAMESPACES, CABLE], capture_output=True, check=False).returncode == 0
    return False


@pytest.mark.skipif(has_namespaces(), reason="two machines, below, do more")
def test_torchrun_makes_the_adapter_of_one_process(tiny_checkpoint: Path, letters: Path, tmp_path: Path) -> None:
    done = torchrun("init", tiny_checkpoint, "--out", tmp_path / "out", "--data", letters, *SMALL)
    assert done.returncode == 0, done.stderr
    assert_as_of_one_process(done.stdout, tiny_checkpoint, letters, tmp_path)


@pytest.mark.skipif(not has_namespaces(), reason="needs network namespaces")
def test_two_machines_make_the_adapter_of_one_process(tiny_checkpoint: Path, letters: Path, tmp_path: Path) -> None:
    rendezvous = "--nnodes 2 --master-addr 10.0.0.1 --master-port 29500"
    init = f"-m nullspace init {tiny_checkpoint} --out {tmp_path / 'out'} --data {letters} {' '.join(SMALL)}"
    node = f"{sys.executable} -m torch.distributed.run {rendezvous} --node-rank"
    script = f"""{CABLE}
export OMP_NUM_THREADS=1
GLOO_SOCKET_IFNAME=right ip netns exec b {node} 1 --nproc-per-node 1 {init} &
GLOO_SOCKET_IFNAME=left ip netns exec a {node} 0 --nproc-per-node 2 {init}
wait $!
"""
    done = run([*NAMESPACES, script])
    assert done.returncode == 0, done.stderr
    assert_as_of_one_process(done.stdout, tiny_checkpoint, letters, tmp_path)
