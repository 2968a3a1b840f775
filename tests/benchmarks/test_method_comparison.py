"""Experiments for PEFT's method comparison, the replaced function, and its result files, with a small stand-in of a checkout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig

pytest.importorskip("benchmarks.method_comparison", reason="needs the repository's root on the path: python -m pytest")
from benchmarks.method_comparison import checkout, experiments, results
from benchmarks.method_comparison import start as calibration
from benchmarks.method_comparison.__main__ import main, run_one
from benchmarks.method_comparison.checkout import Checkout, adapter_of
from benchmarks.method_comparison.dry_run import READ, Stream
from benchmarks.method_comparison.experiments import RECIPES, Sizes, Start
from benchmarks.method_comparison.start import Starter, kept_texts
from nullspace.errors import DamagedFileError, InputError, MissingFileError, OutputExistsError, RunError
from nullspace.integrations.peft import inject_adapters, lora_layers

pytestmark = pytest.mark.filterwarnings("ignore::nullspace.errors.DataWarning")
SAMPLES = 6, 9
"""Kept texts and training examples."""
# The names and arguments of PEFT's modules, as far as they are used, around a tiny model.
UTILS = """
import json
from types import SimpleNamespace

import transformers
from peft import get_peft_model

RESULT_PATH = RESULT_PATH_TEST = RESULT_PATH_CANCELLED = None


def get_train_config(path):
    defaults = {"dtype": "float32", "attn_implementation": None, "max_seq_length": 32, "batch_size": 4, "batch_size_eval": 4,
                "query_template": "{query}", "seed": 0, "autocast_adapter_dtype": True, "generation_kwargs": {}}
    return SimpleNamespace(**{**defaults, **json.load(open(path))})


def get_tokenizer(*, model_id, max_seq_length):
    return transformers.AutoTokenizer.from_pretrained(model_id)


def get_base_model(*, model_id, dtype, attn_implementation, use_gc):
    return transformers.AutoModelForCausalLM.from_pretrained(model_id)


def get_model(*, model_id, peft_config):
    base = get_base_model(model_id=model_id, dtype=None, attn_implementation=None, use_gc=False)
    return get_peft_model(base, peft_config, autocast_adapter_dtype=True)


def get_accuracy(*, predictions, responses):
    return sum(map(str.__eq__, predictions, responses)) / len(responses)


def get_file_size(model, *, clean):
    return 7
"""
DATA = """
load_dataset = None


def get_wiki_small(num_samples=100):
    return [f"the river number {n} flows north" for n in range(num_samples)]


def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    rows = [f"{n} and {n} are {2 * n}" for n in range(30)]
    return [{"input_ids": tokenizer(row)["input_ids"]} for row in rows], rows[:4], rows[4:10]
"""
RUN = """
import json
import os

import torch
from peft import PeftConfig
from utils import get_file_size, get_model, get_tokenizer, get_train_config
import utils
from data import get_wiki_small


