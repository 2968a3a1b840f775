"""From the batches of a loader to the arguments of a model: `calls`."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from nullspace.devices import upload
from nullspace.errors import DataWarning, InputError, InputTypeError, NullspaceError
from nullspace.model.blocks import is_encoder_decoder
from nullspace.model.padding import Padding, PaddingReader, Part, looks_like_mask
from nullspace.model.sharded_tensors import device_of
from nullspace.model.sites import Targets
from nullspace.model.towers import Regions
from nullspace.model.wrappers import unwrapped

if TYPE_CHECKING:
    from nullspace.distributed.loaders import Share


class Call(NamedTuple):
    """The arguments of one forward pass.

    Attributes:
        number: of the batch, from 1.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model; without labels, unless a loss is wanted.
        padding: which of its tokens count.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    padding: Padding


def calls(model: nn.Module, share: Share, device: torch.device | None = None, *, labels: bool = False) -> Iterator[Call]:
    """The arguments to call the model with, batch by batch.

    Args:
        model: its `forward` says which arguments it takes.
        share: of a loader of mappings, tensors or tuples of tensors.
        device: where the arguments go; by default where the model's embeddings are.
        labels: keep them, so that the model computes a loss.

    Raises:
        TypeError: for a batch that is none of these.
        ValueError: for a tuple that holds a mask which the model's `forward` does not name; for sequences under names of TRL's
            preferences; at the end, if there were fewer batches than the loader announced.

    Warns:
        UserWarning: once, for tokens that look like padding and are counted, for padding that moves the tokens behind it, and for
            pairs of preferences, whose rejected answers are counted.
    """
    reader, pairs = PaddingReader(model), False
    for number, batch in share:
        named, by_name = _named(batch, number, model)
        if by_name:
            pairs = _check_preferences(named, number, model, warned=pairs)
        padding = reader.read(number, named)
        args, kwargs = _arguments(named, by_name, device or input_device(model), model, labels)
        if by_name:
            reader.check_positions(model, kwargs, padding)
        yield Call(number, args, kwargs, padding)


def check_batch(model: nn.Module, batch: Any) -> None:
    """Check the first batch of a loader, as far as that is possible without running the model.

    Args:
        model: that is to be run.
        batch: the batch; None if it is not known.

    Raises:
        TypeError, ValueError: as `calls`; for a batch without a tensor, and token ids that are no matrix.
    """
    if batch is None:
        return
    named, by_name = _named(batch, 1, model)
    if not any(isinstance(value, torch.Tensor) for value in named.values()):
        names = ", ".join(map(repr, named)) or "nothing"
        raise InputTypeError(f"batch 1 holds {names}, and no tensor: give batches of tokens, or the rows themselves")
    ids = named.get("input_ids")
    if isinstance(ids, torch.Tensor) and ids.ndim < 2:
        raise InputError(f"batch 1: its input_ids have the shape {tuple(ids.shape)}: (samples, tokens) is needed")
    if by_name:
        _check_preferences(named, 1, model, warned=True)


