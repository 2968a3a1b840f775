"""Which layers `targets` names: every family's linear layers, names, endings, expressions, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from models import FAMILIES, tiny
from nullspace.model.linear import is_conv1d, is_linear, output_head, weight_shape
from nullspace.model.sites import Site, find_targets

HEADS = {
    "llama": "lm_head",
    "qwen2": "lm_head",
    "gemma": "lm_head",
    "gpt2": "lm_head",
    "opt": "lm_head",
    "bert": "cls.predictions.decoder",
    "albert": "predictions.decoder",
}


class Shared(nn.Module):
    """One linear layer under two names, beside an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.other = nn.Linear(3, 3)


class SharedBlock(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(3, 3))
        self.down = self.up


def matrices(model: nn.Module) -> set[str]:
    """Modules that own a weight matrix and are no embedding: linear layers by what they hold, not by their class."""
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding) and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_weight_matrix_but_the_output_head(family: str) -> None:
    model = tiny(family)
    found = find_targets(model)
    assert set(found) == matrices(model) - {HEADS[family]}
    assert HEADS[family] in matrices(model)
    order = [name for name, _ in model.named_modules() if name in found]
    assert list(found) == order
    assert all(found[name] is module for name, module in model.named_modules() if name in found)


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda c: transformers.LlamaForSequenceClassification(c), "score"),
        (lambda c: transformers.LlamaForTokenClassification(c), "score"),
        (lambda c: transformers.LlamaModel(c), None),
    ],
)
def test_a_new_classification_head_is_no_target(make: Callable[..., nn.Module], head: str | None) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = make(config)
    assert set(find_targets(model)) == matrices(model) - {head}
    assert output_head(model) is (None if head is None else model.get_submodule(head))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_output_head_is_a_target_when_it_is_named(family: str) -> None:
    assert list(find_targets(tiny(family), ["lm_head"])) == ["lm_head"]
    assert "lm_head" in find_targets(tiny(family), ".*")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weight_shape_is_what_the_layer_computes(family: str) -> None:
    for name, module in find_targets(tiny(family)).items():
        d_out, d_in = weight_shape(module)
        assert module(torch.zeros(1, d_in)).shape == (1, d_out), name


def test_conv1d_stores_its_weight_the_other_way_round() -> None:
    layer = Conv1D(5, 3)  # 5 outputs, 3 inputs
    assert layer.weight.shape == (3, 5)
    assert weight_shape(layer) == (5, 3)
    assert weight_shape(nn.Linear(3, 5)) == (5, 3)
    assert is_conv1d(layer)
    assert not is_conv1d(nn.Linear(3, 5))


def test_a_subclass_of_a_linear_layer_is_linear_and_a_namesake_is_not() -> None:
    assert is_linear(type("Mine", (nn.Linear,), {})(2, 3))
    assert is_linear(type("Mine", (Conv1D,), {})(2, 3))
    assert not is_linear(type("Conv1D", (nn.Module,), {})())
    assert not is_linear(nn.Conv1d(2, 3, 1))
    assert not is_linear(nn.Embedding(2, 3))


def test_a_list_names_layers_by_endings_behind_a_dot() -> None:
    model = tiny("llama")
    assert set(find_targets(model, ["q_proj", "mlp.up_proj"])) == {
        f"model.layers.{i}.{ending}" for i in range(3) for ending in ("self_attn.q_proj", "mlp.up_proj")
    }
    # "proj" ends every name but stands behind an underscore, and must not match any.
    with pytest.raises(ValueError, match="'proj' matches no module"):
        find_targets(model, ["proj"])


def test_a_list_names_layers_in_full() -> None:
    name = "model.layers.1.mlp.down_proj"
    assert list(find_targets(tiny("llama"), [name])) == [name]


