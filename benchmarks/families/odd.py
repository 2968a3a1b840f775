"""Where the names of the sizes alone do not make a model, or tokens alone no batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {**_ROPE, "mrope_section": [2, 3, 3]}

# Model type of a configuration → arguments of its class.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "chameleon": {"vocabulary_map": {"<image>": 201, "IMGIMGBS00Z": 202}},
    "emu3": {"vocabulary_map": {"<image>": 201, "<|extra_200|>": 202}},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _MROPE)},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [48, 48]},
    "esm": {"vocab_size": 256, "pad_token_id": 1, "mask_token_id": 200},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "fun_asr_nano_adaptor": {"intermediate_size": 16},
    "glm5_next_text": {"num_key_value_heads": 4},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm46v_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm_ocr_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "qk_head_dim": 32, "head_dim": 16},
    "mamba2": {"num_heads": 8, "expand": 2, "head_dim": 16, "n_groups": 1},
    "mobilebert": {"hidden_size": 128, "embedding_size": 64, "intra_bottleneck_size": 64, "num_feedforward_networks": 2},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "perceiver": {"d_latents": 64, "num_latents": 8, "num_self_attends_per_block": 2},
    "phi4_multimodal_audio": {"nemo_conv_channels": 16},
    "reformer": {"axial_pos_shape": [4, 8], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh", "local"]},
    "step3p5": {"sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "n_mamba_heads": 2,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
        "attention_head_dim": None,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Class → arguments of its configuration, where models of one configuration differ.
OF_CLASS: dict[str, dict[str, Any]] = {
    "ReformerModelWithLMHead": {"is_decoder": True},
}


# Classes that compute some of their parts in float32 whatever the dtype of their weights, or load some weights in it.
FLOAT32 = {
    "FSMTForConditionalGeneration",
    "BeamForCausalLM",
    "NemotronHForCausalLM",
    "Nemotron3_5TranscribeForConditionalGeneration",
    "XLNetLMHeadModel",
}
# Classes whose own backward pass needs inputs with gradients.
REVERSIBLE = {"ReformerModelWithLMHead", "ReformerForMaskedLM"}


def _image(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _mel(frames: int, *, bins: int = 16, last: bool = False) -> Callable[[int], dict[str, torch.Tensor]]:
    """A spectrogram: (batch, bins, frames), or with the bins last; and which frames count, all of them."""

    def make(batch: int) -> dict[str, torch.Tensor]:
        shape = (batch, frames, bins) if last else (batch, bins, frames)
        return {"input_features": torch.randn(*shape), "attention_mask": torch.ones(batch, frames, dtype=torch.int64)}

    return make


def _wave(samples: int) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda batch: {
        "input_values": torch.randn(batch, samples),
        "attention_mask": torch.ones(batch, samples, dtype=torch.int64),
    }


def _no_types(batch: int) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": torch.zeros(batch, 32, dtype=torch.int64)}


# Class → other inputs that its forward needs, of so many sequences.
INPUTS: dict[str, Callable[[int], dict[str, torch.Tensor]]] = {
    "BlipForConditionalGeneration": _image,
    "VisionEncoderDecoderModel": _image,
    "Molmo2ForConditionalGeneration": _no_types,
    "WhisperForConditionalGeneration": _mel(256),
    "Speech2TextForConditionalGeneration": _mel(128, bins=80, last=True),
    "SeamlessM4TForSpeechToText": _mel(64, bins=160, last=True),
    "SeamlessM4Tv2ForSpeechToText": _mel(64, bins=160, last=True),
    "MoonshineForConditionalGeneration": _wave(8000),
    "MoonshineStreamingForConditionalGeneration": _wave(8000),
    "SpeechT5ForSpeechToText": _wave(8000),
    "CanaryForConditionalGeneration": _mel(256, last=True),
    "CohereAsrForConditionalGeneration": _mel(256, last=True),
}
