"""Models by hub name, folder or GGUF file (`load`, `offload`), and data as packed batches of tokens (`data`, `rows`)."""

from nullspace.integrations.transformers.data import PackedBatches, load_rows, load_texts, prompt_and_response
from nullspace.integrations.transformers.load import ModelSource, drop_quantizer, empty_model, load_model, positions, read_config
from nullspace.integrations.transformers.offload import offload_map

__all__ = [
    "ModelSource",
    "PackedBatches",
    "drop_quantizer",
    "empty_model",
    "load_model",
    "load_rows",
    "load_texts",
    "offload_map",
    "positions",
    "prompt_and_response",
    "read_config",
]
