"""From a configuration class to the configuration of a tiny model, by the names of the sizes in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from benchmarks.families.odd import MORE

WIDTH, HEADS, HEAD, INNER, LAYERS, VOCABULARY = 64, 4, 16, 96, 3, 256
# Beside a language model: its vision or audio tower.
TOWER_LAYERS = 2
ROPE_SECTIONS = [2, 3, 3]  # of the 8 frequencies of a head of 16

# What a size is called, as a regular expression for the whole name, and its value. The first that matches counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(swa_|vision_|decoder_|encoder_|audio_|index_|linear_)?(num_)?(attention_|attn_)?n?_?heads?", HEADS),
    (r"num_(encoder|decoder)_attention_heads|resampler_n_heads|linear_num_(key|value)_heads|n_heads?|encoder_n_heads", HEADS),
    (
        r"(swa_|resampler_|linear_|index_|global_|attention_)?(key_|value_|qk_|v_)?(head_dim|dim_head|d_head)|d_kv|kv_channels|attention_head_size",
        HEAD,
    ),
    (r"qk_(nope|rope)_head_dim", HEAD),
    (r"(mamba_)?(num_heads|n_heads)|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_(d_head|head_dim)", HEAD),
    (r"hidden_size_per_layer_input|hidden_size_global|laurel_rank", 16),
    (r"mamba_d_ssm", 128),
    (r"(.*_)?moe_(shared_expert_)?intermediate_size|shared_(expert_)?intermediate_size|(expert_|moe_)?ffn_hidden_size", 48),
    (
        r"(.*_)?intermediate_size(_mlp)?|(encoder_|decoder_|t2u_encoder_|t2u_decoder_)?ffn_dim|d_ff|dff|dim_ff|n_inner|mlp_dim",
        INNER,
    ),
    (
        r"(.*_)?(hidden_size|hidden_dim|embed_dim|embedding_size|embedding_dim|emb_dim)|d_model|n_embd|dim|hidden_dims?|d_embed|d_inner",
        WIDTH,
    ),
    (r"(.*_)?(lru_width|word_embed_proj_dim|projection_dim|output_dim|out_hidden_size|adapter_out_dim|vision_output_dim)", WIDTH),
    (r"(vit_)?(projector|downsample|num_hidden)_hidden_size|prediction_head_size", WIDTH),
    (r"(q|kv|o)_lora_rank", 32),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|n_experts", 4),
    (r"num_experts_per_tok(en)?|moe_(top_?)?k|top_k_experts|num_selected_experts|num_experts_top_k", 2),
    (r"(n|num|moe_num)_shared_experts|n_group|topk_group|num_expert_group|(mamba_)?n_groups|num_nextn_predict_layers", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(text_|vision_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions", 128),
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 16),
    (r"time_step_rank|mamba_dt_rank", 8),
    (
        r"(.*_)?sliding_window(_size)?|window_size|attention_window_size|attention_chunk_size|(local_)?attention(_window)?|window_left",
        16,
    ),
    (r"(mamba_)?chunk_size|block_size", 16),
    (r"(num_hidden|n|num|encoder|decoder|num_encoder|num_decoder|num_transformer)_?layers?", LAYERS),
    (r"(t2u_|speech_)?(encoder|decoder)_layers|depth|num_global_layers|resampler_depth|num_adapter_layers", TOWER_LAYERS),
    (r"image_size|img_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|mel_dim|input_feat_size", 16),
    (r"num_query_tokens|num_queries|image_seq_length|mm_tokens_per_image|num_image_tokens|latent_query_num|prompt_length", 4),
    (r"num_position_embeddings", 16),
    (r"index_topk|index_kpool", 8),
    (r"zero_expert_num|num_kv_shared_layers", 1),
    (r"num_codebooks", 1),
    (r"rotary_dim", 8),
)
KEY_VALUE_HEADS = r"(swa_)?num_key_value_heads|kv_n_heads|num_kv_heads"
ALL_HEADS = ("num_attention_heads", "swa_num_attention_heads", "n_heads", "n_head")
# Embeddings of their own for whatever is no text; texts have the tokens from 4 to 199.
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
TEXT_TOKENS = range(4, 200)

# A configuration may derive some sizes from others, and then takes none or other values: they are left out in turn.
LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"),
    ("head_dim", "layer_types"),
    ("qk_head_dim", "head_dim"),
    ("v_head_dim", "qk_head_dim"),
    ("num_key_value_heads", "num_attention_heads", "head_dim"),
    ("num_key_value_heads",),
    ("sliding_window", "num_kv_shared_layers"),
    ("n_group", "topk_group", "first_k_dense_replace", "n_groups"),
)
_RULES = tuple((re.compile(pattern), value) for pattern, value in SIZES)


def size_of(name: str) -> int | None:
    """The tiny value of a size of this name; None if it is no size."""
    return next((value for pattern, value in _RULES if pattern.fullmatch(name)), None)


def shrunk(
    config_class: type[PreTrainedConfig],
    left_out: Iterable[str] = (),
    *,
    more: Mapping[str, Any] | None = None,
    plain: PreTrainedConfig | None = None,
    tower: bool = False,
) -> PreTrainedConfig:
    """A configuration of the same kind with tiny sizes, and so in the configurations nested in it.

    Args:
        config_class: of the configuration.
        left_out: names to leave to the configuration class.
        more: arguments that count more than any rule.
        plain: a configuration to start from; by default that of the class without arguments.
        tower: whether it is that of another part than the text's, which gets fewer layers.
    """
    plain = config_class() if plain is None else plain
    left_out = set(left_out)
    layers = TOWER_LAYERS if tower else LAYERS
    more = {**MORE.get(config_class.model_type, {}), **(more or {})}
    given: dict[str, Any] = {}
    special = iter(range(VOCABULARY - 1, TEXT_TOKENS.stop, -1))
    for name, value in vars(plain).items():
        if name.startswith("_") or (name in left_out and name not in more):
            continue
        if re.fullmatch(KEY_VALUE_HEADS, name) and isinstance(value, int):
            given[name] = HEADS if value in (getattr(plain, heads, None) for heads in ALL_HEADS) else HEADS // 2
        elif isinstance(value, PreTrainedConfig):
            inner = name not in ("text_config", "decoder", "decoder_config", "thinker_config", "text_encoder")
            given[name] = shrunk(type(value), left_out, plain=value, tower=inner)
        else:
            small = _small(name, value, layers, special)
            if small is not None:
                given[name] = small
    try:
        return config_class(**{**given, **more})
    except Exception:  # some derive the width of a head, and take none
        if "head_dim" not in given or plain.head_dim is not None:
            raise
        del given["head_dim"]
        return config_class(**{**given, **more})


def _small(name: str, value: Any, layers: int, special: Any) -> Any:
    """The tiny value of an attribute; None to leave it to the configuration class."""
    if name in SPECIAL and isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
        return SPECIAL[name]
    if re.fullmatch(r".*_token_(id|index)|.*_(token|index)_id", name) and isinstance(value, int) and value > TEXT_TOKENS.start:
        return next(special)
    if name == "head_dim" and value is None:
        return HEAD
    if name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types") and value:
        kinds = list(dict.fromkeys(value))
        return [kinds[i % len(kinds)] for i in range(layers)]
    if name == "rope_parameters" and isinstance(value, Mapping):
        return _rope(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    small = size_of(name)
    return min(layers, small) if small == LAYERS and "layer" in name else small


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings whose sections fit a head."""
    made = {key: _rope(inner) if isinstance(inner, Mapping) else inner for key, inner in value.items()}
    if "mrope_section" in made:
        made["mrope_section"] = list(ROPE_SECTIONS)
    return made
