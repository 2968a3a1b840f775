"""`rank_budget`: the same parameters as of uniform ranks, the scaling that was asked for, and names that match one layer each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import sources_for
from mixtures import MIXTURES, mixture, moments
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from models import random_batches, tiny
from nullspace import prepare
from nullspace.integrations.peft import inject_adapters, lora_layers, save_init
from nullspace.integrations.peft.experts.layout import pattern_name
from nullspace.integrations.peft.folders.cards import CARD
from nullspace.methods import METHODS
from nullspace.model.linear import weight_shape
from nullspace.model.sites import find_targets

MOST, EQUAL = 8, 3
ABLE = [name for name, each in METHODS.items() if each.shares is not None]
BATCH = random_batches(1, 2, 24, seed=7)[0]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**BATCH).logits


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def ranks_of(model: PeftModel) -> dict[str, int]:
    return {name: layer.r["default"] for name, layer in lora_layers(model, "default").items()}


def uniform(model: nn.Module, rank: int, frozen: bool) -> int:
    """Trained parameters of adapters of one rank in all layers."""
    shapes = [weight_shape(layer) for layer in find_targets(model).values()]
    return sum(rank * (d_out if frozen else d_out + d_in) for d_out, d_in in shapes)


CASES = [(method, False) for method in ABLE] + [("lora-null", True)]


@pytest.mark.parametrize(("method", "rslora"), CASES)
def test_no_more_parameters_than_uniform_ranks_a_better_objective_and_the_same_scaling(method: str, rslora: bool) -> None:
    model, sources = tiny("llama"), sources_for(method, "llama")
    before, limit = logits(model), uniform(model, EQUAL, METHODS[method].frozen)
    config = LoraConfig(r=MOST, lora_alpha=20, use_rslora=rslora, alpha_pattern={"k_proj": 6})
    adapted = inject_adapters(model, config, method=method, rank_budget=EQUAL, **sources)
    ranks = ranks_of(adapted)
    assert min(ranks.values()) >= 1
    assert max(ranks.values()) <= MOST
    assert len(set(ranks.values())) > 1
    assert 0.97 * limit <= trained(adapted) <= limit
    facts = adapted.nullspace_budget["rank_budget"]
    assert facts["parameters"] == trained(adapted)
    assert facts["gain"] > facts["uniform_gain"] > 0
    for name, layer in lora_layers(adapted, "default").items():
        alpha = 6 if name.endswith("k_proj") else 20
        assert layer.scaling["default"] == pytest.approx(alpha / (math.sqrt(MOST) if rslora else MOST), rel=1e-12)
    assert (logits(adapted) - before).abs().max() <= 2e-6 * before.abs().max()


def test_a_budget_of_the_largest_rank_is_uniform_and_null_spaces_are_cut_to_the_ranks() -> None:
    sources = sources_for("b-zero", "llama")
    whole = inject_adapters(tiny("llama"), LoraConfig(r=MOST), method="b-zero", rank_budget=MOST, **sources)
    assert set(ranks_of(whole).values()) == {MOST}
    # By the definition of the leak: of the rows of A that are trained, the update of LoRA-Null reads no other direction.
    model = inject_adapters(tiny("llama"), LoraConfig(r=MOST), method="lora-null", rank_budget=EQUAL, freeze_a=True, **sources)
    for name, layer in lora_layers(model, "default").items():
        a, basis = layer.lora_A["default"].weight.double(), sources["spaces"][name].basis[:, : layer.r["default"]]
        assert (a - a @ basis @ basis.T).norm() <= 1e-6 * a.norm(), name


class Nested(nn.Module):
    """Layers whose names end alike, or alike as regular expressions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        for index, path in enumerate(["q", "x.q", "x.y.q", "x_y.q", "xzy.q", "x+.q"]):
            parent, *names = self, *path.split(".")
            for name in names[:-1]:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent._modules[name]
            layer = nn.Linear(12, 10)
            layer.weight.data.copy_(torch.outer(torch.randn(10), torch.randn(12)) if index % 2 else torch.randn(10, 12))
            parent.add_module(names[-1], layer)


