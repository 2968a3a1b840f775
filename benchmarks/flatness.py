"""Peak memory of a layerwise run against the depth of the model and against the number of tokens: both should be flat.

    python -m benchmarks.flatness      # writes benchmarks/results/flatness-cpu.json

A Llama of width 512 with random weights, on the CPU, its weights in the checkpoint's files and its hidden states in files too
(`offload_map`, `hidden_states="disk"`); one fresh process a run. Measured is anonymous memory, looked at every 2 ms, of
`compute_null_spaces` alone: pages of files that were read are not counted, since the system takes them back when it wants them.
Blocks: 4 to 32 with 8,192 tokens. Tokens: 8,192 to 131,072 with 4 blocks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.children import PeakMemory, run_child
from benchmarks.environment import write_result

BLOCKS = (4, 8, 16, 32)
TOKENS = (8192, 16384, 32768, 65536, 131072)
LENGTH, BATCH_SIZE, RANK = 512, 2, 16


def make_checkpoint(folder: Path, blocks: int) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def run(folder: str, tokens: int) -> dict[str, Any]:
    import torch
    import transformers

    from nullspace import compute_null_spaces
    from nullspace.integrations.transformers import offload_map

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=offload_map(transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="meta"), "cpu")
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (tokens // LENGTH, LENGTH), generator=generator)
    loader = [{"input_ids": part} for part in ids.split(BATCH_SIZE)]
    with PeakMemory() as peak:
        compute_null_spaces(model, loader, rank=RANK, strategy="layerwise", hidden_states="disk", progress=False)
    return {"peak_bytes": peak.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run, options.tokens)))
        return
    from nullspace.artifacts.locks import temporary_folder

    runs: list[dict[str, Any]] = []
    with temporary_folder() as folder:
        cases = [(blocks, TOKENS[0]) for blocks in BLOCKS] + [(BLOCKS[0], tokens) for tokens in TOKENS]
        for blocks, tokens in cases:
            checkpoint = Path(folder) / str(blocks)
            if not checkpoint.exists():
                make_checkpoint(checkpoint, blocks)
            done = run_child("benchmarks.flatness", ["--run", str(checkpoint), "--tokens", str(tokens)])
            if "failed" in done:
                raise SystemExit(f"{blocks} blocks, {tokens} tokens: {done['failed']}")
            runs.append({"blocks": blocks, "tokens": tokens, **done})
            print(f"{blocks:3} blocks  {tokens:7,} tokens  peak {done['peak_bytes'] / 1e6:7.1f} MB", flush=True)
    print(f"\nwrote {write_result('flatness-cpu', {'runs': runs})}")


if __name__ == "__main__":
    main()
