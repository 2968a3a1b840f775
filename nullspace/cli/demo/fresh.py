"""A process that cannot import nullspace loads an adapter, as a user of the result does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from nullspace.errors import RunError

# What a user of the result runs: transformers and PEFT, and no nullspace.
FRESH_PROCESS = """
import json, os, sys
sys.modules["nullspace"] = None  # importing it is an error from here on
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()
folder, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
known = load_file(os.path.join(folder, "reference.safetensors"))
with torch.no_grad():
    error = float((model(known["input_ids"]).logits - known["logits"]).abs().max())
asked = tokenizer(prompt, return_tensors="pt")
answer = model.generate(**asked, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
answer = tokenizer.decode(answer[0, asked["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"error": error, "answer": answer.strip()}))
"""


class Answer(NamedTuple):
    """What the process has answered."""

    error: float
    """the largest difference from the logits"""
    answer: str
    """to the prompt, by greedy decoding"""


def ask(base: Any, tokenizer: Any, adapter: Path, probe: Any, logits: Any, prompt: str) -> Answer:
    """Load an adapter without nullspace, and compare.

    The base goes there as a temporary checkpoint, which loads faster than a GGUF file.

    Args:
        base: the untouched model.
        tokenizer: of the model.
        adapter: its directory.
        probe: token ids (1, tokens).
        logits: (1, tokens, vocabulary), of the model that the adapter was exported from.
        prompt: to answer.

    Raises:
        RuntimeError: if the process fails.
    """
    from safetensors.torch import save_file

    from nullspace.artifacts.locks import temporary_folder

    with temporary_folder() as folder:
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file({"input_ids": probe, "logits": logits.contiguous()}, folder / "reference.safetensors")
        done = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(folder), str(adapter), prompt], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RunError(f"the fresh process failed:\n{done.stderr}")
    return Answer(**json.loads(done.stdout.splitlines()[-1]))