@contextlib.contextmanager
def naming_batch(model: nn.Module, call: Call) -> Iterator[None]:
    """Context manager: turns what the model raises for its inputs into a `ValueError` that names the batch and its shapes."""
    try:
        yield
    except NullspaceError:
        raise
    except IndexError as error:
        ids = call.kwargs.get("input_ids", call.args[0] if call.args else None)
        shape = f" {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else ""
        raise InputError(
            f"batch {call.number}{shape}: the model has no embedding for one of its token ids or positions ({error}): use shorter "
            "sequences, or the model's own tokenizer"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        named = {**{str(place): value for place, value in enumerate(call.args)}, **call.kwargs}
        given = ", ".join(f"{n} {tuple(v.shape)}" if isinstance(v, torch.Tensor) else n for n, v in named.items())
        decoded = any(name == "labels" or name.startswith("decoder_") for name in named)
        advice = "that its forward takes" if decoded or not is_encoder_decoder(model) else "with 'labels' or 'decoder_input_ids'"
        raise InputError(
            f"batch {call.number}: {type(model).__name__} cannot be run on {given} ({type(error).__name__}: {error}): give batches "
            f"{advice}"
        ) from error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: eval mode, without key-value caches, compiled graphs and wrappers; the exit restores all of them.

    The cache is switched off in the configurations: a model may take `use_cache` only through `**kwargs`, or not at all.
    """
    training = [m for m in model.modules() if m.training]
    caching = [config for config in _configurations(model) if getattr(config, "use_cache", None) is True]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        with unwrapped(model):
            yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations of a model and its modules, and those nested in them, such as a text model's."""
    left = [config for module in model.modules() if (config := module.__dict__.get("config")) is not None]
    seen: dict[int, Any] = {}
    while left:
        config = left.pop()
        if id(config) not in seen:
            seen[id(config)] = config
            left += [value for value in getattr(config, "__dict__", {}).values() if hasattr(value, "use_cache")]
    return list(seen.values())


def forward_options(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, Any]:
    """Arguments that leave out work on which no site depends: the key-value cache, and the logits of all tokens but the last.

    The latter only if all targets are in the base model (BERT's layer before the output head would get the last token alone), and
    if no part of it takes that argument too (Gemma 4's would send the last token alone through its last blocks).
    """
    takes = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in takes:
        options["use_cache"] = False
    base = getattr(model, "base_model_prefix", "")
    # With an encoder–decoder model's labels, from which it makes its decoder's inputs, it computes a loss of all logits.
    if (
        "logits_to_keep" in takes
        and not is_encoder_decoder(model)
        and base
        and all(name.startswith(f"{base}.") for name in targets)
    ):
        inner = {type(module): module for module in model.modules() if module is not model}
        if any("logits_to_keep" in inspect.signature(module.forward).parameters for module in inner.values()):
            return options
        options["logits_to_keep"] = 1
    return options


def padded_batch(model: nn.Module, loader: Iterable[Any], part: Part) -> int | None:
    """The number of the first batch with padding in a part, of a loader that is a sequence; None if there is none, or it is another
    loader."""
    if not isinstance(loader, Sequence):
        return None
    reader = PaddingReader(model)
    return next((n for n, batch in enumerate(loader, 1) if reader.padding_of(_named(batch, n, model)[0]).hides(part)), None)


def refuse_unreached(model: nn.Module, loader: Iterable[Any], targets: Targets, uncalled: Iterable[str]) -> None:
    """Refuse layers of a tower, asked for by name, that the first batch did not call, if all batches hold text alone.

    Args:
        model: that ran the first batch.
        loader: a sequence; of others the next batches are unknown.
        targets: module name → layer.
        uncalled: the names of those that the first batch did not call.

    Raises:
        ValueError: naming the first of them, and its tower.
    """
    if targets.optional or not isinstance(loader, Sequence):
        return
    regions = Regions(model)
    towers = {name: tower for name in uncalled if (tower := regions.tower(name)) is not None}
    reader = PaddingReader(model)
    if not towers or any(reader.padding_of(_named(batch, n, model)[0]).mixed for n, batch in enumerate(loader, 1)):
        return
    (name, tower), more = next(iter(towers.items())), f" and {len(towers) - 1} more" if len(towers) > 1 else ""
    raise InputError(
        f"target {name!r}{more} was never called: {tower!r} does not get text, and no batch holds anything else. Leave it out "
        rf"(exclude='{re.escape(tower)}\..*'), or give batches with images or sounds"
    )


def _arguments(
    named: Mapping[str, Any], by_name: bool, device: torch.device | None, model: nn.Module, labels: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    moved = {
        name: upload(value, device) if isinstance(value, torch.Tensor) and device is not None else value
        for name, value in named.items()
    }
    if not by_name:
        return tuple(moved.values()), {}
    if not labels and hasattr(model, "config") and not is_encoder_decoder(model):
        moved.pop("labels", None)  # no loss is wanted; encoder–decoder models make their decoder's inputs of them
    return (), moved


def _named(batch: Any, number: int, model: nn.Module) -> tuple[dict[str, Any], bool]:
    """A batch as argument name → value, and whether the model is to be called with names."""
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in batch.items()}, True
    values = (batch,) if isinstance(batch, torch.Tensor) else batch
    if not isinstance(values, (tuple, list)) or not values or not all(isinstance(value, torch.Tensor) for value in values):
        rows = isinstance(values, (tuple, list)) and values and isinstance(values[0], Mapping)
        what = ". Rows become batches by PackedBatches(load_texts(rows), tokenizer)" if rows else ""
        raise InputTypeError(f"batch {number} is {type(batch).__name__}; expected a mapping, a tensor or a tuple of tensors{what}")
    names, own = parameter_names(model, len(values))
    if len(names) < len(values):
        if any(looks_like_mask(value, values[0]) for value in values[max(1, len(names)) :]):
            raise InputError(
                f"batch {number}: one of its {len(values)} tensors looks like an attention_mask, but the forward of "
                f"{type(model).__name__} does not name its arguments: give batches as mappings with 'attention_mask'"
            )
        names += [f"argument {index}" for index in range(len(names), len(values))]
    return dict(zip(names, values, strict=False)), own and "attention_mask" in names and isinstance(batch, (tuple, list))


def _check_preferences(named: Mapping[str, Any], number: int, model: nn.Module, *, warned: bool) -> bool:
    """Whether a batch, or one before, is of pairs of preferences (TRL's DPO, KTO), about which there is a warning.

    Raises:
        ValueError: if its sequences have names such as `chosen_input_ids`, which the model does not take.
    """
    takes = inspect.signature(model.forward).parameters
    others = [name for name in named if name.endswith("input_ids") and name not in takes]
    if others and "input_ids" in takes and not {"input_ids", "inputs_embeds"} & named.keys():
        raise InputError(
            f"batch {number} has no 'input_ids', but {', '.join(map(repr, others))}: give mappings of what the model takes "
            f"({{'input_ids': batch[{others[0]!r}], 'attention_mask': …}}), or the data themselves: "
            "PackedBatches(load_texts(rows), tokenizer) takes the chosen side"
        )
    if warned or "completion_mask" not in named or "labels" in named:
        return warned
    warnings.warn(
        f"batch {number} has a 'completion_mask' and no labels, as TRL's batches of preferences have: rejected answers are counted "
        "like chosen ones. PackedBatches(load_texts(rows), tokenizer) takes the chosen side of pairs alone",
        DataWarning,
        stacklevel=2,
    )
    return True


def parameter_names(model: nn.Module, count: int) -> tuple[list[str], bool]:
    """The names of the first arguments, and whether they are the model's own: a wrapper passes on what it does not name."""
    module, own = model, True
    while True:
        parameters = inspect.signature(module.forward).parameters.values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
        children = list(module.children())
        if named or len(children) != 1 or not any(p.kind == p.VAR_POSITIONAL for p in parameters):
            return named, own
        module, own = children[0], False


def input_device(model: nn.Module) -> torch.device | None:
    """Where a model's embeddings are."""
    get = getattr(model, "get_input_embeddings", None)
    with contextlib.suppress(NotImplementedError):
        embeddings = get() if callable(get) else None
        weight = getattr(embeddings, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
            return device_of(weight)
    return next((device_of(p) for p in model.parameters() if p.device.type != "meta"), None)
