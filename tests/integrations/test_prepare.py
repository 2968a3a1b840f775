"""`prepare` and `initialize_lora_nullspace_weights`: against the long way, on data of every form, on hostile input."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn

import nullspace
from models import random_batches, tiny
from nullspace import Covariances, compute_covariances, compute_null_spaces
from nullspace.errors import DataWarning
from nullspace.integrations.peft import initialize_lora_nullspace_weights, inject_adapters, lora_layers, prepare, save_init
from nullspace.integrations.transformers import PackedBatches, load_texts
from nullspace.integrations.transformers.batches import token_batches
from nullspace.integrations.transformers.corpus import default_corpus
from nullspace.methods import METHODS

RANK = 4
TASK, KEEP = random_batches(2, 4, 48, seed=3), random_batches(2, 4, 48, seed=4, padding="right")
BATCH = random_batches(1, 2, 24, seed=7)[0]
SIZES: dict[str, Any] = {"samples": 4, "length": 32, "batch_size": 2}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*saw fewer tokens", "ignore:.*span fewer directions", "ignore:the texts fill", "ignore:the mixture goes on"
)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": RANK, **options})


def wrapped(adapter_name: str = "default", **options: Any) -> PeftModel:
    """What PEFT makes of the tiny model, with an adapter on all linear layers but the head."""
    torch.manual_seed(0)
    return get_peft_model(tiny("llama"), config(**{"target_modules": "all-linear", **options}), adapter_name=adapter_name).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def factors(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    pairs = {name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for name, layer in lora_layers(model, adapter).items()}
    return {f"{name} {part}": each.detach().clone() for name, pair in pairs.items() for part, each in zip("AB", pair, strict=True)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are the same to the bit."""
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of second moments of `TASK` and `KEEP`, and of the null spaces of `KEEP`, as the long way makes them."""
    folder = tmp_path_factory.mktemp("moments")
    for name, data in (("task", TASK), ("keep", KEEP)):
        compute_covariances(tiny("llama"), data, folder / name, precision="auto", progress=False)
    compute_null_spaces(tiny("llama"), KEEP, rank=RANK, progress=False).save(folder / "spaces")
    return {name: folder / name for name in ("task", "keep", "spaces")}


def long_way(method: str, moments: dict[str, Path], **options: Any) -> PeftModel:
    """Calibration and `inject_adapters`, step by step."""
    of = {"covariances": "task" if METHODS[method].of_task else "keep", "preserve": "keep"}
    given: dict[str, Any] = {name: Covariances.load(moments[of[name]]) for name in METHODS[method].needs if name != "spaces"}
    if "spaces" in METHODS[method].needs:
        given["spaces"] = nullspace.NullSpaces.load(moments["spaces"])
    return inject_adapters(tiny("llama"), config(), method=method, **given, **options)


def data_for(method: str, **data: Any) -> dict[str, Any]:
    return {name: data.get(name, {"task": TASK, "keep": KEEP}[name]) for name in METHODS[method].data}


@pytest.fixture(scope="module")
def text_model(tiny_checkpoint: Path) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, which has a chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = TEMPLATE
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), tokenizer


# ---- the same as the long way


@pytest.mark.parametrize("method", METHODS)
def test_one_call_gives_what_the_long_way_gives_to_the_bit(method: str, moments: dict[str, Path]) -> None:
    torch.manual_seed(5)
    one_call = prepare(tiny("llama"), None, config(), **data_for(method), method=method, progress=False)
    torch.manual_seed(5)
    assert same(factors(one_call), factors(long_way(method, moments)))
    assert same(one_call.state_dict(), one_call.state_dict())
    trained = {name.rpartition(".lora_")[2][0] for name, p in one_call.named_parameters() if p.requires_grad}
    assert trained == ({"B"} if METHODS[method].frozen else {"A", "B"})


def test_it_is_a_lazy_name_of_the_package() -> None:
    assert nullspace.prepare is prepare


@pytest.mark.parametrize("method", ["contrast", "lora-null", "corda-kpm"])
def test_moments_that_are_there_are_used_and_no_forward_runs(
    method: str, moments: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = factors(long_way(method, moments))
    monkeypatch.setattr(transformers.LlamaModel, "forward", lambda *_, **__: pytest.fail("the model runs"))
    keep = moments["spaces" if method == "lora-null" else "keep"]
    folders = prepare(tiny("llama"), None, config(), **data_for(method, task=str(moments["task"]), keep=keep), method=method)
    assert same(factors(folders), wanted)
    model = wrapped()
    given = data_for(method, task=Covariances.load(moments["task"]), keep=keep)
    initialize_lora_nullspace_weights(model, **given, method=method, residual="base" if METHODS[method].changes_base else "auto")
    assert same(factors(model), wanted)
