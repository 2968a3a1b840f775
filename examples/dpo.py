"""Preference training (DPO) with TRL on a start that keeps what the model knows.

    python examples/dpo.py --pairs trl-lib/ultrafeedback_binarized --keep facts.jsonl --out dpo

`prepare` reads the prompts with the chosen answers: what the model shall not say needs no directions of its own. B starts at zero
on the original model, so the copy of the adapter that DPOTrainer takes as its reference is the original model.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

import nullspace
from nullspace.integrations.transformers import load_model, load_rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", default="trl-lib/ultrafeedback_binarized", help="rows with `chosen` and `rejected`")
    parser.add_argument("--keep", help="text or conversations that stand for what must be kept; by default a small corpus")
    parser.add_argument("--rows", type=int, default=2000, help="of the pairs")
    parser.add_argument("--samples", type=int, default=256, help="sequences to calibrate on, of each")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=-1, help="-1: one epoch")
    parser.add_argument("--out", default="dpo")
    args = parser.parse_args(argv)

    model, tokenizer = load_model(args.model)
    pairs = load_rows(args.pairs, limit=args.rows)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = nullspace.prepare(model, tokenizer, config, task=pairs, keep=args.keep, samples=args.samples)

    settings = DPOConfig(
        args.out,
        num_train_epochs=1,
        max_steps=args.steps,
        learning_rate=2e-5,  # DPOConfig's default, 1e-6, is for training all weights
        weight_decay=0.0,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
