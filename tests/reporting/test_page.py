"""`nullspace report`, on a small model: what the page holds, what the numbers are, and what bad input gets."""

from __future__ import annotations

import base64
import csv
import gzip
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vl_convert
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import nullspace
from nullspace import analysis
from nullspace.analysis import Analysis
from nullspace.cli import app
from nullspace.integrations.peft import filter_path, read_course, read_factors
from nullspace.reporting import figures
from nullspace.reporting import page as pages
from nullspace.reporting import study as fronts
from nullspace.reporting.charts import library
from nullspace.reporting.page import Head, Section, Table, as_csv
from nullspace.reporting.sections import sections
from nullspace.reporting.study import Spread
from nullspace.reporting.verdict import Finding, verdict

pytestmark = pytest.mark.slow  # the first of them makes all that the pages show
SMALL = ["--samples", "6", "--length", "64", "--batch-size", "2", "-q"]
TITLES = [
    "Effective rank of inputs and weights",
    "Spectra",
    "Which directions each adapter reads",
    "How far training moves A",
    "Leak and gap",
    "Drift of the layers' outputs",
    "Tokens with massive activations",
    "Layer by layer",
]
# In the library: names of XML and JSON formats, a comment, and the editor, whose button is left out. None is requested.
ADDRESSES = {
    "http://www.w3.org/2000/svg",
    "http://www.w3.org/2000/xmlns/",
    "http://www.w3.org/1999/xlink",
    "https://vega.github.io/schema/vega/v6.json",
    "https://vega.github.io/editor/",
    "https://github.com/vega/vega-lite/issues/2415",
}


