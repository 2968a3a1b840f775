"""The parts of a model with several inputs: where a layer is, and the masks that the model hands to its parts.

A vision tower turns pixels into patches, and an audio tower sounds into frames, by rules of the model's own. Which patches are
padding is known only inside: the blocks of the tower get a mask, made of the batch's. So do the blocks of a decoder for the
encoder's output, to which they attend.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from nullspace.devices import on_host
from nullspace.model.blocks import is_encoder_decoder, marked_blocks, split_towers
from nullspace.model.linear import output_head
from nullspace.model.padding import seen_rows
from nullspace.model.wrappers import named_modules

TEXT = ""
"""In the place of a tower's name."""
# Arguments of blocks with what another part of the model has made, and the masks of it.
SOURCES = ("encoder_hidden_states", "cross_attention_states", "key_value_states")
MASK = "attention_mask"
MASKS_OF_SOURCES = ("encoder_attention_mask", "cross_attention_mask")


class Regions:
    """Where in a model a layer is, by its name: in an encoder, in another tower than the text's, in a list of experts, …"""

    def __init__(self, model: nn.Module) -> None:
        modules = named_modules(model)
        blocks = marked_blocks(model)
        self.has_two_inputs = is_encoder_decoder(model)
        self._blocks = [tuple(name.split(".")) for name in blocks]
        self._text, beside = split_towers(model, blocks)
        self._towers = list(dict.fromkeys(beside.values()))
        while "." in self._text and self._towers:  # what is in a module with the text's part and no tower gets text (BLIP's `cls`)
            around = self._text.rpartition(".")[0]
            if any(tower.startswith(f"{around}.") for tower in self._towers):
                break
            self._text = around
        head = output_head(model)
        self._head = next((name for name, module in modules.items() if module is head), None)
        self._lists = {
            tuple(name.split("."))
            for name, module in modules.items()
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
        }

    def is_text(self, name: str) -> bool:
        """Whether a layer is in the part of the model that the token embeddings and their blocks share, or is the output head."""
        return not self._text or name.startswith(f"{self._text}.") or name == self._head

    def tower(self, name: str) -> str | None:
        """The encoder, or the tower beside the text's (one with blocks of its own), that a module is in."""
        if self.has_two_inputs:
            path = name.split(".")
            sides = (end for end, part in enumerate(path, 1) if part.endswith(("encoder", "decoder")))
            end = next(sides, 0)
            if end:
                return ".".join(path[:end]) if path[end - 1].endswith("encoder") else None
        return next((tower for tower in self._towers if name == tower or name.startswith(f"{tower}.")), None)

    def is_outside_blocks(self, name: str) -> bool:
        """Whether a model has blocks, and a layer is in none of them."""
        path = tuple(name.split("."))
        return bool(self._blocks) and not any(path[: len(block)] == block for block in self._blocks)

    def is_routed(self, name: str) -> bool:
        """Whether a layer may be one of several of which each gets some of the rows: it is in a list of modules below its block."""
        path = tuple(name.split("."))
        block = next((block for block in self._blocks if path[: len(block)] == block), ())
        return any(path[:end] in self._lists for end in range(len(block) + 1, len(path)))


class HandedMasks:
    """What the blocks of a model, and the modules around those of towers, are handed in one batch.

    Args:
        model: any module.
        regions: of the model.
    """

    def __init__(self, model: nn.Module, regions: Regions) -> None:
        # Tower → the masks that its blocks, and the modules around them, were handed; the last ones first.
        self._of: dict[str, list[torch.Tensor]] = {}
        self._around: dict[str, list[torch.Tensor]] = {}
        self._sources: list[tuple[weakref.ref[torch.Tensor], torch.Tensor | None]] = []  # and their masks
        self._read: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._readers = list(self._make_readers(model, regions))

    def clear(self) -> None:
        """Begin a batch."""
        for kept in (self._of, self._around, self._sources, self._read):
            kept.clear()

    def is_source(self, x: torch.Tensor) -> bool:
        """Whether blocks were handed this very tensor as the output of another part of the model."""
        return any(ref() is x for ref, _ in self._sources)

    def of_source(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The masks of such a tensor, each (sequences, rows) bool: those that can be read."""
        given = (mask for ref, mask in self._sources if ref() is x)
        return [seen for mask in given if mask is not None and (seen := self._seen(mask, of_source=True)) is not None]

    def of_tower(self, tower: str) -> list[torch.Tensor]:
        """The masks that a tower's blocks, or those of `TEXT`, were handed, (sequences, rows) bool: those that can be read."""
        return [seen for mask in self._of.get(tower, ()) if (seen := self._seen(mask, of_source=False)) is not None]

    def around_tower(self, tower: str) -> list[torch.Tensor]:
        """As `of_tower`, of the modules around its blocks: maybe of pixels, where the rows are patches."""
        return [seen for mask in self._around.get(tower, ()) if (seen := self._seen(mask, of_source=False)) is not None]

    def of_all_towers(self) -> list[torch.Tensor]:
        """`of_tower` of all towers."""
        return [seen for tower in self._of if tower != TEXT for seen in self.of_tower(tower)]

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Context manager: masks are read, by hooks."""
        handles = [module.register_forward_pre_hook(read, with_kwargs=True) for module, read in self._readers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_readers(self, model: nn.Module, regions: Regions) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        blocks = marked_blocks(model)
        around = {name[:end] for name in blocks if regions.tower(name) for end, sign in enumerate(name) if sign == "."}
        for name, module in named_modules(model).items():
            names = list(inspect.signature(type(module).forward).parameters)[1:]  # a stand-in may be in the module's own place
            if name in blocks or name in around or not set(SOURCES).isdisjoint(names):
                yield module, self._reader(regions.tower(name) or TEXT, names, self._of if name in blocks else self._around)

    def _reader(self, tower: str, names: list[str], masks: dict[str, list[torch.Tensor]]) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
            mask = next((tensors[name] for name in MASKS_OF_SOURCES if name in tensors), None)
            for name in SOURCES:
                if name in tensors and not self.is_source(tensors[name]):
                    self._sources.append((weakref.ref(tensors[name]), mask))
            own = [value for name, value in tensors.items() if name.endswith(MASK) and name not in MASKS_OF_SOURCES]
            known = masks.setdefault(tower, [])
            known[:0] = [value for value in own if not any(value is each for each in known)]

        return read

    def _seen(self, mask: torch.Tensor, *, of_source: bool) -> torch.Tensor | None:
        """`seen_rows`, on the host; the host waits once for a mask that is on a GPU."""
        if id(mask) not in self._read:
            self._read[id(mask)] = mask, seen_rows(on_host(mask), of_source=of_source)
        return self._read[id(mask)][1]
