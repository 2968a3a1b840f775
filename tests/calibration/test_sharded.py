"""Models whose weights are spread over several ranks: what is found of them is what is found of the same model in one piece."""

from __future__ import annotations

import copy
import datetime
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from mixtures import mixture
from peft import LoraConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed import DistributedConfig
from transformers.integrations import HfDeepSpeedConfig

from models import random_batches, tiny
from nullspace import Covariance, Covariances, Site, compute_covariances
from nullspace.artifacts import identity, records
from nullspace.artifacts.identity import weights_of
from nullspace.distributed import Job
from nullspace.distributed.errors import was_shared
from nullspace.integrations.peft import (
    export_lora,
    freeze_a,
    inject,
    inject_adapters,
    lora_layers,
    read_factors,
    row_spaces,
    save_init,
    write_init,
)
from nullspace.methods import METHODS
from nullspace.model.blocks import find_blocks
from nullspace.model.linear import weight_shape
from nullspace.model.sharded import layer_input, reshard_model
from nullspace.model.sharded_tensors import is_sharded
from nullspace.model.sharded_tensors import whole as whole_of
from nullspace.model.sites import find_targets
from patience import slowness
from processes import Checks
from reference import relative_error
from together import alone, assert_as_good, compute, counting_questions, refused, stream

pytestmark = pytest.mark.processes

STRATEGIES = ("layerwise", "resident")
# Sums of the same numbers in another order.
ROUNDING = 1e-12
check = Checks(__file__)


@functools.cache
def everybody() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def as_torchrun_does() -> None:
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, DS_ACCELERATOR="cpu")


