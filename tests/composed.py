"""Tiny models on the disk, a few steps of training, and what a comparison of their logits may differ by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from models import VOCABULARY, random_batches, tiny

BATCH = random_batches(1, 2, 24, seed=7)[0]
LEARNING_RATE = 1e-3
TOKENS = [3, 5, 8]


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


def loss_of(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """On random targets; every sequence has the trainable tokens in it."""
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=generator)
    ids[:, :3] = torch.tensor(TOKENS)
    return nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Two steps: whatever requires a gradient moves, and nothing else."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer or adamw(model)
    generator = torch.Generator().manual_seed(5)
    model.train()
    for _ in range(2):
        loss_of(model, generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


# The same weights through the same code: only the order of sums may differ, with where in memory the weights happen to lie.
SAME = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
