"""A trained change cut to a smaller rank: by the second moment of its inputs, and by the Frobenius norm.

    python -m benchmarks.truncation [--data FOLDER]      # writes benchmarks/results/truncation-cpu.json

Plain LoRA of rank 32 on all 210 linear layers of SmolLM2-135M, trained on GSM8K as the evidence study trains it. Every layer's
change ΔW is cut to ranks 4, 8 and 16 by `nullspace.factors.truncated`: with the second moment C of the layer's inputs on training
examples, and without one, which is what an SVD of ΔW does. Measured is ‖(ΔW − ΔW_r) X‖ / ‖ΔW X‖ of both, for the inputs X

- of the training examples that C is of (`calibration`), where the cut by C is the optimum;
- of test examples of the task (`held-out`);
- of running text of WikiText (`other text`), which neither cut has seen.

X are the inputs of the untouched model. The ratio is the error of the cut by C over that of the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

RANK, RANKS = 32, (4, 8, 16)
STEPS, RATE, SEED = 30, 2e-3, 0
EXAMPLES, WINDOWS, WINDOW = 64, 8, 512
TEXTS = ("calibration", "held-out", "other text")


def trained_change(settings: Any, data: Any, model: Any, tokenizer: Any) -> tuple[Mapping[str, Any], list[float]]:
    """Layer → ΔW as A and B, in float64, and the losses of the steps. The model keeps its adapter."""
    from benchmarks import preservation
    from benchmarks.evidence import methods
    from benchmarks.evidence import settings as declared
    from nullspace.factors import LowRank

    prepared = methods.prepare(model, "lora", rank=RANK, seed=SEED)
    examples = data.examples(declared.TASKS["gsm8k"].train)
    losses = preservation.train(prepared.model, tokenizer, preservation.Data([], {}, {}, examples, [], []), settings, RATE, SEED)
    change = methods.change_of(prepared)
    assert all(isinstance(each, LowRank) for each in change.values())
    return change, losses


def inputs(data: Any) -> dict[str, Any]:
    """The batches of each of `TEXTS`."""
    from benchmarks import preservation
    from benchmarks.evidence import settings as declared
    from nullspace.integrations.transformers import PackedBatches, load_texts

    task = declared.TASKS["gsm8k"]
    name, split = preservation.parted(data.source("wikitext"))
    return {
        "calibration": data.of_task("gsm8k"),
        "held-out": data.batches(task.test),
        "other text": PackedBatches(load_texts(name, split=split), data.tokenizer, samples=WINDOWS, length=WINDOW),
    }


def error(change: Any, cut: Any, c: Any) -> float:
    """‖(ΔW − ΔW_r) X‖ / ‖ΔW X‖ for C = X Xᵀ."""
    import torch

    def size(a: Any, b: Any) -> float:
        rows = torch.linalg.qr(b, mode="r").R @ a
        return float(((rows @ c) * rows).sum().clamp(min=0)) ** 0.5

    return size(torch.cat([change.A, -cut.A]), torch.cat([change.B, cut.B], dim=1)) / size(*change)


def measured(change: Mapping[str, Any], moments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a layer: rank → text → the errors of the cut by C and of that by the Frobenius norm, to six digits."""
    from nullspace.factors import LowRank, truncated

    for name, trained in change.items():
        pair = LowRank(*(factor.double() for factor in trained))
        c_of = {text: each[name].matrix() for text, each in moments.items()}
        errors: dict[str, dict[str, list[float]]] = {}
        for rank in RANKS:
            cuts = [truncated(pair, c_of["calibration"], rank=rank), truncated(pair, rank=rank)]
            errors[str(rank)] = {text: [float(f"{error(pair, cut, c):.6g}") for cut in cuts] for text, c in c_of.items()}
        yield {"layer": name, "errors": errors}


def summarise(layers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rank → text → medians over the layers of both errors and of their ratio, the worst ratio, and how many are above 1."""
    summary: dict[str, dict[str, Any]] = {}
    for rank in map(str, RANKS):
        summary[rank] = {}
        for text in TEXTS:
            pairs = [row["errors"][rank][text] for row in layers]
            ratios = [by_c / frobenius for by_c, frobenius in pairs]
            worst = max(range(len(ratios)), key=ratios.__getitem__)
            summary[rank][text] = {
                "by_c": median(by_c for by_c, _ in pairs),
                "frobenius": median(frobenius for _, frobenius in pairs),
                "ratio": median(ratios),
                "worst_ratio": ratios[worst],
                "worst_layer": layers[worst]["layer"],
                "above_1": sum(ratio > 1 for ratio in ratios),
            }
    return summary


def table(summary: Mapping[str, Mapping[str, Any]], layers: int) -> list[str]:
    """The summary as rows of Markdown."""
    rows = [
        "| rank | inputs | lost of ‖ΔW X‖, cut by C | cut by the Frobenius norm | ratio, median | ratio, worst | layers above 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for rank, texts in summary.items():
        for text, row in texts.items():
            figures = " | ".join(f"{row[name]:.2g}" for name in ("by_c", "frobenius", "ratio"))
            rows.append(f"| {rank} | {text} | {figures} | {row['worst_ratio']:.3g} | {row['above_1']} of {layers} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of files; the hub's data sets are read where it has none")
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M-Instruct by default")
    options = parser.parse_args()

    from benchmarks import preservation
    from benchmarks.environment import write_result
    from benchmarks.evidence.data import Data
    from benchmarks.evidence.settings import Sizes
    from benchmarks.evidence.units import Settings, Unit, preservation_settings
    from benchmarks.peers import checkpoint_of_demo_model
    from nullspace import Covariances, compute_covariances
    from nullspace.artifacts.locks import temporary_folder

    name = options.model or str(checkpoint_of_demo_model(Path(".venv") / "smollm2-135m"))
    study = Settings(name, options.data, sizes=Sizes(of_task=EXAMPLES))
    settings = preservation_settings(study, Unit("lora", "gsm8k", STEPS, RANK, "", 0, ()))
    model, tokenizer = preservation.load_model(settings)
    data = Data(tokenizer, study.sizes, options.data)
    with temporary_folder() as folder:
        moments = {}
        for text, batches in inputs(data).items():
            compute_covariances(model, batches, Path(folder) / text, strategy="resident", precision="mixed", progress=False)
            moments[text] = Covariances.load(Path(folder) / text)
            print(f"moments of {text}: {moments[text].rows()[0]['tokens']:,} tokens", flush=True)
        tokens = {text: each.rows()[0]["tokens"] for text, each in moments.items()}
        change, losses = trained_change(settings, data, model, tokenizer)
        print(f"trained: {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
        layers = list(measured(change, moments))
    summary = summarise(layers)
    print("\n".join(table(summary, len(layers))))
    workload = {"model": "SmolLM2-135M float32", "task": "gsm8k", "rank": RANK, "steps": STEPS, "rate": RATE, "tokens": tokens}
    content = {"workload": {**workload, "losses": losses}, "summary": summary, "layers": layers}
    print(f"\nwrote {write_result('truncation-cpu', content)}")


if __name__ == "__main__":
    main()
