"""Adapters in training, for the tests of what holds them: tiny models, a tokenizer of their words, and a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from calibrated import covariances_for
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import parametrize

from models import VOCABULARY, random_batches, tiny
from nullspace import Covariances
from nullspace.integrations.peft import lora_layers

LEAK = 0.3
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def adapted(family: str = "llama", **options: Any) -> PeftModel:
    """Plain LoRA on a tiny model."""
    return get_peft_model(tiny(family), LoraConfig(**{**CONFIG, **options}))


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def rows(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """A by layer, a copy."""
    return {name: layer.lora_A[adapter].weight.detach().clone() for name, layer in lora_layers(model, adapter).items()}


class Outside(torch.nn.Module):
    """(I − Q Qᵀ) M, or M (I − Q Qᵀ)."""

    def __init__(self, basis: torch.Tensor, *, right: bool) -> None:
        super().__init__()
        self.basis, self.right = basis, right

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        projector = torch.eye(len(self.basis), dtype=matrix.dtype) - self.basis @ self.basis.mT
        return matrix @ projector if self.right else projector @ matrix


def project_in_forward(model: PeftModel) -> None:
    """OPLoRA as its paper has it: every use of A and B reads A (I − V Vᵀ) and (I − U Uᵀ) B, with half of W₀'s singular vectors."""
    for layer in lora_layers(model, "default").values():
        u, sigma, vh = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False)
        k = len(sigma) // 2
        parametrize.register_parametrization(layer.lora_A["default"], "weight", Outside(vh[:k].mT, right=True))
        parametrize.register_parametrization(layer.lora_B["default"], "weight", Outside(u[:, :k], right=False))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """A few steps on random tokens."""
    model.train()
    for seed in range(steps):
        batch = random_batches(1, 2, 24, seed=seed)[0]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def quiet(c: torch.Tensor, leak: float = LEAK) -> torch.Tensor:
    """(d, k): by an independent decomposition, the most directions with a joint leak within the budget."""
    u, values, _ = torch.linalg.svd(c)
    joint = values.flip(0).cumsum(0) / c.trace()
    return u.flip(1)[:, : int((joint <= leak**2).sum())]


def outside(
    now: dict[str, torch.Tensor], start: dict[str, torch.Tensor], covariances: Covariances | None = None, leak: float = LEAK
) -> float:
    """The largest part of an A's change, relative to A, that is in no allowed direction. Every A must have changed."""
    covariances, worst = covariances or covariances_for("llama"), 0.0
    for name, a in now.items():
        basis, change = quiet(covariances[name].matrix(), leak), (a - start[name]).double()
        assert change.norm() > 0, name
        worst = max(worst, float((change - change @ basis @ basis.mT).norm() / a.double().norm()))
    return worst


def sequences(seed: int = 3) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": each, "labels": each} for each in ids]


def trainer_of(model: PeftModel, out: Path, *, callbacks: list[Any] | None = None, **options: Any) -> transformers.Trainer:
    """Four steps; every one is logged, every second one saved."""
    settings = {
        "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "logging_steps": 1, **options,
    }  # fmt: skip
    return transformers.Trainer(
        model, transformers.TrainingArguments(str(out), **settings), train_dataset=sequences(), callbacks=callbacks
    )


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Of as many words as the tiny models know."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2", pad_token="w1", unk_token="w0")