STUDY_TITLES = ["What was forgotten, where as much was learned", "What forgetting goes with", "What is left when BA is dropped"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Page(html.parser.HTMLParser):
    """What a page refers to, the titles of its sections, its text, its policy, its tables as CSV, and its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.titles: list[str] = []
        self.tables: dict[str, list[dict[str, str]]] = {}
        self.places: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.policy = self.text = ""
        self.count = 0  # of tables
        self._inside: dict[str, str | None] = {}
        self._tag = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag, self._inside = tag, dict(attrs)
        self.count += tag == "table"
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "data", "action", "poster")]
        self.places += [value or "" for name, value in attrs if name == "data-panel"]
        if self._inside.get("http-equiv") == "Content-Security-Policy":
            self.policy = self._inside["content"] or ""
        if self._inside.get("download"):
            data = base64.b64decode((self._inside["href"] or "").partition("base64,")[2]).decode()
            self.tables[self._inside["download"] or ""] = list(csv.DictReader(io.StringIO(data)))

    def handle_data(self, data: str) -> None:
        if self._inside.get("id") == "figures" and data.strip():
            self.figures = json.loads(gzip.decompress(base64.b64decode(data)))
        elif self._tag not in ("script", "style"):
            self.text += data
        if self._tag == "h2" and data.strip() and data != "Verdict":
            self.titles.append(data)


def drawn(figure: dict[str, Any]) -> list[str]:
    """The panels of a figure as SVG, by the Vega-Lite that the page carries."""
    return [
        vl_convert.vegalite_to_svg({**spec, "width": 300}, vl_version=vl_convert.get_vegalite_versions()[-1])
        for spec in figure["panels"]
    ]


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with covariances, spaces, two inits, and what training would have left of one of them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data.txt").write_text("\n\n".join(prose[:3]))
    (folder / "other.txt").write_text("\n\n".join(prose[3:6]))
    commands: list[list[Any]] = [
        ["covariances", tiny_checkpoint, "--data", folder / "data.txt", "--out", folder / "kept", *SMALL],
        ["covariances", tiny_checkpoint, "--data", folder / "other.txt", "--out", folder / "other", *SMALL],
        ["compute", "--covariances", folder / "kept", "--rank", 8, "--spectrum", "--out", folder / "spaces", "-q"],
        ["init", tiny_checkpoint, "--spaces", folder / "spaces", "--rank", 8, "--out", folder / "null", "-q"],
        ["init", tiny_checkpoint, "--method", "pissa", "--rank", 4, "--use-rslora", "--out", folder / "pissa", "-q"],
    ]
    for command in commands:
        result = run(*command)
        assert result.exit_code == 0, result.output
    base = AutoModelForCausalLM.from_pretrained(folder / "null" / "base")
    model = PeftModel.from_pretrained(base, folder / "null" / "adapter", is_trainable=True)
    for step in (9, 10):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder / "run" / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def whole(made: Path, tiny_checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """The page of everything, and its numbers."""
    out = made / "all.html"
    sources = ["--covariances", made / "kept", "--spaces", made / "spaces", "--model", tiny_checkpoint]
    adapters = ["--adapter", f"LoRA-Null <v1>={made / 'null'},{made / 'run'}", "--adapter", f"$pissa={made / 'pissa'}"]
    more = ["--held-out", made / "other", "--task", made / "other"]
    result = run("report", "--out", out, *sources, *adapters, *more, "--json", "-q")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_the_page_has_every_section_and_requests_nothing(whole: tuple[Path, dict[str, Any]]) -> None:
    path, _ = whole
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert page.titles == [*TITLES, "What a filter would give back"]
    assert "Left out here" not in page.text
    assert path.stat().st_size < 3e6
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert page.policy.startswith("default-src 'none';")
    assert not re.search(r"https?:|blob:|\*", page.policy)
    ours = text.replace(library(), "")
    assert len(ours) < len(text)
    assert not re.search(r"@import|url\(|<link|<iframe|https?://|\bimport\(|fetch\(|XMLHttp|WebSocket", ours)
    assert set(re.findall(r"https?://[^\"'` )]+", library())) <= ADDRESSES
    assert "http" not in json.dumps(page.figures)
    assert page.places == [f"{i} {j}" for i, figure in enumerate(page.figures) for j in range(len(figure["panels"]))]
    assert len(page.figures) >= 9


def test_every_figure_can_be_drawn_and_has_marks(whole: tuple[Path, dict[str, Any]]) -> None:
    for figure in Page(whole[0]).figures:
        for picture in drawn({"panels": figure["panels"][:1]}):
            assert picture.count("<path") > 4
            assert "NaN" not in picture


def test_the_head_says_of_what_when_and_how(whole: tuple[Path, dict[str, Any]], made: Path, tiny_checkpoint: Path) -> None:
    text = Page(whole[0]).text
    assert f"Nullspace report: {tiny_checkpoint.name}, lora-null and pissa" in text
    for words in (str(tiny_checkpoint), "lora-null, rank 8", f"nullspace {nullspace.__version__}", f"torch {torch.__version__}"):
        assert words in text
    assert re.search(r"20\d\d-\d\d-\d\d", text)
    command = f"nullspace report --covariances {made / 'kept'} --spaces {made / 'spaces'} --model {tiny_checkpoint} --adapter "
    assert command in text


def test_held_out_leaks_are_those_of_dense_products(whole: tuple[Path, dict[str, Any]], made: Path) -> None:
    _, told = whole
    other, spaces = nullspace.Covariances.load(made / "other"), nullspace.NullSpaces.load(made / "spaces")
    for row in told["inputs"]:
        c, u = other[row["site"]].matrix(), spaces[row["site"]].basis
        assert row["held_out_leak"] == pytest.approx(math.sqrt(float((u.mT @ c @ u).trace() / c.trace())), rel=1e-9)
    factors = read_factors(made / "run" / "checkpoint-10")
    for row in (row for row in told["adapters"] if row["state"] == "step 10"):
        c, q = other[row["layer"]].matrix(), torch.linalg.qr(factors[row["layer"]].A.double().mT).Q
        assert row["held_out_leak"] == pytest.approx(math.sqrt(float((q.mT @ c @ q).trace() / c.trace())), rel=1e-9)


def test_what_a_filter_gives_back_is_what_the_filter_command_shows(whole: tuple[Path, dict[str, Any]], made: Path) -> None:
    path = filter_path(
        made / "run" / "checkpoint-10", made / "other", made / "kept", initial=made / "null", strengths=(0.0, 1.0), progress=False
    )
    (rows,) = whole[1]["filters"].values()
    shown = {row["strength"]: row for row in rows}
    for step in path.steps:
        assert shown[step.strength]["left"] == pytest.approx(step.left, rel=1e-6)
        assert shown[step.strength]["response"] == pytest.approx(step.response, rel=1e-6)
    assert 0 < shown[1.0]["drift"] < shown[0.0]["drift"]


def test_every_table_is_there_as_csv_with_all_digits(whole: tuple[Path, dict[str, Any]]) -> None:
    path, told = whole
    page = Page(path)
    tables = page.tables
    assert len(tables) == page.count
    assert [float(row["leak"]) for row in tables["null-spaces.csv"]] == [row["leak"] for row in told["inputs"]]
    layers = {(row["adapter"], row["layer"]): float(row["leak"]) for row in tables["layers.csv"]}
    last = {(row["adapter"], row["layer"]): row["leak"] for row in told["adapters"]}  # the later state replaces the earlier
    assert layers == last


def test_the_verdict_follows_from_the_numbers(whole: tuple[Path, dict[str, Any]]) -> None:
    path, told = whole
    by_name = {finding["about"]: finding for finding in told["verdict"]}
    adapters = {row["adapter"]: row["state"] for row in told["adapters"]}
    worst = max((r for r in told["adapters"] if r["state"] == adapters[r["adapter"]]), key=lambda row: row["leak"])
    assert f"{worst['layer']} ({worst['adapter']}, {worst['state']}): {worst['leak']:.2e}" in by_name["Leak"]["text"]
    drift = told["adapter_summary"][2]
    assert f"{drift['drift']:.2%} in the median and at most by {drift['worst_drift']:.2%}" in by_name["Drift"]["text"]
    assert {"Calibration", "Held-out text", "Filter"} <= by_name.keys()
    assert all(finding["text"] in Page(path).text for finding in told["verdict"])


@pytest.mark.parametrize(
    ("tokens", "level", "words"), [(0, "look", "text that reaches it"), (5, "look", "about 3 times"), (48, "good", "4.0")]
)
def test_too_few_tokens_are_said(tokens: int, level: str, words: str) -> None:
    row = {"site": "a", "members": ["a"], "d_in": 10, "tokens": tokens, "rank": 2, "leak": 0.1, "held_out_leak": 0.3}
    found = {finding.about: finding for finding in verdict(Analysis([row], [], []))}
    assert found["Calibration"].level == level
    assert words in found["Calibration"].text
    assert found["Held-out text"].level == "look"  # three times the leak
    assert f"{math.sqrt(0.2):.2e}" in found["Leak"].text
    assert {finding.level for finding in verdict(Analysis([], [], []))} == {"unknown"}


def test_cells_of_every_kind() -> None:
    rows = [{"n": 1234, "x": 0.00012345678, "s": Spread(1.0, 0.25, 3), "t": '=<a>,"b"', "?": None}]
    rows.append({"n": 2, "x": math.nan, "s": Spread(2.0, math.nan, 1), "t": "c", "?": None})
    text = pages.page(Head("<T>", {"a&b": "c<d"}, [Finding("good", "e", "f<g")]), [Section("h", "i", table=Table("j", rows))])
    for cell in (
        "1,234",
        "0.0001235",
        "1.00 ± 0.25",
        "=&lt;a&gt;,&quot;b&quot;",
        "<td>nan<",
        "–",
        "a&amp;b",
        "c&lt;d",
        "f&lt;g",
        "&lt;T&gt;",
    ):
        assert cell in text
    first, second = csv.DictReader(io.StringIO(as_csv(Table("j", rows))))
    assert (first["x"], first["s, deviation"], first["t"], first["?"]) == ("0.00012345678", "0.25", '=<a>,"b"', "")
    assert (second["x"], second["s"], second["s, deviation"]) == ("nan", "2.0", "")


def test_names_are_text_and_not_markup(whole: tuple[Path, dict[str, Any]]) -> None:
    path, _ = whole
    assert "LoRA-Null <v1>" in Page(path).text
    assert "<v1>" not in path.read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_analysis(whole: tuple[Path, dict[str, Any]], made: Path) -> None:
    _, told = whole
    assert {"inputs", "weights", "adapters", "effective_ranks", "adapter_summary", "seconds", "out"} <= set(told)
    assert len(told["weights"]) == 14
    states = [(row["adapter"], row["state"], row["step"]) for row in told["adapter_summary"]]
    mine = "LoRA-Null <v1>"
    assert states == [(mine, "initial", 0), (mine, "step 9", 9), (mine, "step 10", 10), ("$pissa", "initial", 0)]
    drifts = [row["drift"] for row in told["adapter_summary"]]
    assert 0 == drifts[0] < drifts[1] < drifts[2]
    assert len(told["adapters"]) == 4 * 14
    again = json.loads(run("inspect", made / "spaces", "--json").stdout)["sites"]
    assert [row["leak"] for row in told["inputs"]] == [row["leak"] for row in again]
    assert [row["effective_rank"] for row in told["inputs"]] == pytest.approx([row["effective_rank"] for row in again])


def test_weights_on_the_disk_give_the_same_numbers(
    whole: tuple[Path, dict[str, Any]], made: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nullspace.reporting.sections.SECTIONS", ())
    adapter = f"LoRA-Null <v1>={made / 'null'},{made / 'run'}"
    sources = ["--covariances", made / "kept", "--model", tiny_checkpoint, "--adapter", adapter, "--held-out", made / "other"]
    result = run("report", "--out", tmp_path / "page.html", *sources, "--offload", "--json", "-q")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["weights"] == whole[1]["weights"]
    assert told["adapters"] == [row for row in whole[1]["adapters"] if row["adapter"] != "$pissa"]


def test_every_section_says_what_it_lacks(made: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[list[Any], int, list[str]]] = {
        "covariances": (["--covariances", made / "kept"], 2, ["--model", "--adapter", "--spaces"]),
        "spaces": (["--spaces", made / "spaces"], 2, ["--covariances", "--model", "--adapter"]),
        "adapter": (["--adapter", f"x={made / 'pissa'},{made / 'pissa' / 'adapter'}"], 1, ["--covariances", "--spaces"]),
        "init": (["--adapter", f"x={made / 'null'}"], 1, ["--covariances"]),  # spaces lie beside the adapter
    }
    for name, (sources, least, words) in cases.items():
        out = tmp_path / f"{name}.html"
        result = run("report", "--out", out, *sources)
        assert result.exit_code == 0, result.output
        page = Page(out)
        assert page.titles == TITLES
        assert len(page.figures) >= least, name
        assert all(word in page.text for word in ["Left out here", *words]), name
        assert "sections" in result.stdout
        assert "Calibration: " in result.stdout


def scores(loss: float, nq: float, perplexity: float) -> dict[str, Any]:
    knowledge = {name: {"log_likelihood": value, "exact_match": 0.1} for name, value in (("nq", nq), ("webq", -8.0))}
    return {"knowledge": knowledge, "text": {"wikitext": {"perplexity": perplexity}}, "task": {"loss": loss, "token_accuracy": 0.5}}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A preservation study of two methods: one forgets twice as much as the other; its highest rate diverges."""
    records: list[dict[str, Any]] = [{"kind": "study", "settings": {}}, {"kind": "base", "scores": scores(2.0, -10.0, 20.0)}]
    records += [{"kind": "start", "variant": name, "scores": scores(2.0 + 1e-6, -10.0, 20.0)} for name in ("a <b>", "quiet")]
    records.append({"kind": "dropped", "variant": "quiet", "scores": scores(2.5, -12.5, 25.0)})
    for name, lost in (("a <b>", 2.0), ("quiet", 1.0)):
        for seed in (0, 1):
            for rate, loss in ((1e-3, 1.5), (1e-2, 1.0), (1e-1, 7.0)):
                run = {"variant": name, "seed": seed, "learning_rate": rate, "layers": {"drift": 0.1 * lost}}
                records.append({"kind": "run", **run, "scores": scores(loss, -10.0 - lost * (2 - loss) - 0.1 * seed, 20.0)})
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_preservation_study_has_sections_of_its_own(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run("report", "--study", study, "--out", out, "--json", "-q")
    assert result.exit_code == 0, result.output
    page = Page(out)
    assert page.titles == STUDY_TITLES
    assert len(page.figures) == 3
    assert all(picture.count("<path") > 4 for figure in page.figures for picture in drawn(figure))
    assert "within 1e-06 of the base's, 2.000" in page.text
    assert "a <b>" in page.text
    assert "<b>" not in out.read_text(encoding="utf-8")
    assert re.search(r"drift0\.\d\dnan", page.text.replace("\n", ""))  # what was lost of text does not vary
    told = json.loads(result.stdout)
    # At the common loss, 1.0, the mean over the sets and over both seeds; the first lost twice as much.
    ends = {row["variant"]: row["forgetting"] for row in told["equal_loss"]["knowledge"] if row["task_loss"] == 1.0}
    assert ends["a <b>"]["mean"] == pytest.approx((2.0 + 0.05) / 2)
    assert ends["quiet"]["mean"] == pytest.approx((1.0 + 0.05) / 2)
    assert f"{ends['quiet']['mean']:.3f} ± {ends['quiet']['deviation']:.3f}" in page.text
    assert "1.2500" in page.text  # what the base without BA lost: half of 2.5
    assert {row["learning_rate"] for row in told["runs"]} == {1e-3, 1e-2, 1e-1}


def test_a_front_ends_where_most_was_learned(study: Path) -> None:
    spec = figures.forgetting(fronts.read_study(study / "results.jsonl")).panels[0].spec
    lines = {name: [row["x"] for row in spec["data"]["values"] if row["series"] == name] for name in ("a <b>", "quiet")}
    assert list(lines.values()) == [[2.0, 1.5, 1.0]] * 2  # and not 7.0, of the rate that diverged
    assert spec["encoding"]["x"]["scale"]["reverse"]


def test_a_study_stands_before_the_layers(study: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run("report", "--study", study / "results.jsonl", "--spaces", made / "spaces", "--out", out, "-q")
    assert result.exit_code == 0, result.output
    assert Page(out).titles == [*STUDY_TITLES, *TITLES]


def test_a_study_without_runs_or_of_another_kind(study: Path, tmp_path: Path) -> None:
    path = study / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    for given, message in ((study, "no finished run yet"), (tmp_path, "results.jsonl"), (tmp_path / "none.jsonl", "none.jsonl")):
        result = run("report", "--study", given, "--out", tmp_path / "page.html")
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_factors_have_pefts_scaling_of_every_layer(use_rslora: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=use_rslora,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 6},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 5, "v_proj": 7},
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config)
    model.save_pretrained(tmp_path / "adapter")
    found = read_factors(tmp_path / "adapter")
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.allclose((found[name].B @ found[name].A).float(), layer.get_delta_weight("default"), atol=1e-6), name


def test_a_folder_of_checkpoints_is_read_in_order_of_its_steps(made: Path) -> None:
    course = read_course("x", made / "null", made / "run")
    assert [state.step for state in course.trained] == [9, 10]
    same = read_course("x", made / "null" / "adapter", made / "run" / "checkpoint-10", made / "null" / "adapter")
    assert [(state.label, state.step) for state in same.trained] == [("step 10", 10), ("adapter", None)]
    name = next(iter(course.initial))
    assert torch.equal(course.trained[1].factors[name].A, same.trained[0].factors[name].A)
    twice = read_course("x", made / "null", made / "null" / "adapter", made / "null" / "adapter")
    assert len({state.label for state in twice.states}) == 3


def altered(source: Path, target: Path, change: Any) -> Path:
    """A copy of an adapter whose tensors were changed."""
    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return target


def narrower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()}


