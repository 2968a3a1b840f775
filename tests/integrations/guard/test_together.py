"""What holds an adapter, the gauge and the callback in two processes: DDP, FSDP2, ZeRO 1 to 3, and a Trainer under DDP."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from guarded import CONFIG, LEAK, adapted, outside, rows, trained, trainer_of, word_tokenizer
from peft import LoraConfig, PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from models import random_batches, tiny
from nullspace import Covariances, stream_covariances
from nullspace.artifacts.identity import weights_of
from nullspace.distributed import Job
from nullspace.integrations.peft import (
    ForgettingCallback,
    clora,
    confine,
    decay_to_start,
    drift_of,
    inject_adapters,
    lora_layers,
    oplora,
    penalty,
)
from nullspace.model.blocks import find_blocks
from nullspace.model.sharded_tensors import whole
from nullspace.model.sites import find_targets
from processes import Checks

pytestmark = pytest.mark.processes
check = Checks(__file__)
FACTORS, SPARED = ("lora_A", "lora_B"), 5


@functools.cache
def covariances_alone() -> Covariances:
    """All of them on each process, which would otherwise divide the sites."""
    model = tiny("llama")
    pairs = stream_covariances(model, random_batches(), precision="fp64", progress=False, job=Job.alone())
    return Covariances(pairs, weights_of(find_targets(model)))


def whole_rows(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: whole(layer.lora_A["default"].weight).detach().clone() for name, layer in lora_layers(model, "default").items()}


def batch_of(rank: int, number: int) -> dict[str, torch.Tensor]:
    batch = random_batches(1, 2, 24, seed=10 * number + rank)[0]
    return {**batch, "labels": batch["input_ids"]}


def sharded(model: PeftModel) -> PeftModel:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in find_blocks(model.get_base_model()).values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_one_piece(steps: int) -> tuple[PeftModel, float]:
    """The same training in one process, on the batches of both ranks."""
    model = adapted(r=5)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    hold = penalty(model, covariances_alone())
    with confine(model, covariances_alone(), LEAK):
        decay_to_start(model, 0.1, optimizer)
        for number in range(steps):
            for rank in range(2):
                (model(**batch_of(rank, number)).loss / 2).backward()
            hold().backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, float(hold().detach())


@check(2)
def as_in_one_process(rank: int, count: int, folder: Path) -> None:
    """DDP and FSDP2: steps, penalty and decay included, as in one process; rank 5 is not divided evenly."""
    alone, value = in_one_piece(3)
    covariances = covariances_alone()
    for kind in ("ddp", "fsdp2"):
        model = adapted(r=5)
        runs: Any = DistributedDataParallel(model) if kind == "ddp" else sharded(model)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        confinement = confine(runs, covariances, LEAK, optimizer=optimizer)
        decay_to_start(runs, 0.1, optimizer)
        start = whole_rows(model)
        hold = penalty(runs, covariances)
        for number in range(3):
            (runs(**batch_of(rank, number)).loss + hold()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert outside(whole_rows(model), start, covariances_alone()) <= 1e-6, kind
        for (name, ours), theirs in zip(whole_rows(model).items(), rows(alone).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=f"{kind} {name}")
        assert abs(float(hold().detach()) / value - 1) <= 1e-3, kind
        assert abs(drift_of(runs, covariances).median / drift_of(alone, covariances).median - 1) <= 1e-3
        assert confinement.allowed.keys() == start.keys()


def spared_in_one_piece(steps: int) -> PeftModel:
    model = adapted(r=5)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    oplora(model, SPARED, covariances_alone(), optimizer=optimizer)
    hold = clora(model, SPARED, covariances_alone())
    for number in range(steps):
        for rank in range(2):
            (model(**batch_of(rank, number)).loss / 2).backward()
        hold().backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


@check(2)
def spared_as_in_one_process(rank: int, count: int, folder: Path) -> None:
    """The same of `oplora`, whose gradients are clipped after they were projected, and of `clora`."""
    alone, covariances = whole_factors(spared_in_one_piece(2)), covariances_alone()
    for kind in ("ddp", "fsdp2"):
        model = adapted(r=5)
        runs: Any = DistributedDataParallel(model) if kind == "ddp" else sharded(model)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        oplora(runs, SPARED, covariances, optimizer=optimizer)
        hold = clora(runs, SPARED, covariances)
        for number in range(2):
            (runs(**batch_of(rank, number)).loss + hold()).backward()
            torch.nn.utils.clip_grad_norm_(trained(model), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        for (name, ours), theirs in zip(whole_factors(model).items(), alone.values(), strict=True):
            for our, their in zip(ours, theirs, strict=True):
                assert (our - their).norm() <= 1e-3 * their.norm(), (kind, name)
        assert spared_leak(model, {name: b @ a for name, (a, b) in whole_factors(model).items()}) <= 1e-6, kind


def whole_factors(model: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    layers = lora_layers(model, "default").items()
    return {name: tuple(whole(getattr(layer, f)["default"].weight).detach().clone() for f in FACTORS) for name, layer in layers}


def spared_leak(model: PeftModel, changes: dict[str, torch.Tensor]) -> float:
    """The largest part of a change along the leading inputs and outputs, relative to it."""
    worst = 0.0
    for name, layer in lora_layers(model, "default").items():
        change, c = changes[name], covariances_alone()[name].matrix()
        w = whole(layer.get_base_layer().weight).detach().double()
        u, v = (torch.linalg.eigh(moment)[1][:, -SPARED:] for moment in (w @ c @ w.mT, c))
        parts = (u.mT @ change.double(), change.double() @ v)
        worst = max(worst, *(float(part.norm() / change.norm()) for part in parts))
    return worst


@check(2)
def zero_with_its_float32_copy(rank: int, count: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), DS_ACCELERATOR="cpu")
    import deepspeed

    # Not `from deepspeed.comm import torch`, which may be PyTorch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # compiles for half a minute what gloo does not need
    for stage, options in ((1, {}), (2, {"bf16": {"enabled": True}}), (3, {})):
        model = adapted(r=5)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
            "gradient_clipping": 1.0,
            **options,
        }
        engine = deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]
        confinement = confine(engine.module, covariances_alone(), LEAK)
        with pytest.raises(ValueError, match="takes no hooks"):
            confinement.attach(engine.optimizer)
        start = masters(model)
        for number in range(3):
            engine.backward(engine(**batch_of(rank, number)).loss)
            engine.step()
            confinement.project()
        assert outside(masters(model), start, covariances_alone()) <= 1e-5, stage
        rounding = 1e-2 if "bf16" in options else 1e-6
        for (name, ours), theirs in zip(whole_rows(model).items(), masters(model).values(), strict=True):
            assert (ours - theirs).norm() <= rounding * theirs.norm(), (stage, name)
        assert drift_of(engine.module, covariances_alone()).median > 0
        spared: Any = oplora(engine.module, SPARED, covariances_alone())
        spared.on_train_begin(None, None, None)  # as in a Trainer: gradients are projected too
        first = {factor: masters(model, factor) for factor in FACTORS}
        engine.backward(engine(**batch_of(rank, 3)).loss)
        engine.step()
        spared.project()
        changed = {f: {name: now - first[f][name] for name, now in masters(model, f).items()} for f in FACTORS}
        both = {name: changed["lora_B"][name].sum(1, keepdim=True) @ changed["lora_A"][name].sum(0, keepdim=True) for name in start}
        assert spared_leak(model, both) <= 1e-5, stage


def masters(model: PeftModel, factor: str = "lora_A") -> dict[str, torch.Tensor]:
    import deepspeed

    layers = {name: getattr(layer, factor)["default"].weight for name, layer in lora_layers(model, "default").items()}
    return {name: deepspeed.utils.safe_get_full_fp32_param(weight).clone() for name, weight in layers.items()}


@check(2)
def a_trainer_in_two_processes(rank: int, count: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    covariances = covariances_alone()
    model = inject_adapters(tiny("llama"), LoraConfig(**CONFIG), method="corda-kpm", covariances=covariances)
    start = rows(model)
    callback = ForgettingCallback(covariances, texts=["w3 w9 w4"], tokenizer=word_tokenizer(), drift_budget=1e-12, on_budget="slow")
    trainer = trainer_of(model, folder, callbacks=[confine(model, covariances, LEAK)], max_steps=2, save_steps=1, logging_steps=2)
    callback.attach(trainer).on_log(trainer.args, trainer.state, trainer.control, logs={"eval_loss": 1.0})  # of no training step
    trainer.train()
    assert outside(rows(model), start, covariances_alone()) <= 1e-6
    assert [reading.step for reading in callback.readings] == [1, 2]
    dist.barrier()
    assert "## Drift from the base model" in (folder / "checkpoint-2" / "README.md").read_text()


@pytest.mark.parametrize(("count", "name"), check.all)
def test_together(tmp_path_factory: pytest.TempPathFactory, name: str, count: int) -> None:
    if "zero" in name:
        pytest.importorskip("deepspeed")
    check.report(count, name, tmp_path_factory)
