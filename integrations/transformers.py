"""transformers models and text: loading by hub name, folder or GGUF file, and data into packed batches."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from nullspace.blocks import marked_blocks
from nullspace.checks import check_device, check_integer
from nullspace.sites import is_linear

# Pairs of fields that are joined into one text where `field` is not given; the first of them that all are present wins.
KNOWN_FIELDS = (
    ("text",),
    ("question", "answer"),
    ("instruction", "input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("content",),
)


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
        OSError: if there is no such model.
        ValueError: if this machine has no such device; with `offload`, if the model is quantised, a GGUF file, or has no blocks.
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
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if dtype == "auto" else dtype, **options)
        drop_quantizer(model)
        model.config._name_or_path = model.name_or_path = str(path)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    else:
        config = AutoConfig.from_pretrained(name)
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
        OSError: if there is no such configuration.
    """
    config = AutoConfig.from_pretrained(name)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    build = _model_class(config)
    with torch.device("meta"):
        # A class is told by `_from_config`, the Auto classes by `from_config`, and neither takes the other's.
        model: nn.Module = (build.from_config if hasattr(build, "from_config") else build._from_config)(config, dtype=dtype)
    return model.eval()


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
    config = AutoConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised, and its weights are unpacked while it is loaded: load it whole")
    model_class = _model_class(config)
    placed = offload_map(empty_model(name, dtype=dtype), device)
    temporary = tempfile.mkdtemp(prefix="nullspace-") if folder is None else None
    try:
        with _one_file_at_a_time(), _without_chatter():
            model = model_class.from_pretrained(name, dtype=dtype, device_map=placed, offload_folder=str(temporary or folder))
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None and not os.listdir(temporary):
        os.rmdir(temporary)
    elif temporary is not None:
        weakref.finalize(model, shutil.rmtree, temporary, ignore_errors=True)
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
        data: `.txt` or `.md` (paragraphs, divided at blank lines), `.jsonl`, `.json`, `.parquet` or `.csv` (through `datasets`), or
            the name of a hub data set, with `name:configuration` for one of its configurations.
        field: which field is the text; several, joined by line breaks, behind commas: `"question,answer"`. By default `text`, or
            the first known pair (question/answer, instruction/input/output, prompt/completion, …). Of a list of answers, the
            first counts.
        split: of a hub data set.
        limit: read at most this many rows.

    Raises:
        FileNotFoundError: if a path with a known ending does not exist.
        ValueError: naming the file, if it is not what its ending says, is empty, or lacks the field (the fields there are
            are listed).
    """
    path = Path(data)
    kind = path.suffix.lower()
    _check_is_there(path)
    texts: Iterable[str]
    texts = _paragraphs(path) if kind in (".txt", ".md") else (_row_text(row, field, str(data)) for row in _rows(data, split))
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
    kind = path.suffix.lower()
    if kind in (".txt", ".md"):
        raise ValueError(f"{path} is a text, which has no rows: JSON Lines, JSON, CSV or Parquet is needed")
    _check_is_there(path)
    found = list(itertools.islice(_rows(data, split), limit))
    if not found:
        raise ValueError(f"{data} is empty")
    return found


def prompt_and_response(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row of a task as what is asked and what is to be answered.

    Of the first known fields (question/answer, instruction/input/output, prompt/completion, text/code, …) the last is the response,
    of a list its first entry; the others, joined by line breaks, are the prompt.

    Raises:
        ValueError: listing the row's fields, if none of them are known or one is empty.
    """
    pairs = [names for names in KNOWN_FIELDS if len(names) > 1]
    more = [("query", "response"), ("text", "code"), ("prompt", "canonical_solution")]
    names = next((known for known in [*pairs, *more] if all(name in row for name in known)), ())
    parts = [_first(row[name]) for name in names]
    if len(parts) < 2 or not parts[0].strip() or not parts[-1].strip():
        raise ValueError(f"a row has no known prompt and response; its fields are {', '.join(map(str, row))}")
    return "\n".join(part for part in parts[:-1] if part), parts[-1]


class PackedBatches(Sequence[dict[str, torch.Tensor]]):
    """Batches of token ids, all of one length: texts laid end to end, an end-of-text token between them.

    Args:
        texts: in the order in which they are to be used.
        tokenizer: transformers'.
        samples: at most this many sequences (the paper takes 256).
        length: tokens a sequence (the paper: 1024).
        batch_size: sequences a batch.

    A last sequence that the texts do not fill is padded on the right and masked.

    Raises:
        ValueError: if a size is smaller than 1 or the texts hold no token.

    Warns:
        UserWarning: if the texts fill fewer than `samples` sequences.
    """

    def __init__(
        self, texts: Iterable[str], tokenizer: Any, *, samples: int = 256, length: int = 1024, batch_size: int = 4
    ) -> None:
        for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
            check_integer(name, value)
        ids = _token_stream(texts, tokenizer, samples * length)
        if not ids:
            raise ValueError("the texts hold no token")
        rows = -(-len(ids) // length)
        if rows < samples:
            warnings.warn(f"the texts fill {rows} of {samples} samples of {length} tokens", stacklevel=2)
        pad = -len(ids) % length
        self.tokens = len(ids)
        self._ids = torch.tensor(ids + [ids[-1]] * pad).reshape(rows, length)
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


def _token_stream(texts: Iterable[str], tokenizer: Any, wanted: int) -> list[int]:
    ids: list[int] = []
    between = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    for text in texts:
        # A text longer than the model's window is cut into samples below: the tokenizer's warning about it is beside the point.
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if between is not None:
            ids.append(between)
        if len(ids) >= wanted:
            break
    return ids[:wanted]


def _check_is_there(path: Path) -> None:
    if path.suffix.lower() in (".txt", ".md", ".jsonl", ".json", ".parquet", ".csv") and not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return iter(text.replace("\r\n", "\n").split("\n\n"))


def _rows(data: str | os.PathLike[str], split: str) -> Iterator[Mapping[str, Any]]:
    path = Path(data)
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from _json_lines(path)
        return
    import datasets

    if kind in (".json", ".parquet", ".csv"):
        try:
            yield from datasets.load_dataset(kind[1:], data_files=str(path), split="train", streaming=True)
        except Exception as error:
            # `datasets` wraps what its readers raise in exceptions of several libraries; the file's name is what helps.
            raise ValueError(f"{path} cannot be read as {kind[1:]}: {error}") from error
        return
    name, _, configuration = str(data).partition(":")
    yield from datasets.load_dataset(name, configuration or None, split=split, streaming=True)


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
            yield row


def _row_text(row: Mapping[str, Any], field: str | None, source: str) -> str:
    if field is not None:
        names: tuple[str, ...] = tuple(name.strip() for name in field.split(","))
    else:
        names = next((known for known in KNOWN_FIELDS if all(name in row for name in known)), ())
    missing = next((name for name in names if name not in row), None)
    if not names or missing is not None:
        what = f"no field {missing!r}" if missing else "no field that is known to be text"
        raise ValueError(f"{source} has {what}; its fields are {', '.join(map(str, row))} (choose with field / --field)")
    parts = [_first(row[name]) for name in names]
    return "\n".join(part for part in parts if part)


def _first(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return "" if value is None else str(value)
