"""A mixture of experts: every expert's matrices get an adapter in the null space of the tokens that the router sends there.

    python examples/moe.py --model allenai/OLMoE-1B-7B-0924-Instruct --task trl-lib/Capybara --keep facts.jsonl --out moe

Null spaces take rank × d_in numbers a matrix, where the second moments of `contrast` take d_in²: with hundreds of experts a layer
that decides. Servers that read such adapters: see "Mixtures of experts" in docs/peft-and-trl.md.
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
    parser.add_argument("--model", default="allenai/OLMoE-1B-7B-0924-Instruct")
    parser.add_argument("--task", default="trl-lib/Capybara", help="hub name or file, in a form that SFTTrainer takes")
    parser.add_argument("--keep", help="text or conversations that stand for what must be kept; by default a small corpus")
    parser.add_argument("--rows", type=int, default=2000, help="of the task")
    parser.add_argument("--samples", type=int, default=256, help="sequences to calibrate on: routing is uneven, so use many")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=-1, help="-1: one epoch")
    parser.add_argument("--out", default="moe")
    args = parser.parse_args(argv)

    model, tokenizer = load_model(args.model)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, task_type="CAUSAL_LM")  # no dropout: PEFT has none for experts
    # experts="pooled" makes one null space of the hidden states for all experts of a layer: E times fewer eigenproblems.
    how = {"method": "lora-null", "freeze_a": True, "samples": args.samples, "experts": "auto"}
    model = nullspace.prepare(model, tokenizer, config, keep=args.keep, **how)

    settings = SFTConfig(
        args.out,
        num_train_epochs=1,
        max_steps=args.steps,
        learning_rate=5e-4,
        weight_decay=0.0,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    rows = Dataset.from_list(load_rows(args.task, limit=args.rows))
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
