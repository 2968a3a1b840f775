"""Every start together with what else PEFT, transformers and TRL offer: the start changes nothing, training works, and what is
saved is the trained model in a process that has only transformers and PEFT."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn

from models import random_batches, tiny
from nullspace import NullSpaces, compute_null_spaces, store
from nullspace.integrations import peft as integration
from nullspace.integrations.peft import export_lora, inject_adapters, save_init

RANK = 8
BATCH = random_batches(1, 2, 24, seed=7)[0]
LEARNING_RATE = 1e-3

COMPUTED: dict[str, NullSpaces] = {}


def null_spaces(family: str) -> NullSpaces:
    if family not in COMPUTED:
        COMPUTED[family] = compute_null_spaces(tiny(family), random_batches(), rank=RANK, progress=False)
    return COMPUTED[family]


@dataclass(frozen=True)
class Method:
    """What a method is made of, and whether it changes the base."""

    source: Callable[[str], Any] = null_spaces
    residual: bool = True


METHODS = {"lora-null": Method(), "b-zero": Method(residual=False)}


def start(method: str, model: nn.Module, config: LoraConfig, family: str = "llama", **options: Any) -> PeftModel:
    return inject_adapters(model, config, METHODS[method].source(family), method=method, **options)


def test_every_method_is_composed() -> None:
    assert METHODS.keys() == set(integration.METHODS)


@dataclass(frozen=True)
class Composition:
    config: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[PeftModel], torch.optim.Optimizer] | None = None
    prepare: Callable[[PeftModel], None] = lambda _: None


def loraplus(model: PeftModel) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=LEARNING_RATE / 4, loraplus_lr_ratio=16)


def checkpointing(use_reentrant: bool, model: PeftModel) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 5},
    "alpha_pattern": {"k_proj": 32, r"layers\.0\.mlp\.up_proj": 1},
}

COMPOSITIONS = {
    "plain": Composition(),
    "frozen A": Composition(options={"freeze_a": True}),
    "rsLoRA": Composition({"use_rslora": True, "lora_alpha": 12}),
    "DoRA": Composition({"use_dora": True}),
    "DoRA, frozen A": Composition({"use_dora": True, "lora_alpha": 3}, options={"freeze_a": True}),
    "DoRA, rsLoRA, patterns": Composition({"use_dora": True, "use_rslora": True, **PATTERNS}),
    "DoRA, Conv1D": Composition({"use_dora": True}, family="gpt2"),
    "DoRA, bfloat16": Composition({"use_dora": True}, dtype=torch.bfloat16),
    "LoRA+": Composition(optimizer=loraplus),
    "LoRA+, frozen A": Composition(options={"freeze_a": True}, optimizer=loraplus),
    "patterns": Composition(PATTERNS),
    "rsLoRA, patterns": Composition({"use_rslora": True, **PATTERNS}),
    "dropout": Composition({"lora_dropout": 0.3}),
    "whole head": Composition({"modules_to_save": ["lm_head"]}),
    "whole head and norms, frozen A": Composition(
        {"modules_to_save": ["lm_head", "post_attention_layernorm"]}, options={"freeze_a": True}
    ),
    "tokens": Composition({"trainable_token_indices": [3, 5, 8]}),
    "tied embeddings": Composition(family="qwen2"),
    "tied embeddings, whole head": Composition({"modules_to_save": ["lm_head"]}, family="qwen2"),
    "tied embeddings, tokens": Composition({"trainable_token_indices": [3, 5, 8]}, family="qwen2"),
    "all biases": Composition({"bias": "all"}, family="qwen2"),
    "biases of layers": Composition({"bias": "lora_only"}, family="qwen2"),
    "biases of adapters": Composition({"lora_bias": True}),
    "checkpointing": Composition(prepare=partial(checkpointing, False)),
    "checkpointing, reentrant": Composition(prepare=partial(checkpointing, True)),
    "bfloat16": Composition(dtype=torch.bfloat16),
    "bfloat16, frozen A": Composition(dtype=torch.bfloat16, options={"freeze_a": True}),
    "float16": Composition(dtype=torch.float16),
}


def checkpoint(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny(family).to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**BATCH).logits.float()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 2) -> None:
    """Steps of AdamW on random targets. Every parameter that is to move gets a gradient, every other one stays."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer or adamw(model)
    generator = torch.Generator().manual_seed(5)
    model.train()
    for _ in range(steps):
        ids = torch.randint(3, 200, (2, 24), generator=generator)
        ids[:, :3] = torch.tensor([3, 5, 8])
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


# The same weights through the same code: only the order of sums may differ, with where in memory the weights happen to lie.
SAME = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

