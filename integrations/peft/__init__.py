"""PEFT adapters from null spaces and second moments: before training, and as a plain LoRA afterwards.

PEFT has no registry of initialisers, so the factors are written after PEFT has made its layers. What is saved is plain PEFT, and
loads without nullspace.

- `prepare` and `initialize_lora_nullspace_weights` (`from_data`): from data to an adapter that is ready to train, in one call.
- `inject_adapters` (`inject`) and `save_init` (`save`), or `write_init` (`write`) for models that are larger than the memory.
- `preprocess_corda` (`corda`): PEFT's function of this name.
- `get_eva_state_dict` and `initialize_lora_eva_weights` (`eva`): PEFT's two functions for EVA, from exact second moments.
- `export_lora` (`folders.export`): a trained adapter as a plain LoRA for the untouched base.
- `convert_to_lora` (`folders.convert`): PEFT's function of this name, cut to a rank where the layers' inputs notice it least.
- `filter_adapter`, `filter_checkpoint`, `combine_adapters`, `adapter_drift` (`filtering`): less forgetting, after training.
- `describe` and `set_base` (`folders.describe`): what a folder holds, and which base an adapter needs.
- `confine`, `oplora`, `penalty`, `clora`, `overlap`, `decay_to_start`, `Gauge`, `ForgettingCallback` (`guard`): hold what must be
  kept while an adapter trains.
- `read_course` (`files`): an adapter from its start through training, for `nullspace.analysis`.
"""

from nullspace.checks import missing_package

try:
    from nullspace.integrations.peft.corda import preprocess_corda
    from nullspace.integrations.peft.eva import get_eva_state_dict, initialize_lora_eva_weights
    from nullspace.integrations.peft.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_course, read_factors, row_spaces
    from nullspace.integrations.peft.filtering.adapters import Filtered, filter_adapter, filter_path
    from nullspace.integrations.peft.filtering.checkpoints import checkpoint_path, filter_checkpoint
    from nullspace.integrations.peft.filtering.combine import Combined, combine_adapters
    from nullspace.integrations.peft.filtering.drift import adapter_drift
    from nullspace.integrations.peft.filtering.paths import FilterPath, LayerPath, Step
    from nullspace.integrations.peft.fit import fit_config
    from nullspace.integrations.peft.folders.convert import convert_to_lora
    from nullspace.integrations.peft.folders.describe import describe, set_base
    from nullspace.integrations.peft.folders.export import export_lora
    from nullspace.integrations.peft.from_data.initialize import initialize_lora_nullspace_weights
    from nullspace.integrations.peft.from_data.prepare import prepare
    from nullspace.integrations.peft.guard import (
        Allowed,
        Confinement,
        Drift,
        ForgettingCallback,
        Gauge,
        Reading,
        StartDecay,
        clora,
        confine,
        decay_to_start,
        drift_of,
        oplora,
        overlap,
        penalty,
    )
    from nullspace.integrations.peft.inject import inject_adapters
    from nullspace.integrations.peft.layers import check_servable, lora_layers
    from nullspace.integrations.peft.origin import freeze_a, freeze_b
    from nullspace.integrations.peft.save import save_init
    from nullspace.integrations.peft.subtracted import attach_subtracted
    from nullspace.integrations.peft.write import write_init
    from nullspace.methods import METHODS
except ImportError as error:
    raise missing_package("nullspace.integrations.peft", "peft", error) from error

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "METHODS",
    "Allowed",
    "Combined",
    "Confinement",
    "Drift",
    "FilterPath",
    "Filtered",
    "ForgettingCallback",
    "Gauge",
    "LayerPath",
    "Reading",
    "StartDecay",
    "Step",
    "adapter_drift",
    "attach_subtracted",
    "check_servable",
    "checkpoint_path",
    "clora",
    "combine_adapters",
    "confine",
    "convert_to_lora",
    "decay_to_start",
    "describe",
    "drift_of",
    "export_lora",
    "filter_adapter",
    "filter_checkpoint",
    "filter_path",
    "fit_config",
    "freeze_a",
    "freeze_b",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "initialize_lora_nullspace_weights",
    "inject_adapters",
    "lora_layers",
    "oplora",
    "overlap",
    "penalty",
    "prepare",
    "preprocess_corda",
    "read_course",
    "read_factors",
    "row_spaces",
    "save_init",
    "set_base",
    "write_init",
]
