"""Data from the command line: chat templates, several data sets with weights, part of one, another order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from nullspace import Covariances, compute_covariances
from nullspace.cli import app
from nullspace.integrations.transformers import PackedBatches, load_texts

SMALL = ["--samples", "4", "--length", "64", "--targets", "down_proj", "-q"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, prose: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("data")
    chats = [[{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text[60:200]}] for text in prose[:12]]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    (folder / "facts.jsonl").write_text("\n".join(json.dumps({"question": text[:50], "answer": text[50:150]}) for text in prose))
    (folder / "prose.txt").write_text("\n\n".join(prose[:4]))
    (folder / "t.jinja").write_text(TEMPLATE)
    return folder


def kept(out: Path) -> dict[str, torch.Tensor]:
    return {name: each.matrix() for name, each in Covariances.load(out).items()}


def test_second_moments_of_chat_data_are_those_of_the_templates_tokens(files: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    chat = ["covariances", tiny_checkpoint, "--data", files / "chat.jsonl", *SMALL]
    refused = run(*chat, "--out", tmp_path / "refused")
    assert refused.exit_code == 2
    assert "chat.jsonl, row 1 is a conversation, and the tokenizer" in refused.stderr
    assert "--template FILE" in refused.stderr
    assert not list(tmp_path.iterdir())
    done = run(*chat, "--out", tmp_path / "out", "--template", files / "t.jinja", "--system", "Be brief.", "--skip", 3)
    assert done.exit_code == 0, done.output
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    chats = [json.loads(line)["messages"] for line in (files / "chat.jsonl").read_text().splitlines()[3:]]
    system = {"role": "system", "content": "Be brief."}
    by_hand = [tokenizer.apply_chat_template([system, *each], chat_template=TEMPLATE, return_dict=True) for each in chats]
    ids = torch.tensor([i for each in by_hand for i in each["input_ids"]])[: 4 * 64].reshape(4, 64)
    reference = compute_covariances(
        model, [{"input_ids": ids}], tmp_path / "reference", targets=["down_proj"], precision="fp64", progress=False
    )
    for name, matrix in kept(tmp_path / "out").items():
        assert (matrix - reference[name].matrix()).norm() <= 1e-6 * matrix.norm()


def test_a_mixture_from_the_command_line_is_that_of_python(files: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = [files / "prose.txt", files / "facts.jsonl"]
    how = ["--weights", "3,1", "--shuffle", "7", "--as-chat", "--template", TEMPLATE]
    named = [argument for path in paths for argument in ("--data", path)]
    out = tmp_path / "out"
    done = run("compute", tiny_checkpoint, *named, *how, "--out", out, "--rank", 8, *SMALL[:-1], "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["data"] == f"{paths[0]} (3), {paths[1]} (1)"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    texts = load_texts(paths, weights=[3, 1], shuffle=7, as_chat=True)
    batches = PackedBatches(texts, tokenizer, samples=4, length=64, template=TEMPLATE)
    compute_covariances(model, batches, tmp_path / "reference", targets=["down_proj"], precision="auto", progress=False)
    again = run("compute", "--covariances", tmp_path / "reference", "--out", tmp_path / "again", "--rank", 8, "--json")
    assert [site["leak"] for site in json.loads(again.stdout)["sites"]] == pytest.approx(
        [site["leak"] for site in json.loads(done.stdout)["sites"]], rel=1e-4
    )


def test_the_form_of_the_calibration_is_recorded(files: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out, template = tmp_path / "out", files / "t.jinja"
    form = ["--as-chat", "--template", template, "--system", "Be brief."]
    done = run(
        "init", tiny_checkpoint, "--data", files / "facts.jsonl", *form, "--rank", 4, "--method", "b-zero", "--out", out, *SMALL
    )
    assert done.exit_code == 0, done.output
    record = json.loads((out / "nullspace.json").read_text())
    assert {name: record[name] for name in ("data", "as_chat", "template", "system")} == {
        "data": str(files / "facts.jsonl"), "as_chat": True, "template": str(template), "system": "Be brief.",
    }  # fmt: skip


def test_only_what_is_needed_of_large_files_is_read(
    files: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of data sets of the hub: rows are read until the samples are full. Small files are checked to their end."""
    text = (files / "facts.jsonl").read_text()
    (tmp_path / "long.jsonl").write_text(f"{text}\nno JSON")
    read = ["covariances", tiny_checkpoint, "--data", tmp_path / "long.jsonl", *SMALL]
    refused = run(*read, "--out", tmp_path / "small")
    assert f"long.jsonl, line {text.count(chr(10)) + 2}: not JSON" in refused.stderr
    monkeypatch.setattr("nullspace.integrations.transformers.data.WHOLE", 64)
    done = run(*read, "--out", tmp_path / "large")
    assert done.exit_code == 0, done.output
    assert "not JSON" in run(*read, "--out", tmp_path / "shuffled", "--shuffle", 1).stderr
