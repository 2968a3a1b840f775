"""Every command and snippet of README and docs, run as it stands, on a small model of the same architecture under the same name.

In a page, the blocks of a language run in the order in which they stand:

- `python`: in one namespace a page.
- `console`: lines that begin with `$ nullspace`, by typer's runner.
- `sh`: nothing but `make TARGET` and `pip install '.[EXTRA]'`, which are looked up, not run.
- `text`, `json`: what is shown only.

A block behind a line `*Not run by the tests: REASON.*` is not run; all of these are listed here, in `NOT_RUN`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from nullspace.cli import app
from nullspace.integrations.peft import lora_layers

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MIXTURE = "Qwen/Qwen3-30B-A3B"
RUN, LOOKED_UP, SHOWN = ("python", "console"), ("sh",), ("text", "json")
# Page → the reasons for blocks that are not run.
NOT_RUN = {
    "docs/evidence.md": ["it trains for hours"],
    "docs/holding.md": ["it needs a model that was trained whole"],
    "docs/results.md": ["it trains for hours", "it needs the data sets of the tasks", "it trains for an hour and a half"],
    "docs/several-gpus.md": ["it starts eight processes, one a GPU"],
}
COMMANDS = {"init", "inspect", "compute", "covariances", "merge", "export", "report", "plan", "filter", "combine", "verify"}


class Block(NamedTuple):
    language: str
    text: str
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    pattern = r"(?:^\*Not run by the tests: (.+?)\.\*\n\n)?^```(\w*)\n(.*?)^```$"
    text = page.read_text(encoding="utf-8")
    found = [Block(each[2], each[3], each[1]) for each in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL)]
    assert text.count("```") == 2 * len(found), f"{page}: a fence that is not read here"
    return found


def commands(block: Block) -> list[list[str]]:
    """The command lines of a `console` or `sh` block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if any(b.language in RUN and b.not_run is None for b in blocks(page))]


@pytest.fixture
def folder(tiny_checkpoint: Path, trained: Path, prose: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that pages name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, HUB_NAME)
    Path(HUB_NAME, "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    write_mixture(Path(MIXTURE), tiny_checkpoint)
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    for file, texts in (("facts.jsonl", prose[:4]), ("more.jsonl", prose[4:8])):
        Path(file).write_text("\n".join(json.dumps({"question": "What is this?", "answer": [text]}) for text in texts))
    chats = [[{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": text}] for text in prose[:4]]
    Path("chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    rows = [{"prompt": "What is this?\n", "completion": text[:64]} for text in prose[8:16]]
    Path("task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def write_mixture(folder: Path, like: Path) -> None:
    """A checkpoint of a random Qwen3-MoE with the tokenizer of another one."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = transformers.AutoConfig.from_pretrained(like).vocab_size
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(vocab_size=vocabulary, **sizes, **heads, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of the model, as a training may leave them."""
    folder = tmp_path_factory.mktemp("trained")
    for seed, name in enumerate(("math/checkpoint-100", "code")):
        torch.manual_seed(seed)
        config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config)
        for layer in lora_layers(model, "default").values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-5)
        model.peft_config["default"].base_model_name_or_path = HUB_NAME
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the texts fill")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_blocks_of_a_page_run_in_order(page: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run is not None or block.language not in RUN:
            continue
        if block.language == "python":
            exec(compile(block.text, name(page), "exec"), names)
            continue
        for program, *arguments in commands(block):
            assert program == "nullspace"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (arguments, result.output)


def test_every_block_is_run_or_looked_up_or_shown() -> None:
    assert {
        (name(page), b.language) for page in PAGES for b in blocks(page) if b.language not in (*RUN, *LOOKED_UP, *SHOWN)
    } == set()


def test_blocks_that_are_not_run() -> None:
    reasons = {name(page): [b.not_run for b in blocks(page) if b.not_run is not None] for page in PAGES}
    assert {page: found for page, found in reasons.items() if found} == NOT_RUN


def test_every_command_of_the_command_line_is_shown() -> None:
    shown = {line[1] for page in PAGES for b in blocks(page) if b.language == "console" for line in commands(b)}
    assert shown >= COMMANDS


def test_make_targets_and_extras_that_are_named_exist() -> None:
    makefile, project = ((ROOT / file).read_text(encoding="utf-8") for file in ("Makefile", "pyproject.toml"))
    for page in PAGES:
        for block in blocks(page):
            for line in commands(block) if block.language == "sh" and block.not_run is None else ():
                if line[:2] == ["pip", "install"]:
                    extras = re.fullmatch(r"\.\[([a-z,]+)\]", line[2])
                    assert extras is not None, (name(page), line)
                    assert all(re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) for extra in extras[1].split(","))
                else:
                    program, target, *_ = line
                    assert program == "make", (name(page), line)
                    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (name(page), line)


def test_files_that_the_readme_links_to_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if "://" not in link]
    assert "docs/methods.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(readme.splitlines()) <= 150
