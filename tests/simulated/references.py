"""What is run on simulated GPUs, and what it is compared with: second moments on the CPU, in float64."""

from __future__ import annotations

import functools

import accelerate
import torch
from mixtures import MIXTURES, mixture
from torch import nn

from models import random_batches, tiny
from nullspace import stream_covariances


def model_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return (mixture(family) if family in MIXTURES else tiny(family)).to(dtype)


def batches_of(padding: str | None = None, *, masked: bool = True) -> list[dict[str, torch.Tensor]]:
    """Four batches of two sequences, with their masks unless `masked` is False."""
    batches = random_batches(4, 2, 48, padding=padding)
    return batches if masked else [{"input_ids": batch["input_ids"]} for batch in batches]


@functools.cache
def sums_of(family: str, padding: str | None = None, experts: str = "auto") -> dict[str, tuple[torch.Tensor, int]]:
    """Name of a layer → the second moment and the tokens of its site."""
    stream = stream_covariances(
        model_of(family), batches_of(padding), strategy="resident", precision="fp64", experts=experts, progress=False
    )
    found = {site: (covariance.matrix(), covariance.tokens) for site, covariance in stream}
    return {name: values for site, values in found.items() for name in site.members}


def spread(order: tuple[int, ...]) -> tuple[nn.Module, dict[str, torch.device]]:
    """A Llama whose blocks are on these devices, by accelerate, and the devices by number of the block."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": order[-1], "lm_head": order[-1]}
    places |= {f"model.layers.{number}": device for number, device in enumerate(order)}
    model = accelerate.dispatch_model(model_of("llama"), places)
    return model, {str(number): torch.device("cuda", device) for number, device in enumerate(order)}