def calculate_mean_per_token_loss(model, tokenizer, rows, batch_size, max_length):
    ids = tokenizer(rows[:3], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def evaluate(model, tokenizer, ds, batch_size, generate_kwargs, use_tqdm=False):
    return list(ds), [row if number else "" for number, row in enumerate(ds)]


def main(*, path_experiment, experiment_name, clean, bucket_name):
    params = get_train_config(os.path.join(path_experiment, "training_params.json"))
    tokenizer = get_tokenizer(model_id=params.model_id, max_seq_length=params.max_seq_length)
    model = get_model(model_id=params.model_id, peft_config=PeftConfig.from_pretrained(path_experiment))
    loss = lambda: calculate_mean_per_token_loss(model, tokenizer, get_wiki_small(), 4, 768)
    with model.disable_adapter():
        before = loss()
    started = loss()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.add_(0.05)
    print_verbose(get_file_size(model, clean=clean))
    metrics = [{"test accuracy": 0.25, "forgetting": loss() - before, "before": before, "started": started}]
    content = {
        "run_info": {"experiment_name": experiment_name, "total_time": 5.0, "train_config": vars(params), "error_msg": "no luck"},
        "train_info": {"status": params.status if hasattr(params, "status") else "success", "metrics": metrics, "train_time": 2.0},
    }
    with open(os.path.join(utils.RESULT_PATH, experiment_name.replace("/", "--") + ".json"), "w") as file:
        json.dump(content, file)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "peft" / checkout.FOLDER
    folder.mkdir(parents=True)
    for name, text in (("utils", UTILS), ("data", DATA), ("run", RUN)):
        (folder / f"{name}.py").write_text(text)
    yield tmp_path / "peft"
    for name in checkout.USED:
        sys.modules.pop(name, None)


def small(tmp_path: Path, model: Path, methods: list[str], **changed: Any) -> dict[str, Path]:
    """Experiments of rank 4 for a tiny model, calibrated on few samples: METHOD → folder."""
    out = {}
    for folder in experiments.write(tmp_path / "out", Sizes(str(model), rank=4), methods, [1e-4]):
        start = Start.load(folder)
        if start is not None:
            content = json.loads((folder / experiments.START).read_text())
            content |= {"keep_samples": SAMPLES[0], "task_samples": SAMPLES[1], **changed}
            (folder / experiments.START).write_text(json.dumps(content))
        out[folder.parent.name] = folder
    return out


def test_written_folders_are_read_by_peft_and_by_us(tmp_path: Path) -> None:
    folders = experiments.write(tmp_path, Sizes(), list(RECIPES), seeds=(0, 3))
    assert len(folders) == len(set(folders)) == 18
    for folder in folders:
        assert checkout.name_of(folder) == f"{folder.parent.name}/{folder.name}"
        config = PeftConfig.from_pretrained(folder)
        assert isinstance(config, LoraConfig)
        assert (config.r, config.lora_alpha, config.target_modules) == (32, 64, {"q_proj", "v_proj"})
        training = json.loads((folder / "training_params.json").read_text())
        start = Start.load(folder)
        changes_base = start is not None and start.method in ("lora-null", "corda-kpm")
        assert training["optimizer_kwargs"]["weight_decay"] == (0.0 if changes_base else 0.1)
        assert training.get("seed", 0) == (3 if folder.name.endswith("-seed_3") else 0)
        assert (start is None) == (folder.parent.name == "lora")
        if start is not None and start.of:
            assert tmp_path / "experiments" / start.of in folders
    with pytest.raises(OutputExistsError, match="exists"):
        experiments.write(tmp_path, Sizes(), ["contrast"])


def test_names_tell_experiments_apart(tmp_path: Path) -> None:
    sizes = [
        Sizes(),
        Sizes(rank=8),
        Sizes(targets=("up_proj",)),
        Sizes(keep="Salesforce/wikitext:wikitext-103-raw-v1"),
        Sizes("a/b"),
    ]
    names = [folder.name for each in sizes for folder in experiments.write(tmp_path, each, ["contrast"], [1e-4, 1e-3])]
    assert len(set(names)) == 10
    assert "llama-3.2-3B-rank32-up-lr_0.0001" in names
    with pytest.raises(InputError, match="unknown method 'sora'"):
        experiments.write(tmp_path, Sizes(), ["sora"])


@pytest.mark.parametrize("text", ["{", "[]", '{"keep": "x"}', '{"method": "contrast", "metod": 1}'])
def test_a_damaged_start_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / experiments.START).write_text(text)
    with pytest.raises(DamagedFileError, match=experiments.START):
        Start.load(tmp_path)


@pytest.mark.parametrize("method", ["contrast", "lora-null"])
def test_their_run_trains_our_start(fake: Path, tmp_path: Path, tiny_checkpoint: Path, method: str) -> None:
    (experiment,) = small(tmp_path, tiny_checkpoint, [method]).values()
    theirs = Checkout.load(fake)
    (path,) = run_one(theirs, experiment, tmp_path / "out")
    assert path.parent.name == "results"
    measured = json.loads(path.read_text())["train_info"]["metrics"][-1]
    params, base = theirs.params(experiment), theirs.utils.get_base_model
    model = base(model_id=str(tiny_checkpoint), dtype=None, attn_implementation=None, use_gc=False)
    tokenizer = theirs.tokenizer(params)
    wanted = theirs.run.calculate_mean_per_token_loss(model, tokenizer, theirs.data.get_wiki_small(), 4, 768)
    assert measured["before"] == pytest.approx(wanted, abs=1e-6)  # forgetting is counted from the base, whatever the start
    assert measured["started"] == pytest.approx(wanted, abs=1e-4)
    assert measured["forgetting"] != measured["started"] - measured["before"]  # and ends with the trained adapter
    assert (adapter_of(tmp_path / "out", checkout.name_of(experiment)) / "adapter_model.safetensors").is_file()
    assert theirs.utils.get_peft_model.__module__ == "peft.mapping_func"


