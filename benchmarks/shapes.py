"""The shapes of published models, with random weights: what a benchmark runs where no checkpoint can be had.

`build` makes one directly on a device: shapes on the meta device, memory without values, normal numbers in place. The weights are
scaled so that activations stay of order one through the depth: W ~ N(0, 1 / d_in), and what writes to the residual stream is
divided by √(2 · blocks). `plant_massive` and `plant_spectrum` add what trained models have and random ones lack: massive
activations, and hidden states whose second moment has a steep spectrum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.solvers import FRACTIONS, LOG_SPECTRUM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WRITERS = ("o_proj", "down_proj")  # to the residual stream


def _shape(kind: str, hidden: int, inner: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> Any:
    theta, eps = more.pop("theta"), more.pop("eps", 1e-5)
    return kind, {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": eps,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **more,
    }


# As in the config.json of each. `PARAMETERS` is what the published weights count, and the test holds one against the other.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": _shape("Llama", 576, 1536, 30, 9, 3, 49152, theta=1e5, max_position_embeddings=8192, tie_word_embeddings=True),
    "Llama-3.2-1B": _shape(
        "Llama",
        2048,
        8192,
        16,
        32,
        8,
        128256,
        theta=5e5,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Llama-2-7B": _shape("Llama", 4096, 11008, 32, 32, 32, 32000, theta=1e4, max_position_embeddings=4096),
    "Llama-3-8B": _shape("Llama", 4096, 14336, 32, 32, 8, 128256, theta=5e5, max_position_embeddings=8192),
    "Qwen3-8B": _shape("Qwen3", 4096, 12288, 36, 32, 8, 151936, theta=1e6, eps=1e-6, head_dim=128, max_position_embeddings=40960),
    "Mistral-7B": _shape("Mistral", 4096, 14336, 32, 32, 8, 32000, theta=1e4, max_position_embeddings=32768, sliding_window=4096),
    "Llama-3-70B": _shape("Llama", 8192, 28672, 80, 64, 8, 128256, theta=5e5, max_position_embeddings=8192),
    "Llama-3.1-405B": _shape(
        "Llama",
        16384,
        53248,
        126,
        128,
        8,
        128256,
        theta=5e5,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    # Not published: for dry runs.
    "tiny": _shape("Llama", 64, 176, 4, 4, 2, 211, theta=1e4, max_position_embeddings=2048),
    "forty-million": _shape("Llama", 768, 1792, 6, 12, 4, 2000, theta=1e4, max_position_embeddings=2048),
    "wide": _shape("Llama", 1024, 3072, 4, 16, 4, 2000, theta=1e4, max_position_embeddings=2048),
    "half-gigabyte": _shape("Llama", 1024, 2816, 10, 16, 4, 8000, theta=1e4, max_position_embeddings=2048),
}
PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "Mistral-7B": 7_241_732_096,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
}


def config(name: str, *, blocks: int | None = None) -> Any:
    """A transformers configuration.

    Args:
        name: a key of `SHAPES`.
        blocks: cut the depth to this many; all by default.

    Raises:
        ValueError: if there is no such shape, or it has fewer blocks.
    """
    if name not in SHAPES:
        raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    kind, values = SHAPES[name]
    whole = values["num_hidden_layers"]
    if blocks is not None and not 1 <= blocks <= whole:
        raise ValueError(f"{name} has {whole} blocks, not {blocks}")
    return getattr(transformers, f"{kind}Config")(**{**values, "num_hidden_layers": blocks or whole})


def empty(name: str, *, blocks: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model on the meta device."""
    kind = SHAPES[name][0] if name in SHAPES else ""
    settings = config(name, blocks=blocks)
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")._from_config(settings, dtype=dtype).eval()


@torch.no_grad()
def build(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    blocks: int | None = None,
    seed: int = 0,
    massive: bool = False,
    steep: bool = False,
) -> Any:
    """The model with random weights, made on the device.

    Args:
        name, blocks: as for `config`.
        device, dtype: of the weights.
        seed: of their generator; other devices give other numbers.
        massive: plant massive activations (`plant_massive`).
        steep: plant a real layer's spectrum (`plant_spectrum`).
    """
    model = empty(name, blocks=blocks, dtype=dtype)
    model.to_empty(device=device)
    # Buffers that are computed, not loaded: `to_empty` leaves anything in them.
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, type(module)(config=model.config).to(device))
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    depth = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scale = (2 * depth) ** -0.5 if path.rpartition(".")[2] in WRITERS else 1.0
            if module.weight is not model.get_input_embeddings().weight:
                module.weight.normal_(0, scale * module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 1, generator=generator)
        elif type(module).__name__.endswith("Norm"):
            module.weight.fill_(1)
    if steep:
        plant_spectrum(model)
    if massive:
        plant_massive(model)
    return model


@torch.no_grad()
def plant_spectrum(model: Any) -> None:
    """Hidden states whose second moment has the spectrum of a real layer's inputs (`benchmarks.solvers.LOG_SPECTRUM`).

    Random weights make inputs of a flat one, which no trained model has, and whose bottom no iteration finds quickly. Here what
    writes into the residual stream, embeddings and the last projections of attention and MLP, is scaled channel by channel. The
    inputs of these last projections themselves stay flatter at their bottom than a trained model's.
    """
    d = model.config.hidden_size
    logs = np.interp(np.linspace(0, 1, d), FRACTIONS, LOG_SPECTRUM)
    roots = torch.tensor(10 ** (logs / 2))
    roots = roots[torch.randperm(d, generator=torch.Generator().manual_seed(0))] * (d**0.5 / torch.linalg.vector_norm(roots))
    embeddings = model.get_input_embeddings().weight
    scale = roots.to(embeddings.device, embeddings.dtype)
    embeddings *= scale
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in WRITERS and isinstance(module, nn.Linear):
            module.weight *= scale[:, None]


@torch.no_grad()
def plant_massive(model: Any, *, token: int = 0, block: int = 0, channels: tuple[int, ...] = (3, 11)) -> None:
    """Massive activations in a few channels at one token, from one block's `down_proj` on, as trained models have them.

    The token's embedding points along the last axis of the residual stream, and the given channels of the block's gate and up
    projections listen to that axis alone: they answer with about d at this token, and with about one at all others.

    Args:
        model: of `build`.
        token: which one; others keep the axis free.
        block: where.
        channels: of the block's inner width.
    """
    embeddings, mlp = model.get_input_embeddings().weight, model.model.layers[block].mlp
    embeddings[:, -1] = 0
    embeddings[token] = 0
    embeddings[token, -1] = embeddings.shape[1] ** 0.5
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight[list(channels)] = 0
        layer.weight[list(channels), -1] = 1
