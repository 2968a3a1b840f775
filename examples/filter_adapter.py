"""Repair an adapter that somebody has trained: less forgetting, in closed form, without training.

    python examples/filter_adapter.py ADAPTER --task task.jsonl --keep facts.jsonl --out repaired

ADAPTER is a folder or a hub name of a LoRA of any origin. On the command line, `nullspace filter ADAPTER --task-data task.jsonl
--keep-data facts.jsonl --retain 0.98 --out repaired` does the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftConfig

from nullspace import Covariances, compute_covariances
from nullspace.integrations.peft import filter_adapter, filter_path
from nullspace.integrations.transformers import PackedBatches, load_model, load_texts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or hub name")
    parser.add_argument("--task", required=True, help="some dozens of examples of what the adapter was trained on")
    parser.add_argument("--keep", required=True, help="text that stands for what must be kept, in the form of its use")
    parser.add_argument("--base", help="the untouched base; by default that which the adapter names")
    parser.add_argument("--samples", type=int, default=64, help="sequences to calibrate on, of each")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--retain", type=float, default=0.98, help="share of the response to the task's inputs that must stay")
    parser.add_argument("--out", default="repaired")
    args = parser.parse_args(argv)

    folder = args.adapter if Path(args.adapter).is_dir() else snapshot_download(args.adapter)
    base = args.base or PeftConfig.from_pretrained(folder).base_model_name_or_path
    model, tokenizer = load_model(base)

    def moments(data: str, out: str) -> Covariances:
        loader = PackedBatches(load_texts(data), tokenizer, samples=args.samples, length=args.length)
        return compute_covariances(model, loader, out)

    with tempfile.TemporaryDirectory() as scratch:
        task, keep = moments(args.task, f"{scratch}/task"), moments(args.keep, f"{scratch}/keep")
        print("strength    drift  response")
        for step in filter_path(folder, task, keep, base=model).steps:  # a forecast: the model does not run
            print(f"{step.strength:8g}  {step.drift:.5f}  {step.response:8.1%}")
        done = filter_adapter(folder, task, keep, args.out, retain=args.retain, base=base)
    left, response = done.after.left, done.after.response
    print(f"{args.out}: strength {done.strength:.3g}, {left:.1%} of the drift is left, {response:.1%} of the response")


if __name__ == "__main__":
    main()
