"""transformers models and text: loading by hub name, folder or GGUF file, and data into packed batches."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from nullspace.artifacts.locks import TemporaryFolder
from nullspace.artifacts.records import read_json
from nullspace.checks import check_device, check_integer
from nullspace.integrations.rows import KNOWN_FIELDS, TEXTS, as_text, check_is_there, fields_of, paragraphs, rows_of, text_of
from nullspace.model.blocks import marked_blocks
from nullspace.model.linear import is_linear


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    offload: bool = False,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, Any]:
    """A model in eval mode and its tokenizer.

    Args:
        name: a hub name, a folder, or a `.gguf` file (which needs the package `gguf`; its weights are dequantised, to float32
            unless `dtype` says otherwise).
        dtype: of the weights; `"auto"` takes the checkpoint's own.
        device: where to put it, or with `offload` where it computes; CUDA if there is one, else the CPU, by default.
        offload: leave the weights of the transformer blocks, the embeddings and the head in the checkpoint's files, from where
            accelerate reads them when they are needed: see `offload_map`.
        offload_folder: where to keep the weights that cannot stay in the checkpoint's own files (it is not safetensors, or the
            model joins tensors that the checkpoint keeps apart). By default a temporary directory, which goes with the model.

    Returns:
        `(model, tokenizer)`. The class is the one that the checkpoint names, a causal language model where it names none.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: naming the model, if it cannot be loaded; if this machine has no such device; with `offload`, if the model is
            quantised, a GGUF file, or has no blocks.
    """
    path = Path(name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = check_device(device)
    if offload:
        return _load_offloaded(name, dtype, device, offload_folder)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        folder, options = str(path.parent), {"gguf_file": path.name}
        with _naming(name):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if dtype == "auto" else dtype, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        drop_quantizer(model)
        model.config._name_or_path = model.name_or_path = str(path)
    else:
        config = read_config(name)
        with _naming(name):
            model = _model_class(config).from_pretrained(name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name)
    module: nn.Module = model
    return module.to(device).eval(), tokenizer


def empty_model(name: str | os.PathLike[str], *, dtype: torch.dtype | str = "auto") -> nn.Module:
    """A model of a configuration alone, on the meta device: shapes, no weights. In eval mode, of `load_model`'s class.

    Args:
        name: a hub name, or a folder with a `config.json`.
        dtype: of the weights; `"auto"` takes the configuration's own, float32 where it names none.

    Raises:
        FileNotFoundError, ValueError: naming the model, if there is no such configuration, or nothing can be built of it.
    """
    config = read_config(name)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    build = _model_class(config)
    with _naming(name), torch.device("meta"):
        # A class is told by `_from_config`, the Auto classes by `from_config`, and neither takes the other's.
        model: nn.Module = (build.from_config if hasattr(build, "from_config") else build._from_config)(config, dtype=dtype)
    return model.eval()


def read_config(name: str | os.PathLike[str]) -> Any:
    """transformers' configuration of a model.

    Raises:
        FileNotFoundError: naming the model, if there is none.
        ValueError: naming the model, or its file if it is a local one, for what is no configuration.
    """
    path = Path(name, "config.json")
    if not path.exists():
        with _naming(name):
            return AutoConfig.from_pretrained(name)
    if not isinstance(read_json(path), dict):
        raise ValueError(f"{path} is no configuration of a model: it should hold an object")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # of many kinds, as classes of configurations check themselves
        raise ValueError(f"{path} is no configuration of a model that transformers knows: {_line(error)}") from error


@contextlib.contextmanager
def _naming(name: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of loading that name the model: transformers, and what reads files for it, raise many kinds, and few name a file."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        text = _line(error)
        if getattr(error, "errno", None) is not None or "out of memory" in text or "can't allocate memory" in text:
            raise
        if isinstance(error, OSError) and not Path(name).exists():
            raise FileNotFoundError(f"{name} is neither a folder nor a model that the hub gives: {text}") from error
        raise ValueError(f"{name} cannot be loaded: {text}") from error


def _line(error: Exception) -> str:
    """What an error says, in one line, with its kind where that is not plain."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def positions(config: Any) -> int | None:
    """How many tokens a sequence may have by a model's configuration; None if that names no limit.

    Beyond it, learned positions have no embedding, and rotary embeddings turn by angles that the model has not been trained on.
    The number is `max_position_embeddings` (or what the model calls it) of the text model. Where scaled rotary embeddings
    (`rope_parameters`) reach further, factor · `original_max_position_embeddings` counts. ALiBi has no limit.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # one a kind of attention, or one
    scaled = ((kind.get("factor") or 1) * (kind.get("original_max_position_embeddings") or limit) for kind in kinds)
    return max(limit, *(int(each) for each in scaled))


def offload_map(model: nn.Module, device: torch.device | str) -> dict[str, str]:
    """A `device_map` with which no more of a model than a block has to be in memory at once.

    On the `"disk"` go the blocks (every outermost `GradientCheckpointingLayer`) and, outside of them, embeddings and linear layers:
    all that is large. On the device stay norms and what else there is, which is small; and whatever is tied to it.

    Args:
        model: the architecture; on the meta device will do.
        device: where everything else goes.

    Returns:
        Module (or tensor) name → `"disk"` or the device's name, for `from_pretrained`.

    Raises:
        ValueError: if the model has no blocks.
    """
    blocks = marked_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that transformers knows of (GradientCheckpointingLayer): load it whole"
        )
    on_disk = dict(blocks)
    for name, module in model.named_modules():
        whole = (isinstance(module, nn.Embedding) or is_linear(module)) and not any(True for _ in module.children())
        if name and whole and not _within(name, blocks):
            on_disk[name] = module
    # Tied weights are one tensor: on the disk under all of their names, or under none.
    while True:
        kept = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not _within(name, on_disk)}
        moved = [name for name, module in on_disk.items() if name not in blocks and any(id(p) in kept for p in module.parameters())]
        if not moved:
            break
        for name in moved:
            del on_disk[name]
    found: dict[str, str] = {}
    _cover("", model, on_disk, str(device), found)
    if set(found.values()) == {"disk"}:  # accelerate takes the device to compute on from the map
        found[next(reversed(found))] = str(device)
    return found


def _within(name: str, modules: Iterable[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts) + 1))


def _cover(name: str, module: nn.Module, on_disk: Mapping[str, nn.Module], device: str, found: dict[str, str]) -> None:
    """Name every tensor once, by the largest module that is in one place."""
    prefix = f"{name}." if name else ""
    if name in on_disk:
        found[name] = "disk"
    elif name and not any(other.startswith(prefix) for other in on_disk):
        found[name] = device
    else:
        own = (*module._parameters.items(), *module._buffers.items())
        found.update({prefix + tensor: device for tensor, value in own if value is not None})
        for child_name, child in module.named_children():
            _cover(prefix + child_name, child, on_disk, device, found)


def _load_offloaded(
    name: str | os.PathLike[str], dtype: torch.dtype | str, device: torch.device, folder: str | os.PathLike[str] | None
) -> tuple[nn.Module, Any]:
    if Path(name).suffix == ".gguf":
        raise ValueError(f"{name} is dequantised while it is loaded, so its weights cannot stay on the disk: load it whole")
    config = read_config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised, and its weights are unpacked while it is loaded: load it whole")
    model_class = _model_class(config)
    placed = offload_map(empty_model(name, dtype=dtype), device)
    temporary = TemporaryFolder() if folder is None else None
    try:
        with _naming(name), _one_file_at_a_time(), _without_chatter():
            model = model_class.from_pretrained(
                name, dtype=dtype, device_map=placed, offload_folder=str(temporary.path if temporary else folder)
            )
    except BaseException:
        if temporary is not None:
            temporary.delete()
        raise
    if temporary is not None and not os.listdir(temporary.path):
        temporary.delete()
    elif temporary is not None:
        weakref.finalize(model, temporary.delete)
    with _naming(name):
        return model.eval(), AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """accelerate warns that parameters are where it was asked to put them, and that a map names tensors beside modules."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _one_file_at_a_time() -> Iterator[None]:
    """Let `from_pretrained` open a file of the checkpoint when it reads a tensor, not all of them at once.

    It maps every file before it reads the first tensor. These are private mappings, which count as memory of the process under
    `ulimit -d`, `ulimit -v` and strict overcommit, although nothing was read: the checkpoint would have to fit after all.
    """
    loading: Any = transformers.modeling_utils
    original = getattr(loading, "safe_open", None)
    if original is None:
        yield
        return
    loading.safe_open = functools.partial(_ClosedFile, original)
    try:
        yield
    finally:
        loading.safe_open = original


