"""QLoRA: a base in 4 bits (NF4), calibrated and trained as it is.

    python examples/qlora.py --model HuggingFaceTB/SmolLM2-1.7B-Instruct --task trl-lib/Capybara --keep facts.jsonl --out qlora

A quantised weight cannot become a residual W₀ − s·BA. `contrast` (and every method with a frozen A) leaves it alone: B starts at
zero. The result is a plain LoRA, for this base and for the same model in 16 bits.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import nullspace
from nullspace.integrations.transformers import load_model, load_rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--task", default="trl-lib/Capybara", help="hub name or file, in a form that SFTTrainer takes")
    parser.add_argument("--keep", help="text or conversations that stand for what must be kept; by default a small corpus")
    parser.add_argument("--rows", type=int, default=2000, help="of the task")
    parser.add_argument("--samples", type=int, default=256, help="sequences to calibrate on, of each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=-1, help="-1: one epoch")
    parser.add_argument("--out", default="qlora")
    args = parser.parse_args(argv)

    # Second moments of the 16-bit model serve as well: `nullspace covariances`, once, then task=FOLDER and keep=FOLDER.
    model, tokenizer = load_model(args.model, load_in_4bit=True)
    rows = load_rows(args.task, limit=args.rows)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = nullspace.prepare(model, tokenizer, config, task=rows, keep=args.keep, samples=args.samples)

    settings = SFTConfig(
        args.out,
        num_train_epochs=1,
        max_steps=args.steps,
        learning_rate=5e-4,
        weight_decay=0.0,
        # On a CPU too: TRL casts what is trained on a quantised base (B) to bfloat16, and the frozen A stays in float32.
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
