"""Adapters moved, uploaded, and loaded by somebody else: right, or a warning that says what is missing, for each kind."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from calibrated import covariances_for
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel

from models import random_batches, tiny
from nullspace.integrations.peft import (
    ForgettingCallback,
    Gauge,
    attach_subtracted,
    describe,
    drift_of,
    export_lora,
    filter_adapter,
    freeze_a,
    inject_adapters,
    save_init,
    set_base,
)
from nullspace.integrations.peft.filtering.changes import read_changes
from nullspace.integrations.peft.origin import KEY

BATCH = random_batches(1, 2, 12, seed=7)[0]
# What subtracts the start of each kind.
KINDS: dict[str, dict[str, Any]] = {
    "residual": {"residual": "base"},
    "pair": {"residual": "adapter"},
    "frozen": {"freeze_a": True},
}
FOLDERS = ("out", "out/adapter", "trained", "exported", "filtered")


class Made(NamedTuple):
    """A folder that was moved as a whole after all in it was made, and the outputs of the models that were trained."""

    folder: Path
    before: Path
    outputs: dict[str, torch.Tensor]


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**BATCH).logits
    return logits


def load(folder: Path | str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def start(folder: Path, base: Path, method: str = "pissa", **options: Any) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    model = inject_adapters(load(base), config, method=method, **options)
    save_init(folder, model)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`model`, a `sibling` of other weights, `again`, another start; of each kind `out`, `trained`, `exported` and `filtered`."""
    before = tmp_path_factory.mktemp("before") / "all"
    tiny("llama").save_pretrained(before / "model")
    sibling = tiny("llama")
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter.mul_(1.05)
    sibling.save_pretrained(before / "sibling")
    found = {}
    covariances = covariances_for("llama")
    for kind, options in KINDS.items():
        folder = before / kind
        model = start(folder / "out", before / "model", **options)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.02 * torch.randn_like(parameter))
        found[kind] = outputs(model)
        model.save_pretrained(folder / "trained", selected_adapters=["default"])
        export_lora(folder / "trained", folder / "out", folder / "exported")
        filter_adapter(
            folder / "trained", covariances, covariances, folder / "filtered", strength=1.0, initial=folder / "out", progress=False
        )
    start(before / "again" / "out", before / "model", "milora", residual="base")
    folder = tmp_path_factory.mktemp("after") / "all"
    shutil.move(before, folder)
    return Made(folder, before, found)


def base_for(kind: str) -> str:
    return "residual/out/base" if kind == "residual" else "model"


def loaded(made: Made, kind: str, base: str | None = None, adapter: str = "trained") -> PeftModel:
    return PeftModel.from_pretrained(load(made.folder / (base or base_for(kind))), made.folder / kind / adapter, is_trainable=True)


