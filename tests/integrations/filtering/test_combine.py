"""`combine_adapters` against a dense least-squares solution on the inputs themselves."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import RANK, batches, covariances_of, effects, inputs, moments, stir

from models import tiny
from nullspace.factors import RIDGE
from nullspace.integrations.peft import combine_adapters, describe
from reference import recorded_inputs, second_moment

quiet = functools.partial(combine_adapters, progress=False)
OTHER = batches(120, 200)


@functools.cache
def other_task() -> tuple[dict[str, torch.Tensor], object]:
    names = list(moments("llama")[0])
    x = recorded_inputs(tiny("llama"), OTHER, names)
    return {name: each.double() for name, each in x.items()}, covariances_of(tiny("llama"), OTHER)


def dense(c: torch.Tensor) -> torch.Tensor:
    return c / c.trace()


def write(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Two adapters on different layers, with other scalings and ranks; their effects."""
    alone = {}
    for seed, (name, config) in enumerate(
        {
            "one": LoraConfig(r=RANK, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
            "two": LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "v_proj"]),
        }.items()
    ):
        model = get_peft_model(tiny("llama"), config)
        stir(model, seed=seed)
        model.save_pretrained(folder / name)
        alone[name] = effects(PeftModel.from_pretrained(tiny("llama"), folder / name))
    return alone


def test_each_task_is_answered_as_the_least_squares_solution_says(tmp_path: Path) -> None:
    alone = write(tmp_path)
    (x_one, x_keep), (x_two, two) = inputs("llama"), other_task()
    given = ([tmp_path / "one", tmp_path / "two"], [moments("llama")[0], two], moments("llama")[1])
    with pytest.warns(UserWarning, match=r"6 of 9 layers are changed by some of the adapters alone \('model\.layers\.0"):
        result = quiet(*given, tmp_path / "out", strength=0.5)
    after = effects(PeftModel.from_pretrained(tiny("llama"), tmp_path / "out"))
    assert set(after) == set(alone["one"]) | set(alone["two"])
    for name, change in after.items():
        eye = RIDGE / change.shape[1] * torch.eye(change.shape[1], dtype=torch.float64)
        tasks = [dense(second_moment(x[name])) + eye for x in (x_one, x_two)]
        wanted = sum(alone[which].get(name, torch.zeros_like(change)) @ t for which, t in zip(("one", "two"), tasks, strict=True))
        joint = sum(tasks) + 0.5 * dense(second_moment(x_keep[name]))
        wanted = torch.linalg.solve(joint, wanted.mT).mT
        assert float((change - wanted).norm()) <= 2e-6 * float(wanted.norm()), name
    assert result.rank == 2 + RANK
    assert {result.ranks[name] for name in result.partly} == {2, RANK}
    document = describe(tmp_path / "out")
    assert (document["kind"], document["base_kind"], document["rank"], document["layers"]) == ("combined", "untouched", 2 + RANK, 9)
    # Cut to a rank, it is the best of that rank: no worse than truncating ΔW itself.
    with pytest.warns(UserWarning, match="layers are changed by some"):
        assert quiet(*given, tmp_path / "cut", strength=0.5, rank=3).rank == 3
    cut = effects(PeftModel.from_pretrained(tiny("llama"), tmp_path / "cut"))
    name = "model.layers.1.self_attn.q_proj"
    joint = sum(dense(second_moment(x[name])) for x in (x_one, x_two)) + 0.5 * dense(second_moment(x_keep[name]))
    u, sigma, vt = torch.linalg.svd(after[name], full_matrices=False)
    truncated = (u[:, :3] * sigma[:3]) @ vt[:3]
    errors = [float(torch.einsum("oi,ij,oj->", gap, joint, gap)) for gap in (cut[name] - after[name], truncated - after[name])]
    assert 0 < errors[0] < errors[1]


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    task, keep = moments("llama")
    model = get_peft_model(tiny("llama"), LoraConfig(r=RANK, target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path / "dora")
    tiny("llama").save_pretrained(tmp_path / "base")
    elsewhere = get_peft_model(tiny("llama"), LoraConfig(r=RANK, target_modules=["q_proj"]))
    elsewhere.peft_config["default"].base_model_name_or_path = "another/base"
    elsewhere.save_pretrained(tmp_path / "elsewhere")
    few = type(task)([(site, task[site.name]) for site in task.sites if "model.layers.1.self_attn.v_proj" not in site.members])
    for names, tasks, words in (
        (["one"], [task], "at least two adapters"),
        (["one", "two"], [task], "at least two adapters are needed, and one task each"),
        (["one", "dora"], [task, task], "DoRA magnitudes.*cannot be combined"),
        (["one", "elsewhere"], [task, task], "name different bases"),
        (["one", "two"], [task, few], r"'model\.layers\.1\.self_attn\.q_proj', for which there is no second moment in task 2"),
        (["one", "two"], [task, moments("gpt2")[0]], "no second moment in task 2"),
    ):
        with pytest.raises(ValueError, match=words):
            quiet([tmp_path / name for name in names], tasks, keep, tmp_path / "out", strength=1.0)
    for arguments, words in (({"strength": -1.0}, "strength"), ({"strength": 1.0, "rank": 0}, "rank")):
        with pytest.raises(ValueError, match=words):
            quiet([tmp_path / "one", tmp_path / "two"], [task, task], keep, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
