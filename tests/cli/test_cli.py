"""The command line, in process where that is enough and as a process where it is not."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

import nullspace
from nullspace import NullSpaces
from nullspace.artifacts import locks
from nullspace.cli import app, init
from nullspace.cli.options import defaults, parse_targets
from nullspace.methods import METHODS

RANK = ["--rank", "8"]
SMALL = ["--samples", "6", "--length", "64", "--batch-size", "2", *RANK]


@pytest.fixture
def data(tmp_path: Path, prose: list[str]) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(prose[:3]))
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def test_init_does_the_whole_job(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("init", tiny_checkpoint, "--data", data, "--out", out, *SMALL, "--alpha", 24, "--spectrum")
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "is_trainable=True" in result.stdout
    assert result.stderr.count("A is trained too (LoRA-Null v1): --freeze-a (v2)") == 1
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")  # finds OUT/base by itself
    assert (logits(model) - logits(original)).abs().max() <= 1e-5
    assert (logits(model.unload()) - logits(original)).abs().max() > 1e-3  # the base is the residual, not the original
    assert model.peft_config["default"].lora_alpha == 24
    spaces = NullSpaces.load(out / "spaces")
    assert {space.tokens for space in spaces.values()} == {6 * 64}
    assert all(space.effective_rank > 1 for space in spaces.values())
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "chosen", [{"freeze_a": True}, {"freeze_a": False}, {"factor_split": 8.0}, {"residual": "adapter"}, {"method": "corda-kpm"}]
)
def test_what_was_chosen_is_not_warned_of(chosen: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init._warn_of_neighbour(init.Adapter(**{**defaults(init.Adapter), **chosen}))


def test_init_of_a_model_on_the_disk_writes_the_same(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run("compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "spaces", *SMALL, "-q").exit_code == 0
    written = []
    for name, options in (("one", []), ("two", ["--offload"])):
        out = tmp_path / name
        result = run("init", tiny_checkpoint, "--spaces", tmp_path / "spaces", "--out", out, "--rank", 8, "-q", *options)
        assert result.exit_code == 0, result.output
        files = sorted(path for path in out.rglob("*") if path.is_file())
        written.append({str(p.relative_to(out)): p.read_bytes().replace(str(out).encode(), b"OUT") for p in files})
    assert written[0] == written[1]
    assert "base/model.safetensors" in written[0]


def test_init_with_offload_does_the_whole_job(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("init", tiny_checkpoint, "--data", data, "--out", out, *SMALL, "--offload")
    assert result.exit_code == 0, result.output
    assert "meta device" not in result.stderr
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert (logits(AutoPeftModelForCausalLM.from_pretrained(out / "adapter")) - logits(original)).abs().max() <= 1e-5


def test_compute_inspect_and_init_from_spaces_agree(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    computed = run("compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "spaces", *SMALL, "--json", "--quiet")
    assert computed.exit_code == 0, computed.output
    told = json.loads(computed.stdout)
    inspected = json.loads(run("inspect", tmp_path / "spaces", "--json").stdout)
    assert told["sites"] == inspected["sites"]
    assert {"site", "members", "d_in", "tokens", "rank", "leak", "gap", "outliers"} <= set(told["sites"][0])
    result = run("init", tiny_checkpoint, "--spaces", tmp_path / "spaces", "--out", tmp_path / "out", "--rank", 5, "-q")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["sites"] == told["sites"]


def test_export_after_training_is_for_the_model_that_init_was_given(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run("init", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, "-q").exit_code == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter", is_trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    result = run("export", tmp_path / "trained", "--initial", tmp_path / "out", "--out", tmp_path / "plain", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["rank"], told["base"]) == (16, str(tiny_checkpoint))
    exported = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert (logits(exported) - logits(model)).abs().max() <= 1e-5


def test_b_zero_writes_no_base(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("init", tiny_checkpoint, "--data", data, "--out", out, *SMALL, "--method", "b-zero", "-q").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "nullspace.json", "spaces"]
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(out / "adapter")), logits(original))


def covariances(checkpoint: Path, data: Path, out: Path, *more: Any) -> None:
    samples = ["--samples", "6", "--length", "64", "--batch-size", "2"]
    result = run("covariances", checkpoint, "--data", data, "--out", out, *samples, "-q", *more)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_the_text_and_from_kept_covariances(
    method: str, tiny_checkpoint: Path, data: Path, tmp_path: Path, prose: list[str]
) -> None:
    original = logits(transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint))
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(prose[3:6]))
    covariances(tiny_checkpoint, data, tmp_path / "kept")
    options = ["--method", method]
    needs = METHODS[method].needs
    if "preserve" in needs:
        covariances(tiny_checkpoint, other, tmp_path / "preserved")
        options += ["--preserve", tmp_path / "preserved", *(["--beta", "0.3"] if method == "sc-lora" else [])]
    # As many digits as the covariances have, which were summed in float64.
    from_text = ["--data", data, *SMALL, "--precision", "fp64"] if needs else RANK
    products = []
    for name, source in (("one", from_text), ("two", ["--covariances", tmp_path / "kept", *RANK] if needs else RANK)):
        out = tmp_path / name
        more = ["--no-freeze-a", "--no-freeze-b"] if name == "two" else []
        result = run("init", tiny_checkpoint, "--out", out, *source, *options, *more, "-q")
        assert result.exit_code == 0, result.output
        model = AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
        assert (logits(model) - original).abs().max() <= 1e-5
        assert (out / "base").exists() == METHODS[method].changes_base
        record = json.loads((out / "nullspace.json").read_text())
        assert record["method"] == method
        assert ("beta" in record) == (method == "sc-lora")
        frozen = METHODS[method].frozen if name == "one" else None
        card, shown = (out / "adapter" / "README.md").read_text(encoding="utf-8"), run("inspect", out).stdout
        for factor in ("a", "b"):
            assert record.get(f"freeze_{factor}", False) == (frozen == factor.upper())
            assert (f"freeze_{factor}(model)" in card) == (frozen == factor.upper())
            assert (f"call freeze_{factor} after loading it" in shown) == (frozen == factor.upper())
        layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
        products.append({n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()})
    if method != "orthogonal":
        for name, (a, b) in products[0].items():
            again_a, again_b = products[1][name]
            assert (a - again_a).abs().max() <= 1e-4 * a.abs().max(), name
            assert (b - again_b).abs().max() <= 1e-4 * b.abs().max(), name
    left = {"one", "two", "kept", "data.txt", "other.txt", *(["preserved"] if "preserve" in needs else [])}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_kept_covariances_are_merged_inspected_and_give_the_null_spaces_of_all_data(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, prose: list[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(prose[3:6]))
    covariances(tiny_checkpoint, data, tmp_path / "a")
    covariances(tiny_checkpoint, other, tmp_path / "b", "--keep", "float32")
    merged = run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c", "--weights", "2,1", "--json")
    assert merged.exit_code == 0, merged.output
    told = json.loads(merged.stdout)
    assert [site["tokens"] for site in told["sites"]] == [2 * 6 * 64] * len(told["sites"])
    assert told["sites"][0]["mass"] == 3 * 6 * 64
    inspected = run("inspect", tmp_path / "c", "--json")
    assert json.loads(inspected.stdout)["sites"] == told["sites"]
    assert "down_proj" in run("inspect", tmp_path / "c").stdout
    of_text = [tiny_checkpoint, "--data", data, "--precision", "fp64", *SMALL]
    for name, source in (("s", ["--covariances", tmp_path / "a", *RANK]), ("t", of_text)):
        result = run("compute", *source, "--out", tmp_path / name, "-q")
        assert result.exit_code == 0, result.output
    mine, theirs = NullSpaces.load(tmp_path / "s"), NullSpaces.load(tmp_path / "t")
    assert list(mine) == list(theirs)
    for site in mine.sites:
        assert mine[site.name].leak == pytest.approx(theirs[site.name].leak, rel=1e-6)


def test_exclude_takes_layers_away(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    result = run(
        "init", tiny_checkpoint, "--data", data, "--out", tmp_path / "o", *SMALL, "-q", "--exclude", "re:.*mlp.*|.*\\.1\\..*"
    )
    assert result.exit_code == 0, result.output
    expected = {f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"}
    assert set(NullSpaces.load(tmp_path / "o" / "spaces")) == expected
    assert len(load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors")) == 2 * len(expected)
    assert "leaves out" not in result.stderr
    for option, message in ((tmp_path / "o" / "adapter", "use --avoid"), ("zzz", "'zzz' matches no target")):
        refused = run("plan", tiny_checkpoint, *RANK, "--exclude", option)
        assert refused.exit_code == 2
        assert message in " ".join(refused.stderr.split())


def test_what_peft_cannot_adapt_is_known_before_the_calibration(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Mamba's `out_proj`."""
    folder = tmp_path / "mamba"
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    config = transformers.MambaConfig(vocab_size=258, hidden_size=48, state_size=8, num_hidden_layers=1, time_step_rank=12)
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    command = ["init", folder, "--data", data, "--out", tmp_path / "o", *SMALL, "-q"]
    refused = run(*command, "--targets", "in_proj,out_proj")
    assert refused.exit_code == 2
    assert "target 'backbone.layers.0.mixer.out_proj' gets no adapter from PEFT" in " ".join(refused.stderr.split())
    assert not (tmp_path / "o.checkpoint").exists()
    result = run(*command)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert said.count("leaves out") == 1
    assert "mixer.out_proj' gets no adapter from PEFT" in said
    assert "mixer.dt_proj' was never called" in said
    adapter = load_file(tmp_path / "o" / "adapter" / "adapter_model.safetensors")
    assert {name.partition("mixer.")[2].partition(".")[0] for name in adapter} == {"in_proj", "x_proj"}


