"""Tiny models of transformers' families, built from their configuration classes by the names of the sizes in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 3, 211

# What a size is called in one configuration or another, and what it becomes in a tiny one.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("lru_width", "mamba_d_ssm", "linear_attn_hidden_size", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "feed_forward_proj_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "mamba_d_head", "mamba_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "local_attention"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "first_k_dense_replace", "num_kv_shared_layers", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("linear_num_heads", "d_conv", "conv_l_cache"), 4),
    **dict.fromkeys(("linear_head_dim", "rotary_dim"), 8),
    "mamba_chunk_size": 16,
    "chunk_size": 16,
}
# Where the names alone do not make a model.
MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "zaya": {"num_experts_per_tok": 1},
    "nemotron": {"num_key_value_heads": 2},
    "musicgen": {"ffn_dim": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "moe_topk": 2},
    "ministral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "mamba2": {"num_heads": 8, "expand": 2, "head_dim": 8, "n_groups": 1},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 64},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_n_heads": 8},
}


# Of these, a configuration may derive some from others, and then takes none or other values: they are left out in turn.
LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"),
    ("head_dim", "layer_types"),
    ("qk_head_dim", "head_dim"),
    ("v_head_dim", "qk_head_dim"),
    ("num_key_value_heads", "num_attention_heads", "head_dim"),
    ("sliding_window", "num_kv_shared_layers"),
    ("pad_token_id", "bos_token_id", "eos_token_id"),
    ("n_group", "topk_group", "first_k_dense_replace", "n_groups"),
)


def sizes(config: type[Any], kind: str) -> dict[str, Any]:
    """The sizes of `SIZES` that a configuration has."""
    plain = config()
    given = {}
    for name, value in SIZES.items():
        with contextlib.suppress(Exception):  # what is not the same for all layers
            known = getattr(plain, name, None)
            if isinstance(known, (int, float)) and not isinstance(known, bool):  # no window is a setting of its own
                given[name] = value
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        kinds = getattr(plain, name, None)
        if isinstance(kinds, (list, tuple)) and kinds:
            several = list(dict.fromkeys(kinds))
            given[name] = [several[i % len(several)] for i in range(LAYERS)]
    return {**given, **MORE.get(kind, {})}


def classes(which: str) -> dict[str, str]:
    """Model type → class, of `"causal"` models or `"encoder"`s."""
    names = {"causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES"}[which]
    return {kind: name for kind, name in getattr(modeling_auto, names).items() if isinstance(name, str)}


def build(kind: str, name: str) -> nn.Module:
    """A tiny model of a class that runs, in float64 if it can, in eval mode; whatever it raises means that there is none."""
    made: Any = getattr(transformers, name)
    given = sizes(made.config_class, kind)
    errors: list[Exception] = []
    for left_out in LEFT_OUT:
        own = {key: value for key, value in given.items() if key not in left_out or key in MORE.get(kind, {})}
        try:
            return _run(made, own)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _run(made: Any, given: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        weights = made._from_config(made.config_class(**given)).parameters()
        if sum(p.numel() for p in weights) > 4_000_000:
            raise ValueError(f"{made.__name__} is not tiny")
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = made._from_config(made.config_class(**given)).to(dtype).eval()
        with contextlib.suppress(Exception):  # grouped products take no float64
            model.set_experts_implementation("eager")
        try:
            with torch.no_grad():
                model(input_ids=torch.arange(5, 29)[None], use_cache=False)
        except Exception:
            if dtype is torch.float32:
                raise
        else:
            break
    assert isinstance(model, nn.Module)
    return model


def t5_encoder() -> nn.Module:
    """Its first block makes the bias that all blocks add."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=HEADS)
    return transformers.T5EncoderModel(config).double().eval()


ODD: dict[str, Callable[[], nn.Module]] = {"T5EncoderModel": t5_encoder}
