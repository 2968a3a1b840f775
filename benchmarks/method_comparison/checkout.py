"""The modules of PEFT's comparison, loaded from a checkout, and one experiment run by them."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.method_comparison.experiments import TRAINING
from nullspace.errors import InputError, MissingFileError, RunError

FOLDER = Path("method_comparison") / "MetaMathQA"
RESULTS = {"RESULT_PATH": "results", "RESULT_PATH_TEST": "temporary_results", "RESULT_PATH_CANCELLED": "cancelled_results"}
"""Their names for folders of results → the folders in OUT: of a checkout on main, on another branch, and of failed runs."""
HOOK = "get_peft_model"
"""The function of their `utils` that is replaced."""
USED = {
    "utils": (HOOK, "get_model", "get_train_config", "get_tokenizer", "get_base_model", "get_accuracy", *RESULTS),
    "data": ("get_train_valid_test_datasets", "get_wiki_small", "load_dataset"),
    "run": ("main", "evaluate", "calculate_mean_per_token_loss", "get_file_size"),
}
"""What is called or replaced of their modules."""
ARGUMENTS = {"path_experiment", "experiment_name", "clean", "bucket_name"}
"""Of their `main`."""

# (base model, configuration, experiment) → the PEFT model.
Starter = Callable[[Any, Any, Path], Any]


@dataclass(frozen=True)
class Checkout:
    """Their three modules."""

    utils: ModuleType
    data: ModuleType
    run: ModuleType

    @classmethod
    def load(cls, checkout: Path) -> Checkout:
        """Import `utils`, `data` and `run`, and the `peft` of the checkout where it is not imported yet.

        Raises:
            FileNotFoundError: if the folder is no checkout of PEFT with the comparison.
            ValueError: if another `peft` is imported; naming the function, if a module no longer has one that is used.
        """
        folder = checkout.resolve() / FOLDER
        if not (folder / "run.py").is_file():
            raise MissingFileError(f"{folder / 'run.py'} does not exist: --peft needs a checkout of PEFT's repository")
        use_peft_of(checkout)
        sys.path.insert(0, str(folder))
        try:
            for name in USED:
                sys.modules.pop(name, None)  # they import each other by these names
            modules = {name: importlib.import_module(name) for name in USED}
        finally:
            sys.path.remove(str(folder))
        for name, wanted in USED.items():
            missing = [each for each in wanted if not hasattr(modules[name], each)]
            if missing:
                raise InputError(_changed(folder / f"{name}.py", f"has no {', '.join(missing)}"))
        given = set(inspect.signature(modules["run"].main).parameters)
        if given != ARGUMENTS:
            raise InputError(_changed(folder / "run.py", f"its main takes {', '.join(sorted(given))}"))
        return cls(**modules)

    def params(self, experiment: Path) -> Any:
        """Their training parameters of an experiment."""
        return self.utils.get_train_config(str(experiment / TRAINING))

    def tokenizer(self, params: Any) -> Any:
        return self.utils.get_tokenizer(model_id=params.model_id, max_seq_length=params.max_seq_length)

    def datasets(self, tokenizer: Any, params: Any) -> tuple[Any, Any, Any]:
        """Their examples for training, validation and test."""
        return self.data.get_train_valid_test_datasets(tokenizer=tokenizer, query_template=params.query_template, print_fn=say)


def use_peft_of(checkout: Path) -> None:
    """Import the checkout's own `peft`, to which its comparison belongs.

    Raises:
        ValueError: if another one is imported already.
    """
    source = checkout.resolve() / "src"
    if not (source / "peft").is_dir():
        return
    if "peft" not in sys.modules:
        sys.path.insert(0, str(source))
    found = Path(str(importlib.import_module("peft").__file__)).resolve()
    if source not in found.parents:
        raise InputError(f"peft is imported from {found.parent}, not from {source}: run `pip install -e {source.parent}`")


def _changed(file: Path, what: str) -> str:
    return f"{file}: {what}. PEFT's comparison has changed since benchmarks.method_comparison was written: use an older checkout"


def say(*parts: Any, **options: Any) -> None:
    """What they print with `-v`."""
    print(*parts, **{**options, "file": sys.stderr})


def name_of(experiment: Path) -> str:
    """METHOD/NAME.

    Raises:
        ValueError: if the folder is not experiments/METHOD/NAME.
    """
    whole = experiment.resolve()
    if whole.parent.parent.name != "experiments":
        raise InputError(f"{experiment} should be …/experiments/METHOD/NAME")
    return f"{whole.parent.name}/{whole.name}"


def adapter_of(out: Path, name: str) -> Path:
    """Where a trained adapter is kept, with its result."""
    return out / "adapters" / name.replace("/", "--")


def train(theirs: Checkout, experiment: Path, out: Path, start: Starter | None) -> Path:
    """Run an experiment by their `main`, with the adapters that `start` makes; None for PEFT's own.

    Their result file goes into OUT, and the trained adapter into OUT/adapters, beside a copy of the result.

    Returns:
        The result file.

    Raises:
        RuntimeError: if their run failed, or no longer makes its adapters by the function that is replaced.
    """
    name = name_of(experiment)
    kept = adapter_of(out, name)
    for setting, folder in RESULTS.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        setattr(theirs.utils, setting, str(out / folder))
    original, file_size = getattr(theirs.utils, HOOK), theirs.run.get_file_size
    made: list[bool] = []

    def make(model: Any, config: Any, **options: Any) -> Any:
        made.append(True)
        return original(model, config, **options) if start is None else start(model, config, experiment)

    def keep(model: Any, **options: Any) -> int:
        if not made:
            raise RunError(_changed(Path(theirs.utils.__file__), f"get_model does not call {HOOK}"))
        model.save_pretrained(kept)
        return file_size(model, **options)

    before = _results(out)
    theirs.run.print_verbose = say  # their command line sets it, below `if __name__ == "__main__"`
    setattr(theirs.utils, HOOK, make)
    theirs.run.get_file_size = keep
    try:
        theirs.run.main(path_experiment=str(experiment), experiment_name=name, clean=True, bucket_name=None)
    finally:
        setattr(theirs.utils, HOOK, original)
        theirs.run.get_file_size = file_size
    written = [path for path, when in _results(out).items() if before.get(path) != when]
    if len(written) != 1:
        raise RunError(f"{name}: their run should have written one result into {out}, and has written {len(written)}")
    _check(written[0])
    shutil.copy(written[0], kept / "result.json")
    return written[0]


def _results(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in RESULTS.values() for path in (out / folder).glob("*.json")}


def _check(result: Path) -> None:
    """Their run keeps on after an error, and logs it."""
    content = json.loads(result.read_text())
    if content["train_info"]["status"] != "success":
        raise RunError(f"their run ended as {content['train_info']['status']}: {content['run_info'].get('error_msg')} ({result})")
