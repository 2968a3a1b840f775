"""A run that was cut off goes on where it was, and ends with the same bits; another run's checkpoint is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from models import random_batches, tiny
from nullspace import NullSpaces, compute_null_spaces
from nullspace.artifacts.checkpoint import Checkpoint
from nullspace.calibration import null_spaces as spaces_module

STRATEGIES = ("resident", "layerwise")


def compute(model: nn.Module, directory: Path | None, loader: Any = None, **options: Any) -> NullSpaces:
    batches = random_batches(length=40) if loader is None else loader
    options = {"rank": 4, "progress": False, **options}
    return compute_null_spaces(model, batches, checkpoint=directory, **options)


def assert_equal(a: NullSpaces, b: NullSpaces) -> None:
    assert a.sites == b.sites
    for site in a.sites:
        assert a[site.name].facts() == b[site.name].facts()
        assert torch.equal(a[site.name].basis, b[site.name].basis)
        assert torch.equal(a[site.name].eigenvalues, b[site.name].eigenvalues)


class Cut(Exception):
    pass


def cut_after(steps: int) -> Any:
    """A progress that ends the run at its `steps`-th site."""
    seen = 0

    def progress(stage: str, done: int, total: int | None, tokens: int) -> None:
        nonlocal seen
        if stage == "null spaces":
            seen += 1
            if seen == steps:
                raise Cut

    return progress


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [1, 5, 11])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path: Path, strategy: str, steps: int) -> None:
    model = tiny("llama")
    with pytest.raises(Cut):
        compute(model, tmp_path / "kept", strategy=strategy, progress=cut_after(steps))
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == steps
    assert_equal(compute(model, tmp_path / "kept", strategy=strategy), compute(model, None, strategy=strategy))


def test_finished_blocks_are_not_summed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    with pytest.raises(Cut):
        compute(model, tmp_path / "kept", strategy="layerwise", progress=cut_after(5))
    asked: list[Any] = []
    stream = spaces_module.one_pass
    monkeypatch.setattr(spaces_module, "one_pass", lambda *a, **k: asked.append(a[1]) or stream(*a, **k))
    compute(model, tmp_path / "kept", strategy="layerwise")
    assert not any(name.startswith("model.layers.0.") for name in asked[0])
    assert "model.layers.1.self_attn.o_proj" in asked[0]
    assert "model.layers.1.self_attn.q_proj" not in asked[0]


def test_a_finished_run_does_not_run_the_model_again(tmp_path: Path) -> None:
    model = tiny("llama")
    first = compute(model, tmp_path / "kept")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    assert_equal(compute(model, tmp_path / "kept"), first)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_was_cut_off_in_its_second_pass_ends_with_the_same_bits(tmp_path: Path, strategy: str) -> None:
    model, options = tiny("llama"), {"strategy": strategy, "tolerance": 1e-14}  # every mixed sum is summed again
    batches = random_batches(20)
    whole = compute(model, None, batches, **options)
    assert any(whole[site.name].precision == "fp64" for site in whole.sites)
    passes: list[str] = []

    def cut(stage: str, done: int, total: int | None, tokens: int) -> None:
        passes.append(stage)
        if stage == "null spaces" and "forward, fp64" in passes and passes[-2] == "null spaces":
            raise Cut

    with pytest.raises(Cut):
        compute(model, tmp_path / "kept", batches, progress=cut, **options)
    assert_equal(compute(model, tmp_path / "kept", batches, **options), whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 5}, "rank: 4 there, 5 now"),
        ({"precision": "fp64"}, "precision: 'auto' there, 'fp64' now"),
        ({"strategy": "layerwise"}, "strategy: 'resident' there, 'layerwise' now"),
        ({"spectrum": True}, "spectrum: False there, True now"),
        ({"tolerance": 0.1}, "tolerance: "),
        ({"targets": ["q_proj"]}, "targets: "),
        (
            {"avoid": {"model.layers.0.mlp.up_proj": torch.ones(1, 48)}},
            r"avoid: \{\} there, \{'model\.layers\.0\.mlp\.up_proj': '",
        ),
        ({"loader": random_batches(length=40, seed=9)}, "data: .*content"),
        ({"loader": random_batches(3, length=40)}, "data: .*'batches': 3"),
        ({"model": "other weights"}, "model: .*weights"),
        ({"model": "other class"}, "model: .*Qwen2"),
    ],
)
def test_another_run_is_told_what_differs(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    compute(tiny("llama"), tmp_path / "kept")
    change = dict(change)
    kind = change.pop("model", None)
    model = tiny("qwen2") if kind == "other class" else tiny("llama")
    if kind == "other weights":
        with torch.no_grad():
            model.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(ValueError, match=says) as error:
        compute(model, tmp_path / "kept", **change)
    assert str(tmp_path / "kept") in str(error.value)
    if kind != "other class":  # which has other targets too
        assert len(str(error.value).splitlines()) == 2  # nothing else differs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_avoided_belongs_to_the_run(tmp_path: Path, strategy: str) -> None:
    model, rows = tiny("llama"), torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    q, k = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    options = {"strategy": strategy, "avoid": {q: rows[:2], k: rows[2:]}}
    with pytest.raises(Cut):
        compute(model, tmp_path / "kept", progress=cut_after(6), **options)
    for other in ({}, {q: rows[:2]}, {q: rows[:2], k: rows[1:2]}, {k: rows[:2], q: rows[2:]}, {q: rows[:2] + 1e-6, k: rows[2:]}):
        with pytest.raises(ValueError, match="avoid: "):
            compute(model, tmp_path / "kept", strategy=strategy, avoid=other)
    options["avoid"] = {k: rows[2:].double(), q: rows.T.contiguous().T[:2]}  # the same, in another order and layout
    whole = compute(model, None, **options)
    assert_equal(compute(model, tmp_path / "kept", **options), whole)
    assert whole[q].avoided == whole[k].avoided == 3
    assert float((rows.double() @ whole[q].basis).norm()) <= 1e-12


def test_a_loader_that_can_be_read_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read more than once"):
        compute(tiny("llama"), tmp_path / "kept", iter(random_batches()))
    assert not (tmp_path / "kept").exists()


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(FileExistsError, match=r"run\.json"):
        compute(tiny("llama"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


SITE = "model.layers.0.mlp.gate_proj"  # which 00002 holds


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NullSpaces]:
    directory = tmp_path_factory.mktemp("finished") / "kept"
    return directory, compute(tiny("llama"), directory)


def rewritten(path: Path, change: Any) -> None:
    """A file with other facts or tensors, and digests that fit."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["record"])["facts"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(facts, tensors)
    kept = Checkpoint(path.parent / "other", {})
    kept.keep("site", facts, tensors)
    (path.parent / "other" / "00000.safetensors").replace(path)
    shutil.rmtree(path.parent / "other")


