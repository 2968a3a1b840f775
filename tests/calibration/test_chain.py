"""Blocks that do not behave: block by block they give what an ordinary forward gives, or are refused before the first sum."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from nullspace import stream_covariances

WIDTH = 16


class Linear(GradientCheckpointingLayer):
    """A block with one layer inside. Those below differ from it in what they do beside that."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.up(x))

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.step(x)


class InPlace(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return x.add_(self.step(x))


class InPlaceUnseen(Linear):
    """PyTorch does not count what is written through `.data`."""

    def forward(self, x: torch.Tensor) -> Any:
        step = self.step(x)
        x.data.mul_(0.5)
        return x + step


class ReturnsItsInput(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        self.step(x)
        return x


class ReturnsAView(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.stack([x + self.step(x), x])[0]


class WithWeights(Linear):
    """As attention returns its weights; here they are not used."""

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.step(x), x.mT @ x, None, [x.argmax(-1)]


class Biased(Linear):
    """As in T5: the first block makes a bias of its input, and all use it."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        bias = x.mean(1, keepdim=True) if bias is None else bias
        return x + self.step(x) + bias, bias


class Masked(Linear):
    """What it returns beside the hidden states is whole numbers."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor | None = None) -> Any:
        chosen = x.argmax(-1) if chosen is None else chosen
        return x + self.step(x) * (chosen % 2)[..., None], chosen


class WritesMask(Linear):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        out = x + self.step(x) * mask
        mask.mul_(0.5)
        return out


class Appends(Linear):
    def forward(self, x: torch.Tensor, memory: Any) -> Any:
        memory.append(x)
        return x + self.step(sum(memory))


class Caches(Linear):
    """Fills a cache of an unknown class with all that it has been given, and reads it."""

    def forward(self, x: torch.Tensor, past: Any = None) -> Any:
        past.kept[id(self)] = torch.cat([past.kept[id(self)], x], 1) if id(self) in past.kept else x
        return x + self.step(x) + past.kept[id(self)].mean(1, keepdim=True)


class Remembers(Linear):
    """Goes on from its last call."""

    def forward(self, x: torch.Tensor) -> Any:
        last, self.last = getattr(self, "last", torch.zeros(())), x.detach().mean()
        return x + self.step(x) + last


class Shares(Linear):
    """Counts the calls of all blocks."""

    calls: ClassVar[list[int]] = [0]

    def forward(self, x: torch.Tensor) -> Any:
        self.calls[0] += 1
        return x + self.step(x) * self.calls[0]


class Memoises(Linear):
    """Keeps a table that is the same whenever it is made."""

    table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        if self.table is None:
            self.table = torch.linspace(0, 1, WIDTH, dtype=x.dtype)
        return x + self.step(x) * self.table


class Random(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return x + F.dropout(self.step(x), 0.1, training=True)


class OtherDtype(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        x = x.double()
        return (x + self.step(x)).float()


class Numbered(Linear):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        kwargs["seen"] = kwargs.get("seen", 0) + 1
        return x + self.step(x) * kwargs["seen"]


class Model(nn.Module):
    """An embedding and three blocks, called as a chain; `between` says what else happens."""

    def __init__(self, blocks: list[type[Linear]], between: str = "") -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList([block() for block in blocks])
        self.last = nn.Linear(WIDTH, 4)
        self.between = between
        self.register_buffer("workspace", torch.zeros(2, 30, WIDTH))
        self.to(torch.float32 if between == "autocast" else torch.float64).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        kind = type(self.blocks[0])
        more: dict[str, Any] = {}
        if kind is WritesMask:
            more = {"mask": torch.ones(ids.shape[1], 1, dtype=x.dtype)}
        elif kind is Appends:
            more = {"memory": []}
        elif kind is Caches:
            more = {"past": SimpleNamespace(kept={})}
        if self.between == "workspace":
            x = self.workspace[:, : ids.shape[1]].copy_(x)
        for number, block in enumerate(self.blocks):
            if self.between == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = block(x)
            else:
                out = block(x, **more)
            x, *side = out if isinstance(out, tuple) else (out,)
            if kind in (Biased, Masked):
                more = {"bias" if kind is Biased else "chosen": side[0]}
            if self.between == "in place":
                x.mul_(1 + number)
            if self.between == "a flag":
                more = {"flag": bool((x > 0).sum() % 2)}
        return self.last(x.to(self.last.weight.dtype))


class Flagged(Linear):
    def forward(self, x: torch.Tensor, flag: bool = False) -> Any:
        return x + self.step(x) * (2 if flag else 1)


class Contextual(Linear):
    """Reads what the model has written on it."""

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.step(x) + self.context.mean(1, keepdim=True)


class SideChannel(Model):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            block.context = self.embed(ids)
        return super().forward(ids)


class Behind(Model):
    """Uses what a block in the midst returned behind all of them."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        a, b, c = self.blocks
        x = a(self.embed(ids))
        return self.last(c(b(x)) + x)


class Entangled(Model):
    """Writes what depends on hidden states into a tensor that the first block was given too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        scale = torch.ones(ids.shape[1], 1, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, scale)
            scale.add_(x.detach().mean().isnan().logical_not())
        return self.last(x)


class Scaled(Linear):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> Any:
        return x + self.step(x) * scale


def batches(lengths: tuple[int, ...] = (30, 30, 17)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (2, length), generator=generator) for length in lengths]


def sums(model: nn.Module, data: list[torch.Tensor], strategy: str) -> dict[str, tuple[torch.Tensor, int]]:
    torch.manual_seed(5)
    stream = stream_covariances(model, data, strategy=strategy, precision="fp64", progress=False)
    return by_layer(stream)


def by_layer(stream: Any) -> dict[str, tuple[torch.Tensor, int]]:
    return {name: (covariance.matrix(), covariance.tokens) for site, covariance in stream for name in site.members}


def make(kind: type[Model], *blocks: type[Linear], between: str = "") -> Callable[[], Model]:
    def made() -> Model:
        torch.manual_seed(0)
        return kind(list(blocks) if len(blocks) > 1 else 3 * list(blocks), between)

    return made


SERVED = {
    "returns its input": make(Model, ReturnsItsInput),
    "returns a view": make(Model, ReturnsAView),
    "returns weights that are not used": make(Model, WithWeights),
    "blocks that return different things": make(Model, Linear, WithWeights, ReturnsItsInput),
    "memoises": make(Model, Memoises),
    "its own keyword arguments": make(Model, Numbered),
}


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("how", list(SERVED))
def test_what_blocks_keep_to_themselves_does_no_harm(how: str, place: str) -> None:
    expected = sums(SERVED[how](), batches(), "resident")
    torch.manual_seed(5)
    stream = stream_covariances(
        SERVED[how](), batches(), strategy="layerwise", precision="fp64", hidden_states=place, progress=False
    )
    found = by_layer(stream)
    assert found.keys() == expected.keys()
    for name, (matrix, tokens) in expected.items():
        assert found[name][1] == tokens
        torch.testing.assert_close(found[name][0], matrix, rtol=1e-9, atol=1e-9 * float(matrix.trace()))


REFUSED = {
    "writes to its input": (make(Model, InPlace), r"'blocks\.0' that changes what it is given"),
    "writes to its input, in the midst": (make(Model, Linear, InPlace, Linear), r"'blocks\.1' that changes what it is given"),
    "writes to its input, unseen": (make(Model, InPlaceUnseen), r"'blocks\.0' that changes what it is given"),
    "writes to a mask": (make(Model, WritesMask), r"'blocks\.0' that changes what it is given"),
    "appends to a list": (make(Model, Appends), r"'blocks\.0' that changes what it is given"),
    "fills a cache": (make(Model, Caches), r"'blocks\.0' that changes what it is given"),
    "hands on a bias": (make(Model, Biased), r"'blocks\.1' more than what 'blocks\.0' returned"),
    "hands on whole numbers": (make(Model, Masked), r"'blocks\.1' more than what 'blocks\.0' returned"),
    "hands on a flag": (make(Model, Flagged, between="a flag"), r"'blocks\.[12]' more than what"),
    "goes on from its last call": (make(Model, Remembers), r"'blocks\.0' that returns something else when it is called again"),
    "goes on, in the midst": (make(Model, Linear, Remembers, Linear), r"'blocks\.1' that returns something else"),
    "counts the calls of all": (make(Model, Shares), r"'blocks\.0' that returns something else when it is called again"),
    "draws random numbers": (make(Model, Random), r"'blocks\.0' that returns something else when it is called again"),
    "in another dtype": (make(Model, OtherDtype), r"'blocks\.0' that turns torch\.float64 .* into torch\.float32"),
    "last, in another dtype": (make(Model, Linear, Linear, OtherDtype), r"'blocks\.2' that turns torch\.float64"),
    "under autocast": (make(Model, Linear, between="autocast"), r"'blocks\.0' that"),
    "changed in place between blocks": (make(Model, Linear, between="in place"), r"does not hand 'blocks\.1' the hidden states"),
    "in a workspace that the next batch fills": (make(Model, Linear, between="workspace"), "writes again to a tensor"),
    "by a side channel": (make(SideChannel, Contextual), r"'blocks\.0' that returned something else"),
    "used behind the blocks": (make(Behind, Linear), r"gives 'last', behind its blocks, more than what 'blocks\.2' returned"),
    "written into an argument": (make(Entangled, Scaled), r"'blocks\.[12]' more than what"),
}


@pytest.mark.parametrize("how", list(REFUSED))
def test_what_would_come_out_differently_is_refused_by_name_before_the_first_sum(how: str) -> None:
    model, says = REFUSED[how]
    data = batches()
    before = [batch.clone() for batch in data]
    with pytest.raises(ValueError, match=says) as error:
        next(stream_covariances(model(), data, strategy="layerwise", precision="fp64", progress=False))
    assert "strategy='resident'" in str(error.value)
    assert all(map(torch.equal, data, before))
    assert sums(model(), data, "resident")
