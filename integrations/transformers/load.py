"""Models and tokenizers by hub name, folder or GGUF file; configurations, and models of a configuration alone.

The hub's token is the environment's (`HF_TOKEN`, or what `hf auth login` has stored): no function takes one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from nullspace.artifacts.records import read_json
from nullspace.checks import check_device, missing_package
from nullspace.errors import InputError, MissingFileError
from nullspace.integrations.transformers.offload import load_offloaded, offload_map
from nullspace.integrations.transformers.quantisation import check_quantisable, loading_options, set_planned_bytes, warn_of_rest

# transformers' automatic classes of generating models, and those for models with an encoder and a decoder.
AUTO_CLASSES = ("AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")
TWO_INPUTS = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")


@dataclass(frozen=True)
class ModelSource(os.PathLike[str]):
    """A model's name, and how its files are read. It is accepted where a model's name is, and is that name as a path and as text.

    Attributes:
        name: a hub name, a folder, or a `.gguf` file.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, name: str | os.PathLike[str]) -> ModelSource:
        """A name as a `ModelSource`."""
        return name if isinstance(name, cls) else cls(os.fspath(name))

    @classmethod
    def in_revision(cls, name: str, revision: str | None) -> ModelSource:
        """A name that a record holds, with its revision if it is not on this machine."""
        return cls(name, None if Path(name).exists() else revision)

    def __post_init__(self) -> None:
        if self.revision is not None and Path(self.name).exists():
            raise InputError(f"{self.name} is on this machine, and only models of the hub have revisions: leave out revision")

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def options(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`. Without an explicit False, transformers asks on standard input."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {**revision, "trust_remote_code": self.trust_remote_code}


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    offload: bool = False,
    offload_folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> tuple[nn.Module, Any]:
    """A model in eval mode and its tokenizer.

    Args:
        name: a hub name, a folder, or a `.gguf` file (needs the package `gguf`; its weights are dequantised, to float32 by
            default).
        dtype: of the weights; `"auto"` takes the checkpoint's own.
        device: where the model is put or, with `offload`, computes. By default CUDA if there is one, else the CPU.
        offload: leave the weights of the transformer blocks, the embeddings and the head in the checkpoint's files, from which
            accelerate reads them when they are needed: see `offload_map`.
        offload_folder: for weights that cannot stay in the checkpoint's own files (it is not safetensors, or the model joins
            tensors that the checkpoint stores separately). By default a temporary directory, which is deleted with the model.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run Python code that comes with the checkpoint.
        attn_implementation: `"eager"`, `"sdpa"`, `"flash_attention_2"`, …; by default transformers' choice.
        device_map: in the place of `device` and `offload`, accelerate's placement: `"auto"`, `"balanced"`, …, or module → device.
        load_in_4bit: quantise linear layers while they are loaded, into bitsandbytes' NF4. The head stays as it is, and so do
            experts that are one tensor.
        load_in_8bit: the same, in 8 bits (LLM.int8).

    Returns:
        `(model, tokenizer)`. The class is the one that the checkpoint names; if it names none, a causal language model.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: naming the model, if it cannot be loaded; if this machine has no such device; with `offload`, if the model is
            quantised, a GGUF file, or has no blocks; for a revision of a folder, and `device_map` with `device` or `offload`; if a
            model is to be quantised that is, in another way.
        ImportError: if the package that reads the quantised weights is not installed.
    """
    source = ModelSource.of(name)
    if revision is not None or trust_remote_code:
        source = ModelSource(source.name, revision, trust_remote_code)
    model = load_weights(
        source,
        dtype=dtype,
        device=device,
        offload=offload,
        offload_folder=offload_folder,
        attn_implementation=attn_implementation,
        device_map=device_map,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
    )
    return model, load_tokenizer(source)


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model: a hub name, a folder, a `.gguf` file, or a `ModelSource`. Errors as `load_model`."""
    path, source = Path(name), ModelSource.of(name)
    if path.suffix == ".gguf" and not path.is_file():
        raise MissingFileError(f"{path} is not a file")
    with _naming(name):
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(source.name, **source.options())


def load_weights(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    offload: bool = False,
    offload_folder: str | os.PathLike[str] | None = None,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> nn.Module:
    """`load_model` without a tokenizer, which the folder need not have. `name` may be a `ModelSource`."""
    path = Path(name)
    if device_map is not None and (device is not None or offload):
        raise InputError(f"device_map places the weights of {name}: leave out {'offload' if offload else 'device'}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = check_device(device)
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    if path.suffix == ".gguf":
        if offload:
            raise InputError(f"{name} is dequantised while it is loaded, so its weights cannot stay on the disk: load it whole")
        if load_in_4bit or load_in_8bit:
            raise InputError(f"{name} is dequantised while it is loaded: load_in_4bit and load_in_8bit need the checkpoint itself")
        model = _load_gguf(path, {**options, "dtype": torch.float32 if dtype == "auto" else dtype})
        return (model if device_map is not None else model.to(device)).eval()
    source = ModelSource.of(name)
    config = read_config(source)
    model_class = _model_class(config, source)
    options |= source.options()
    quantised = loading_options(name, config, dtype, device, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    if not offload:
        options = {**quantised, **options}
        with _naming(name):
            model = model_class.from_pretrained(source.name, **options)
        if load_in_4bit or load_in_8bit:
            warn_of_rest(name, model, "load_in_4bit" if load_in_4bit else "load_in_8bit")
        with _naming(name):
            return (model if "device_map" in options else model.to(device)).eval()
    if quantised:
        raise InputError(f"{name} is quantised, and its weights are unpacked while it is loaded: load it whole")
    placed = offload_map(empty_model(source, dtype=dtype), device)
    with _naming(name):
        return load_offloaded(model_class, source.name, {**options, "device_map": placed}, offload_folder).eval()


def _load_gguf(path: Path, options: Mapping[str, Any]) -> nn.Module:
    if not path.is_file():
        raise MissingFileError(f"{path} is not a file")
    with _naming(path):
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **options)
    drop_quantizer(model)
    model.config.name_or_path = model.name_or_path = str(path)
    module: nn.Module = model
    return module


def drop_quantizer(model: Any) -> None:
    """Make an ordinary model of one that was dequantised while loading (GGUF), so that `save_pretrained` and `Trainer` take it."""
    model.hf_quantizer, model.is_quantized = None, False
    for place, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(place, name):
            delattr(place, name)


def empty_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> nn.Module:
    """A model of a configuration alone, on the meta device: shapes, no weights. In eval mode, of `load_model`'s class.

    Args:
        name: a hub name, or a folder with a `config.json`; a `ModelSource` names a revision too.
        dtype: of the weights; `"auto"` takes the configuration's own, float32 if it names none.
        attn_implementation: as in `load_model`.
        load_in_4bit, load_in_8bit: count its weights as quantised in forecasts. Those of a quantised checkpoint count so anyway.

    Raises:
        FileNotFoundError, ValueError: naming the model, if there is no such configuration, or no model can be built from it; if the
            checkpoint is quantised otherwise.
    """
    source = ModelSource.of(name)
    config = read_config(source)
    check_quantisable(name, config, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    build = _model_class(config, source)
    with _naming(name), torch.device("meta"):
        # Model classes have only `_from_config`, Auto classes only `from_config`, which alone runs the checkpoint's own code.
        model: nn.Module
        if hasattr(build, "from_config"):
            model = build.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code, **options)
        else:
            model = build._from_config(config, dtype=dtype, **options)
    set_planned_bytes(model, config, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    return model.eval()


def _model_class(config: Any, source: ModelSource) -> Any:
    """The class of a checkpoint's model; with `trust_remote_code`, the Auto class that loads the checkpoint's own.

    If the checkpoint names none: one with an encoder and a decoder, or with vision and audio towers, if there is one.
    """
    names = [*TWO_INPUTS, *AUTO_CLASSES] if getattr(config, "is_encoder_decoder", False) else AUTO_CLASSES
    automatic = [getattr(transformers, name) for name in names if hasattr(transformers, name)]  # not all versions have all
    own = getattr(config, "auto_map", None) or {}
    if source.trust_remote_code:
        for each in automatic:
            if each.__name__ in own:
                return each
    architectures = getattr(config, "architectures", None) or []
    named = getattr(transformers, architectures[0], None) if architectures else None
    if named is not None:
        return named
    return next((each for each in automatic if type(config) in each._model_mapping), AutoModel)


def read_config(name: str | os.PathLike[str]) -> Any:
    """transformers' configuration of a model: a hub name, a folder, or a `ModelSource`.

    Raises:
        FileNotFoundError: naming the model, if there is none.
        ValueError: naming the model, or its file if it is a local one, if it is not a valid configuration.
    """
    path, source = Path(name, "config.json"), ModelSource.of(name)
    if not path.exists():
        with _naming(name):
            return AutoConfig.from_pretrained(source.name, **source.options())
    if not isinstance(read_json(path), dict):
        raise InputError(f"{path} is no configuration of a model: it should hold an object")
    try:
        return AutoConfig.from_pretrained(source.name, **source.options())
    except Exception as error:  # configuration classes validate themselves, with exceptions of many types
        raise InputError(f"{path} is no configuration of a model that transformers knows: {_line(error)}") from error


def positions(config: Any) -> int | None:
    """The largest sequence length that a model's configuration allows, in tokens; None if it sets no limit.

    Beyond it, learned positions have no embedding, and rotary embeddings take angles that the model was not trained on. The number
    is `max_position_embeddings` (or what the model calls it) of the text model. Where scaled rotary embeddings (`rope_parameters`)
    reach further, factor · `original_max_position_embeddings` counts. ALiBi has no limit.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # one per type of attention, or one for all
    scaled = ((kind.get("factor") or 1) * (kind.get("original_max_position_embeddings") or limit) for kind in kinds)
    return max(limit, *(int(each) for each in scaled))


@contextlib.contextmanager
def _naming(name: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager: name the model in errors of loading. transformers and its readers raise many types; few name a file."""
    try:
        yield
    except ImportError as error:
        if Path(name).suffix != ".gguf":
            raise
        raise missing_package(str(name), "gguf", error) from error
    except MemoryError:
        raise
    except Exception as error:
        text = _line(error)
        if getattr(error, "errno", None) is not None or "out of memory" in text or "can't allocate memory" in text:
            raise
        if isinstance(error, OSError) and not Path(name).exists():
            raise MissingFileError(f"{name} is neither a folder nor a model that the hub gives: {text}") from error
        raise InputError(f"{name} cannot be loaded: {text}") from error


def _line(error: Exception) -> str:
    """An error's message in one line, with its type unless that is an `OSError` or a `ValueError`."""
    text = " ".join(str(error).split()).replace("`trust_remote_code=True`", "`trust_remote_code=True` (--trust-remote-code)")
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"
