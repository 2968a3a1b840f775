"""A calibration and a training that may be cut off at any time: run the same command again, and it goes on.

    python examples/resume.py --task trl-lib/Capybara --keep facts.jsonl --out work

`work/calibration` holds the layers that are finished, `work/start` the adapter before training, `work/training` Trainer's
checkpoints, `work/adapter` the result. On the command line, `nullspace init` keeps `OUT.checkpoint` by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from nullspace import compute_null_spaces
from nullspace.integrations.peft import freeze_a, inject_adapters, save_init
from nullspace.integrations.transformers import PackedBatches, load_model, load_rows, load_texts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--task", default="trl-lib/Capybara", help="hub name or file, in a form that SFTTrainer takes")
    parser.add_argument("--keep", required=True, help="text or conversations that stand for what must be kept")
    parser.add_argument("--samples", type=int, default=256, help="sequences to calibrate on")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("work"))
    args = parser.parse_args(argv)
    start, training = args.out / "start", args.out / "training"

    if not start.exists():  # save_init writes it whole or not at all
        model, tokenizer = load_model(args.model)
        loader = PackedBatches(load_texts(args.keep), tokenizer, samples=args.samples)
        spaces = compute_null_spaces(model, loader, rank=args.rank, checkpoint=args.out / "calibration")
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, task_type="CAUSAL_LM")
        save_init(start, inject_adapters(model, config, spaces, freeze_a=True), spaces)
    model, tokenizer = load_model(args.model)
    model = PeftModel.from_pretrained(model, start / "adapter", is_trainable=True)
    freeze_a(model)  # PEFT loads A trainable

    settings = SFTConfig(
        str(training), max_steps=args.steps, save_steps=args.save_steps, learning_rate=5e-4, bf16=torch.cuda.is_available()
    )
    rows = Dataset.from_list(load_rows(args.task, limit=2000))
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(training)) if training.exists() else None)
    trainer.save_model(str(args.out / "adapter"))


if __name__ == "__main__":
    main()
