"""Every command and snippet of README and docs, run as it stands, in the order in which a reader meets them.

A page begins in a fresh folder. There is nothing in it but what the hub has, small and under the same names: two models and three
data sets (`HUB`). A page that says that it starts with the files of another page's section finds those that the blocks of
this section leave; other files are made by the page's own blocks before they are used. The blocks of a language:

- `python`: in one namespace a page.
- `console`: lines that begin with `$ nullspace`, by typer's runner.
- `sh`: `torchrun` and `accelerate launch` by their own code, which starts two processes over gloo; `make TARGET` and
  `pip install '.[EXTRA]'` are looked up, not run.
- `text`, `json`: what is shown only.

A block behind a line `*Not run by the tests: REASON.*` is not run; all of these are listed here, in `NOT_RUN`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch.distributed.run
import transformers
import typer
import yaml
from accelerate.commands import launch
from torch.distributed.launcher.api import elastic_launch
from typer.testing import CliRunner

import processes
from nullspace.cli import app

ROOT = Path(__file__).resolve().parents[2]
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MIXTURE = "Qwen/Qwen3-30B-A3B"
RUN, SHOWN = ("python", "console", "sh"), ("text", "json")
LAUNCHERS, LOOKED_UP = ("torchrun", "accelerate"), ("make", "pip")
# Page → the reasons for blocks that are not run.
NOT_RUN = {
    "docs/evidence.md": ["it trains for hours"],
    "docs/results.md": ["it trains for hours", "it needs the data sets of the tasks", "it trains for an hour and a half"],
}
COMMANDS = {"init", "inspect", "compute", "covariances", "merge", "export", "report", "plan", "filter", "combine", "verify"}
# Options in sentences that are not ours: of servers, and of every program. Pages whose options are those of benchmarks.
OF_OTHERS = {"--help", "--max-lora-rank", "--enable-mixed-moe-lora-format", "--lora-strict-loading"}
OF_BENCHMARKS = ("evidence.md", "results.md")
STARTS_WITH = re.compile(r"starts? with the files of the \[[^]]+\]\(([^)#]+)#([^)]+)\)")


def in_order() -> Iterator[Path]:
    """README, then the pages in the order of the site's navigation, then those that it leaves out."""

    def leaves(entry: object) -> Iterator[str]:
        for each in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
            yield from [each] if isinstance(each, str) else leaves(each)

    yield ROOT / "README.md"
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [ROOT / "docs" / name for name in leaves(navigation)]
    yield from named
    yield from sorted(set((ROOT / "docs").rglob("*.md")) - set(named))


PAGES = list(in_order())


class Block(NamedTuple):
    language: str
    text: str
    not_run: str | None


def blocks(page: Path, section: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or of a section of it, by its anchor."""
    pattern = r"(?:^\*Not run by the tests: (.+?)\.\*\n\n)?^```(\w*)\n(.*?)^```$"
    text = page.read_text(encoding="utf-8")
    if section is not None:
        parts = re.split(r"^##+ (.+)\n", text, flags=re.MULTILINE)
        text = next(part for title, part in zip(parts[1::2], parts[2::2], strict=True) if anchor(title) == section)
    found = [Block(each[2], each[3], each[1]) for each in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL)]
    assert text.count("```") == 2 * len(found), f"{page}: a fence that is not read here"
    return found


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def commands(block: Block) -> list[list[str]]:
    """The command lines of a `console` or `sh` block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if any(b.language in RUN and b.not_run is None for b in blocks(page))]


