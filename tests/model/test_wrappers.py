"""A model that is compiled or wrapped gives what it gives by itself, under its own names; what stops the sums is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn

from models import random_batches, tiny
from nullspace import compute_covariances, compute_null_spaces, stream_covariances
from nullspace.integrations.peft import (
    freeze_a,
    get_eva_state_dict,
    inject_adapters,
    preprocess_corda,
    row_spaces,
    save_init,
    write_init,
)
from nullspace.model.wrappers import unwrap
from nullspace.planning.forecast import forecast
from nullspace.planning.plan import Workload

BATCHES = random_batches(2, 3, 24)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process, as `DistributedDataParallel` asks for one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(model, backend="eager")
    return made


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def forward_compiled(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def blocks_compiled_in_place(model: Any) -> nn.Module:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def blocks_compiled(model: Any) -> nn.Module:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block, backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile(model)": compiled,
    "model.compile()": compiled_in_place,
    "model.forward compiled": forward_compiled,
    "block.compile()": blocks_compiled_in_place,
    "torch.compile(block)": blocks_compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DistributedDataParallel of a compiled model": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
}


class Small(nn.Module):
    """An embedding, blocks, and an output head that it names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.embed = nn.Embedding(211, 16)
        self.model.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(16, 211)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.model.embed(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.head(x)


def wrapped(how: str) -> nn.Module:
    """A small model, which has run: a graph knows nothing of hooks that come later."""
    torch._dynamo.reset()
    model = WRAPPERS[how](Small())
    with torch.no_grad():
        model(**BATCHES[0])
    return model


def moments(model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    stream = stream_covariances(model, BATCHES, progress=False, **options)
    return {name: covariance.matrix() for site, covariance in stream for name in site.members}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, matrix in expected.items():
        torch.testing.assert_close(found[name], matrix, rtol=1e-9, atol=1e-9 * float(matrix.trace()))


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
@pytest.mark.parametrize("how", list(WRAPPERS))
def test_sums_are_those_of_the_model_inside(how: str, strategy: str, alone: None) -> None:
    expected = moments(Small(), strategy=strategy)
    assert list(expected) == ["model.layers.0.0", "model.layers.1.0"]
    model = wrapped(how)
    before = {name: (dict(m.__dict__), dict(m._modules)) for name, m in model.named_modules()}
    assert_equal(moments(model, strategy=strategy), expected)
    after = {name: (dict(m.__dict__), dict(m._modules)) for name, m in model.named_modules()}
    assert before.keys() == after.keys()
    for name, (attributes, children) in after.items():
        assert attributes.keys() == before[name][0].keys()
        assert attributes.get("forward") == before[name][0].get("forward")
        assert attributes.get("_compiled_call_impl") is before[name][0].get("_compiled_call_impl")
        assert all(children[key] is child for key, child in before[name][1].items())


@pytest.mark.parametrize("how", ["torch.compile(model)", "DataParallel", "torch.compile(block)"])
def test_every_door_takes_the_model_inside(how: str, tmp_path: Path) -> None:
    plain, model = tiny("llama"), WRAPPERS[how](tiny("llama"))
    spaces = compute_null_spaces(plain, BATCHES, rank=4, targets=TARGETS, progress=False)
    found = compute_null_spaces(model, BATCHES, rank=4, targets=TARGETS, progress=False)
    assert list(found) == list(spaces)
    sums = compute_covariances(model, BATCHES, tmp_path / "sums", targets=TARGETS, progress=False)
    assert list(sums) == list(spaces)
    workload = Workload(device="cpu", batch_size=1, length=16, targets=TARGETS)  # of shapes alone
    forecasts = [forecast(each, workload) for each in (plain, model)]
    assert [each.as_dict() for each in forecasts[0]] == [each.as_dict() for each in forecasts[1]]
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    names = sorted(name for name, _ in inject_adapters(tiny("llama"), config, spaces).named_parameters())
    write_init(tmp_path / "init", model, config, found, progress=False)
    expected = plain(**BATCHES[0]).logits
    injected = inject_adapters(model, config, found)
    assert sorted(name.replace("_orig_mod.", "") for name, _ in injected.named_parameters()) == names
    with torch.compiler.set_stance("force_eager"):  # nothing is asked of the compiler here
        torch.testing.assert_close(injected(**BATCHES[0]).logits, expected, rtol=1e-4, atol=1e-4)
    again = WRAPPERS["torch.compile(model)"](injected)
    freeze_a(again)
    save_init(tmp_path / "saved", again)
    assert row_spaces(again).keys() == row_spaces(tmp_path / "saved" / "adapter").keys() == set(spaces)


@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()", "DataParallel"])
def test_the_doors_of_peft_take_the_model_inside(how: str) -> None:
    config = LoraConfig(r=4, target_modules=r"model\.layers\.\d\.0", init_lora_weights="eva", eva_config=EvaConfig(rho=1))
    expected, found = (get_eva_state_dict(m, BATCHES, config, show_progress_bar=False) for m in (Small(), wrapped(how)))
    torch.testing.assert_close(found, expected)
    plain, model = Small(), wrapped(how)
    for each in (plain, model):
        config = LoraConfig(r=4, target_modules=r"model\.layers\.\d\.0", corda_config=CordaConfig(corda_method="ipm"))
        # What somebody runs is the model as it was given, with its graph.
        preprocess_corda(each, config, run_model=lambda each=each: [each(**batch) for batch in BATCHES])
    for index in range(2):
        layers = [each.get_submodule(f"model.layers.{index}.0") for each in (plain, unwrap(model))]
        torch.testing.assert_close(layers[1].eigens.S_WC, layers[0].eigens.S_WC)


# --- hooks that do not stand, weights that are not there ------------------------------------------------------------------------


class Meddling(nn.Module):
    """A chain whose forward does something to its second block's layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(211, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
        self.how, self.calls = how, 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        for index, block in enumerate(self.blocks):
            if index == 1 and self.how == "removes":
                block[0]._forward_pre_hooks.clear()
            if index == 1 and self.how == "replaces":
                block[0] = nn.Linear(16, 16)
            x = block(x)
        self.calls += 1
        if self.calls == 1 and self.how == "removes later":
            self.blocks[1][0]._forward_pre_hooks.clear()
        return x


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("removes", r"'blocks\.1\.0' lost the hook that reads its inputs"),
        ("removes later", r"'blocks\.1\.0' lost the hook"),
        ("replaces", r"'blocks\.1\.0' was replaced"),
    ],
)
def test_a_hook_that_the_model_removes_is_named(how: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        moments(Meddling(how), strategy="resident")


@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
@pytest.mark.parametrize("part", ["model.layers.1.mlp.up_proj", "model.layers.0", "model.norm", "model.embed_tokens"])
def test_weights_on_the_meta_device_are_refused_by_name_before_the_model_runs(part: str, strategy: str) -> None:
    model = tiny("llama")
    model.get_submodule(part).to("meta")
    called: list[Any] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: called.append(None))
    with pytest.raises(ValueError, match=rf"'{part.replace('.', chr(92) + '.')}\..*weight' is on the meta device"):
        moments(model, strategy=strategy)
    assert not called


def test_eva_refuses_weights_on_the_meta_device_but_not_adapters_there() -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1))
    model = get_peft_model(tiny("llama"), config, low_cpu_mem_usage=True)
    assert get_eva_state_dict(model, BATCHES, show_progress_bar=False)
    model.base_model.model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model\.norm\.weight' is on the meta device"):
        get_eva_state_dict(model, BATCHES, show_progress_bar=False)