def test_the_start_is_of_the_task_against_what_is_kept(
    fake: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small(tmp_path, tiny_checkpoint, ["contrast"])["contrast"]
    theirs = Checkout.load(fake)
    start = Start.load(experiment)
    assert start is not None
    tokens = {}

    def inject(*arguments: Any, **options: Any) -> Any:
        for name in ("covariances", "preserve"):
            tokens[name] = options[name]["model.layers.0.self_attn.q_proj"].tokens
        return inject_adapters(*arguments, **options)

    monkeypatch.setattr(calibration, "inject_adapters", inject)
    model = theirs.utils.get_base_model(model_id=str(tiny_checkpoint), dtype=None, attn_implementation=None, use_gc=False)
    adapted = Starter(theirs, start)(model.bfloat16(), PeftConfig.from_pretrained(experiment), experiment)
    rows, params = theirs.data.get_wiki_small(1000 + SAMPLES[0])[1000:], theirs.params(experiment)
    drawn = calibration.task_batches(theirs.datasets(theirs.tokenizer(params), params)[0], start, params.seed)
    assert len(drawn) == SAMPLES[1]
    assert tokens == {"covariances": sum(each["input_ids"].numel() for each in drawn), "preserve": sum(map(len, rows))}
    layers = lora_layers(adapted, "default")
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}
    for layer in layers.values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == b.dtype == torch.float32
        assert not a.requires_grad
        assert b.requires_grad
        assert not b.any()
    with pytest.raises(InputError, match="unknown method 'sora'"):
        Starter(theirs, Start("sora"))


def test_a_filter_of_strength_zero_is_the_lora_that_was_trained(
    fake: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = small(tmp_path, tiny_checkpoint, ["filter"], strengths=[0.0, 100.0])
    theirs, out = Checkout.load(fake), tmp_path / "out"
    trained = results.read(run_one(theirs, folders["lora"], out)[0])
    monkeypatch.delattr(theirs.run, "main")  # the LoRA in OUT is taken, not trained again
    zero, strong = (results.read(path) for path in run_one(theirs, folders["filter"], out))
    assert zero.forgetting == pytest.approx(trained.forgetting, abs=1e-5)
    assert abs(strong.forgetting or 1) < abs(trained.forgetting or 0)
    assert zero.accuracy == pytest.approx(5 / 6)  # of `evaluate`, not the trained LoRA's
    assert (zero.train_seconds, zero.name) == (2.0, f"filter/{folders['filter'].name}-mu_0")


def test_no_text_that_forgetting_is_measured_on_is_calibrated_on(fake: Path, tmp_path: Path) -> None:
    theirs = Checkout.load(fake)
    measured = set(theirs.data.get_wiki_small())
    found = kept_texts(theirs, Start("contrast", keep_samples=20))
    assert len(found) == 20
    assert not measured & set(found)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(["a text of its own", *sorted(measured)]))
    assert kept_texts(theirs, Start("contrast", keep=str(other))) == ["a text of its own"]
    with pytest.raises(InputError, match="first 100 rows"):
        kept_texts(theirs, Start("contrast", skip=99))
    stream = Stream([f"text {n}" for n in range(2 * READ)], 1000)
    assert not {row["text"] for row in stream.take(100)} & {row["text"] for row in stream.take(1000 + READ)[1000:]}


@pytest.mark.parametrize(
    ("module", "old", "new", "message"),
    [
        ("utils", "import get_peft_model", "import get_peft_model as _other", "utils.py: has no get_peft_model"),
        ("run", "def evaluate", "def assess", "run.py: has no evaluate"),
        (
            "run",
            "bucket_name):",
            "bucket_name, seed=0):",
            "its main takes bucket_name, clean, experiment_name, path_experiment, seed",
        ),
    ],
)
def test_a_changed_comparison_is_refused(fake: Path, module: str, old: str, new: str, message: str) -> None:
    file = fake / checkout.FOLDER / f"{module}.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        Checkout.load(fake)


