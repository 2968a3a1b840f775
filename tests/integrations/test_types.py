"""mypy checks calls of the integrations' public functions: it sees their signatures through the links to the top-level folders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
# Lines with an `E:` must give an error with this text, all others none.
CALLS = """
from pathlib import Path

import pytest

import torch
from peft import LoraConfig

from nullspace import Covariances, NullSpaces
from nullspace.factors import LowRank
from nullspace.integrations import peft, transformers

model = torch.nn.Linear(2, 2)
config = LoraConfig()
spaces, covariances = NullSpaces.load("spaces"), Covariances.load(Path("covariances"))

adapted = peft.inject_adapters(model, config, spaces, method="lora-null", freeze_a=True, sigma_scale=2.0)
peft.inject_adapters(model, config, covariances=covariances, preserve=covariances, method="sc-lora", beta=0.5)
peft.inject_adapters(1, 2, 3, nonsense="x")  # E: Unexpected keyword argument "nonsense" for "inject_adapters"
peft.inject_adapters(model, config, 3)  # E: Argument 3 to "inject_adapters" has incompatible type "int"
peft.inject_adapters(model, config, covariances)  # E: Argument 3 to "inject_adapters" has incompatible type "Covariances"
peft.inject_adapters(model)  # E: Missing positional argument "config" in call to "inject_adapters"
peft.inject_adapters(model, config, spaces, "lora-null")  # E: Too many positional arguments for "inject_adapters"
peft.inject_adapters(model, config, covariances=covariances, preserve=covariances, method="contrast", freeze_a=None)
peft.inject_adapters(model, config, spaces, freeze_a="yes")  # E: Argument "freeze_a" to "inject_adapters" has incompatible
out: Path = peft.save_init("out", adapted, spaces, record={"model": "x"}, overwrite=True)
peft.save_init(adapted, "out", 1)  # E: Argument 3 to "save_init" has incompatible type "int"; expected "NullSpaces | None"
out = peft.write_init(Path("out"), model, config, spaces, max_shard_bytes=10**9, progress=False)
peft.write_init("out", model, config, spaces, max_shard_bytes="5GB")  # E: Argument "max_shard_bytes" to "write_init" has
peft.export_lora("trained", "initial", out)
peft.export_lora("trained", initial=1, out=out)  # E: Argument "initial" to "export_lora" has incompatible type "int"
peft.freeze_a(adapted, adapter_name=None)  # E: Argument "adapter_name" to "freeze_a" has incompatible type "None"
peft.attach_subtracted(adapted)  # E: Missing positional argument "directory" in call to "attach_subtracted"
factors: dict[str, LowRank] = peft.read_factors("adapter")
rank: int = peft.describe("out")  # E: Incompatible types in assignment

loaded, tokenizer = transformers.load_model("name", dtype=torch.bfloat16, device="cpu", offload=True)
transformers.load_model("name", offload="disk")  # E: Argument "offload" to "load_model" has incompatible type "str"
texts: list[str] = transformers.load_texts(Path("data.txt"), limit=3)
transformers.PackedBatches(texts, tokenizer, samples="all")  # E: Argument "samples" to "PackedBatches" has incompatible type "str"
limit: int = transformers.positions(loaded)  # E: Incompatible types in assignment (expression has type "int | None"
"""


def test_wrong_calls_fail_and_right_ones_pass(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    # Without site-packages: to read their types takes half a minute. Tensors, and what torch decorates, are then of type Any.
    options = ["--no-site-packages", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache"), "--hide-error-context"]
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", *options, str(file)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    errors = dict(re.findall(rf"^{re.escape(str(file))}:(\d+): error: (.*)", output, re.MULTILINE)[::-1])  # the first of each line
    wanted = {str(n): line.split("# E: ")[1] for n, line in enumerate(CALLS.splitlines(), start=1) if "# E: " in line}
    assert errors.keys() == wanted.keys(), output
    assert [(line, errors[n]) for n, line in wanted.items() if not errors[n].startswith(line)] == []
