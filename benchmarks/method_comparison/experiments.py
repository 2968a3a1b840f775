"""Experiment folders in the format of PEFT's comparison, with a file of ours that says how the adapters start."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nullspace.errors import DamagedFileError, InputError, OutputExistsError

MODEL = "meta-llama/Llama-3.2-3B"
START = "nullspace.json"
TRAINING = "training_params.json"
FINEWIKI = "finewiki"
DECAY = 0.1
"""Their default weight decay."""


@dataclass(frozen=True)
class Start:
    """How adapters start, or how a trained one is filtered. Its fields are those of `nullspace.json`.

    Attributes:
        method: of `nullspace.methods.METHODS`, or `"filter"`.
        freeze_a: of `inject_adapters`.
        keep: what must be kept: `"finewiki"`, rows behind `skip` of the data set that their forgetting is measured on; or a file or
            hub data set of `load_texts` (its train split).
        skip: rows of FineWiki that are left out. Their forgetting is measured on the first 100.
        keep_samples: texts, each cut at `length` tokens.
        task_samples: training examples of MetaMathQA, in their template, drawn at random.
        length: tokens.
        of: for a filter: the experiment whose adapter is filtered, as METHOD/NAME.
        strengths: for a filter: μ, each a result.
    """

    method: str
    freeze_a: bool | None = None
    keep: str = FINEWIKI
    skip: int = 1000
    keep_samples: int = 256
    task_samples: int = 256
    length: int = 768
    of: str = ""
    strengths: tuple[float, ...] = ()

    @classmethod
    def load(cls, experiment: Path) -> Start | None:
        """The start of an experiment; None if the folder has no file of ours, so that PEFT starts its adapters.

        Raises:
            ValueError: naming the file, if it is no JSON object with these fields.
        """
        path = experiment / START
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise DamagedFileError(f"{path} is not JSON: {error}") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or "method" not in content or not names.issuperset(content):
            raise DamagedFileError(
                f"{path} needs a JSON object with the field method, and no others than {', '.join(sorted(names))}"
            )
        return cls(**{**content, "strengths": tuple(content.get("strengths", ()))})

    def save(self, experiment: Path) -> None:
        (experiment / START).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Recipe:
    """One method of the comparison.

    Attributes:
        folder: the name in `experiments/`.
        suffix: behind the name of an experiment.
        start: None for PEFT's own LoRA.
        rates: learning rates, their default among them. Where A is frozen twice that too, since half of the parameters are trained.
        decay: of the weights. Zero where the start is not zero: there it would pull towards the model without B₀A₀.
    """

    folder: str
    suffix: str = ""
    start: Start | None = None
    rates: tuple[float, ...] = (1e-4,)
    decay: float = DECAY


RECIPES = {
    "lora": Recipe("lora"),
    "contrast": Recipe("contrast", start=Start("contrast", freeze_a=True), rates=(1e-4, 2e-4)),
    "lora-null": Recipe("lora_null", "-v2", Start("lora-null", freeze_a=True), (1e-4, 2e-4), decay=0.0),
    "lora-null-b-zero": Recipe("lora_null", "-b-zero", Start("b-zero", freeze_a=True), (1e-4, 2e-4)),
    "corda": Recipe("corda", "-kpm", Start("corda-kpm"), decay=0.0),
    "filter": Recipe("filter", start=Start("filter", strengths=(0.1, 1.0, 10.0))),
}


@dataclass(frozen=True)
class Sizes:
    """What all experiments of one call share; the targets are those of PEFT's LoRA on Llama."""

    model: str = MODEL
    rank: int = 32
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    keep: str = FINEWIKI

    def name(self, rate: float, seed: int, suffix: str = "", calibrated: bool = False) -> str:
        """The name of an experiment: model, rank, rate, and what differs from the defaults."""
        model = self.model.rstrip("/").rpartition("/")[2]
        targets = "" if self.targets == Sizes.targets else "-" + "-".join(each.removesuffix("_proj") for each in self.targets)
        keep = "-keep_" + re.sub(r"[^\w.-]", "_", Path(self.keep).stem) if calibrated and self.keep != FINEWIKI else ""
        once_more = f"-seed_{seed}" if seed else ""
        return f"{model[:1].lower()}{model[1:]}-rank{self.rank}{targets}{suffix}{keep}-lr_{rate:g}{once_more}"


def write(
    out: Path, sizes: Sizes, methods: Sequence[str], rates: Sequence[float] | None = None, seeds: Sequence[int] = (0,)
) -> list[Path]:
    """OUT/experiments/METHOD/NAME for every method, rate and seed: `adapter_config.json`, `training_params.json`, `nullspace.json`.

    A filter brings the LoRA that it filters.

    Raises:
        ValueError: for an unknown method.
        FileExistsError: naming the folder, if one of them is there; then nothing is written.
    """
    unknown = sorted(set(methods) - set(RECIPES))
    if unknown:
        raise InputError(f"unknown method {unknown[0]!r}: choose of {', '.join(RECIPES)}")
    wanted = list(dict.fromkeys([*(("lora",) if "filter" in methods else ()), *methods]))
    plans: dict[Path, tuple[Recipe, float, int]] = {}
    for recipe in (RECIPES[method] for method in wanted):
        for rate in rates or recipe.rates:
            for seed in seeds:
                name = sizes.name(rate, seed, recipe.suffix, recipe.start is not None)
                plans[out / "experiments" / recipe.folder / name] = recipe, rate, seed
    present = [folder for folder in plans if folder.exists()]
    if present:
        raise OutputExistsError(f"{present[0]} exists: delete it, or choose another --out")
    for folder, plan in plans.items():
        _write_one(folder, sizes, *plan)
    return list(plans)


def _write_one(folder: Path, sizes: Sizes, recipe: Recipe, rate: float, seed: int) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=list(sizes.targets), task_type="CAUSAL_LM")
    config.save_pretrained(folder)
    training: dict[str, Any] = {"optimizer_kwargs": {"lr": rate, "weight_decay": recipe.decay}}
    if sizes.model != MODEL:
        training["model_id"] = sizes.model
    if seed:
        training["seed"] = seed
    (folder / TRAINING).write_text(json.dumps(training, indent=2) + "\n")
    if recipe.start is not None:
        of = f"lora/{sizes.name(rate, seed)}" if recipe.start.method == "filter" else ""
        Start(**{**asdict(recipe.start), "keep": sizes.keep, "of": of}).save(folder)