def fsdp(family: str = "llama", *, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny model as `fully_shard` is used: block by block, then the rest."""
    model, options = tiny(family, seed), {"mesh": everybody(), **options}
    for block in find_blocks(model).values():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def batches_of(kind: str, count: int) -> list[dict[str, torch.Tensor]]:
    return {
        "uneven": lambda: random_batches(count + 1, 2, 40),
        "empty": lambda: random_batches(1, 4, 40),
        "padded": lambda: random_batches(2 * count, 2, 40, padding="right"),
    }[kind]()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**random_batches(1, 2, 12, seed=7)[0]).logits


def everyones(model: nn.Module, batches: Any, **options: Any) -> dict[Site, Covariance]:
    """The sums of all sites, whoever owns them."""
    return dict(itertools.chain(*Job().exchange(list(stream(model, batches, precision="fp64", **options).items()))))


def projectors_differ(found: Any, expected: Any) -> float:
    return max(
        float((found[s.name].basis @ found[s.name].basis.T - expected[s.name].basis @ expected[s.name].basis.T).abs().max())
        for s in expected.sites
    )


# ---- FSDP2


@check(2)
def the_spaces_are_those_of_the_model_in_one_piece(rank: int, count: int, folder: Path) -> None:
    whole, model = tiny("llama"), fsdp()
    for strategy, kind in itertools.product(STRATEGIES, ("uneven", "empty", "padded")):
        batches = batches_of(kind, count)
        found = compute(model, batches, strategy=strategy, precision="fp64")
        assert_as_good(found, whole, batches, precision="fp64")
    batches = random_batches(6)  # more tokens than dimensions: the bases are no matter of chance
    for strategy in STRATEGIES:
        found, expected = compute(model, batches, strategy=strategy, precision="fp64"), alone(whole, batches, precision="fp64")
        assert projectors_differ(found, expected) <= 1e-9
        for name in found:  # each knows the other's model, and no other one
            found.check(name, whole.get_submodule(name))
            expected.check(name, model.get_submodule(name))
        name = "model.layers.1.mlp.up_proj"
        with pytest.raises(ValueError, match="of another model"):
            expected.check(name, fsdp(seed=1).get_submodule(name))


@check(2)
def other_models_and_other_ways_to_shard_them(rank: int, count: int, folder: Path) -> None:
    batches = random_batches(count + 1, padding="right")
    hybrid = init_device_mesh("cpu", (count, 1), mesh_dim_names=("replicate", "shard"))
    ways = {
        "qwen2": {},  # its output head is its embeddings
        "gpt2": {"mesh": hybrid},  # weights lie the other way; another block layout
        "llama": {"shard_placement_fn": lambda p: Shard(p.ndim - 1)},
        "gemma3": {"reshard_after_forward": False},
    }
    for family, options in ways.items():
        model, whole = fsdp(family, **options), tiny(family)
        for strategy in STRATEGIES:
            assert_as_good(compute(model, batches, strategy=strategy, precision="fp64"), whole, batches, precision="fp64")
        for name, (shape, mark) in weights_of(find_targets(whole)).items():
            assert weight_shape(model.get_submodule(name)) == shape
            assert torch.equal(weights_of({name: model.get_submodule(name)})[name][1], mark), name
    whole, one, many = (tiny("llama") for _ in range(3))
    fully_shard(one, mesh=everybody())  # all in one group
    for part in (*many.model.layers, many.model.embed_tokens):  # as accelerate does it
        fully_shard(part, mesh=everybody())
    fully_shard([many.model.norm, many.lm_head], mesh=everybody(), reshard_after_forward=False)
    fully_shard(many, mesh=everybody())
    for model, strategy in itertools.product((one, many), STRATEGIES):
        assert_as_good(compute(model, batches, strategy=strategy, precision="fp64"), whole, batches, precision="fp64")


@check(2)
def what_is_ahead_of_the_blocks_and_behind_them_is_summed_too(rank: int, count: int, folder: Path) -> None:
    def make() -> nn.Module:
        config = tiny("opt").config
        config.word_embed_proj_dim = 32
        torch.manual_seed(0)
        return transformers.OPTForCausalLM(config).eval()

    whole, model = make(), make()
    for block in find_blocks(model).values():
        fully_shard(block, mesh=everybody())
    fully_shard(model, mesh=everybody())
    for batches in (random_batches(count, padding="right"), random_batches(1)):
        totals = everyones(model, batches, strategy="layerwise")
        expected = stream(whole, batches, precision="fp64", job=Job.alone())
        assert set(totals) == set(expected)
        for site, total in expected.items():
            assert relative_error(totals[site].matrix(), total.matrix()) <= ROUNDING


@check(2)
def the_model_goes_on_as_it_was(rank: int, count: int, folder: Path) -> None:
    ids = random_batches(1, 2, 12, seed=5)[0]["input_ids"]
    whole = tiny("llama")
    whole(input_ids=ids, labels=ids).loss.backward()
    for strategy, first in itertools.product(STRATEGIES, (False, True)):
        model = fsdp().train()
        if first:
            logits(model)  # what is then gathered stays so
        hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
        compute(model, random_batches(1), strategy=strategy)
        assert hooks == [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
        assert all(module.training for module in model.modules())
        reshard_model(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        model(input_ids=ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), whole.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@check(2)
def mixed_precision_is_that_of_the_model_either_way(rank: int, count: int, folder: Path) -> None:
    batches = random_batches(count)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    exact = everyones(fsdp(), batches)
    found, expected = (everyones(fsdp(mp_policy=policy), batches, strategy=each) for each in STRATEGIES)
    assert set(found) == set(expected)
    for site, total in expected.items():
        assert relative_error(found[site].matrix(), total.matrix()) <= ROUNDING
        assert relative_error(found[site].matrix(), exact[site].matrix()) > 1e-4


@check(2)
def an_error_of_one_is_raised_by_all(rank: int, count: int, folder: Path) -> None:
    model, batches = fsdp(), random_batches(count + 1, 2, 24)
    last = count - 1

    def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output.fill_(float("nan")) if rank == last else None

    handle = model.model.layers[1].input_layernorm.register_forward_hook(spoil)
    for strategy, loader in itertools.product(STRATEGIES, (batches, batches[:count])):
        refused(
            ValueError,
            rf"^rank {last}: model\.layers\.1\.self_attn\.q_proj, batch {last + 1}: NaN or Inf",
            lambda loader=loader, strategy=strategy: compute(model, loader, strategy=strategy),
        )
    handle.remove()
    for strategy in STRATEGIES:
        text = [*batches[:1], "text"]
        refused(TypeError, "^rank 1: batch 2 is str", lambda text=text, s=strategy: compute(model, text, strategy=s))
        flat = [batches[0], {**batches[1], "attention_mask": torch.eye(24).bool().expand(2, 1, 24, 24)}]
        refused(ValueError, "^rank 1: .* cannot tell padding", lambda flat=flat, s=strategy: compute(model, flat, strategy=s))
        odd = [batches[0], {**batches[1], "attention_mask": [1]}]
        refused(ValueError, "^rank 1: batch 2: .* is list", lambda odd=odd, s=strategy: compute(model, odd, strategy=s))

    def stop(stage: str, done: int, total: int | None, tokens: int) -> None:
        if stage == "null spaces" and rank == 1:
            raise OSError("the disk is full")

    for strategy in STRATEGIES:
        refused(OSError, "^rank 1: the disk is full", lambda s=strategy: compute(model, batches, strategy=s, progress=stop))
    for strategy in STRATEGIES:  # nobody is left behind
        assert_as_good(compute(model, batches, strategy=strategy, precision="fp64"), tiny("llama"), batches, precision="fp64")


@check(2)
def an_error_in_the_midst_of_a_forward_pass_is_raised_where_it_is(rank: int, count: int, folder: Path) -> None:
    group = dist.new_group(list(range(count)), timeout=datetime.timedelta(seconds=4 * slowness()))
    model = fsdp(mesh=DeviceMesh.from_group(group, "cpu"))
    batches = random_batches(count, 2, 24)
    if rank == 1:
        batches[1]["input_ids"] = batches[1]["input_ids"] + 10**6
    says = "^rank 1: .*in a forward pass that gathers" if rank == 1 else "^rank 0: |has lost"
    with pytest.raises(Exception, match=says) as error:
        compute(model, [batches[rank]], strategy="resident", job=Job(group, split=False))
    assert was_shared(error.value)
    dist.barrier()


@check(2)
def a_checkpoint_is_that_of_the_same_model(rank: int, count: int, folder: Path) -> None:
    whole, model, batches = tiny("llama"), fsdp(), random_batches(count)
    for strategy in STRATEGIES:
        options = {"strategy": strategy, "checkpoint": folder / strategy}
        found = compute(model, batches, **options)
        handle = whole.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
        again = compute(whole, batches, **options)
        handle.remove()
        for site in found.sites:
            assert torch.equal(found[site.name].basis, again[site.name].basis)
        out = folder / f"{strategy}-sums"
        sums = compute_covariances(model, batches, out, strategy=strategy, progress=False)
        expected = stream(whole, batches, precision="fp64", job=Job.alone())
        for site, total in expected.items():
            assert relative_error(sums[site.name].matrix(), total.matrix()) <= 1e-6
            sums.check(site.name, whole.get_submodule(site.name))


@check(2)
def nothing_is_asked_twice_and_each_weight_is_gathered_once_for_its_fingerprint(rank: int, count: int, folder: Path) -> None:
    fingerprint = identity.fingerprint
    for strategy in STRATEGIES:
        model, gathered = fsdp(), Counter[int]()

        def counted(weight: torch.Tensor, gathered: Counter[int] = gathered) -> torch.Tensor | None:
            gathered.update([id(weight)] if is_sharded(weight) else [])
            return fingerprint(weight)

        identity.fingerprint = counted
        try:
            with counting_questions(model) as asked:
                compute(model, random_batches(count), strategy=strategy, checkpoint=folder / strategy)
        finally:
            identity.fingerprint = fingerprint
        assert set(asked.values()) == {1}, asked
        assert {"strategy", "precision", "targets", "weights", "model", "data", "rank", "tolerance"} <= asked.keys()
        assert gathered == dict.fromkeys(map(id, model.parameters()), 1)


@check(2)
def what_cannot_work_is_refused_by_name(rank: int, count: int, folder: Path) -> None:
    model, batches = fsdp(), random_batches(1)
    for strategy in (*STRATEGIES, "auto"):
        refused(
            ValueError,
            f"^the weights are sharded over ranks 0, 1, and {1 - rank} is not in this job",
            lambda strategy=strategy: compute(model, batches, strategy=strategy, job=Job.alone()),
        )
    wrapped = FullyShardedDataParallel(tiny("llama"), use_orig_params=True, device_id=torch.device("cpu"))
    refused(ValueError, r"FullyShardedDataParallel \(FSDP1\).*fully_shard", lambda: compute(wrapped, batches))


# ---- ZeRO-3


def zero(family: str = "llama", *, engine: bool = True, persistent: int = 0) -> nn.Module:
    """A tiny model partitioned by DeepSpeed, with an engine's hooks or without."""
    if engine:
        return engine_of(tiny(family), persistent).module.eval()
    deepspeed, config = _deepspeed(persistent)
    model = tiny(family)
    deepspeed.init_distributed("gloo", dist_init_required=False)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    return model


def engine_of(model: nn.Module, persistent: int = 0, **options: Any) -> Any:
    deepspeed, config = _deepspeed(persistent)
    return deepspeed.initialize(model=model, config={**config, **options}, dist_init_required=False)[0]


def _deepspeed(persistent: int) -> tuple[Any, dict[str, Any]]:
    as_torchrun_does()
    import deepspeed

    # Not `from deepspeed.comm import torch`, which may be PyTorch itself.
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # compiles for half a minute what gloo does not need
    stage = {"stage": 3, "stage3_param_persistence_threshold": persistent}
    return deepspeed, {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}


@check(2)
def zero3_finds_the_spaces_of_the_model_in_one_piece(rank: int, count: int, folder: Path) -> None:
    whole = tiny("llama")
    for model in (zero(), zero(persistent=10**6)):
        before = logits(model)
        torch.testing.assert_close(before, logits(whole), rtol=0, atol=1e-6)
        for strategy, kind in itertools.product(STRATEGIES, ("uneven", "empty")):
            batches = batches_of(kind, count)
            found = compute(model, batches, strategy=strategy, precision="fp64")
            assert_as_good(found, whole, batches, precision="fp64")
            for name in found:
                found.check(name, whole.get_submodule(name))
        assert torch.equal(logits(model), before)
    model = zero(engine=False)
    assert all(p.numel() == 0 for p in model.parameters())
    found = compute(model, batches, precision="fp64")
    assert_as_good(found, whole, batches, precision="fp64")
    assert all(p.numel() == 0 for p in model.parameters())
    refused(ValueError, "without an engine", lambda: compute(model, batches, strategy="resident"))


@check(2)
def adapters_of_zero3(rank: int, count: int, folder: Path) -> None:
    adapters_are_those_of_the_model_in_one_piece(lambda: zero(engine=False), tiny("llama"), folder, runs=False)


@check(2)
def zero3_in_training(rank: int, count: int, folder: Path) -> None:
    spaces = alone(tiny("llama"), random_batches(6), targets=["q_proj", "down_proj"])
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    for frozen in (True, False):
        out = folder / f"init-{frozen}"
        adapted = inject_adapters(tiny("llama"), config, spaces, freeze_a=frozen)
        if rank == 0:
            save_init(out, adapted)
        adam = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}
        engine = engine_of(adapted, optimizer=adam)
        ids = random_batches(count, 1, 24)[rank]["input_ids"]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        a_live_adapter_is_read_whole(engine.module, out, folder / f"plain-{frozen}")
        refused(ValueError, "call write_init", lambda live=engine.module: save_init(folder / "no", live))
        if frozen:
            freeze_a(engine.module)
        else:
            refused(ValueError, "freeze_a before deepspeed.initialize", lambda live=engine.module: freeze_a(live))
    model = zero()
    names = list(model.state_dict())
    for method in ("lora-null", "b-zero"):
        refused(
            ValueError,
            "LlamaForCausalLM is in a DeepSpeed engine.* inject_adapters before deepspeed.initialize",
            lambda method=method: inject_adapters(model, config, spaces, method=method),
        )
    assert list(model.state_dict()) == names


