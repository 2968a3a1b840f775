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


# ---- samples


Sample = dict[str, torch.Tensor]


def _image(family: str, generator: torch.Generator, number: int) -> tuple[int, Sample]:
    """How many tokens an image or a sound takes, and its tensors; every second one is smaller than its frame."""
    smaller = number % 2 == 1
    if family == "llava":
        return 9, {"pixel_values": torch.randn(1, 3, 12, 12, generator=generator)}
    if family == "qwen2_vl":
        high = 2 if smaller else 4
        pixels = torch.randn(4 * high, 24, generator=generator)
        return high, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, high, 4]])}
    if family == "idefics3":
        shown = torch.ones(1, 1, 16, 16, dtype=torch.long)
        shown[..., 8 if smaller else 16 :] = 0
        pixels = torch.randn(1, 1, 3, 16, 16, generator=generator) * shown[:, :, None]
        return 4, {"pixel_values": pixels, "pixel_attention_mask": shown}
    if family == "mllama":
        pixels = torch.randn(1, 1, 2, 3, 8, 8, generator=generator)
        two = {"aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long), "aspect_ratio_ids": torch.tensor([[2]])}
        return 1, {"pixel_values": pixels, **two}
    frames = 40 if smaller else 64
    mask = (torch.arange(64) < frames).long()[None]
    sound = torch.randn(1, 8, 64, generator=generator) * mask[:, None]
    return frames // 4, {"input_features": sound, "feature_attention_mask": mask}


def samples(family: str, lengths: tuple[int, ...] = (7, 9, 4)) -> list[Sample]:
    """One batch a sample: texts of these lengths; all but the second have an image (with mllama, that one too)."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number, length in enumerate(lengths):
        ids, image = torch.randint(3, 59, (length,), generator=generator), {}
        if number != 1 or family == "mllama":
            tokens, image = _image(family, generator, number // 2)
            ids = torch.cat([ids[:2], torch.tensor([61]), torch.full((tokens,), IMAGE), ids[2:]])
        made.append(
            _completed(family, {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **image})
        )
    return made


def collated(family: str, alone: list[Sample], side: str) -> Sample:
    """One batch of samples, padded on a side."""
    length = max(sample["input_ids"].shape[1] for sample in alone)
    batch: Sample = {}
    for name in ("input_ids", "attention_mask"):
        rows = []
        for sample in alone:
            lack = length - sample[name].shape[1]
            rows.append(nn.functional.pad(sample[name], (lack, 0) if side == "left" else (0, lack)))
        batch[name] = torch.cat(rows)
    for name in dict.fromkeys(key for sample in alone for key in sample if key not in (*batch, *COMPLETED)):
        first = next(sample[name] for sample in alone if name in sample)
        nothing = [torch.zeros_like(first)] if family == "idefics3" else []  # an image of zeros where a row has none
        batch[name] = torch.cat([each for sample in alone for each in ([sample[name]] if name in sample else nothing)])
    return _completed(family, batch)


COMPLETED = ("cross_attention_mask", "mm_token_type_ids")


def _completed(family: str, batch: Sample) -> Sample:
    """A batch with what follows from its tokens."""
    ids = batch["input_ids"]
    if family == "qwen2_vl":
        return {**batch, "mm_token_type_ids": (ids == IMAGE).long()}
    if family == "mllama":  # tokens behind the image attend to it, in both of its tiles
        behind = (ids == IMAGE).long().cumsum(1) * batch["attention_mask"]
        return {**batch, "cross_attention_mask": behind[..., None, None].expand(-1, -1, 1, 2).contiguous()}
    return batch
