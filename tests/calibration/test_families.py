"""Families whose blocks are odd: block by block the sums are those of an ordinary forward, or the class is refused by name.

`python -m benchmarks.families` tries every family, and more than this.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("benchmarks.families", reason="needs the repository's root on the path: python -m pytest")
from benchmarks.families.build import architectures, build
from nullspace import stream_covariances
from nullspace.model.batches import evaluating
from nullspace.model.linear import is_linear

pytestmark = pytest.mark.slow

# What was wrong once, or is built in another way than most: caches by `**kwargs`, state-space blocks, a bias that the first
# block makes, side outputs, blocks that are called several times.
SOME = {
    "GraniteMoeForCausalLM": "served",
    "GraniteMoeHybridForCausalLM": "served",
    "GraniteMoeSharedForCausalLM": "served",
    "MambaForCausalLM": "served",
    "FalconH1ForCausalLM": "served",
    "BambaForCausalLM": "served",
    "BloomForCausalLM": "served",
    "GlmMoeDsaForCausalLM": "refused",  # a block chooses tokens, by their numbers, and the next ones use its choice
    "ModernBertForMaskedLM": "served",
    "T5EncoderModel": "refused",
}


def data(lengths: tuple[int, ...] = (24, 24, 17)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, 200, (2, length), generator=generator)} for length in lengths]


def t5_encoder() -> nn.Module:
    """Its first block makes the bias that all blocks add."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=211, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    return transformers.T5EncoderModel(config).double().eval()


def sums(model: nn.Module, strategy: str) -> tuple[dict[str, torch.Tensor], bool, Exception | None]:
    """The sums by layer, and whether there were any when an error came."""
    torch.manual_seed(3)
    found: dict[str, torch.Tensor] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for site, covariance in stream_covariances(
                model, data(), targets=called(model), strategy=strategy, precision="fp64", progress=False
            ):
                found.update(dict.fromkeys(site.members, covariance.matrix()))
    except Exception as error:
        return found, bool(found), error
    return found, bool(found), None


def called(model: nn.Module) -> list[str]:
    """The linear layers that these data reach, with one input for every token."""
    names: set[str] = set()
    head: Any = model
    head = head.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if is_linear(module) and module is not head}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: names.add(name) if args else None)
        for name, module in layers.items()
    ]
    with evaluating(model), torch.no_grad():
        for batch in data():
            model(**batch)
    for handle in handles:
        handle.remove()
    return [name for name in layers if name in names]


def verdict(model: nn.Module) -> tuple[str, str]:
    """`("served" | "refused" | "wrong" | "not resident", why)`."""
    expected, _, error = sums(model, "resident")
    if error is not None:
        return "not resident", str(error)
    found, begun, error = sums(model, "layerwise")
    if error is not None:
        by_name = isinstance(error, ValueError) and type(model).__name__ in str(error)
        return "refused" if by_name and not begun else "wrong", f"{type(error).__name__}: {error}"
    if found.keys() != expected.keys():
        return "wrong", f"{len(found)} layers, not {len(expected)}"
    worst = max(float((found[n] - c).abs().max() / c.trace().clamp(min=1e-300)) for n, c in expected.items())
    return ("served" if worst <= 1e-9 else "wrong"), f"{worst:.1e}"


@pytest.mark.parametrize("name", list(SOME))
def test_odd_families(name: str) -> None:
    known = architectures()
    if name not in known and name != "T5EncoderModel":
        pytest.skip("not in this version of transformers")
    model = t5_encoder() if name == "T5EncoderModel" else build(known[name]).model
    config: Any = model.config
    caching = getattr(config, "use_cache", None)
    result, why = verdict(model)
    assert result == SOME[name], why
    assert getattr(config, "use_cache", None) is caching
