"""Tiny models with random weights, one of each family that the engine must understand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import nn

from nullspace import NullSpace, NullSpaces, Site

VOCABULARY = 211


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
        )
    )


def _qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def _gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=256)
    )


def _opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=48,
            pad_token_id=1,
        )
    )


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )


def _albert() -> nn.Module:
    """One block's weights, called at every depth."""
    return transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=32,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gemma": _gemma,
    "gpt2": _gpt2,
    "opt": _opt,
    "bert": _bert,
    "albert": _albert,
}


SMALL: dict[str, int] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def _qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16))


def _gemma3() -> nn.Module:
    """Sliding and full attention in turns: the blocks are handed different masks and rotary embeddings."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=16, sliding_window=8, layer_types=kinds)
    )


def _mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16))


def _phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0))


def _gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))


def _falcon() -> nn.Module:
    """Its blocks return tuples."""
    sizes = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, ffn_hidden_size=96))


# What a layerwise pass must understand.
CHAINS: dict[str, Callable[[], nn.Module]] = {
    **{name: FAMILIES[name] for name in ("llama", "qwen2", "gemma", "gpt2", "opt", "bert")},
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mistral": _mistral,
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
}


def tiny(family: str, seed: int = 0) -> nn.Module:
    """A tiny model of a family, in eval mode."""
    torch.manual_seed(seed)
    return {**FAMILIES, **CHAINS}[family]().eval()


def random_batches(
    batches: int = 4, batch_size: int = 4, length: int = 64, *, padding: str | None = None, seed: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Random token ids; `padding` "left" or "right" masks a different number of tokens in every sequence."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        ids = torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
        mask = torch.ones_like(ids)
        if padding is not None:
            for row, pad in enumerate(torch.randint(0, length // 2, (batch_size,), generator=generator).tolist()):
                mask[row, slice(None, pad) if padding == "left" else slice(length - pad, None)] = 0
        made.append({"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask})
    return made


def random_spaces(seed: int, sites: int) -> NullSpaces:
    """Spaces of sites of width 64, of no model."""
    generator = torch.Generator().manual_seed(seed)
    return NullSpaces(
        NullSpace(
            basis=torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64, generator=generator)).Q,
            eigenvalues=torch.arange(8, dtype=torch.float64),
            trace=1e3,
            tokens=99,
            gap=0.1,
            outliers=0,
            precision="mixed",
            excess_estimate=0.0,
            excess_bound=0.0,
            nullity=0,
            site=Site((f"layers.{i}.up",), 64),
        )
        for i in range(sites)
    )


def write_checkpoint(folder: Path) -> None:
    """A random two-layer Llama with a byte-level tokenizer."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<pad>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