def test_targets_come_in_the_models_order_whatever_the_order_asked_for() -> None:
    names = ["model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    assert list(find_targets(tiny("llama"), names)) == [names[2], names[1], names[0]]
    assert list(find_targets(tiny("llama"), (name for name in names))) == [names[2], names[1], names[0]]


def test_overlapping_entries_name_a_layer_once() -> None:
    assert list(find_targets(tiny("llama"), ["lm_head", "lm_head"])) == ["lm_head"]


def test_an_expression_must_match_the_whole_name() -> None:
    model = tiny("llama")
    assert set(find_targets(model, r".*\.[qk]_proj")) == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qk"}
    with pytest.raises(ValueError, match=r"targets='\[qk\]_proj' matches no module.*whole module names"):
        find_targets(model, "[qk]_proj")
    with pytest.raises(ValueError, match="matches no module"):
        find_targets(model, r"model\.layers\.0\.self_attn\.q_pro")


def test_an_expression_leaves_out_what_is_not_linear() -> None:
    found = find_targets(tiny("llama"), r"model\.layers\.0\..*")
    assert len(found) == 7
    assert all(isinstance(module, nn.Linear) for module in found.values())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "qq_proj"], r"'qq_proj' matches no module\. Did you mean 'q_proj'\?"),
        (["model.layers.0.self_attn.qproj"], r"'model\.layers\.0\.self_attn\.qproj' matches no module\. Did you mean 'q_proj'\?"),
        (["zzz"], r"'zzz' matches no module\. Linear layers here end in: q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (["q_proj", "mlp"], r"'mlp' matches 'model\.layers\.0\.mlp', which is LlamaMLP, not a linear layer"),
        (["embed_tokens"], r"'embed_tokens' matches 'model\.embed_tokens', which is Embedding, not a linear layer"),
        ([], r"targets is empty"),
        ([""], r"'' matches no module"),
        (".*(_proj", r"targets='\.\*\(_proj' is not a regular expression"),
        ("q_proj", r"targets='q_proj' matches no module"),
        ("", r"targets='' matches no module"),
        (r".*\.mlp", r"matches only modules that are not linear, such as 'model\.layers\.0\.mlp'"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_by_name(targets: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(tiny("llama"), targets)


def test_a_hint_is_given_only_where_a_name_is_close() -> None:
    with pytest.raises(ValueError, match="'zzz' matches no module") as error:
        find_targets(tiny("llama"), ["zzz"])
    assert "Did you mean" not in str(error.value)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Embedding has no linear layer"):
        find_targets(nn.Embedding(3, 4))


@pytest.mark.parametrize("targets", [["first"], ["second"], ["first", "second"], "first", "second", "first|second"])
def test_a_layer_with_two_names_is_refused_naming_both(targets: str | list[str]) -> None:
    with pytest.raises(ValueError, match="same layer registered twice") as error:
        find_targets(Shared(), targets)
    assert "'first'" in str(error.value)
    assert "'second'" in str(error.value)


def test_a_layer_in_a_block_with_two_names_is_refused_naming_both() -> None:
    with pytest.raises(ValueError, match=r"'up\.0' and 'down\.0' are the same layer"):
        find_targets(SharedBlock())


def test_a_layer_with_two_names_does_not_stand_in_the_way_of_others() -> None:
    assert list(find_targets(Shared(), ["other"])) == ["other"]


def test_weights_that_are_tied_between_two_layers_are_two_targets() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(find_targets(model)) == ["0", "1"]


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], ["v_proj"], r".*\.q_proj", r".*\.q_proj\.base_layer", r".*\.lora_A\..*"]
)
def test_a_model_that_carries_lora_layers_is_refused(targets: str | list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=r"already carries a LoRA adapter .*\('.*q_proj'\)"):
        find_targets(model, targets)
    assert len(find_targets(model.unload(), ["q_proj"])) == 3


def test_a_site_is_called_by_its_first_member() -> None:
    site = Site(("a.q", "a.k"), 4)
    assert (site.name, str(site)) == ("a.q", "a.q")
    assert site == Site(("a.q", "a.k"), 4)
    assert hash(site) == hash(Site(("a.q", "a.k"), 4))