def a_live_adapter_is_read_whole(live: Any, init: Path, out: Path) -> None:
    """By `row_spaces` and `export_lora`, of an adapter that is itself sharded."""
    layers = lora_layers(live, "default")
    assert all(is_sharded(factor["default"].weight) for each in layers.values() for factor in (each.lora_A, each.lora_B))
    rows = row_spaces(live)
    export_lora(live, init / "adapter", out, base="the-base")
    exported = read_factors(out)
    started = read_factors(init / "adapter")
    assert rows.keys() == exported.keys() == started.keys() == layers.keys()
    moved = 0.0
    for name, layer in layers.items():
        a, b = (whole_of(factor["default"].weight).detach() for factor in (layer.lora_A, layer.lora_B))
        assert torch.equal(rows[name], a)
        update = layer.scaling["default"] * b.double() @ a.double() - started[name].B @ started[name].A
        found = exported[name].B @ exported[name].A
        assert (found - update).norm() <= 1e-6 * started[name].B.norm() * started[name].A.norm()
        moved += float(update.norm())
    assert moved > 0


@check(2)
def zero3_as_transformers_loads_it(rank: int, count: int, folder: Path) -> None:
    zero(engine=False)  # sets DeepSpeed up
    enabled = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    what_transformers_loads_is_served(folder)
    del enabled