class _ClosedFile:
    """`safetensors.safe_open` for whoever asks for names and slices; the file is open only while one of them is read."""

    def __init__(self, opener: Any, *args: Any, **options: Any) -> None:
        self._open = functools.partial(opener, *args, **options)

    def __enter__(self) -> _ClosedFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def metadata(self) -> Any:
        with self._open() as file:
            return file.metadata()

    def keys(self) -> list[str]:
        with self._open() as file:
            return list(file.keys())

    def get_slice(self, name: str) -> _ClosedSlice:
        return _ClosedSlice(self._open, name)


class _ClosedSlice:
    def __init__(self, opener: Any, name: str) -> None:
        self._open, self._name = opener, name

    def __getitem__(self, index: Any) -> Any:
        with self._open() as file:
            return file.get_slice(self._name)[index]

    def get_shape(self) -> Any:
        with self._open() as file:
            return file.get_slice(self._name).get_shape()

    def get_dtype(self) -> Any:
        with self._open() as file:
            return file.get_slice(self._name).get_dtype()


def drop_quantizer(model: Any) -> None:
    """Make an ordinary model of one that was dequantised while loading (GGUF), so that `save_pretrained` takes it."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_texts(
    data: str | os.PathLike[str], *, field: str | None = None, split: str = "train", limit: int | None = None
) -> list[str]:
    """Texts from a file or a hub data set.

    Args:
        data: `.txt` or `.md` (paragraphs, divided at blank lines), `.jsonl`, `.json`, `.parquet` or `.csv`, or the name of a hub
            data set, with `name:configuration` for one of its configurations.
        field: which field is the text; several, joined by line breaks, behind commas: `"question,answer"`. By default `text`, or
            the first known pair (question/answer, instruction/input/output, prompt/completion, …). Of a list of answers, the
            first counts. Chat data (lists of messages) are not supported.
        split: of a hub data set.
        limit: read at most this many rows.

    Raises:
        FileNotFoundError: if a path with a known ending does not exist.
        ValueError: naming the file, if it is not what its ending says, or is empty; naming the row too, if it lacks the field
            (the fields there are are listed), or if the field holds anything but text: numbers are not written out.
    """
    path = Path(data)
    check_is_there(path)
    texts: Iterable[str]
    if path.suffix.lower() in TEXTS:
        texts = paragraphs(path)
    else:
        texts = (text_of(row, field, f"{data}, row {number}") for number, row in enumerate(rows_of(data, split), start=1))
    found = []
    for text in texts:
        if text.strip():
            found.append(text)
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise ValueError(f"{data} holds no text")
    return found


def load_rows(data: str | os.PathLike[str], *, split: str = "train", limit: int | None = None) -> list[Mapping[str, Any]]:
    """Rows of a JSON Lines, JSON, Parquet or CSV file, or of a hub data set, as they are.

    Args:
        data: as in `load_texts`, but for texts.
        split: of a hub data set.
        limit: read at most this many.

    Raises:
        FileNotFoundError: if a path with a known ending does not exist.
        ValueError: naming the file, if it is a text, not what its ending says, or empty.
    """
    path = Path(data)
    if path.suffix.lower() in TEXTS:
        raise ValueError(f"{path} is a text, which has no rows: JSON Lines, JSON, CSV or Parquet is needed")
    check_is_there(path)
    found = list(itertools.islice(rows_of(data, split), limit))
    if not found:
        raise ValueError(f"{data} is empty")
    return found


def prompt_and_response(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row of a task as what is asked and what is to be answered.

    Of the first known fields (question/answer, instruction/input/output, prompt/completion, text/code, …) the last is the response,
    of a list its first entry; the others, joined by line breaks, are the prompt.

    Raises:
        ValueError: listing the row's fields, if none of them are known or one is empty; naming the field, if it holds anything but
            text.
    """
    pairs = [names for names in KNOWN_FIELDS if len(names) > 1]
    more = [("query", "response"), ("text", "code"), ("prompt", "canonical_solution")]
    names = next((known for known in [*pairs, *more] if all(name in row for name in known)), ())
    parts = [as_text(row, name, "a row") for name in names]
    if len(parts) < 2 or not parts[0].strip() or not parts[-1].strip():
        raise ValueError(f"a row has no known prompt and response; its fields are {fields_of(row)}")
    return "\n".join(part for part in parts[:-1] if part), parts[-1]