def fewer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if "layers.1" not in k}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}


def without_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors.items() if "lora_A" in k}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "give at least one of --covariances, --spaces, --adapter and --study"),
        (["--covariances", "none"], "none is not a directory"),
        (["--covariances", "SPACES"], "describes 'spaces', not 'covariances'"),
        (["--covariances", "DAMAGED"], "bytes and should have"),
        (["--spaces", "KEPT"], "describes 'covariances', not 'spaces'"),
        (["--covariances", "KEPT", "--model", "OTHER"], "of another model"),
        (["--adapter", "x"], "--adapter must be NAME=INITIAL"),
        (["--adapter", "=NULL"], "--adapter must be NAME=INITIAL"),
        (["--adapter", "x=NULL,"], "--adapter must be NAME=INITIAL"),
        (["--adapter", "x=NULL", "--adapter", "x=NULL"], "two of the name 'x'"),
        (["--adapter", "x=none"], "none is not a PEFT adapter"),
        (["--adapter", "x=NULL,none"], "none is not a directory"),
        (["--adapter", "x=NULL,PISSA"], "'x'.*PISSA is not what .*NULL was trained to"),
        (["--adapter", "x=NULL,FEWER"], "'x'.*FEWER is not what .*NULL was trained to: only .*layers.1"),
        (["--adapter", "x=TORN"], "adapter_model.safetensors has no B"),
        (["--covariances", "KEPT", "--adapter", "x=NARROW"], "'x' reads inputs of width 127 at .*down_proj.*of width 128"),
        (["--covariances", "KEPT", "--adapter", "x=RENAMED"], "'x' is on 'model.layers.7.*no covariance"),
    ],
)  # fmt: skip
def test_bad_input_exits_with_2_names_the_cause_and_writes_nothing(
    command: list[str], words: str, made: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = made / "null" / "adapter"
    known = {"SPACES": made / "spaces", "KEPT": made / "kept", "NULL": made / "null", "PISSA": made / "pissa" / "adapter"}
    changes = {"FEWER": fewer, "TORN": without_b, "NARROW": narrower, "RENAMED": renamed}
    asked = " ".join(command)
    known |= {name: altered(adapter, tmp_path / name, change) for name, change in changes.items() if name in asked}
    if "DAMAGED" in asked:
        known["DAMAGED"] = Path(shutil.copytree(made / "kept", tmp_path / "DAMAGED"))
        victim = sorted(known["DAMAGED"].glob("*.safetensors"))[2]
        victim.write_bytes(victim.read_bytes()[:-1])
    if "OTHER" in asked:
        model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
        with torch.no_grad():
            model.get_submodule("model.layers.1.mlp.up_proj").weight.add_(1.0)
        known["OTHER"] = Path(shutil.copytree(tiny_checkpoint, tmp_path / "OTHER"))
        model.save_pretrained(known["OTHER"])
    before = sorted(tmp_path.iterdir())
    filled = [re.sub("|".join(known), lambda m: str(known[m[0]]), part) for part in command]
    result = run("report", "--out", "page.html", *filled)
    assert result.exit_code == 2, result.output
    message = " ".join(result.stderr.split())
    for name, path in known.items():
        message = message.replace(str(path), name)
    assert re.search(words, message), message
    assert sorted(tmp_path.iterdir()) == before


def test_dora_is_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="dora uses DoRA"):
        read_factors(tmp_path / "dora")


