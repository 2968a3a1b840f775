"""Where a layer is in its model, read from its name: for tables and figures by block and projection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Location(NamedTuple):
    """Block and projection of a layer."""

    block: int | str | None
    """The block's number; with its prefix, `"decoder.block.0"`, where a model has several rows of blocks; None outside of any."""
    projection: str
    """The name's last part; the whole name behind the block's number where the last part alone would mean two layers."""


def locations(names: Iterable[str]) -> dict[str, Location]:
    """Name → location. The first number in a name is that of its block; later ones, such as an expert's, are left out.

    Example:
        >>> locations(["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj"])["model.layers.3.mlp.up_proj"]
        Location(block=3, projection='up_proj')
        >>> locations(["h.0.attn.c_proj", "h.0.mlp.c_proj"])["h.0.mlp.c_proj"]
        Location(block=0, projection='mlp.c_proj')
    """
    parted = {name: _parted(name.partition("[")[0].split(".")) for name in names}
    prefixes = {prefix for prefix, number, _ in parted.values() if number is not None}
    last = Counter(tail.rpartition(".")[2] for tail in {tail for _, _, tail in parted.values()})

    def locate(prefix: str, number: int | None, tail: str) -> Location:
        end = tail.rpartition(".")[2]
        block = number if number is None or len(prefixes) == 1 else f"{prefix}.{number}"
        return Location(block, end if last[end] == 1 else tail)

    return {name: locate(*parts) for name, parts in parted.items()}


def is_attention(name: str) -> bool:
    """Whether a layer belongs to an attention module, by its name."""
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def is_mlp(name: str) -> bool:
    """Whether a layer belongs to a feed-forward module, experts included, by its name."""
    parts = [part for part in name.lower().partition("[")[0].split(".") if not part.isdigit()]
    inside = any(part in _FEED_FORWARD_LAYERS or any(word in part for word in _FEED_FORWARD) for part in parts)
    return inside and not is_attention(name)


_FEED_FORWARD = ("mlp", "ffn", "feed_forward", "feedforward", "ff_layer", "densereludense", "moe", "expert")
_FEED_FORWARD_LAYERS = ("fc1", "fc2", "wi", "wo", "wi_0", "wi_1", "ff1", "ff2", "lin1", "lin2", "intermediate", "output")


def _parted(parts: list[str]) -> tuple[str, int | None, str]:
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return "", None, ".".join(parts)
    return ".".join(parts[:at]), int(parts[at]), ".".join(part for part in parts[at + 1 :] if not part.isdigit())