def test_a_run_that_passes_by_the_hook_or_fails_writes_no_result(fake: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    experiment = small(tmp_path, tiny_checkpoint, ["lora"])["lora"]
    training = json.loads((experiment / "training_params.json").read_text())
    (experiment / "training_params.json").write_text(json.dumps({**training, "status": "canceled"}))
    with pytest.raises(RunError, match="ended as canceled: no luck"):
        run_one(Checkout.load(fake), experiment, tmp_path / "out")
    utils = fake / checkout.FOLDER / "utils.py"
    utils.write_text(UTILS.replace("return get_peft_model(base", "import peft\n    return peft.get_peft_model(base"))
    with pytest.raises(RunError, match="get_model does not call get_peft_model"):
        run_one(Checkout.load(fake), experiment, tmp_path / "other")
    assert not list((tmp_path / "other" / "results").iterdir())
    with pytest.raises(MissingFileError, match="needs a checkout"):
        Checkout.load(tmp_path)
    with pytest.raises(InputError, match="experiments/METHOD/NAME"):
        checkout.name_of(tmp_path)


TRAINING = {"model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "max_seq_length": 768, "batch_size": 4, "max_steps": 5000}


def result(accuracy: Any = 0.48, forgetting: Any = 0.01, status: str = "success", **training: Any) -> dict[str, Any]:
    """A result in the format of PEFT's, as far as it is read."""
    return {
        "run_info": {
            "experiment_name": "contrast/x",
            "total_time": 99.5,
            "train_config": {**TRAINING, **training},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_max": 22_000_000_000,
            "train_time": 66.0,
            "num_trainable_params": 4587520,
            "status": status,
            "metrics": [{"step": 5000, "valid accuracy": 0.5}, {"step": 5000, "test accuracy": accuracy, "forgetting": forgetting}],
        },
        "meta_info": {"package_info": {"peft-version": "0.20.1"}, "system_info": {"accelerator": "NVIDIA L40S"}},
    }


def read(tmp_path: Path, content: Any) -> results.Result:
    path = tmp_path / "contrast--x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return results.read(path)


def test_a_result_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, result())
    assert (found.name, found.accuracy, found.forgetting, found.memory) == ("contrast/x", 0.48, 0.01, 22e9)
    assert (found.train_seconds, found.total_seconds, found.trainable) == (66.0, 99.5, 4587520)
    assert (found.accelerator, found.peft, found.meets) == ("NVIDIA L40S", "0.20.1", True)


@pytest.mark.parametrize(
    ("content", "meets"),
    [
        (result(0.478, 0.0164), True),
        (result(0.478, 0.0165), False),
        (result(0.477, -0.2), False),
        (result(model_id="/models/Llama-3.2-3B/"), True),
        (result(model_id="SmolLM2-135M"), None),
        (result(max_steps=3), None),
        (result(status="canceled"), None),
        (result(forgetting=None), None),
        (result(accuracy=float("nan")), None),
        (result(accuracy=True), None),
        (result(accuracy="0.9"), None),
        ({**result(), "meta_info": None}, True),
        ({"run_info": {"x": 1}, "train_info": {"status": "success", "metrics": []}}, None),
        ({"run_info": {"x": 1}, "train_info": {"status": "success", "metrics": [3]}}, None),
    ],
)
def test_a_result_meets_the_target_only_if_it_says_so(tmp_path: Path, content: Any, meets: bool | None) -> None:
    assert read(tmp_path, content).meets is meets


@pytest.mark.parametrize("content", ["", '{"run_info"', "[]", "3", '{"run_info": [], "train_info": {}}', '{"run_info": {"a": 1}}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(DamagedFileError, match=r"contrast--x\.json"):
        read(tmp_path, content)


def test_results_stand_beside_the_published_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = tmp_path / "peft" / checkout.FOLDER / "results"
    for folder in (tmp_path / "results", tmp_path / "cancelled_results", published):
        folder.mkdir(parents=True)
    failed, theirs, again = result(None, None, "canceled"), result(0.427, 0.0166), result(status="canceled")
    failed["run_info"] |= {"experiment_name": "corda/y", "error_msg": "out of memory"}
    theirs["run_info"]["experiment_name"] = "osf/z"
    (tmp_path / "results" / "a.json").write_text(json.dumps(result()))
    (tmp_path / "results" / "b.json").write_text("{")
    (tmp_path / "cancelled_results" / "c.json").write_text(json.dumps(failed))
    (tmp_path / "cancelled_results" / "d.json").write_text(json.dumps(again))  # of an experiment that has succeeded before
    (published / "osf.json").write_text(json.dumps(theirs))
    main(["show", str(tmp_path), "--peft", str(tmp_path / "peft")])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert rows[1][:4] == ["contrast/x", "ours", "0.480", "0.0100"]
    assert rows[1][-1] == "met"
    assert ["osf/z", "published", "0.427", "0.0166"] in [row[:4] for row in rows]
    assert "met by contrast/x" in shown
    assert "corda/y: canceled: out of memory" in shown
    assert "b.json is not JSON" in shown
    with pytest.raises(SystemExit, match="no result file"):
        main(["show", str(tmp_path / "peft")])
