"""The survey of families: its page is made of its rows, and a handful of its architectures, one of a kind, go through all steps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

pytest.importorskip("benchmarks.families", reason="needs the repository's root on the path: python -m pytest")
from benchmarks.children import forked
from benchmarks.environment import RESULTS
from benchmarks.families.__main__ import chosen
from benchmarks.families.build import architectures
from benchmarks.families.page import page_of
from benchmarks.families.records import STEPS, read, write
from benchmarks.families.shrink import shrunk, size_of
from benchmarks.families.survey import step, survey
from nullspace.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_of_the_rows(tmp_path: Path) -> None:
    environment, rows = read(RESULTS / "families.jsonl")
    assert (ROOT / "docs/families.md").read_text(encoding="utf-8") == page_of(environment, rows)
    built = [row for row in rows if row.get("built")]
    assert len(built) >= 120
    for row in built:
        assert {row[name]["result"] for name in STEPS if name in row} <= {"ok", "refused"}, row
        assert row.get("share", 0.0) >= 0.99 or row.get("left_out") or row["resident"]["result"] == "refused", row
    write(tmp_path / "again.jsonl", environment, rows)
    assert read(tmp_path / "again.jsonl") == (environment, rows)


# A layer between the base model and the head; one beside a text's part that gets text; blocks that would get the last token alone;
# other names in the checkpoint than in the model; experts whose checkpoint is made by looking into the model.
SOME = {
    "BertLMHeadModel": STEPS,
    "BlipForConditionalGeneration": STEPS,
    "Gemma4ForCausalLM": [name for name in STEPS if name != "layerwise"],
    "LlavaForConditionalGeneration": STEPS,
    "Qwen3VLMoeForConditionalGeneration": STEPS,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SOME))
def test_a_family_of_each_kind(name: str) -> None:
    if name not in architectures():
        pytest.skip("not in this version of transformers")
    with warnings.catch_warnings():
        row = survey(name)
    assert {each: row[each]["result"] for each in SOME[name]} == dict.fromkeys(SOME[name], "ok"), row
    assert row["layerwise"]["result"] in ("ok", "refused")
    assert row["share"] >= 0.99


def test_results_of_a_step() -> None:
    def refuse() -> float:
        raise InputError("a layer")

    def fail() -> float:
        raise KeyError("a layer")

    assert step(lambda: 1e-12, 1e-9) == {"result": "ok", "error": 1e-12}
    assert step(lambda: 1.0, 1e-9)["result"] == step(lambda: float("nan"), 1e-9)["result"] == "wrong"
    assert step(refuse, 1e-9)["result"] == "refused"
    assert step(fail, 1e-9) == {"result": "failed", "message": "KeyError: 'a layer'"}


def test_sizes_by_name() -> None:
    assert size_of("num_hidden_layers") == size_of("encoder_layers") == size_of("n_layer") == 3
    assert size_of("hidden_act") is None
    config: Any = shrunk(transformers.LlavaConfig)
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 64
    assert config.text_config.num_hidden_layers == 3
    assert config.vision_config.num_hidden_layers == 2


def test_names_of_architectures() -> None:
    assert chosen(["llama", "BertForMaskedLM"]) == ["LlamaForCausalLM", "BertForMaskedLM"]
    with pytest.raises(SystemExit, match="no such family or class: nonesuch"):
        chosen(["nonesuch"])


@pytest.mark.processes
def test_calls_in_processes_of_their_own() -> None:
    assert dict(forked("posixpath", "basename", ["a/b", "c"], at_once=2, timeout=60)) == {"a/b": "b", "c": "c"}
    assert dict(forked("os", "_exit", [3], at_once=1, timeout=60)) == {3: {"failed": "the process ended with 3"}}
    assert dict(forked("time", "sleep", [60], at_once=1, timeout=0.5)) == {60: {"failed": "not done in 0.5 s"}}
