"""The options that several commands share, and the groups of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from nullspace.checks import check_device, check_integer, check_real
from nullspace.cli.options.conditions import (
    BLOCKS,
    NEW_SPACES,
    OTHER_BITS,
    PLACED,
    RUN_ON_DATA,
    WHOLE,
    WITH_MODEL,
    both,
    keeps_covariances,
    prints_table,
)
from nullspace.cli.options.declare import option
from nullspace.cli.options.values import compiles, one_of, parse_exclude, parse_targets, parsed

if TYPE_CHECKING:
    from nullspace.integrations.transformers import ModelSource

MODEL = option("Hub name, folder, or .gguf file.", typed=())
COVARIANCES = option("Use what `nullspace covariances` or `merge` wrote instead of --data.", None)
PARTIAL = option("Take covariances though shards of their data are missing.", False, needs=keeps_covariances)
RANK = option("Directions a layer: the adapter's rank.", 128, check_integer)
AVOID = option("Directory of an earlier adapter whose A the new ones are not to read; may be repeated.", None, needs=NEW_SPACES)
TARGETS = option(
    "'all-linear', 'attention', 'mlp', 'experts', name endings ('q_proj,v_proj'), or a regular expression ('re:.*_proj').",
    "all-linear",
    parsed(compiles(parse_targets)),
    WITH_MODEL,
)
EXCLUDE = option("Layers to take away from --targets, in the same form.", None, parsed(compiles(parse_exclude)), WITH_MODEL)
PRECISION = option(
    "'mixed' takes float32 chains throughout, 'fp64' float64 products, 'qr' no products (slow).",
    "auto",
    one_of("auto", "mixed", "fp64", "qr"),
    RUN_ON_DATA,
)
EXPERTS = option(
    "Routed experts: a sum for each, one for all of a layer ('pooled'), or 'auto', by tokens, memory and time.",
    "auto",
    one_of("auto", "each", "pooled"),
    RUN_ON_DATA,
)
DTYPE = option("Of the model's weights.", "auto", one_of("auto", "float32", "bfloat16", "float16"), WITH_MODEL)
OFFLOAD = option("Leave the weights on the disk and read them block by block.", False, needs=both(WITH_MODEL, PLACED))
LOAD_IN_4BIT = option("Quantise the model while it is loaded: bitsandbytes' NF4.", False, needs=both(WITH_MODEL, WHOLE))
LOAD_IN_8BIT = option("The same in 8 bits (LLM.int8).", False, needs=both(WITH_MODEL, both(WHOLE, OTHER_BITS)))
DEVICE_MAP = option("Let accelerate place the weights: 'auto', 'balanced', 'sequential', ….", None, needs=WITH_MODEL)
REVISION = option("Branch, tag or commit of a hub model.", None, needs=WITH_MODEL)
TRUST_REMOTE_CODE = option("Run the Python code that comes with the checkpoint.", False, needs=WITH_MODEL)
ATTN = option("Attention: 'eager', 'sdpa', 'flash_attention_2', …; transformers' choice by default.", None, needs=WITH_MODEL)
KEEP = option("float64, or float32 for half the space and 7 digits.", "float64", one_of("float64", "float32"))
OVERWRITE = option("Replace an earlier result of ours.", False)
JSON = option("One JSON document on standard output instead of tables.", False, typed=("--json",))
QUIET = option("No progress bars and no tables.", False, typed=("--quiet", "-q"))
ALL_ROWS = option("All rows of long tables, not the ten worst.", False, needs=prints_table, typed=("--all",))


@dataclass(frozen=True)
class Loading:
    """Which files a model is loaded from. Gated models need a token in the environment (HF_TOKEN)."""

    PANEL: ClassVar[str] = "Model and run"

    revision: str | None = REVISION
    trust_remote_code: bool = TRUST_REMOTE_CODE

    def of(self, name: str) -> ModelSource:
        """A model of this name."""
        from nullspace.integrations.transformers import ModelSource

        return ModelSource(name, self.revision, self.trust_remote_code)

    def over(self, source: ModelSource) -> ModelSource:
        """The model that a record names, unless other options are given."""
        return replace(source, revision=self.revision or source.revision, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class Layers:
    """Which layers' inputs are summed, and how exactly."""

    PANEL: ClassVar[str] = "Layers and sums"

    targets: str = TARGETS
    exclude: str | None = EXCLUDE
    precision: str = PRECISION
    experts: str = EXPERTS


@dataclass(frozen=True)
class Running:
    """How the model is loaded and run."""

    PANEL: ClassVar[str] = "Model and run"

    dtype: str = DTYPE
    device: str | None = option(
        "cuda, cuda:1, cpu, …; CUDA if there is one by default.", None, parsed(check_device), both(WITH_MODEL, PLACED)
    )
    device_map: str | None = DEVICE_MAP
    attn: str | None = ATTN
    offload: bool = OFFLOAD
    load_in_4bit: bool = LOAD_IN_4BIT
    load_in_8bit: bool = LOAD_IN_8BIT
    strategy: str = option(
        "'resident': all layers' sums at once; 'layerwise': block by block; 'auto': what the memory asks for.",
        "auto",
        one_of("auto", "resident", "layerwise"),
        RUN_ON_DATA,
    )
    hidden_states: str = option(
        "Where a layerwise run keeps what lies between two blocks.", "auto", one_of("auto", "device", "host", "disk"), BLOCKS
    )
    fresh: bool = option("Begin anew, whatever an interrupted run left in OUT.checkpoint.", False, needs=RUN_ON_DATA)
    timeout: float = option(
        "Under torchrun: minutes that one process waits for the others.", 30.0, check_real, RUN_ON_DATA, least=0.05
    )

    def of_model(self) -> dict[str, Any]:
        """Keyword arguments of `load_model`."""
        own = {name: getattr(self, name) for name in ("dtype", "device", "offload", "device_map", "load_in_4bit", "load_in_8bit")}
        return {**own, "attn_implementation": self.attn}


@dataclass(frozen=True)
class RunningForSpaces(Running):
    """The same, for null spaces."""

    spectrum: bool = option("Report effective ranks too.", False, needs=NEW_SPACES)


@dataclass(frozen=True)
class Shown:
    """What happens to an earlier result, and what is printed."""

    PANEL: ClassVar[str] = "Output"

    overwrite: bool = OVERWRITE
    as_json: bool = JSON
    quiet: bool = QUIET


@dataclass(frozen=True)
class ShownTable(Shown):
    """The same, of a command that prints a table of sites."""

    all_rows: bool = ALL_ROWS
