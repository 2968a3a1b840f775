"""Models by hub name, folder or GGUF file, and data as packed batches of tokens.

Models: `load`, `offload`. Data, from files to batches: `rows`, `chat`, `data`, `template`, `packing`.
"""

from nullspace.checks import missing_package

try:
    from nullspace.integrations.transformers.chat import Conversation, TokenIds
    from nullspace.integrations.transformers.data import load_rows, load_texts, prompt_and_response
    from nullspace.integrations.transformers.load import (
        ModelSource,
        drop_quantizer,
        empty_model,
        load_model,
        positions,
        read_config,
    )
    from nullspace.integrations.transformers.offload import offload_map
    from nullspace.integrations.transformers.packing import Mixture, PackedBatches
except ImportError as error:
    raise missing_package("nullspace.integrations.transformers", "peft", error) from error

__all__ = [
    "Conversation",
    "Mixture",
    "ModelSource",
    "PackedBatches",
    "TokenIds",
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
