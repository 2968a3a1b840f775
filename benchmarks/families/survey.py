"""One architecture, step by step: what nullspace sums, starts, trains, reloads and exports, or how it refuses."""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from benchmarks.families.build import Architecture, Batch, architectures, as_built, at_default_sizes, batches, build, scores_of
from benchmarks.families.odd import REVERSIBLE
from benchmarks.families.records import SAME_OUTPUTS, SAME_SUMS
from benchmarks.families.reference import Sums, input_sums
from nullspace import NullSpaces, compute_null_spaces, stream_covariances
from nullspace.errors import NullspaceError
from nullspace.integrations.peft import attach_subtracted, export_lora, inject_adapters, save_init
from nullspace.model.coverage import matrices

RANK = 4


def survey(name: str) -> dict[str, Any]:
    """The row of a model class, by its name: see `docs/families.md`."""
    architecture = architectures()[name]
    began = time.perf_counter()
    row: dict[str, Any] = {"family": architecture.family, "class": name, "kind": architecture.kind}
    warnings.simplefilter("ignore")
    try:
        model, dtype = build(architecture)
    except Exception as error:
        return {**row, "built": False, "message": described(error)}
    row |= {"built": True, "dtype": str(dtype).removeprefix("torch.")}
    _Survey(architecture, model, dtype, row).run()
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def described(error: BaseException, most: int = 400) -> str:
    """Class and message, on one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= most else f"{text[:most]} …"


def step(act: Callable[[], float], limit: float) -> dict[str, Any]:
    """What a step gives: ok or wrong, with its error; refused, if the error is nullspace's own; otherwise failed."""
    try:
        error = act()
    except NullspaceError as refusal:
        return {"result": "refused", "message": described(refusal)}
    except Exception as failure:
        return {"result": "failed", "message": described(failure)}
    return {"result": "ok" if error <= limit else "wrong", "error": float(f"{error:.1e}")}