def test_names_match_one_layer_each_in_plain_peft(tmp_path: Path) -> None:
    names = [name for name, module in Nested().named_modules() if isinstance(module, nn.Linear)]
    model = inject_adapters(Nested(), LoraConfig(r=10, lora_alpha=7, target_modules=names), method="pissa", rank_budget=4)
    ranks = ranks_of(model)
    assert len(ranks) == 6
    assert {ranks[name] for name in ("x.q", "x_y.q", "x+.q")} == {1}  # of rank 1: nothing more to win
    assert min(ranks[name] for name in ("q", "x.y.q", "xzy.q")) > 1
    model.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    config.init_lora_weights = True
    plain = get_peft_model(Nested(), config)
    assert ranks_of(plain) == ranks
    assert all(layer.scaling["default"] == pytest.approx(0.7, rel=1e-15) for layer in lora_layers(plain, "default").values())


@pytest.mark.parametrize(("family", "method"), [*zip(MIXTURES, ["lora-null", "contrast", "pissa", "corda-ipm"], strict=True)])
def test_experts_of_a_parameter_share_a_rank_and_count_all(family: str, method: str) -> None:
    model = mixture(family)
    before, known, limit = logits(model), moments(model), uniform(model, 2, METHODS[method].frozen)
    needs = METHODS[method].needs
    sources: dict[str, Any] = {"covariances": known} if needs else {}
    sources |= {"preserve": moments(mixture(family), seed=2)} if "preserve" in needs else {}
    adapted = inject_adapters(model, LoraConfig(r=6, lora_alpha=6), method=method, rank_budget=2, **sources)
    by_parameter: dict[str, set[int]] = {}
    for name, rank in ranks_of(adapted).items():
        by_parameter.setdefault(pattern_name(name), set()).add(rank)
    assert any(".experts." in name for name in by_parameter)
    assert all(len(ranks) == 1 for ranks in by_parameter.values())
    assert len(set.union(*by_parameter.values())) > 1
    assert adapted.nullspace_budget["rank_budget"]["parameters"] == trained(adapted) <= limit
    assert (logits(adapted) - before).abs().max() <= 1e-5 * before.abs().max()


def test_record_and_card_say_how_ranks_are_distributed(tmp_path: Path) -> None:
    sources = sources_for("eva", "llama")
    model = inject_adapters(tiny("llama"), LoraConfig(r=MOST), method="eva", rank_budget=EQUAL, **sources)
    save_init(tmp_path / "init", model)
    facts = model.nullspace_budget["rank_budget"]
    card = (tmp_path / "init" / "adapter" / CARD).read_text(encoding="utf-8")
    assert f"{facts['smallest']} to {facts['largest']} ({facts['parameters']:,} trained parameters" in card
    model.save_pretrained(tmp_path / "trained")
    assert f"{facts['parameters']:,} trained parameters" in (tmp_path / "trained" / CARD).read_text(encoding="utf-8")


def unread() -> Iterator[Any]:
    raise AssertionError("the data are read")
    yield


@pytest.mark.parametrize(
    ("method", "budget", "config", "error", "message"),
    [
        ("contrast", 9, {"r": 8}, ValueError, "rank_budget must be between 1 and 8"),
        ("contrast", 9, {"r": 4, "rank_pattern": {"q_proj": 8}}, ValueError, "rank_budget must be between 1 and 8"),
        ("contrast", 0, {"r": 8}, ValueError, "rank_budget must be between 1 and 8"),
        ("contrast", 2.5, {"r": 8}, TypeError, "rank_budget"),
        ("contrast", True, {"r": 8}, TypeError, "rank_budget"),
        ("orthogonal", 2, {"r": 8}, ValueError, "'orthogonal' has no objective.*contrast"),
    ],
)
def test_a_bad_budget_is_refused_before_the_data_are_read(
    method: str, budget: Any, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    data: dict[str, Any] = {} if method == "orthogonal" else {"task": unread(), "keep": unread()}
    with pytest.raises(error, match=message):
        prepare(tiny("llama"), None, LoraConfig(**config), method=method, rank_budget=budget, progress=False, **data)
    with pytest.raises(error, match=message):
        inject_adapters(tiny("llama"), LoraConfig(**config), method=method, rank_budget=budget, **sources_for(method, "llama"))


def test_prepare_distributes_what_it_calibrates() -> None:
    batches = random_batches(2, 2, 24)
    model = prepare(
        tiny("llama"), None, LoraConfig(r=MOST), keep=batches, method="lora-null", freeze_a=True, rank_budget=EQUAL, progress=False
    )
    assert len(set(ranks_of(model).values())) > 1
    assert max(ranks_of(model).values()) <= MOST