class PackedBatches(Sequence[dict[str, torch.Tensor]]):
    """Batches of token ids, all of one length: texts laid end to end, behind what the tokenizer puts at the start.

    Every sample begins with the special tokens that the tokenizer puts before a text (`<bos>`, `[CLS]`; none with GPT-2's): a model
    in use has them at position 0, where many models have their massive activations, and the packed texts come behind them.
    Within a sample, texts are divided by what the tokenizer puts behind a text (`[SEP]`), or else by its end-of-text token.

    Args:
        texts: in the order in which they are to be used.
        tokenizer: transformers'.
        samples: at most this many sequences (the paper takes 256).
        length: tokens a sequence (the paper: 1024), special tokens included.
        batch_size: sequences a batch.
        special_tokens: False packs the texts alone, an end-of-text token between them: for a model that is used without special
            tokens.

    Attributes:
        tokens: in all samples, special tokens included, padding left out.

    A last sequence that the texts do not fill is padded on the right and masked.

    Raises:
        ValueError: if a size is smaller than 1, `length` leaves no room behind the special tokens, or the texts hold no token.

    Warns:
        UserWarning: if the texts fill fewer than `samples` sequences.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: Any,
        *,
        samples: int = 256,
        length: int = 1024,
        batch_size: int = 4,
        special_tokens: bool = True,
    ) -> None:
        for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
            check_integer(name, value)
        start, ids = _token_stream(texts, tokenizer, samples, length, special_tokens)
        if not ids:
            raise ValueError("the texts hold no token")
        room = length - len(start)
        rows = -(-len(ids) // room)
        if rows < samples:
            warnings.warn(f"the texts fill {rows} of {samples} samples of {length} tokens", stacklevel=2)
        pad = -len(ids) % room
        self.tokens = len(ids) + rows * len(start)
        packed = torch.tensor(ids + [ids[-1]] * pad).reshape(rows, room)
        self._ids = torch.cat([torch.tensor(start, dtype=packed.dtype).expand(rows, -1), packed], dim=1)
        self._mask = torch.ones_like(self._ids)
        if pad:
            self._mask[-1, -pad:] = 0
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._ids) // self._batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = slice(index * self._batch_size, (index + 1) * self._batch_size)
        return {"input_ids": self._ids[rows], "attention_mask": self._mask[rows]}


def _model_class(config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    named = getattr(transformers, names[0], None) if names else None
    if named is not None:
        return named
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel


def _token_stream(texts: Iterable[str], tokenizer: Any, samples: int, length: int, special: bool) -> tuple[list[int], list[int]]:
    """What begins every sample, and what the samples are to be filled with, as far as it is needed."""
    ids: list[int] = []
    start: list[int] = []
    between = next(([i] for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), [])
    known = not special
    for text in texts:
        # A text longer than the model's window is cut into samples: the tokenizer's warning about it is beside the point.
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not own:
            continue
        if not known:
            start, end = _around(own, tokenizer(text, verbose=False)["input_ids"])
            between, known = end or between, True
            if len(start) >= length:
                raise ValueError(f"length must exceed the {len(start)} special tokens that begin a sample, not {length}")
        ids += own + between
        if len(ids) >= samples * (length - len(start)):
            break
    return start, ids[: samples * (length - len(start))]


def _around(own: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """What a tokenizer has put before and behind a text's own tokens."""
    for begin in range(len(whole) - len(own) + 1):
        if whole[begin : begin + len(own)] == own:
            return whole[:begin], whole[begin + len(own) :]
    raise ValueError(
        "the tokenizer gives a text other tokens with special tokens than without, so it cannot be seen which are special: pack "
        "without them (special_tokens=False)"
    )
