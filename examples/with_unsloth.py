"""Unsloth trains an adapter that nullspace has started. It needs a GPU.

    nullspace covariances HuggingFaceTB/SmolLM2-135M-Instruct --data facts.jsonl --out keep
    nullspace init HuggingFaceTB/SmolLM2-135M-Instruct --data task.jsonl --preserve keep --method contrast --rank 16 --out out
    python examples/with_unsloth.py --adapter out/adapter --task trl-lib/Capybara --out trained

Calibrate in a process without Unsloth, which replaces the forward passes of the layers whose inputs are to be summed.
(This file cannot be called unsloth.py: `import unsloth` would then import it.)
"""

from __future__ import annotations

import argparse

from unsloth import FastLanguageModel  # isort: skip - before transformers and TRL, which it changes

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from nullspace.integrations.peft import freeze_a
from nullspace.integrations.transformers import load_rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="out/adapter", help="what `nullspace init` wrote; it names its base")
    parser.add_argument("--task", default="trl-lib/Capybara", help="hub name or file, in a form that SFTTrainer takes")
    parser.add_argument("--rows", type=int, default=2000, help="of the task")
    parser.add_argument("--steps", type=int, default=-1, help="-1: one epoch")
    parser.add_argument("--load-in-4bit", action="store_true", help="QLoRA: a start with B = 0 serves the base in 4 bits too")
    parser.add_argument("--out", default="trained")
    args = parser.parse_args(argv)

    # The folder of an adapter: Unsloth loads its base, and the adapter as one to be trained.
    model, tokenizer = FastLanguageModel.from_pretrained(args.adapter, max_seq_length=2048, load_in_4bit=args.load_in_4bit)
    freeze_a(model)  # after loading, which makes A trainable

    settings = SFTConfig(
        args.out, num_train_epochs=1, max_steps=args.steps, learning_rate=5e-4, weight_decay=0.0, bf16=True, report_to="none"
    )
    rows = Dataset.from_list(load_rows(args.task, limit=args.rows))
    trainer = SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # a plain LoRA for the original model


if __name__ == "__main__":
    main()
