"""Tiny models with routed experts that are one tensor, and null spaces and second moments of all their layers, made up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn

from models import VOCABULARY
from nullspace import Covariance, Covariances, NullSpaces
from nullspace.artifacts.identity import weights_of
from nullspace.model.linear import weight_shape
from nullspace.model.sites import Site, find_targets

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CHOICE = {"num_experts_per_tok": 2}


def _qwen3_moe() -> nn.Module:
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8, "num_experts": 4}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **CHOICE, **sizes, decoder_sparse_step=1))


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **CHOICE, intermediate_size=24, num_local_experts=4))


def _gpt_oss() -> nn.Module:
    """Its experts are stored transposed, gate and up interleaved, with biases."""
    sizes = {"intermediate_size": 24, "head_dim": 8, "num_local_experts": 4, "pad_token_id": 1, "eos_token_id": 2}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **CHOICE, **sizes))


def _deepseek_v3() -> nn.Module:
    """A dense layer, then one with routed and shared experts."""
    sizes = {"intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1}
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    config = transformers.DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **CHOICE, **sizes, **heads, **groups)
    return transformers.DeepseekV3ForCausalLM(config)


MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}


def mixture(family: str, seed: int = 0) -> nn.Module:
    """A tiny mixture of a family, in eval mode, with expert outputs of some size."""
    torch.manual_seed(seed)
    model = MIXTURES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # initialised with a standard deviation of 0.02, or with zeros
                parameter.normal_(0, 0.2)
    return model


def sites_of(model: nn.Module, *, pooled: bool = False) -> list[Site]:
    """One site for every layer; `pooled`: one for all matrices of a layer's experts that receive the hidden states."""
    sites: dict[str, list[str]] = {}
    targets = find_targets(model)
    for name in targets:
        together = name.partition("[")[0] if pooled and "experts.gate_up_proj[" in name else name
        sites.setdefault(together, []).append(name)
    return [Site(tuple(members), weight_shape(targets[members[0]])[1]) for members in sites.values()]


def moments(model: nn.Module, *, seed: int = 1, pooled: bool = False) -> Covariances:
    """Second moments of random inputs, for every layer of a model."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for site in sites_of(model, pooled=pooled):
        covariance = Covariance(site.d_in)
        covariance.update(torch.randn(4 * site.d_in, site.d_in, generator=generator) * torch.logspace(-2, 0, site.d_in))
        pairs.append((site, covariance))
    return Covariances(pairs, weights_of(find_targets(model)))


def null_spaces(model: nn.Module, rank: int, *, pooled: bool = False) -> NullSpaces:
    """Null spaces of the same."""
    return NullSpaces.from_covariances(moments(model, pooled=pooled), rank=rank, progress=False)