# ---- moved


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_moved_computes_the_same_by_relative_paths_from_elsewhere(
    kind: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.folder / kind)
    model = PeftModel.from_pretrained(load(f"../{base_for(kind)}"), "trained")
    monkeypatch.chdir("/")
    if kind == "pair":
        attach_subtracted(model, os.path.relpath(made.folder / kind / "out" / "subtracted"))
    assert torch.allclose(outputs(model), made.outputs[kind], atol=1e-5)
    export = PeftModel.from_pretrained(load(made.folder / "model"), os.path.relpath(made.folder / kind / "exported"))
    assert torch.allclose(outputs(export), made.outputs[kind], atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_folder_says_which_base_it_needs_and_what_is_not_there(kind: str, folder: str, made: Made) -> None:
    facts = describe(made.folder / kind / folder)
    needs_residual = kind == "residual" and folder not in ("exported", "filtered")
    assert facts["base_kind"] == ("residual" if needs_residual else "untouched")
    assert facts["model"] == str(made.before / "model")
    notes = " ".join(facts["notes"])
    beside = needs_residual and folder.startswith("out")
    assert facts["base_found"] == (str(made.folder / "residual" / "out" / "base") if beside else None)
    assert "--base" in notes
    assert beside or str(made.before / base_for("residual" if needs_residual else "")) in notes
    assert ("attach_subtracted" in notes) == (kind == "pair" and folder not in ("exported", "filtered"))
    assert ("call freeze_a" in notes) == (kind == "frozen" and folder not in ("exported", "filtered"))


def test_the_second_adapter_says_what_it_is(made: Made) -> None:
    facts = describe(made.folder / "pair" / "out" / "subtracted")
    assert facts["base"] == str(made.before / "model")
    assert any("beside that one" in note for note in facts["notes"])
    assert not any("vLLM" in note for note in facts["notes"])


def test_changes_are_counted_from_the_start_beside_the_base_that_was_loaded(made: Made, tmp_path: Path) -> None:
    known = drift_of(loaded(made, "residual"), covariances_for("llama"), initial=made.folder / "residual" / "out").median
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert drift_of(loaded(made, "residual"), covariances_for("llama")).median == known > 0
    shutil.copytree(made.folder / "residual" / "out" / "base", tmp_path / "alone")
    model = PeftModel.from_pretrained(load(tmp_path / "alone"), made.folder / "residual" / "trained")
    with pytest.warns(UserWarning, match=r"started as is not beside its base .*initial="):
        assert drift_of(model, covariances_for("llama")).median == 0


def test_what_needs_no_start_is_filtered_wherever_it_is(made: Made) -> None:
    assert read_changes(made.folder / "frozen" / "trained").start is None
    for kind in ("residual", "pair"):
        with pytest.raises(ValueError, match=r"trained on a base without what it started with .*--initial"):
            read_changes(made.folder / kind / "trained")


# ---- on a wrong base


def thaw(model: PeftModel) -> None:
    freeze_a(model)


def measured(model: PeftModel) -> None:
    Gauge(model, covariances_for("llama"))


def called_back(model: PeftModel) -> None:
    ForgettingCallback(covariances_for("llama")).on_train_begin(
        transformers.TrainingArguments("none", report_to=[]), transformers.TrainerState(), None, model=model
    )


WRONG = [
    ("residual", "model", r"residual base W₀ − s·BA of .*/model, and this base is .*/model itself.*nullspace export"),
    ("residual", "sibling", r"residual base W₀ − s·BA of .*/model, and this base is not marked as one"),
    ("residual", "again/out/base", r"made for another residual base of .*/model than this base"),
    ("pair", "model", r"needs the second adapter .*attach_subtracted .*'subtracted'"),
    ("pair", "sibling", r"made for .*/model, and this base has other weights"),
    ("frozen", "sibling", r"made for .*/model, and this base has other weights"),
    ("frozen", "residual/out/base", r"made for the untouched .*/model, and this base is the residual base of another adapter"),
]


@pytest.mark.parametrize(("kind", "base", "words"), WRONG)
def test_a_wrong_base_is_said_when_training_goes_on(kind: str, base: str, words: str, made: Made) -> None:
    with pytest.warns(UserWarning, match=words):
        freeze_a(loaded(made, kind, base))
    wrong = describe_on(made, kind, base)
    if "second adapter" not in words:
        assert any("made for" in note for note in wrong["notes"])
        assert wrong["base_problem"]


def describe_on(made: Made, kind: str, base: str) -> dict[str, Any]:
    """What is said of a trained adapter whose configuration a person has made to name another base."""
    path = made.folder / kind / "trained" / "adapter_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(before), "base_model_name_or_path": str(made.folder / base)}))
        return describe(path.parent)
    finally:
        path.write_text(before)


@pytest.mark.parametrize("helper", [measured, called_back])
def test_what_measures_forgetting_says_it_too(helper: Callable[[PeftModel], None], made: Made) -> None:
    for kind, words in (("residual", "is .*/model itself"), ("pair", "needs the second adapter")):
        with pytest.warns(UserWarning, match=words):
            helper(loaded(made, kind, "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_on_its_own_base_nothing_is_said(kind: str, made: Made, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for dtype in (torch.float32, torch.bfloat16):
            model = loaded(made, kind)
            model.get_base_model().to(dtype)
            if kind == "pair":
                attach_subtracted(model, made.folder / kind / "out" / "subtracted")
            freeze_a(model)
        if kind == "frozen":
            Gauge(model, covariances_for("llama"))
    assert describe_on(made, kind, base_for(kind))["base_problem"] is None


def test_a_second_adapter_is_attached_to_its_own_kind_and_model_alone(made: Made) -> None:
    with pytest.raises(ValueError, match="started without a second one"):
        attach_subtracted(loaded(made, "frozen"), made.folder / "pair" / "out" / "subtracted")
    with pytest.warns(UserWarning, match="this base has other weights"):
        attach_subtracted(loaded(made, "pair", "sibling"), made.folder / "pair" / "out" / "subtracted")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_for_a_wrong_base(kind: str, made: Made, tmp_path: Path) -> None:
    folder = made.folder / kind
    with pytest.raises(ValueError, match=r"sibling is not the model that .* was made of"):
        export_lora(folder / "trained", folder / "out", tmp_path / "out", base=str(made.folder / "sibling"))
    for base in ("sibling", "again/out/base", "model" if kind == "residual" else "residual/out/base"):
        config = (folder / "trained" / "adapter_config.json").read_bytes()
        with pytest.raises(ValueError, match=r"trained (was made for|needs the residual base)"):
            set_base(folder / "trained", str(made.folder / base))
        assert (folder / "trained" / "adapter_config.json").read_bytes() == config
    with pytest.raises(ValueError, match=r"sibling is not the model that .*exported was made for"):
        read_changes(folder / "exported", base=str(made.folder / "sibling"))
    with pytest.raises(ValueError, match="exported was made for"):
        set_base(folder / "exported", str(made.folder / "sibling"))


def test_a_record_of_an_earlier_version_is_no_reason_to_warn(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder / "residual" / "trained", tmp_path / "old")
    path = tmp_path / "old" / "adapter_config.json"
    config = json.loads(path.read_text())
    for record in ({}, {name: config["auto_mapping"][KEY][name] for name in ("freeze_a", "model", "revision", "factors")}):
        path.write_text(json.dumps({**config, "auto_mapping": {KEY: record}}))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            freeze_a(PeftModel.from_pretrained(load(made.folder / "sibling"), path.parent))
        assert describe(path.parent)["base_kind"] == "residual"  # as its card says
    path.write_text(json.dumps({**config, "auto_mapping": {KEY: {"residual": "zero", "base": {"a": "?"}}}}))
    assert describe(path.parent)["base_kind"] == "untouched"


# ---- uploaded


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """Puts a folder into a cache of the hub, as links into blobs, and returns its snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def upload(name: str, folder: Path) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(snapshot.name)
        (repository / "blobs").mkdir()
        for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
            blob, link = repository / "blobs" / str(number), snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return snapshot

    return upload


def test_an_adapter_and_its_residual_base_are_shared_by_names(
    made: Made, hub: Callable[[str, Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = hub("me/base", made.folder / "residual" / "out" / "base")
    shutil.copytree(made.folder / "residual" / "trained", "copy")
    config = json.loads(Path("copy/adapter_config.json").read_text())
    Path("copy/adapter_config.json").write_text(json.dumps({**config, "revision": "of-the-untouched-model"}))
    set_base("copy", "me/base")
    assert ModelCard.load("copy/README.md").data.base_model == "me/base"
    adapter = hub("me/adapter", Path("copy"))
    facts = describe(adapter)
    assert (facts["base_kind"], facts["base_found"], facts["base_problem"]) == ("residual", str(snapshot), None)
    assert torch.allclose(outputs(AutoPeftModelForCausalLM.from_pretrained("me/adapter")), made.outputs["residual"], atol=1e-5)
    export_lora(adapter, made.folder / "residual" / "out", "exported")
    blobs = {path: path.read_bytes() for path in (tmp_path / "hub").glob("*/blobs/*")}
    with pytest.raises(ValueError, match=r"snapshot of the hub's cache.* copy it"):
        set_base(adapter, str(made.folder / "residual" / "out" / "base"))
    assert all(path.read_bytes() == content for path, content in blobs.items())
    hub("me/again", made.folder / "again" / "out" / "base")
    with pytest.raises(ValueError, match="made for another residual base"):
        set_base("copy", "me/again")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_was_uploaded_alone_says_what_it_needs(
    kind: str, made: Made, hub: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    snapshot = hub(f"me/{kind}", made.folder / kind / "out" / "adapter")
    (snapshot / "README.md").unlink()  # the configuration is enough
    notes = " ".join(describe(snapshot)["notes"])
    words = {"residual": "needs the residual base that it was made with, which is missing", "pair": "'subtracted' must be active"}
    assert words.get(kind, "is for the untouched base") in notes
    whole = hub(f"me/{kind}-out", made.folder / kind / "out")
    facts = describe(whole)
    assert facts["base_found"] == (str(whole / "base") if kind == "residual" else None)
    model = PeftModel.from_pretrained(load(whole / "base" if kind == "residual" else made.folder / "model"), whole / "adapter")
    if kind == "pair":
        attach_subtracted(model, whole / "subtracted")
    assert torch.allclose(outputs(model), outputs(load(made.folder / "model")), atol=1e-5)


def test_the_metadata_of_cards_have_no_path_and_the_text_says_how_to_share(made: Made) -> None:
    cards = [path for path in made.folder.rglob("README.md") if "again" not in path.parts]
    assert len(cards) == 3 * 4 + 2
    for path in cards:
        card = ModelCard.load(path)
        assert card.data.base_model is None, path
        assert not any("base_model" in tag for tag in card.data.tags), path
    for kind, words in (("residual", "upload the folder of the base as a model"), ("pair", "share both, or the export")):
        for folder in ("out/adapter", "trained"):
            assert words in " ".join((made.folder / kind / folder / "README.md").read_text(encoding="utf-8").split())


def test_a_hub_name_in_the_place_of_a_folder_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: describe("me/adapter"), lambda: export_lora("me/adapter", "out", "exported")):
        with pytest.raises(FileNotFoundError, match=r"me/adapter.*hf download"):
            call()
