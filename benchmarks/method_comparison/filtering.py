"""The filter in PEFT's comparison: a LoRA that their run has trained, filtered, and evaluated by their functions."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from benchmarks.method_comparison import start as calibration
from benchmarks.method_comparison.checkout import RESULTS, Checkout, adapter_of, name_of, say, train
from benchmarks.method_comparison.experiments import Start
from nullspace.errors import InputError
from nullspace.integrations.peft import filter_adapter


def run_filter(theirs: Checkout, experiment: Path, start: Start, out: Path) -> list[Path]:
    """One result file a strength, in the format of theirs. The LoRA is trained first, unless OUT has it.

    Nothing is chosen: all strengths that the experiment names are evaluated and written.

    Raises:
        ValueError: if the experiment names no LoRA or no strength.
    """
    if not start.of or not start.strengths:
        raise InputError(f"{experiment}: a filter needs `of`, the experiment of a LoRA, and `strengths`")
    trained = experiment.resolve().parent.parent / start.of
    adapter = adapter_of(out, start.of)
    if not (adapter / "result.json").exists():
        train(theirs, trained, out, None)
    params = theirs.params(trained)
    model = theirs.utils.get_base_model(
        model_id=params.model_id, dtype=params.dtype, attn_implementation=params.attn_implementation, use_gc=False
    )
    tokenizer = theirs.tokenizer(params)
    targets = LoraConfig.from_pretrained(adapter).target_modules
    began = time.perf_counter()
    examples, *asked = theirs.datasets(tokenizer, params)
    before = wiki_loss(theirs, model, tokenizer, params)
    written = []
    with tempfile.TemporaryDirectory() as folder:
        task, keep = (
            calibration.moments(model, batches, targets, Path(folder) / name)
            for name, batches in (
                ("task", calibration.task_batches(examples, start, params.seed)),
                ("keep", calibration.kept_batches(theirs, tokenizer, start)),
            )
        )
        for strength in start.strengths:
            name = f"{name_of(experiment)}-mu_{strength:g}"
            filter_adapter(adapter, task, keep, adapter_of(out, name), strength=strength, overwrite=True, progress=False)
            adapted = PeftModel.from_pretrained(model, adapter_of(out, name)).eval()
            measured = accuracies(theirs, adapted, tokenizer, params, asked)
            measured["forgetting"] = wiki_loss(theirs, adapted, tokenizer, params) - before
            model = adapted.unload()
            written.append(
                _write(adapter, out, name, measured, {"strength": strength, "of": start.of}, time.perf_counter() - began)
            )
            say(f"{name}: {measured}")
    return written


def wiki_loss(theirs: Checkout, model: Any, tokenizer: Any, params: Any) -> float:
    """Their loss on Wikipedia, nats a token, with the batch size and length with which `train` measures it."""
    return theirs.run.calculate_mean_per_token_loss(
        model=model, tokenizer=tokenizer, rows=theirs.data.get_wiki_small(), batch_size=params.batch_size, max_length=768
    )


def accuracies(theirs: Checkout, model: Any, tokenizer: Any, params: Any, asked: Sequence[Any]) -> dict[str, float]:
    """Their accuracy on the validation and test examples."""
    found = {}
    for name, examples in zip(("valid accuracy", "test accuracy"), asked, strict=True):
        predictions, responses = theirs.run.evaluate(
            model=model,
            tokenizer=tokenizer,
            ds=examples,
            batch_size=params.batch_size_eval,
            generate_kwargs={**params.generation_kwargs},
        )
        found[name] = theirs.utils.get_accuracy(predictions=predictions, responses=responses)
    return found


def _write(adapter: Path, out: Path, name: str, measured: dict[str, float], facts: dict[str, Any], seconds: float) -> Path:
    """The result of the LoRA with what is measured of the filtered one, and the seconds of the filter, evaluation included."""
    content = json.loads((adapter / "result.json").read_text())
    content["run_info"] |= {"experiment_name": name, "nullspace": {"filter": facts, "seconds": seconds}}
    content["run_info"]["total_time"] += seconds
    last = content["train_info"]["metrics"][-1]
    content["train_info"]["metrics"] = [*content["train_info"]["metrics"][:-1], {**last, **measured}]
    path = out / RESULTS["RESULT_PATH"] / f"{name.replace('/', '--')}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2))
    return part.rename(path)
