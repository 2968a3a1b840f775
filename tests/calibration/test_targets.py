"""What `"all-linear"` leaves out with one warning and explicit targets refuse by name, and `exclude`: the same everywhere."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models import SMALL, random_batches, tiny
from nullspace import NullSpaces, compute_covariances, compute_null_spaces, stream_covariances
from nullspace.model.linear import unlike_linear
from nullspace.model.sites import find_targets
from nullspace.planning.forecast import forecast
from nullspace.planning.plan import Workload

RANK = 4
BATCHES = random_batches(2, 2, 64)
TWO = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 2}


def phimoe() -> nn.Module:
    """Routers that subclass `nn.Linear` and return a tuple; experts that are one tensor."""
    torch.manual_seed(0)
    return transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**TWO, num_local_experts=4, num_experts_per_tok=2)).eval()


def deepseek_v4() -> nn.Module:
    """A subclass of `nn.Linear` that takes its input in groups."""
    torch.manual_seed(0)
    sizes = {**TWO, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_layer_types": ["moe"] * 2}
    config = transformers.DeepseekV4Config(**sizes, **experts, qk_rope_head_dim=8, layer_types=["sliding_attention"] * 2)
    return transformers.DeepseekV4ForCausalLM(config).eval()


def qwen2_moe() -> nn.Module:
    """`shared_expert_gate` has one output."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**TWO, **experts)).eval()


def matrices(model: nn.Module) -> dict[str, int]:
    """Sizes of the parameters with two axes or more, but embeddings and head."""
    aside = {"embed_tokens.weight", "lm_head.weight"}
    return {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(tuple(aside))}


@pytest.mark.parametrize(
    ("make", "odd", "why"),
    [
        (phimoe, "model.layers.0.mlp.router", r"\(PhimoeTopKRouter\) returns tuple, not a tensor"),
        (deepseek_v4, "model.layers.0.self_attn.o_a_proj", r"\(DeepseekV4GroupedLinear, .*\) turns .* into"),
        (qwen2_moe, "model.layers.0.mlp.shared_expert_gate", r"\(1 × 48\) is smaller than rank 4"),
    ],
)
@pytest.mark.parametrize("strategy", ["resident", "layerwise"])
def test_all_linear_leaves_out_what_is_no_target_with_one_warning(make: Any, odd: str, why: str, strategy: str) -> None:
    model = make()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        spaces = compute_null_spaces(model, BATCHES, rank=RANK, strategy=strategy, progress=False)
    (message,) = [str(w.message) for w in said if issubclass(w.category, UserWarning) and "all-linear" in str(w.message)]
    assert re.search(rf"'{odd}' \(and 1 more like it\) {why}", message), message
    assert odd not in spaces
    covered = {name.partition("[")[0] for name in spaces}
    assert "model.layers.0.mlp.experts.gate_up_proj" in covered
    sizes = matrices(model)
    left = sum(size for name, size in sizes.items() if name.removesuffix(".weight") not in covered)
    assert f"{left / sum(sizes.values()):.2%} of the parameters" in message
    if "smaller" in why:
        return
    with pytest.raises(ValueError, match=rf"target '{odd}' {why}"):
        compute_null_spaces(model, BATCHES, rank=RANK, strategy=strategy, targets=[odd], progress=False)


def test_a_layer_smaller_than_the_rank_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"rank 4 .*shared_expert_gate' \(1 × 48\)"):
        compute_null_spaces(qwen2_moe(), BATCHES, rank=RANK, targets=["shared_expert_gate"], progress=False)


def test_a_rank_that_does_not_fit_half_of_the_model_is_refused_before_it_is_run() -> None:
    with pytest.raises(ValueError, match="rank 48 does not leave"):
        compute_null_spaces(tiny("llama"), iter(()), rank=48, progress=False)


@pytest.mark.filterwarnings("ignore:.* sites saw fewer tokens")
def test_everything_takes_the_same_layers(tmp_path: Path) -> None:
    model = phimoe()
    with pytest.warns(UserWarning, match="router"):
        spaces = compute_null_spaces(model, BATCHES, rank=RANK, progress=False)
    with pytest.warns(UserWarning, match="router"):
        kept = compute_covariances(model, BATCHES, tmp_path / "c", progress=False)
    with pytest.warns(UserWarning, match="router"):
        streamed = [name for site, _ in stream_covariances(model, BATCHES, progress=False) for name in site.members]
    assert list(spaces) == list(kept)
    assert sorted(spaces) == sorted(streamed)
    assert list(NullSpaces.from_covariances(kept, rank=RANK, progress=False)) == list(spaces)


