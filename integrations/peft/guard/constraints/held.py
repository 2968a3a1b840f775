"""`Held`: factors of an adapter in training, and what a step may change of them."""

from __future__ import annotations

from typing import Any

import torch

from nullspace.errors import InputError
from nullspace.integrations.peft.guard.adapted import FACTORS, Adapted
from nullspace.integrations.peft.guard.constraints.directions import Allowed, Damping, Projection
from nullspace.integrations.peft.guard.local import on_gradient, put, put_whole, read, read_whole
from nullspace.model.sharded_tensors import whole

# Of a row's norm: less than this left by a projection is rounding.
_NOTHING = 1e-5


class Held:
    """Rows of length d, one below the other, and what they may change by: the A of layers that share an input, or Bᵀ of one layer.

    Args:
        layers: of the adapter.
        factor: `"lora_A"`, or `"lora_B"` for its columns.
        change: what of a change is allowed.
        allowed: its description.
        lengths: whether a start that is projected keeps the norms of its rows.
        remedy: against rows that have no allowed part, for an error.
    """

    def __init__(
        self,
        layers: list[Adapted],
        factor: str,
        change: Projection | Damping,
        allowed: Allowed,
        *,
        lengths: bool,
        remedy: str,
    ) -> None:
        self.layers, self.factor, self.allowed = layers, factor, allowed
        self._change, self._lengths, self._remedy = change, lengths, remedy
        self._reference = torch.empty(0)
        self._rows: list[int] = []

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """As they are at the moment."""
        return [each.factor(self.factor) for each in self.layers]

    @torch.no_grad()
    def begin(self) -> None:
        """Project the start where the other factor is zero, so that the model stays unchanged. Collective if it is sharded."""
        other = next(name for name in FACTORS if name != self.factor)
        for each, rows in zip(self.layers, self._read().split(self._rows), strict=True):
            if not bool(whole(each.factor(other)).any()):
                self._put(each, self._projected_start(each, rows))
        self.rebase()

    def _projected_start(self, each: Adapted, rows: torch.Tensor) -> torch.Tensor:
        inside = self._change(rows)
        before, after = (torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (rows, inside))
        if bool((after <= _NOTHING * before).any()):
            what = "row of A" if self.factor == "lora_A" else "column of B"
            raise InputError(
                f"layer {each.name!r}: a {what} has nothing in the {self.allowed.directions} directions that it is confined to. "
                f"Start from another {self.factor[-1]}, or {self._remedy}"
            )
        return inside * (before / after) if self._lengths else inside

    def rebase(self) -> None:
        """Count changes from now on."""
        self._reference = self._read()

    @torch.no_grad()
    def project(self) -> None:
        """Take back what is not allowed of the changes."""
        now = self._read()
        confined = self._reference + self._change(now - self._reference)
        for each, rows in zip(self.layers, confined.split(self._rows), strict=True):
            self._put(each, rows)
        if isinstance(self._change, Damping):
            self._reference = confined

    def watch(self) -> list[Any]:
        """Handles of hooks that take what is not allowed out of gradients, before these are clipped."""
        return [on_gradient(parameter, self._of_gradient) for parameter in self.parameters if parameter.requires_grad]

    @torch.no_grad()
    def _of_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        wide = gradient.to(self._reference.dtype)
        return (self._change(wide) if self.factor == "lora_A" else self._change(wide.mT).mT).to(gradient.dtype)

    def _read(self) -> torch.Tensor:
        """(n, d). Of a sharded A the rows of this rank; a sharded B is gathered, as its columns are divided."""
        parts = [read(each.a) if self.factor == "lora_A" else read_whole(each.b).mT for each in self.layers]
        self._rows = [len(part) for part in parts]
        return torch.cat(parts)

    def _put(self, each: Adapted, rows: torch.Tensor) -> None:
        if self.factor == "lora_A":
            put(each.a, rows)
        else:
            put_whole(each.b, rows.mT.contiguous())
