"""Every family of transformers that builds tiny: block by block it sums what an ordinary forward sums, or is refused by name.

By default a few: those whose blocks are odd. `NULLSPACE_FAMILIES=all` tries every causal model and encoder, and prints a summary.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from families import ODD, VOCABULARY, build, classes
from torch import nn

from nullspace import stream_covariances
from nullspace.model.batches import evaluating
from nullspace.model.linear import is_linear

pytestmark = pytest.mark.slow

# What was wrong once, or is built in another way than most: caches by `**kwargs`, state-space blocks, a bias that the first
# block makes, side outputs, blocks that are called several times.
SOME = {
    "granitemoe": "served",
    "granitemoehybrid": "served",
    "granitemoeshared": "served",
    "mamba": "served",
    "falcon_h1": "served",
    "bamba": "served",
    "bloom": "served",
    "glm_moe_dsa": "refused",  # a block chooses tokens, by their numbers, and the next ones use its choice
    "modernbert": "served",
    "T5EncoderModel": "refused",
}


def data(lengths: tuple[int, ...] = (24, 24, 17)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, VOCABULARY, (2, length), generator=generator)} for length in lengths]


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


@pytest.mark.parametrize("kind", list(SOME))
def test_odd_families(kind: str) -> None:
    names = {**classes("encoder"), **classes("causal")}
    if kind not in ODD and kind not in names:
        pytest.skip("not in this version of transformers")
    model = ODD[kind]() if kind in ODD else build(kind, names[kind])
    config: Any = model.config
    caching = getattr(config, "use_cache", None)
    result, why = verdict(model)
    assert result == SOME[kind], why
    assert getattr(config, "use_cache", None) is caching


@pytest.mark.skipif(os.environ.get("NULLSPACE_FAMILIES") != "all", reason="NULLSPACE_FAMILIES=all tries every family")
@pytest.mark.parametrize("which", ["causal", "encoder"])
def test_every_family(which: str, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    for kind, name in classes(which).items():
        try:
            model = build(kind, name)
            called(model)
        except Exception as error:
            result, why = "not built", f"{type(error).__name__}: {error}"
        else:
            result, why = verdict(model)
        counts[result] += 1
        with capsys.disabled():
            print(f"\n{kind} {name}: {result}: {' '.join(why.split())[:240]}", end="", flush=True)
    with capsys.disabled():
        print(f"\n{which}: {dict(counts)}")
    assert not counts["wrong"]