PLAIN_PEFT = """
import json, sys, traceback
sys.modules["nullspace"] = None
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

def loaded(order):
    if order["adapters"] is None:
        return AutoModelForCausalLM.from_pretrained(order["base"], dtype="auto")
    (name, adapter), *more = order["adapters"].items()
    if order["base"] is None:
        model = AutoPeftModelForCausalLM.from_pretrained(adapter, adapter_name=name, dtype="auto")
    else:
        base = AutoModelForCausalLM.from_pretrained(order["base"], dtype="auto")
        model = PeftModel.from_pretrained(base, adapter, adapter_name=name)
    for other, adapter in more:
        model.load_adapter(adapter, other)
    model.base_model.set_adapter(order["active"] or [name])
    return model

for line in sys.stdin:
    order = json.loads(line)
    try:
        model = loaded(order).eval()
        with torch.no_grad():
            save_file({"logits": model(**load_file(order["batch"])).logits.float()}, order["logits"])
        answer = None
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


class PlainPeft:
    """A process that has never heard of us. It loads what a test has saved, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        store.write_tensors(folder / "batch.safetensors", BATCH)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PLAIN_PEFT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )

    def logits(
        self, adapters: Path | dict[str, Path] | None, base: Path | None = None, active: list[str] | None = None
    ) -> torch.Tensor:
        """Of the adapters on a base, which is the one that the adapter names unless given; None for the base itself."""
        if isinstance(adapters, Path):
            adapters = {"default": adapters}
        order = {
            "adapters": None if adapters is None else {name: str(path) for name, path in adapters.items()},
            "base": None if base is None else str(base),
            "active": active,
            "batch": str(self.folder / "batch.safetensors"),
            "logits": str(self.folder / "logits.safetensors"),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer == "null\n", json.loads(answer) if answer else "the process has died"
        return load_file(self.folder / "logits.safetensors")["logits"]


@pytest.fixture(scope="module")
def plain_peft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainPeft]:
    fresh = PlainPeft(tmp_path_factory.mktemp("plain"))
    with fresh.process:
        yield fresh
        fresh.process.stdin.close()


def check_base(base: Path, original: Path, adapted: PeftModel) -> None:
    """The residual checkpoint has the original's tensors, all the same to the bit but W - s B A where there are adapters."""
    residual, before = (load_file(folder / "model.safetensors") for folder in (base, original))
    assert residual.keys() == before.keys()
    for name, layer in integration.lora_layers(adapted, "default").items():
        weight = f"{name}.weight" if f"{name}.weight" in before else f"{name.removeprefix('transformer.')}.weight"
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        product = layer.scaling["default"] * b @ a
        wanted = before.pop(weight).double() - (product.T if layer.fan_in_fan_out else product)
        found = residual.pop(weight)
        limits = torch.finfo(found.dtype)
        assert ((found.double() - wanted).abs() <= limits.eps / 2 * wanted.abs() + limits.smallest_normal).all(), name
    for name, tensor in before.items():
        assert torch.equal(residual[name], tensor), name


@pytest.mark.filterwarnings("ignore:.*lora_bias=True:UserWarning", "ignore:Careful, disabling adapter layers:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_starts_as_the_base_and_what_is_saved_is_what_was_trained(
    name: str, method: str, tmp_path: Path, plain_peft: PlainPeft
) -> None:
    it = COMPOSITIONS[name]
    original = checkpoint(tmp_path / "original", it.family, it.dtype)
    model = loaded(original)
    before, exact = logits(model), logits(copy.deepcopy(model).float())
    config = LoraConfig(**{"r": RANK, "lora_alpha": RANK, **it.config})
    adapted = start(method, model, config, it.family, **it.options)
    if it.dtype == torch.float32:
        assert close(logits(adapted), before, 2e-6)
    else:  # rounding the residual costs no more than computing in 16 bits does anyhow
        assert (logits(adapted) - exact).abs().max() <= 2 * (before - exact).abs().max()
    save_init(tmp_path / "init", adapted, METHODS[method].source(it.family))
    assert (tmp_path / "init" / "base").is_dir() == METHODS[method].residual
    if METHODS[method].residual:
        check_base(tmp_path / "init" / "base", original, adapted)

    it.prepare(adapted)
    train(adapted, it.optimizer and it.optimizer(adapted))
    adapted.save_pretrained(tmp_path / "trained")
    wanted = logits(adapted)
    assert not close(wanted, before, 100 * SAME[torch.float32])  # or else the rest would say nothing
    assert close(plain_peft.logits(tmp_path / "trained"), wanted, SAME[it.dtype])

    if it.config.get("use_dora") and METHODS[method].residual:
        return
    export_lora(adapted, tmp_path / "init" / "adapter", tmp_path / "exported", base=str(original))
    exported = plain_peft.logits(tmp_path / "exported")
    if it.dtype == torch.float32:
        assert close(exported, wanted, 1e-5)
    else:
        assert (exported - wanted).abs().max() <= 4 * (before - exact).abs().max()