class _Survey:
    """One model on its way through all steps; the row is filled in place."""

    def __init__(self, architecture: Architecture, model: nn.Module, dtype: torch.dtype, row: dict[str, Any]) -> None:
        self.architecture, self.model, self.dtype, self.row = architecture, model, dtype, row
        self.loader = batches(architecture, model)
        self.same_sums = SAME_SUMS[row["dtype"]]

    def run(self) -> None:
        """All steps, each only if the one that it needs has gone well."""
        row = self.row
        row["resident"] = self._resident()
        if row["resident"]["result"] == "refused":
            padded = row["resident"]["message"]
            self.loader = batches(self.architecture, self.model, padded=False)
            row["resident"] = self._resident()
            if row["resident"]["result"] != "refused":
                row["padding"] = padded
        if row["resident"]["result"] not in ("ok", "wrong"):
            return
        row["layerwise"] = step(lambda: _difference(self.summed, self._sums("layerwise")), self.same_sums)
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            self.model.save_pretrained(self.folder / "untouched")
            self.model = self._load("untouched")
            for name in ("start", "train", "reload", "export"):
                row[name] = step(getattr(self, f"_{name}"), SAME_OUTPUTS)
                if row[name]["result"] in ("refused", "failed") and name in ("start", "train"):
                    return

    def _resident(self) -> dict[str, Any]:
        def act() -> float:
            expected, called = input_sums(self.model, self.loader)
            self.summed = self._sums("resident")
            self.row |= shares(self.architecture, self.model, set(self.summed), called)
            return _difference({name: expected.get(name, torch.zeros(())) for name in self.summed}, self.summed)

        return step(act, self.same_sums)

    def _sums(self, strategy: str) -> Sums:
        torch.manual_seed(3)
        sums: Sums = {}
        stream = stream_covariances(self.model, self.loader, strategy=strategy, precision="fp64", progress=False, experts="each")
        for site, covariance in stream:
            sums.update(dict.fromkeys(site.members, covariance.matrix()))
        return sums

    def _start(self) -> float:
        before = output_of(self.model, self.loader[-1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spaces: NullSpaces = compute_null_spaces(
                self.model, self.loader, rank=RANK, strategy="resident", experts="each", progress=False
            )
        self.row["warnings"] = sorted({described(Warning(str(each.message)), 600).removeprefix("Warning: ") for each in caught})
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK)
        self.adapted = inject_adapters(self.model, config, spaces)
        self.initial = save_init(self.folder / "init", self.adapted)
        return _change(before, output_of(self.adapted, self.loader[-1]))

    def _train(self) -> float:
        model: Any = self.adapted
        before = output_of(model, self.loader[-1])
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
        model.train()
        for module in model.modules():
            if type(module).__name__.startswith("BatchNorm"):
                module.eval()  # its statistics are the base's, which an adapter does not hold
        if self.architecture.name in REVERSIBLE:
            model.enable_input_require_grads()
        for _ in range(2):
            optimizer.zero_grad()
            scores = scores_of(model(**self.loader[-1]))
            targets = torch.arange(scores.shape[:-1].numel()) % scores.shape[-1]
            loss = nn.functional.cross_entropy(scores.flatten(0, -2), targets)
            loss.backward()
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {float(loss)}")
            without = sorted({re.sub(r"\d+", "#", name) for name, p in trained.items() if p.grad is None})
            if len(without) == len(trained):
                raise ArithmeticError("no factor has a gradient")
            optimizer.step()
        self.row["without_gradient"] = without
        model.eval()
        model.save_pretrained(self.folder / "trained")
        self.expected = output_of(model, self.loader[-1])
        if torch.equal(self.expected, before):
            raise ArithmeticError("two steps have not changed the output")
        return 0.0

    def _reload(self) -> float:
        base = self._load("init/base" if (self.initial / "base").exists() else "untouched")
        model = PeftModel.from_pretrained(base, self.folder / "trained")
        if (self.initial / "subtracted").exists():
            attach_subtracted(model, self.initial / "subtracted")
        return _change(self.expected, output_of(model, self.loader[-1]))

    def _export(self) -> float:
        export_lora(self.folder / "trained", self.initial, self.folder / "exported")
        model = PeftModel.from_pretrained(self._load("untouched"), self.folder / "exported")
        return _change(self.expected, output_of(model, self.loader[-1]))

    def _load(self, folder: str) -> Any:
        return as_built(self.architecture.model_class.from_pretrained(self.folder / folder, dtype=self.dtype))


def shares(architecture: Architecture, model: nn.Module, covered: set[str], called: set[str]) -> dict[str, Any]:
    """Parameters in matrices at the default sizes, the share of them that the data reach, and the covered share of these.

    Layers of the two models are the same if their names differ in numbers alone.
    """
    patterns = {re.sub(r"\d+", "#", name) for name in covered}
    reached = {re.sub(r"\d+", "#", name) for name in called}
    try:
        real = at_default_sizes(architecture)
        sizes = {name: size for name, size in matrices(real) if isinstance(size, int)}
    except Exception:  # some default sizes are no model
        real, sizes = model, dict(matrices(model))
    modules = dict(real.named_modules())
    total = known = served = 0
    left: dict[str, int] = {}
    for name, size in sizes.items():
        pattern = re.sub(r"\d+", "#", name)
        owner = re.sub(r"\d+", "#", name if name in modules else name.rpartition(".")[0])
        total += size
        if pattern in patterns or owner in reached:
            known += size
        if pattern in patterns:
            served += size
        elif owner in reached:
            left[pattern] = left.get(pattern, 0) + size
    most = sorted(left.items(), key=lambda each: -each[1])[:4]
    return {
        "matrices": total,
        "share": round(served / max(known, 1), 5),
        "reached": round(known / max(total, 1), 5),
        "left_out": {name: round(size / max(known, 1), 5) for name, size in most if size / max(known, 1) >= 5e-4},
    }


def output_of(model: Any, batch: Batch) -> torch.Tensor:
    """The scores, in eval mode."""
    model.eval()
    with torch.no_grad():
        return scores_of(model(**batch)).double()


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def _difference(expected: Sums, sums: Sums) -> float:
    """The largest difference, of any layer, relative to the largest entry of its sum; infinite if the layers differ."""
    if expected.keys() != sums.keys():
        only = sorted(expected.keys() ^ sums.keys())
        raise LookupError(f"{len(only)} layers have a sum in one pass alone, such as {only[0]}")
    worst = 0.0
    for name, c in expected.items():
        scale = float(c.abs().max()) if c.dim() else 0.0
        difference = float((sums[name] - c).abs().max())
        worst = max(worst, difference / scale if scale > 0 else float(difference > 0))
    return worst
