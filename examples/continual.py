"""Several tasks one after the other: each starts where the inputs of the earlier ones are small. In the end, one adapter of all.

    python examples/continual.py --tasks first.jsonl second.jsonl --keep facts.jsonl --out continual

What must be kept grows: after each task its second moment is merged into it, and no data of earlier tasks is needed again. Other
ways (`inflora`, O-LoRA, null spaces), and what each promises: docs/holding.md, "Several tasks in a row".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from nullspace import Covariances, compute_covariances
from nullspace.integrations.peft import combine_adapters, inject_adapters
from nullspace.integrations.transformers import PackedBatches, load_model, load_rows, load_texts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--tasks", nargs="+", required=True, help="two or more, in their order, in a form that SFTTrainer takes")
    parser.add_argument("--keep", required=True, help="text or conversations that stand for what must be kept")
    parser.add_argument("--samples", type=int, default=256, help="sequences to calibrate on, of each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=-1, help="of each task; -1: one epoch")
    parser.add_argument("--out", type=Path, default=Path("continual"))
    args = parser.parse_args(argv)
    if len(args.tasks) < 2:
        parser.error("one task has no earlier ones: examples/sft.py trains it")

    def moments(model: Any, tokenizer: Any, data: str, name: str) -> Covariances:
        return compute_covariances(model, PackedBatches(load_texts(data), tokenizer, samples=args.samples), args.out / name)

    model, tokenizer = load_model(args.model)
    known, adapters = [moments(model, tokenizer, args.keep, "keep")], []
    for data in args.tasks:
        name = f"task-{len(known)}"
        model, tokenizer = load_model(args.model)  # untouched again: second moments and adapters of all tasks are of one base
        task = moments(model, tokenizer, data, f"moments-{name}")
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, task_type="CAUSAL_LM")
        keep = Covariances.merge(known, normalise=True)  # each corpus counts alike, however many tokens it has
        model = inject_adapters(model, config, method="contrast", covariances=task, preserve=keep)
        settings = SFTConfig(str(args.out / name), max_steps=args.steps, learning_rate=5e-4, bf16=torch.cuda.is_available())
        trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(load_rows(data)), processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        known.append(task)
        adapters.append(args.out / name)
    combine_adapters(adapters, known[1:], known[0], args.out / "combined", strength=0.1)


if __name__ == "__main__":
    main()
