"""A process with PEFT and transformers, but without nullspace, that loads what tests have saved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from nullspace.artifacts import records

PLAIN_PEFT = """
import json, sys, traceback
sys.modules["nullspace"] = None
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

def loaded(order):
    if order["adapters"] is None:
        return AutoModelForCausalLM.from_pretrained(order["base"], dtype="auto")
    (name, adapter), *more = order["adapters"].items()
    if order["base"] is None:
        model = AutoPeftModelForCausalLM.from_pretrained(adapter, adapter_name=name, dtype="auto")
    else:
        base = AutoModelForCausalLM.from_pretrained(order["base"], dtype="auto")
        model = PeftModel.from_pretrained(base, adapter, adapter_name=name)
    for other, adapter in more:
        model.load_adapter(adapter, other)
    model.base_model.set_adapter(order["active"] or [name])
    return model

for line in sys.stdin:
    order = json.loads(line)
    try:
        model = loaded(order).eval()
        with torch.no_grad():
            save_file({"logits": model(**load_file(order["batch"])).logits.float()}, order["logits"])
        answer = None
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


class PlainPeft:
    """A process without nullspace. It loads what a test has saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PLAIN_PEFT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )

    def logits(
        self,
        adapters: Path | dict[str, Path] | None,
        batch: Mapping[str, torch.Tensor],
        base: Path | None = None,
        active: list[str] | None = None,
    ) -> torch.Tensor:
        """Of the adapters on a base, which is the one that the adapter names unless given; None for the base itself."""
        records.write_tensors(self.folder / "batch.safetensors", batch)
        if isinstance(adapters, Path):
            adapters = {"default": adapters}
        order = {
            "adapters": None if adapters is None else {name: str(path) for name, path in adapters.items()},
            "base": None if base is None else str(base),
            "active": active,
            "batch": str(self.folder / "batch.safetensors"),
            "logits": str(self.folder / "logits.safetensors"),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer == "null\n", json.loads(answer) if answer else "the process has died"
        return load_file(self.folder / "logits.safetensors")["logits"]