def test_a_run_that_goes_on_leaves_out_the_same(tmp_path: Path) -> None:
    model = phimoe()
    with pytest.warns(UserWarning, match="router"):
        first = compute_null_spaces(model, BATCHES, rank=RANK, progress=False, checkpoint=tmp_path / "kept")
    with pytest.warns(UserWarning, match="router"):
        again = compute_null_spaces(model, BATCHES, rank=RANK, progress=False, checkpoint=tmp_path / "kept")
    assert list(first) == list(again)


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.1 * super().forward(x)


class Counted(nn.Linear):
    """Has a forward of its own, and returns W x + b."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("d_in", [3, 4096])
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_looked_at_not_the_class(dtype: torch.dtype, d_in: int, bias: bool) -> None:
    torch.manual_seed(0)
    for kind, good in ((nn.Linear, True), (Counted, True), (Scaled, False)):
        layer = kind(d_in, 40, bias=bias).to(dtype)
        for x in (torch.randn(2, 9, d_in), torch.randn(2, 9, d_in) + 30, torch.zeros(1, 2, d_in), torch.randn(0, d_in)):
            x = x.to(dtype)
            why = unlike_linear(layer, x, layer(x))
            assert (why is None) == (good or not layer(x).any()), why


def test_nan_is_refused_by_its_own_name_and_not_taken_for_another_function() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"0, batch 1: .*NaN"):
        compute_null_spaces(model, [torch.full((40, 6), float("nan"))], rank=2, progress=False)


def test_a_layer_with_two_names_is_left_out() -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
    model["second"] = model["first"]
    found = find_targets(model)
    assert list(found) == ["other"]
    assert "same layer registered twice" in found.left_out["first"]
    with pytest.warns(UserWarning, match=r"'first' and 'second' are the same layer .*50.00%"):
        found.settle(model)


# ---- exclude


@pytest.mark.parametrize(
    ("exclude", "kinds"),
    [
        (["q_proj", "mlp.up_proj"], {"k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}),
        (r".*\.(q|up)_proj", {"k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}),
        (["self_attn.q_proj"], {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_exclude_takes_layers_away_everywhere(exclude: Any, kinds: set[str], tmp_path: Path) -> None:
    model = tiny("llama")
    assert {name.rpartition(".")[2] for name in find_targets(model, exclude=exclude)} == kinds
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*all-linear")  # what the user takes away is not left out
        spaces = compute_null_spaces(model, BATCHES, rank=RANK, exclude=exclude, progress=False)
        kept = compute_covariances(model, BATCHES, tmp_path / "c", exclude=exclude, progress=False)
    assert {name.rpartition(".")[2] for name in spaces} == kinds
    assert list(kept) == list(spaces)
    sites = [site for site, _ in stream_covariances(model, BATCHES, exclude=exclude, progress=False)]
    assert {name for site in sites for name in site.members} == set(spaces)
    whole, part = (forecast(model, Workload(rank=RANK, device="cpu", exclude=e))[0].flops["sums"] for e in (None, ["down_proj"]))
    assert part < whole


def test_exclude_comes_after_explicit_targets() -> None:
    found = find_targets(tiny("llama"), ["q_proj"], exclude=r"model\.layers\.[02]\..*")
    assert list(found) == ["model.layers.1.self_attn.q_proj"]


def test_exclude_may_name_what_all_linear_would_warn_of() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*all-linear")
        compute_null_spaces(phimoe(), BATCHES, rank=RANK, exclude=r".*(experts.*|router)", progress=False)


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        (["q_proj", "zzz"], ValueError, "exclude: 'zzz' matches no target"),
        ("q_proj", ValueError, r"exclude='q_proj' matches no target. A string is a regular expression"),
        ("(", ValueError, r"exclude='\(' is not a regular expression"),
        ([], ValueError, "exclude is empty"),
        (".*", ValueError, r"exclude='\.\*' takes away all of targets='all-linear'"),
        ({"q_proj": torch.ones(1, 48)}, TypeError, "belong to avoid="),
    ],
)
def test_an_exclude_that_takes_nothing_or_everything_is_refused(exclude: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compute_null_spaces(tiny("llama"), BATCHES, rank=RANK, exclude=exclude, progress=False)