@pytest.fixture(scope="module")
def hub(tiny_checkpoint: Path, prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages take from the hub, as folders of the same names."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_checkpoint, folder / HUB_NAME)
    (folder / HUB_NAME / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    write_mixture(folder / MIXTURE, tiny_checkpoint)
    texts, asked = [text[:1500] for text in prose[:48]], "What is this?"
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": text}] for text in texts[:4]]
    data = {
        ("google-research-datasets/nq_open", "default", "train"): [{"question": asked, "answer": [text]} for text in texts[:16]],
        ("openai/gsm8k", "main", "train"): [{"question": asked, "answer": text[:64]} for text in texts[16:48]],
        ("google-research-datasets/mbpp", "full", "train"): [{"text": asked, "code": text[:200]} for text in texts[8:16]],
        ("HuggingFaceTB/everyday-conversations-llama3.1-2k", "default", "train_sft"): [{"messages": chat} for chat in chats],
    }
    for (name, configuration, split), rows in data.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files = [{"config_name": configuration, "default": True, "data_files": [{"split": split, "path": "rows.jsonl"}]}]
        (folder / name / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': files})}---\n")
    return folder


def write_mixture(folder: Path, like: Path) -> None:
    """A checkpoint of a random Qwen3-MoE with the tokenizer of another one."""
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = transformers.AutoConfig.from_pretrained(like).vocab_size
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3MoeConfig(vocab_size=vocabulary, **sizes, **heads, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)


class Launched:
    """In the place of `elastic_launch`: the workers are forked from a process that has imported what they need."""

    def __init__(self, config: torch.distributed.run.LaunchConfig, entrypoint: str) -> None:
        processes.forking()
        config.start_method = "forkserver"
        self._run = elastic_launch(config, processes.run_nullspace)

    def __call__(self, *arguments: str) -> None:
        self._run(*arguments[arguments.index("nullspace") + 1 :])


def launch_two(program: str, arguments: list[str]) -> None:
    """Run the command line of a launcher, which sets variables of the environment and handlers of signals in its own process."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        with mock.patch.dict(os.environ), mock.patch("torch.distributed.run.elastic_launch", Launched):
            if program == "torchrun":
                torch.distributed.run.main(arguments)
            else:
                assert arguments.pop(0) == "launch"
                launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def run(page: Path, section: str | None = None) -> None:
    """Run the blocks of a page, or of a section of it, in the working directory."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, section):
        if block.not_run is not None or block.language not in RUN:
            continue
        if block.language == "python":
            exec(compile(block.text, name(page), "exec"), names)
            continue
        for program, *arguments in commands(block):
            if program == "nullspace":
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, (arguments, result.output)
            elif program in LAUNCHERS:
                launch_two(program, arguments)
            else:
                assert program in LOOKED_UP


@pytest.fixture(scope="module")
def files(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], list[Path]]:
    """The files that the blocks of a page's section leave, which are run once."""

    @functools.cache
    def made(page: Path, section: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("made")
        shutil.copytree(hub, folder, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            run(page, section)
        return [path for path in folder.iterdir() if path.is_file()]

    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the texts fill")
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_blocks_of_a_page_run_in_order(
    page: Path, hub: Path, files: Callable[[Path, str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(hub, tmp_path, dirs_exist_ok=True)
    for link in STARTS_WITH.findall(" ".join(page.read_text(encoding="utf-8").split())):
        for file in files((page.parent / link[0]).resolve(), link[1]):
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    run(page)


def test_every_block_is_run_or_looked_up_or_shown() -> None:
    assert {(name(page), b.language) for page in PAGES for b in blocks(page) if b.language not in (*RUN, *SHOWN)} == set()
    programs = {line[0] for page in PAGES for b in blocks(page) if b.language == "console" for line in commands(b)}
    assert programs == {"nullspace"}


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
            for program, *arguments in commands(block) if block.language == "sh" and block.not_run is None else ():
                if program == "pip":
                    extras = re.fullmatch(r"\.\[([a-z,]+)\]", arguments[1])
                    assert extras is not None, (name(page), arguments)
                    assert all(re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) for extra in extras[1].split(","))
                elif program == "make":
                    assert re.search(rf"^{arguments[0]}:", makefile, flags=re.MULTILINE), (name(page), arguments)
                else:
                    assert program in LAUNCHERS, (name(page), program)


def test_options_and_modules_that_are_named_in_sentences_exist() -> None:
    commands_ = [typer.main.get_command(app), *typer.main.get_command(app).commands.values()]  # type: ignore[attr-defined]
    options = {each for command in commands_ for p in command.params for each in (*p.opts, *p.secondary_opts)} | OF_OTHERS
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name not in OF_BENCHMARKS:
            spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
            ours = [span for span in spans if not span.startswith(("python ", "pip "))]
            named = {each for span in ours for each in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
            assert named <= options, name(page)
        for module in re.findall(r"python -m (benchmarks[\w.]*\w)", text):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), (name(page), module)


def test_files_that_the_readme_links_to_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme) if "://" not in link]
    assert any(link.startswith("docs/methods.md") for link in links)
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []
    assert len(readme.splitlines()) <= 150