def test_a_page_is_replaced_only_on_request_and_only_one_of_ours(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    command = ["report", "--out", out, "--spaces", made / "spaces", "-q"]
    assert run(*command).exit_code == 0
    first = out.read_bytes()
    refused = run("report", "--out", out, "--spaces", "none")  # before the work
    assert refused.exit_code == 2
    assert "exists" in refused.stderr
    assert out.read_bytes() == first
    assert run(*command, "--overwrite").exit_code == 0
    assert out.read_bytes() == first  # the same page from the same numbers
    out.write_text("<!DOCTYPE html><p>My thesis</p>")
    assert run(*command, "--overwrite").exit_code == 2
    assert "thesis" in out.read_text()
    assert run("report", "--out", tmp_path, "--spaces", made / "spaces", "--overwrite").exit_code == 2


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(pages.store, "sync", full)
    with pytest.raises(OSError, match="No space"):
        pages.write(tmp_path / "page.html", Head("A"), [Section("c", "d")])
    assert not list(tmp_path.iterdir())


def test_a_section_more_is_one_entry_more(tmp_path: Path) -> None:
    new = Section("New", "Look.", table=Table("new", [{"method": "a & b", "score": 1}]))
    out = pages.write(tmp_path / "x" / "page.html", Head("A"), [*sections(Analysis([], [], [])), new])
    page = Page(out)
    assert page.titles == [*TITLES, "New"]
    assert "a & b" in page.text
    assert page.figures == page.places == []
    assert out.stat().st_size < 30e3  # without the library


def test_layers_outside_of_blocks_zeros_and_few_numbers_can_be_drawn() -> None:
    rows = [
        {"adapter": "_odd $name", "state": state, "step": None, "layer": name, "block": block, "projection": "fc", "rank": 2}
        | {"change": 0.0, "outside": 0.0, "leak": 0.0, "drift": 0.0, "read": [0.0] * analysis.BINS}
        for state in ("initial", "a", "b")
        for name, block in (("fc", None), ("decoder.0.fc", "decoder.0"))
    ]
    inputs = [
        {"site": "fc", "members": ["fc"], "block": None, "projection": "fc", "d_in": 1, "tokens": 1, "outliers": 1}
        | {"outlier_share": 1.0, "effective_rank": 0.0, "spectrum": [0.0], "rank": 1, "leak": 0.0, "gap": 0.0}
    ]
    parts = sections(Analysis(inputs, [], rows))
    text = pages.page(Head("A", findings=verdict(Analysis(inputs, [], rows))), parts)
    assert "_odd $name" in text
    assert sum(len(part.figures) for part in parts) == 9
    for figure in (figure for part in parts for figure in part.figures):
        drawn({"panels": [figure.panels[0].spec]})


def test_without_vl_convert_the_command_says_what_to_install(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for name in ("sections", "figures", "charts", "page"):
        monkeypatch.delitem(sys.modules, f"nullspace.reporting.{name}")
        monkeypatch.delattr(nullspace.reporting, name)
    result = run("report", "--out", tmp_path / "page.html", "--spaces", made / "spaces")
    assert result.exit_code == 2
    assert "pip install 'nullspace-lora[report]'" in " ".join(result.stderr.split())


@pytest.mark.processes
def test_the_library_imports_no_vl_convert() -> None:
    code = (
        "import sys, nullspace, nullspace.analysis, nullspace.cli; print([m for m in ('vl_convert', 'peft') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
