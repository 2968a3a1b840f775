"""What a causal language model computes, and a few steps of training it."""

from __future__ import annotations

import torch
from torch import nn

IDS = torch.randint(3, 200, (2, 32), generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def train(model: nn.Module, steps: int = 2) -> None:
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(3, 200, (2, 24))
        nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