@check(2)
def fsdp2_as_transformers_loads_it(rank: int, count: int, folder: Path) -> None:
    if "fsdp_size" in inspect.signature(DistributedConfig).parameters:
        what_transformers_loads_is_served(folder, distributed_config=DistributedConfig(fsdp_size=count))


def what_transformers_loads_is_served(folder: Path, **options: Any) -> None:
    as_torchrun_does()
    whole, batches, first = tiny("llama"), random_batches(6), dist.get_rank() == 0
    if first:
        whole.save_pretrained(folder / "model")
    Job().exchange(None)
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model", **options)
    assert all(map(is_sharded, model.parameters()))
    found = compute(model, batches, precision="fp64")
    assert_as_good(found, whole, batches, precision="fp64")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    write_init(folder / "ours", model, config, found, progress=False)
    if first:
        write_init(folder / "whole", whole, config, found, progress=False)
        for name in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
            assert (folder / "ours" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
        ours, theirs = (json.loads((folder / each / "base" / "config.json").read_text()) for each in ("ours", "whole"))
        assert ours["nullspace"]["residual"].pop("model") == str(folder / "model")
        assert theirs["nullspace"]["residual"].pop("model") is None
        assert ours == theirs
    expected = dict(inject_adapters(whole, config, found).named_parameters())
    for name, p in inject_adapters(model, config, found).named_parameters():
        assert torch.equal(whole_of(p), expected[name]), name


# ---- tensor parallelism

COLUMNS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


def tensor_parallel(mesh: DeviceMesh, **styles: Any) -> nn.Module:
    model = tiny("llama")
    rows = ("o_proj", "down_proj")
    plan = {f"*.{name}": styles.get(name, RowwiseParallel() if name in rows else ColwiseParallel()) for name in (*COLUMNS, *rows)}
    for block in model.model.layers:
        parallelize_module(block, mesh, plan)
    return model


def columns_are_summed(model: nn.Module, whole: nn.Module, job: Job) -> None:
    batches = random_batches(3, padding="right")
    found = stream(model, batches, targets=COLUMNS, precision="fp64", job=job)
    expected = stream(whole, batches, targets=COLUMNS, precision="fp64", job=Job.alone())
    assert list(found) == list(expected)
    for site, total in expected.items():
        assert found[site].tokens == total.tokens
        assert relative_error(found[site].matrix(), total.matrix()) <= 1e-6  # parts of products are added in float32
    spaces = compute(model, batches, targets=COLUMNS, job=job)
    for name in spaces:
        spaces.check(name, whole.get_submodule(name))


@check(2)
def tensor_parallel_layers_that_hear_all_are_summed(rank: int, count: int, folder: Path) -> None:
    whole, model = tiny("llama"), tensor_parallel(everybody())
    batches = random_batches(count)
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    columns_are_summed(model, whole, Job.alone())
    for strategy in STRATEGIES:
        refused(
            ValueError,
            r"^'model\.layers\.0\.self_attn\.o_proj' receives only a part of its input .* fully_shard",
            lambda strategy=strategy: stream(model, batches, strategy=strategy, job=Job.alone()),
        )
        refused(
            ValueError,
            r"^ranks 0, 1 compute the same layers together .* job=Job\.alone\(\)",
            lambda strategy=strategy: stream(model, batches, strategy=strategy, targets=COLUMNS),
        )


@check(2)
def what_hooks_make_of_an_input_is_heard(rank: int, count: int, folder: Path) -> None:
    mesh = everybody()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    whole = torch.randn(40, 8)
    expected = dict(stream(model, [whole], targets=["0"], job=Job.alone()))
    split = {"0": ColwiseParallel(input_layouts=Shard(0)), "1": RowwiseParallel(output_layouts=Shard(0))}
    parallelize_module(model, mesh, split)  # sequence parallelism: each rank begins and ends with its part of the tokens
    found = dict(stream(model, [whole.chunk(count)[rank]], targets=["0"], job=Job.alone()))
    for site, total in expected.items():
        assert found[site].tokens == 40
        assert relative_error(found[site].matrix(), total.matrix()) <= ROUNDING
    part = DTensor.from_local(whole.chunk(count)[rank], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"'0' receives only a part of its input .*Shard"):
        layer_input("0", part, part)
    assert layer_input("0", whole, DTensor.from_local(whole, mesh, [Replicate()])) is whole


@check(2)
def what_is_data_parallel_beside_it_is_a_job(rank: int, count: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (1, count), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(mesh["tp"])
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    columns_are_summed(model, tiny("llama"), Job(mesh["dp"].get_group()))


@check(2)
def transformers_tensor_parallelism_is_known_too(rank: int, count: int, folder: Path) -> None:
    whole = tiny("llama")
    if rank == 0:
        whole.save_pretrained(folder / "model")
    Job().exchange(None)
    as_torchrun_does()
    fields = inspect.signature(DistributedConfig).parameters
    plan = {"distributed_config": DistributedConfig(tp_size=count)} if "tp_size" in fields else {"tp_plan": "auto"}
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model", **plan)
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)
    columns_are_summed(model, whole, Job.alone())
    refused(ValueError, "o_proj' receives only a part of its input", lambda: stream(model, random_batches(1), job=Job.alone()))
    refused(ValueError, "^ranks 0, 1 compute the same", lambda: stream(model, random_batches(1), targets=COLUMNS))


# ---- adapters


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def adapters_are_those_of_the_model_in_one_piece(
    make: Callable[..., nn.Module], whole: nn.Module, folder: Path, *, runs: bool = True
) -> None:
    """Of a model that runs without an engine, or does not."""
    targets = ["c_attn", "c_proj"] if "GPT2" in type(whole).__name__ else ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    spaces = alone(whole, random_batches(6), rank=8, targets=targets)
    sums = Covariances(stream(whole, random_batches(6), targets=targets, precision="fp64", job=Job.alone()).items())
    sources = {"spaces": spaces, "covariances": sums, "preserve": sums}
    rank = dist.get_rank()
    for method in ("lora-null", "b-zero", "contrast", "mica", "orthogonal"):
        given = {name: sources[name] for name in METHODS[method].needs}
        model = make()
        before = logits(model) if runs else None
        torch.manual_seed(rank)  # what is drawn must be the first one's
        found = inject_adapters(model, config, **given, method=method)
        torch.manual_seed(0)
        expected = inject_adapters(copy.deepcopy(whole), config, **given, method=method)
        if runs:
            torch.testing.assert_close(logits(found), before, rtol=0, atol=1e-5)
        assert found.nullspace_residual == expected.nullspace_residual
        reshard_model(found)
        ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, own in theirs.items():
            sharded = is_sharded(ours[name])
            assert sharded != ("lora_" in name)
            value = whole_of(ours[name])
            assert torch.equal(value, own), name
            assert all(torch.equal(value, each) for each in Job().exchange(value.detach().cpu())), name
        refused(ValueError, "call write_init", lambda found=found: save_init(folder / "no", found))
        Job().exchange(None)
        model = make()
        torch.manual_seed(rank)
        names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
        write_init(folder / method, model, config, **given, method=method, progress=False)
        assert (list(model.state_dict()), [type(module) for module in model.modules()]) == (names, kinds)
        if runs:
            torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
        if rank == 0:
            torch.manual_seed(0)
            write_init(folder / "whole" / method, whole, config, **given, method=method, progress=False)
            ours, theirs = bytes_of(folder / method), bytes_of(folder / "whole" / method)
            assert ours.keys() == theirs.keys()
            for name in theirs.keys() - {"adapter/adapter_config.json", "nullspace.json"}:
                assert ours[name] == theirs[name], name
        Job().exchange(None)


@check(2)
def experts_that_are_sharded_become_residuals_and_get_no_adapters_in_memory(rank: int, count: int, folder: Path) -> None:
    model, whole, config = mixture("mixtral"), mixture("mixtral"), LoraConfig(r=4, target_modules="all-linear")
    for block in model.model.layers:
        fully_shard(block, mesh=everybody())
    fully_shard(model, mesh=everybody())
    message = r"experts\.down_proj' is spread over several ranks.*call write_init"
    refused(ValueError, message, lambda: inject_adapters(model, config, method="milora"))
    Job().exchange(None)
    write_init(folder / "ours", model, config, method="milora", progress=False)
    if rank == 0:
        write_init(folder / "whole", whole, config, method="milora", progress=False)
        ours, theirs = bytes_of(folder / "ours"), bytes_of(folder / "whole")
        assert ours.keys() == theirs.keys()
        assert {name for name in theirs if ours[name] != theirs[name]} <= {"adapter/adapter_config.json", "nullspace.json"}
    Job().exchange(None)


@check(2)
def adapters_of_weights_that_are_sharded_otherwise(rank: int, count: int, folder: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    whole = tiny("llama")
    spaces = alone(whole, random_batches(6), targets=["q_proj", "down_proj"])
    named = init_device_mesh("cpu", (count,), mesh_dim_names=("dp_shard",))  # as accelerate does, and PEFT does not know
    hybrid = init_device_mesh("cpu", (count, 1), mesh_dim_names=("replicate", "shard"))
    ways = ({"mesh": named}, {"mesh": hybrid}, {"shard_placement_fn": lambda p: Shard(p.ndim - 1)})
    for options, residual in itertools.product(ways, ("base", "adapter")):
        found = inject_adapters(fsdp(**options), config, spaces, residual=residual, freeze_a=True)
        expected = dict(inject_adapters(copy.deepcopy(whole), config, spaces, residual=residual, freeze_a=True).named_parameters())
        reshard_model(found)
        assert {name for name, _ in found.named_parameters()} == set(expected)
        for name, p in found.named_parameters():
            assert p.requires_grad == expected[name].requires_grad
            assert torch.equal(whole_of(p), expected[name]), name
        torch.testing.assert_close(logits(found), logits(whole), rtol=0, atol=1e-5)
    dora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    refused(ValueError, "use_dora asks for the norms", lambda: inject_adapters(fsdp(), dora, spaces))


@check(2)
def adapters_that_fsdp2_shards_too(rank: int, count: int, folder: Path) -> None:
    spaces = alone(tiny("llama"), random_batches(6), targets=["q_proj", "down_proj"])
    adapted = inject_adapters(tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), spaces)
    if rank == 0:
        save_init(folder / "init", adapted)
    for block in find_blocks(adapted.get_base_model()).values():
        fully_shard(block, mesh=everybody())
    fully_shard(adapted, mesh=everybody())
    ids = random_batches(count, 1, 24)[rank]["input_ids"]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    reshard_model(adapted)
    a_live_adapter_is_read_whole(adapted, folder / "init", folder / "plain")


@check(2)
def weights_are_put_back_by_all(rank: int, count: int, folder: Path) -> None:
    """Where the last rank fails after it has changed most of its parts."""
    spaces = alone(tiny("llama"), random_batches(6), targets=["q_proj", "down_proj"])
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    before, residual_of, calls = tiny("llama").state_dict(), inject.residual_of, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5 and rank == count - 1:
            raise MemoryError("no room")
        return residual_of(*args)

    makes: list[Callable[[], nn.Module]] = [fsdp]
    if importlib.util.find_spec("deepspeed") is not None:
        makes.append(lambda: zero(engine=False))
    for make in makes:
        model = make()
        calls.clear()
        inject.residual_of = fails
        try:
            refused(MemoryError, rf"^rank {count - 1}: no room", lambda model=model: inject_adapters(model, config, spaces))
        finally:
            inject.residual_of = residual_of
        assert [name for name, _ in model.named_parameters()] == list(dict(tiny("llama").named_parameters()))
        for name, p in model.named_parameters():
            assert torch.equal(whole_of(p), before[name]), name


@check(2)
def adapters_of_fsdp2(rank: int, count: int, folder: Path) -> None:
    for family in ("llama", "gpt2"):
        (folder / family).mkdir(exist_ok=True)
        adapters_are_those_of_the_model_in_one_piece(lambda family=family: fsdp(family), tiny(family), folder / family)


@check(2)
def an_error_in_making_adapters_is_raised_by_all(rank: int, count: int, folder: Path) -> None:
    model, spaces = fsdp(), alone(tiny("llama"), random_batches(6), targets=["q_proj", "down_proj"])
    few = alone(tiny("llama"), random_batches(6), targets=["q_proj"])
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    names = list(model.state_dict())
    make = (
        functools.partial(inject_adapters, model, config, few if rank else spaces),
        functools.partial(write_init, folder / "out", model, config, few if rank else spaces, progress=False),
    )
    for call in make:
        refused(ValueError, "^rank 1: there is no null space for 'model.layers.0.mlp.down_proj'", call)
    before = records.TensorFile.write

    def full(self: Any, name: str, tensor: torch.Tensor) -> None:
        if "layers.2" in name:
            raise OSError("the disk is full")
        before(self, name, tensor)

    records.TensorFile.write = full
    try:
        refused(OSError, "^rank 0: the disk is full", lambda: write_init(folder / "out", model, config, spaces, progress=False))
    finally:
        records.TensorFile.write = before
    Job().exchange(None)
    assert list(folder.iterdir()) == []
    assert list(model.state_dict()) == names
    column = tensor_parallel(everybody())
    refused(ValueError, "tensor parallelism.*write_init", lambda: inject_adapters(column, config, spaces))
    write_init(folder / "out", column, config, spaces, progress=False)  # which gathers
    if rank == 0:
        write_init(folder / "whole", tiny("llama"), config, spaces, progress=False)
        for name in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
            assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.parametrize(("count", "name"), check.all)
def test_together(tmp_path_factory: pytest.TempPathFactory, name: str, count: int) -> None:
    if "zero3" in name:
        pytest.importorskip("deepspeed")
    check.report(count, name, tmp_path_factory)
