"""Null spaces, and the other methods that second moments serve, into PEFT: before training, and back out of it afterwards.

PEFT has no register of initialisers, so the factors are written after PEFT has made its layers. What is saved is plain PEFT: it
loads in a process that has never heard of nullspace.

- `inject_adapters` and `save_init` (`inject.py`), or `write_init` (`write.py`) for models that are larger than the memory.
- `preprocess_corda` (`corda.py`): PEFT's function of this name.
- `get_eva_state_dict` and `initialize_lora_eva_weights` (`eva.py`): PEFT's two functions for EVA, from exact second moments.
- `export_lora` (`export.py`): a trained adapter as a plain LoRA for the untouched base.
- `describe` and `set_base` (`folders.py`): what a folder holds, and which base an adapter needs.
- `read_course` (`files.py`): an adapter from its start through training, for `nullspace.analysis`.
"""

from nullspace.integrations.peft.corda import preprocess_corda
from nullspace.integrations.peft.eva import get_eva_state_dict, initialize_lora_eva_weights
from nullspace.integrations.peft.export import export_lora
from nullspace.integrations.peft.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_course, read_factors, row_spaces
from nullspace.integrations.peft.fit import fit_config
from nullspace.integrations.peft.folders import describe, set_base
from nullspace.integrations.peft.inject import attach_subtracted, freeze_a, inject_adapters, save_init
from nullspace.integrations.peft.layers import check_servable, lora_layers
from nullspace.integrations.peft.write import write_init
from nullspace.methods import METHODS

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "METHODS",
    "attach_subtracted",
    "check_servable",
    "describe",
    "export_lora",
    "fit_config",
    "freeze_a",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapters",
    "lora_layers",
    "preprocess_corda",
    "read_course",
    "read_factors",
    "row_spaces",
    "save_init",
    "set_base",
    "write_init",
]