def flipped(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def swapped(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["basis"] = torch.cat([tensors["basis"][:, :3], 2 * tensors["basis"][:, 3:]], dim=1)


DAMAGE: dict[str, Any] = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-7]),
    "text": lambda p: p.write_bytes(b"hello"),
    "empty": lambda p: p.write_bytes(b""),
    "a bit of the basis": lambda p: flipped(p, 8 * p.stat().st_size - 2),
    "a bit of the facts": lambda p: flipped(p, 8 * p.read_bytes().index(b"trace") + 90),
    "a bit of a digest": lambda p: flipped(p, 8 * p.read_bytes().index(b"sha256") + 100),
    "another site's file": lambda p: shutil.copy(p.with_name("00004.safetensors"), p),
    "a pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "a directory": lambda p: (p.unlink(), p.mkdir()),
    "not orthonormal": lambda p: rewritten(p, swapped),
    "another rank": lambda p: rewritten(p, lambda facts, tensors: facts.update(rank=3)),
    "another model's": lambda p: rewritten(p, lambda facts, tensors: facts.update(members=["../../x"])),
    "markup": lambda p: rewritten(p, lambda facts, tensors: facts.update(members=["[/bold]"])),
    "facts that are none": lambda p: rewritten(p, lambda facts, tensors: facts.update(trace="much")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_its_site_computed_again(
    damage: str, tmp_path: Path, finished: tuple[Path, NullSpaces], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(finished[0], kept)
    DAMAGE[damage](kept / "00002.safetensors")
    model, asked = tiny("llama"), []
    stream = spaces_module.one_pass
    monkeypatch.setattr(spaces_module, "one_pass", lambda *a, **k: asked.append(a[1]) or stream(*a, **k))
    name = "00004" if damage == "another site's file" else "00002"
    with pytest.warns(UserWarning, match=rf"kept/{name}\.safetensors is damaged: its site is computed again") as caught:
        found = compute(model, kept)
    if damage in ("a bit of the basis", "not orthonormal", "another rank"):
        assert SITE in str(caught[0].message)
    expected = finished[1]
    assert {s.members for s in found.sites} == {s.members for s in expected.sites}
    for site in expected.sites:
        assert torch.equal(found[site.name].basis, expected[site.name].basis)
        assert found[site.name].facts() == expected[site.name].facts()
    assert all(SITE in targets or damage == "another site's file" for targets in asked)
    assert len(asked) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
        if damage != "a directory":
            compute(model, kept)  # what was damaged is whole again


@pytest.mark.parametrize("harm", ["truncated", "a bit", "a pipe", "deep", "foreign"])
def test_a_damaged_record_of_the_run_is_an_error_that_names_it(
    harm: str, tmp_path: Path, finished: tuple[Path, NullSpaces]
) -> None:
    shutil.copytree(finished[0], tmp_path / "kept")
    path = tmp_path / "kept" / "run.json"
    if harm == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        text = path.read_text()
        new = {"truncated": text[:-7], "a bit": text.replace('"rank": 4', '"rank": 5'), "deep": "[" * 10**5, "foreign": "{}"}[harm]
        path.write_text(new)
    with pytest.raises(ValueError, match=r"kept/run\.json .*delete"):
        compute(tiny("llama"), tmp_path / "kept")


def test_files_of_other_names_are_none_of_the_checkpoint(tmp_path: Path, finished: tuple[Path, NullSpaces]) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(finished[0], kept)
    (kept / "notes.safetensors").write_bytes(b"mine")
    model = tiny("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    assert_equal(compute(model, kept), finished[1])
    assert (kept / "notes.safetensors").read_bytes() == b"mine"


def test_what_a_crash_left_half_written_is_ignored(tmp_path: Path) -> None:
    model = tiny("llama")
    first = compute(model, tmp_path)
    (tmp_path / "00003.safetensors").rename(tmp_path / "00003.safetensors.part")
    (tmp_path / "00003.safetensors.part").write_bytes(b"half")
    again = compute(model, tmp_path)
    assert {s.name for s in again.sites} == {s.name for s in first.sites}
    for site in first.sites:
        assert torch.equal(again[site.name].basis, first[site.name].basis)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    assert_equal(compute(model, tmp_path), first)  # nothing was written over anything else, and the order is the first one


def test_sites_keep_the_order_in_which_they_were_first_kept(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, {"run": 1})
    for name in ("b", "a", "b", "c"):
        kept.keep(name, {"members": [name]}, {"basis": torch.ones(1), "eigenvalues": torch.zeros(1)})
    again = Checkpoint(tmp_path, {"run": 1})
    assert [facts["members"] for facts, _ in again.load()] == [["b"], ["a"], ["c"]]
    again.keep("d", {"members": ["d"]}, {"basis": torch.ones(1), "eigenvalues": torch.zeros(1)})
    assert [facts["members"][0] for facts, _ in Checkpoint(tmp_path, {"run": 1}).load()] == ["b", "a", "c", "d"]


# --- kill -9 --------------------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from models import random_batches, tiny
from nullspace import compute_null_spaces

def progress(*_):
    time.sleep(0.02)  # slow enough to be hit between any two steps

print("ready", flush=True)
spaces = compute_null_spaces(
    tiny("llama"), random_batches(length=40), rank=4, strategy={strategy!r}, checkpoint={kept!r}, progress=progress
)
spaces.save({out!r})
"""


def files(directory: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(directory.iterdir()):
        yield path.name, path.read_bytes()


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["layerwise"])  # both, by several processes, in test_interrupted.py
def test_kill_minus_9_at_random_moments_and_the_directory_ends_the_same(tmp_path: Path, strategy: str) -> None:
    moments = random.Random(strategy)

    def start(kept: Path, out: Path) -> subprocess.Popen[str]:
        code = CHILD.format(tests=str(Path(__file__).parents[1]), strategy=strategy, kept=str(kept), out=str(out))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        return child

    def finish(kept: Path, out: Path) -> None:
        compute_null_spaces(
            tiny("llama"), random_batches(length=40), rank=4, strategy=strategy, checkpoint=kept, progress=False
        ).save(out)

    finish(tmp_path / "whole", tmp_path / "expected")
    kills = 0
    for _ in range(2):
        child = start(tmp_path / "kept", tmp_path / "out")
        time.sleep(moments.uniform(0.0, 0.5))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    if not (tmp_path / "out").exists():
        finish(tmp_path / "kept", tmp_path / "out")
    assert kills
    assert dict(files(tmp_path / "out")) == dict(files(tmp_path / "expected"))
    assert json.loads((tmp_path / "kept" / "run.json").read_text())["strategy"] == strategy
