"""A process that cannot import nullspace loads an adapter, as a user of the result does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nullspace.artifacts.locks import temporary_folder
from nullspace.errors import RunError

# What a user of the result runs: transformers and PEFT, and no nullspace.
FRESH_PROCESS = """
import os, sys
sys.modules["nullspace"] = None  # importing it is an error from here on
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
known = load_file(os.path.join(folder, "reference.safetensors"))
with torch.no_grad():
    print(float((model(known["input_ids"]).logits - known["logits"]).abs().max()))
"""


def error_elsewhere(base: Any, adapter: Path, probe: torch.Tensor, logits: torch.Tensor) -> float:
    """Load an adapter without nullspace: the largest difference of its model's logits from these.

    The base goes there as a temporary checkpoint, which loads faster than a GGUF file.

    Args:
        base: the untouched model.
        adapter: its directory.
        probe: token ids (1, tokens).
        logits: (1, tokens, vocabulary), of the model that the adapter was exported from.

    Raises:
        RuntimeError: if the process fails.
    """
    with temporary_folder() as folder:
        base.save_pretrained(folder)
        save_file({"input_ids": probe, "logits": logits.contiguous()}, folder / "reference.safetensors")
        command = [sys.executable, "-c", FRESH_PROCESS, str(folder), str(adapter)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the process without nullspace failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])
