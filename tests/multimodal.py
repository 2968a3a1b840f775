"""Tiny models that take images or sounds beside text, and samples for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 64
IMAGE = 63
"""The token in whose place an image's or a sound's vectors are put."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
}


def _llava() -> nn.Module:
    """Its projector takes the tower's last but one hidden states: the last block's weights have no effect."""
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION, image_size=12)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )


def _qwen2_vl() -> nn.Module:
    """All patches of all images in one row; rotary positions from the places of the images."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=61
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    """As many places for images in every row as the row with most has; padding within an image."""
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config={**VISION, "image_size": 16},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _mllama() -> nn.Module:
    """Blocks that attend to images, and are left out where there is none."""
    text = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "bos_token_id": 1, "eos_token_id": 2}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.MllamaForConditionalGeneration(config)


def _qwen2_audio() -> nn.Module:
    """Sounds are padded to one length, and the tower is given a mask."""
    audio = {
        "d_model": 16,
        "encoder_ffn_dim": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "num_mel_bins": 8,
        "max_source_positions": 32,
    }
    text = transformers.Qwen2Config(**TEXT)
    config = transformers.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=IMAGE)
    return transformers.Qwen2AudioForConditionalGeneration(config)


MULTIMODAL: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "idefics3": _idefics3,
    "mllama": _mllama,
    "qwen2_audio": _qwen2_audio,
}


def tiny_multimodal(family: str) -> nn.Module:
    """A tiny model of a family, in eval mode."""
    torch.manual_seed(0)
    return MULTIMODAL[family]().eval()