def test_an_earlier_adapters_rows_are_left_alone(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    first = ["init", tiny_checkpoint, "--data", data, "--out", tmp_path / "first", *SMALL, "-q", "--targets", "q_proj,up_proj"]
    assert run(*first).exit_code == 0
    command = ["init", tiny_checkpoint, "--data", data, *SMALL, "-q", "--targets", "q_proj,k_proj", "--avoid"]
    result = run(*command, tmp_path / "first" / "adapter", "--out", tmp_path / "second")
    assert result.exit_code == 0, result.output
    a, b = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")[
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        ]
        for name in ("first", "second")
    )
    assert (a @ b.T).abs().max() <= 1e-6 * a.norm() * b.norm()
    assert {space.avoided for space in NullSpaces.load(tmp_path / "second" / "spaces").values()} == {8}
    refused = run(*command, tmp_path / "nothing", "--out", tmp_path / "third")
    assert refused.exit_code == 2
    assert "nothing" in refused.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["init", "MODEL", "--method", "pissa", "--data", "DATA"], "'pissa' looks at the weights alone: leave out --data"),
        (["init", "MODEL", "--method", "corda-kpm"], "give one of --data, --covariances for 'corda-kpm'"),
        (["init", "MODEL", "--method", "sc-lora", "--data", "DATA"], "'sc-lora' needs --preserve"),
        (["init", "MODEL", "--method", "contrast", "--data", "DATA"], "'contrast' needs --preserve"),
        (["init", "MODEL", "--method", "contrast", "--preserve", "DATA"], "give one of --data, --covariances for 'contrast'"),
        (
            ["init", "MODEL", "--method", "contrast", "--data", "DATA", "--preserve", "p", "--damping", "0"],
            "damping must be a positive number",
        ),
        (["init", "MODEL", "--method", "eva", "--data", "DATA", "--avoid", "x"], "--avoid belongs to null spaces"),
        (["init", "MODEL", "--method", "eva", "--data", "DATA", "--beta", "0.7"], "beta belongs to 'sc-lora'"),
        (["compute"], "give MODEL and --data, or --covariances"),
        (["compute", "MODEL", "--covariances", "DATA"], "--covariances needs neither MODEL nor --data"),
        (["compute", "--covariances", "none"], "none is not a directory"),
        (["covariances", "MODEL", "--data", "DATA", "--keep", "float16"], "--keep must be one of 'float64', 'float32'"),
        (["merge", "none"], "none is not a directory"),
        (["merge", "none", "--weights", "a"], "--weights must be numbers"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(
    command: list[str], words: str, tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = run(*({"MODEL": tiny_checkpoint, "DATA": data}.get(part, part) for part in command), "--out", "out")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split()), result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--rank", "64"], "rank 64 .*q_proj"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--length", "0"], "--length must be at least 1"),
        (["--targets", "q_prj"], "'q_prj' matches no module.*Did you mean 'q_proj'"),
        (["--targets", "re:("], "not a regular expression"),
        (["--method", "lora-zero"], "lora-zero"),
        (["--dtype", "int8"], "--dtype"),
        (["--data", "none.jsonl"], r"none\.jsonl is not a file"),
        (["--field", "nothing", "--data", "rows.jsonl"], "no field 'nothing'"),
        (["--spaces", "spaces"], "give one of --data, --covariances and --spaces"),
    ],
)
def test_bad_input_exits_with_2_names_the_cause_and_writes_nothing(
    change: list[str], words: str, tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "x"}\n')
    before = sorted(tmp_path.iterdir())
    result = run("init", tiny_checkpoint, "--data", data, "--out", "out", *SMALL, *change)
    assert result.exit_code == 2
    assert result.stdout == ""
    message = " ".join(result.stderr.split())
    assert "error:" in message
    assert re.search(words, message), message
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_result_is_refused_before_the_work_and_replaced_on_request(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    arguments = ["compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, "-q"]
    assert run(*arguments).exit_code == 0
    refused = run("compute", "no-such-model", *arguments[2:])  # the model is not even looked for
    assert refused.exit_code == 2
    assert "exists" in refused.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert run(*arguments[:4], "--out", tmp_path / "mine", *SMALL, "-q", "--overwrite").exit_code == 2
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_inspect_names_the_damaged_file(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run("compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, "-q").exit_code == 0
    victim = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    victim.write_bytes(victim.read_bytes()[:-1])
    result = run("inspect", tmp_path / "out")
    assert result.exit_code == 2
    assert victim.name in "".join(result.stderr.split())
    assert run("inspect", tmp_path / "nowhere").exit_code == 2


def test_targets_are_a_list_unless_marked_as_an_expression() -> None:
    assert parse_targets("all-linear") == "all-linear"
    assert parse_targets("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert parse_targets(r"re:.*\.(q|v)_proj") == r".*\.(q|v)_proj"


@pytest.mark.parametrize("again", [[], ["--fresh"]])
def test_an_interrupted_run_goes_on_where_it_was(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: list[str]
) -> None:
    from nullspace.calibration import null_spaces

    command = ["compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", "--strategy", "layerwise", "-q", *SMALL]
    solved = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal solved
        for space in decompose(*arguments, **options):
            solved += 1
            if solved == 3:
                raise KeyboardInterrupt
            yield space

    decompose = null_spaces.decompose
    with monkeypatch.context() as patch:
        patch.setattr(null_spaces, "decompose", interrupted)
        result = run(*command)
        assert result.exit_code == 130
    kept = tmp_path / "out.checkpoint"
    assert f"interrupted; {kept} has 2 finished sites, and the same command goes on behind them" in " ".join(result.output.split())
    assert len(list(kept.glob("*.safetensors"))) == 2
    assert not (tmp_path / "out").exists()
    seen: list[str] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        for space in decompose(*arguments, **options):
            seen.append(space.site.name)
            yield space

    monkeypatch.setattr(null_spaces, "decompose", watched)
    assert run(*command, *again).exit_code == 0
    assert len(seen) == (8 if again else 6)
    assert not kept.exists()
    assert run(*[tmp_path / "whole" if part == tmp_path / "out" else part for part in command]).exit_code == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_command_that_keeps_nothing_does_not_say_that_it_goes_on(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    assert run("covariances", tiny_checkpoint, "--data", data, "--out", tmp_path / "sums", *SMALL[:4], "-q").exit_code == 0
    (tmp_path / "out.checkpoint").mkdir()  # another command's
    for name in ("run.json", "00000.safetensors"):
        (tmp_path / "out.checkpoint" / name).write_text("{}")
    monkeypatch.setattr("nullspace.Covariances.save", interrupted)
    result = run("merge", tmp_path / "sums", tmp_path / "sums", "--out", tmp_path / "out")
    assert (result.exit_code, result.output.strip()) == (130, "interrupted")
    monkeypatch.setattr("nullspace.integrations.transformers.load.load_weights", interrupted)  # before anything is kept
    result = run("compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "other", *SMALL, "-q")
    assert (result.exit_code, result.output.strip()) == (130, "interrupted; nothing is kept")


@pytest.mark.parametrize(("number", "word", "code"), [("SIGINT", "interrupted", 130), ("SIGTERM", "ended by SIGTERM", 143)])
def test_an_interrupted_forward_pass_says_what_is_kept_and_goes_on(
    number: str, word: str, code: int, tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, and so resident."""
    command = ["compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL]
    forwards: list[int] = []

    def interrupting(self: Any, stage: str, done: int, total: int | None, tokens: int) -> None:
        forwards.append(done) if stage == "forward" else None
        if (stage, done, len(forwards)) == ("forward", 2, 3):
            signal.raise_signal(getattr(signal, number))

    monkeypatch.setattr("nullspace.cli.console.Bars.__call__", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores
    try:
        result = run(*command)
    finally:
        signal.signal(signal.SIGINT, before)
    kept = tmp_path / "out.checkpoint"
    assert result.exit_code == code
    assert f"{word}; {kept} has the sums over 2 batches, and the same command goes on behind them" in " ".join(
        result.output.split()
    )
    assert "Interrupt again to end at once" in result.output
    assert run(*command).exit_code == 0
    assert forwards == [0, 1, 2, 2, 3]
    assert not kept.exists()


def test_the_steps_are_logged_with_verbose(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    command = ["compute", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, "--json"]
    result = run("-v", *command)
    assert result.exit_code == 0, result.output
    assert "info: 14 layers, strategy resident, precision auto\n" in result.stderr
    assert f"info: wrote {tmp_path / 'out'}\n" in result.stderr
    assert json.loads(result.stdout)["out"] == str(tmp_path / "out")
    logger = logging.getLogger("nullspace")
    assert (logger.level, logger.handlers, logger.propagate) == (logging.NOTSET, [], True)


def test_what_has_names_beside_out_is_left_alone(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name in ("out.covariances", "out.part", "out.old.part", "out.lock", "out.tmp"):
        (work / name).mkdir(parents=True)
        (work / name / "thesis.txt").write_text(name)
    assert run("covariances", tiny_checkpoint, "--data", data, "--out", work / "one.covariances", *SMALL[:4], "-q").exit_code == 0
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    for out, method in ((work / "out", "corda-kpm"), (work / "one", "lora-null")):
        assert run("init", tiny_checkpoint, "--data", data, "--out", out, *SMALL, "--method", method, "-q").exit_code == 0
        shutil.rmtree(out)
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    assert len(os.listdir(work)) == 6


@pytest.mark.parametrize("again", [[], ["--fresh"]])
@pytest.mark.parametrize("there", ["a directory", "a directory with run.json", "a file"])
def test_a_checkpoint_of_others_is_refused_before_the_work_and_left_alone(
    data: Path, tmp_path: Path, again: list[str], there: str
) -> None:
    kept = tmp_path / "out.checkpoint"
    if there == "a file":
        kept.write_text("…")
    else:
        kept.mkdir()
        (kept / "00000.safetensors").write_text("…")
        if there != "a directory":
            (kept / "run.json").write_text('{"run": 1}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in ("init", "compute", "covariances"):
        sizes = SMALL[:4] if command == "covariances" else SMALL
        result = run(command, tmp_path / "no model", "--data", data, "--out", tmp_path / "out", *sizes, *again)
        assert result.exit_code == 2
        assert "out.checkpoint" in result.output
        assert "no model" not in result.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_files_of_others_in_a_checkpoint_stay(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out.checkpoint").mkdir()
    command = ["init", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, "--method", "corda-kpm", "-q"]
    (tmp_path / "out.checkpoint" / "notes.part").write_text("mine")
    assert run(*command).exit_code == 0
    assert [path.name for path in (tmp_path / "out.checkpoint").iterdir()] == ["notes.part"]


@pytest.mark.parametrize("command", ["init", "compute", "covariances", "merge", "export", "report", "demo"])
def test_a_place_where_another_run_writes_is_refused_at_once(tmp_path: Path, command: str) -> None:
    arguments: dict[str, list[str]] = {
        "init": ["no model", "--data", "no data"],
        "compute": ["no model", "--data", "no data"],
        "covariances": ["no model", "--data", "no data"],
        "merge": ["no sums"],
        "export": ["no adapter", "--initial", "no init"],
        "report": ["--spaces", "no spaces"],
        "demo": [],
    }
    results: list[Any] = []
    with locks.locked(tmp_path / "out"):  # by another thread
        thread = threading.Thread(target=lambda: results.append(run(command, *arguments[command], "--out", tmp_path / "out")))
        thread.start()
        thread.join()
    said = " ".join(results[0].output.split())
    assert results[0].exit_code == 2, said
    assert f"{tmp_path / 'out'} is being written by another run (process {os.getpid()} on " in said
    assert not any(tmp_path.iterdir())


def test_with_json_nothing_else_is_printed(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed, where it is installed, logs to standard output when transformers imports it."""
    monkeypatch.setattr("nullspace.cli.init._versions", lambda: print("a library's own words") or {})
    result = run("init", tiny_checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, "--json")
    assert json.loads(result.stdout)["out"] == str(tmp_path / "out")
    assert "a library's own words" in result.stderr


def test_what_deepspeed_says_of_the_hardware_is_not_shown(tmp_path: Path) -> None:
    assert run("inspect", tmp_path / "nowhere").exit_code == 2
    logger = logging.getLogger("DeepSpeed")
    said = {level: logger.filter(logger.makeRecord("DeepSpeed", level, "", 0, "", (), None)) for level in (30, 40)}
    assert not said[logging.WARNING]
    assert said[logging.ERROR]


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["init", "-h"], ["init", "--help"], ["plan", "-h"]], ids=" ".join)
def test_help_has_a_short_option_everywhere(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"nullspace {nullspace.__version__}\n"


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["init", "--help"]], ids=" ".join)
def test_help_of_a_checkout_imports_the_command_line_alone(arguments: list[str]) -> None:
    """Without torch it takes less than half a second of CPU time; with torch and transformers, 10 seconds."""
    script = (
        "import runpy, sys\ntry: runpy.run_module('nullspace', run_name='__main__')\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    root = Path(nullspace.__file__).parents[1]
    # -S: without the installed package's path hook, but with the directories of the other packages.
    others = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), others])}
    done = subprocess.run([sys.executable, "-S", "-c", script, *arguments], capture_output=True, text=True, env=environment)
    assert "nullspace" in done.stdout
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "transformers", "peft", "numpy", "scipy", "safetensors"}
    assert {name for name in loaded if re.match(r"nullspace\.(?!cli\b)", name)} <= {
        "nullspace.checks",
        "nullspace.errors",
        "nullspace.progress",
    }


def _refuse() -> None:
    raise ValueError("somebody's file is at fault")


# As if it stood in the package.
refuse = types.FunctionType(_refuse.__code__, {"__name__": "nullspace.artifacts.store", "__builtins__": __builtins__})


@pytest.mark.parametrize(
    ("raises", "code", "words"),
    [
        (refuse, 2, "error: somebody's file is at fault"),
        (lambda: torch.zeros(2) + "x", 1, "failed: TypeError: "),
        (lambda: json.loads("{"), 1, "failed: JSONDecodeError: "),
        (lambda: torch.linalg.cholesky(-torch.eye(2)), 1, "failed: _LinAlgError: "),
        (lambda: {}["model"], 1, "failed: KeyError: 'model'"),
        (lambda: math.sqrt(-1), 1, "failed: ValueError: "),
    ],
    ids=["ours", "interpreter", "standard library", "torch", "KeyError", "math"],
)
def test_what_nobody_raised_on_purpose_is_called_a_fault_and_debug_shows_where(
    raises: Any, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.setattr("nullspace.artifacts.records.kind_of", lambda directory: raises())
    command = ["inspect", tmp_path / "d"]
    result = run(*command)
    assert result.exit_code == code
    assert result.stderr.startswith(words)
    assert ("--debug" in result.stderr) == (code == 1)
    assert "Traceback" not in result.stderr
    for asked in (["--debug", *command], [*command, "--debug"]):
        result = run(*asked)
        assert result.exit_code == code
        assert "Traceback (most recent call last)" in result.stderr
        assert words in result.stderr
    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("NULLSPACE_DEBUG", value)
        assert ("Traceback" in run(*command).stderr) == shown


def test_weights_that_overflow_are_an_error_of_one_line_that_names_the_layer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight.fill_(1e308)
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    result = run("init", tmp_path / "model", "--method", "pissa", "--out", tmp_path / "out", *RANK, "-q")
    assert result.exit_code == 2
    assert re.fullmatch(r"error: .*model\.layers\.1\.mlp\.down_proj.*\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
