"""Three tasks in a row, each with an adapter beside the earlier ones: what each method promises about the earlier tasks' inputs.

Every task has fewer tokens than the layers are wide, so that there is a null space of all that came before. All is float64, and
what is promised is compared with dense products on the inputs themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from calibrated import covariances_for
from peft import LoraConfig, get_peft_model

from models import random_batches, tiny
from nullspace import Covariances, NullSpaces, stream_covariances
from nullspace.artifacts.identity import weights_of
from nullspace.factors import LowRank, filtered
from nullspace.integrations.peft import initialize_lora_nullspace_weights, lora_layers, overlap, row_spaces
from nullspace.model.sites import find_targets

pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer tokens:nullspace.errors.DataWarning")
TASKS, RANK = 3, 4
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "o-lora": {},
    "lora-null": {"method": "lora-null", "freeze_a": True},
    "inflora": {"method": "inflora", "share": 1.0},
    "contrast": {"method": "contrast"},
}


class Given(NamedTuple):
    """A task: its batch, its second moments and its inputs, layer → (d_in, tokens), on the untouched base."""

    batch: dict[str, torch.Tensor]
    moments: Covariances
    inputs: dict[str, torch.Tensor]


class Trained(NamedTuple):
    """What a task has added, layer → A and B; its start, and the values of O-LoRA's term before and after."""

    change: dict[str, LowRank]
    start: dict[str, torch.Tensor]
    overlaps: tuple[float, float]


@cache
def base() -> torch.nn.Module:
    return tiny("llama").double()


@cache
def given(task: int) -> Given:
    model, inputs = base(), {}
    targets = find_targets(model)
    batch = random_batches(1, 1, 10, seed=10 + task)[0]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0][0].detach().mT))
        for name, module in targets.items()
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    pairs = stream_covariances(model, [batch], precision="fp64", progress=False)
    return Given(batch, Covariances(pairs, weights_of(targets)), inputs)


def started(method: str, task: int, keep: Covariances | None, earlier: list[Mapping[str, LowRank]]) -> Any:
    """A model with the earlier changes as frozen adapters, and one that trains, "new"; all are active."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny("llama").double(), config, adapter_name="new")
    names = [f"task{i}" for i in range(task)]
    for name, change in zip(names, earlier, strict=True):
        model.add_adapter(name, config)
        for layer, module in lora_layers(model, name).items():
            module.lora_A[name].weight.data.copy_(change[layer].A)
            module.lora_B[name].weight.data.copy_(change[layer].B)
    if METHODS[method] and keep is not None:
        own = {} if METHODS[method]["method"] == "lora-null" else {"task": given(task).moments}
        initialize_lora_nullspace_weights(model, keep=keep, adapter_name="new", progress=False, **METHODS[method], **own)
    model.base_model.set_adapter([*names, "new"])
    model.set_requires_grad(names, False)
    return model


def trained(method: str, task: int, keep: Covariances | None, earlier: list[Mapping[str, LowRank]]) -> Trained:
    torch.manual_seed(task)
    model = started(method, task, keep, earlier)
    layers = lora_layers(model, "new")
    start = {name: layer.lora_A["new"].weight.detach().clone() for name, layer in layers.items()}
    rows = {name: torch.cat([change[name].A for change in earlier]) for name in layers} if earlier else {}
    apart = overlap(model, rows, adapter_name="new") if earlier else lambda: torch.zeros(())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    first, batch = float(apart().detach()), given(task).batch
    for _ in range(8 if method == "o-lora" else 2):
        loss = model(**batch, labels=batch["input_ids"]).loss
        (loss + (0.5 * apart() if method == "o-lora" else 0.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    change = {
        name: LowRank(layer.lora_A["new"].weight.detach().clone(), layer.lora_B["new"].weight.detach().clone())
        for name, layer in layers.items()
    }
    return Trained(change, start, (first, float(apart().detach())))


@cache
def in_a_row(method: str) -> tuple[Trained, ...]:
    """The three tasks; what must be kept is made of all that came before, with equal traces, the base's own text first."""
    known, done = [given(TASKS).moments], []
    for task in range(TASKS):
        keep = Covariances.merge(known, normalise=True)
        done.append(trained(method, task, keep, [each.change for each in done]))
        known.append(given(task).moments)
    return tuple(done)


def moved(change: Mapping[str, LowRank], of: int) -> float:
    """The largest ‖ΔW X‖ / (‖ΔW‖ ‖X‖) of all layers, on the inputs of a task."""
    shares = []
    for name, (a, b) in change.items():
        x, delta = given(of).inputs[name], b @ a
        shares.append(float((delta @ x).norm() / (delta.norm() * x.norm())))
    return max(shares)


def earlier_than(task: int) -> list[int]:
    return [TASKS, *range(task)]


@pytest.mark.parametrize("method", ["lora-null", "inflora"])
def test_the_earlier_tasks_inputs_do_not_notice_a_change_in_the_null_space_of_all_of_them(method: str) -> None:
    for task, (change, _, _) in enumerate(in_a_row(method)):
        assert moved(change, task) > 1e-2  # the new task is learned
        for of in earlier_than(task):
            assert moved(change, of) < 1e-7, (task, of)


@pytest.mark.parametrize("method", ["lora-null", "inflora", "contrast"])
def test_with_a_frozen_a_no_change_reads_more_than_the_start(method: str) -> None:
    for task, (change, start, _) in enumerate(in_a_row(method)):
        for name, (a, b) in change.items():
            assert torch.equal(a, start[name])
            for of in earlier_than(task):
                read = torch.linalg.matrix_norm(b, 2) * (start[name] @ given(of).inputs[name]).norm()
                assert (b @ a @ given(of).inputs[name]).norm() <= read * (1 + 1e-12)


def test_contrast_moves_the_earlier_tasks_less_than_lora_and_its_own_more() -> None:
    for task, (ours, plain) in enumerate(zip(in_a_row("contrast"), in_a_row("lora"), strict=True)):
        for of in earlier_than(task):
            assert moved(ours.change, of) < 0.5 * moved(plain.change, of)


def test_the_leak_bounds_what_is_moved() -> None:
    """Where there is no exact null space: of n merged runs of equal trace, ‖UᵀX_i‖ ≤ √n · leak · ‖X_i‖ for each."""
    runs = [covariances_for("llama", seed=seed) for seed in (1, 2, 5)]
    spaces = NullSpaces.from_covariances(Covariances.merge(runs, normalise=True), rank=RANK, progress=False)
    for site in spaces.sites:
        basis, leak = spaces[site.name].basis, spaces[site.name].leak
        read = [float((basis.mT @ run[site.name].matrix() @ basis).trace() / run[site.name].trace) ** 0.5 for run in runs]
        assert 0 < max(read) <= len(runs) ** 0.5 * leak * (1 + 1e-9)


def test_o_lora_parts_the_rows_and_not_the_inputs() -> None:
    for task, (change, _, (first, last)) in enumerate(in_a_row("o-lora")):
        if task:
            assert last < 0.5 * first
        for of in earlier_than(task):
            assert moved(change, of) > 1e-2


def test_a_filter_takes_the_earlier_tasks_out_of_a_trained_change() -> None:
    plain, known = in_a_row("lora"), [given(TASKS).moments]
    for task, (change, _, _) in enumerate(plain):
        keep = Covariances.merge(known, normalise=True)
        after = {}
        for name, delta in change.items():
            c_t, c_k = given(task).moments[name].matrix(), keep[name].matrix()
            after[name] = filtered(delta, c_t, c_k, strength=10.0)
        for of in earlier_than(task):
            assert moved(after, of) < 0.5 * moved(change, of)
        known.append(given(task).moments)


def test_the_rows_of_a_live_stack_are_those_of_its_adapters() -> None:
    done = in_a_row("lora")
    model = started("lora", 2, None, [each.change for each in done[:2]])
    rows = row_spaces(model)
    assert all(len(rows[name]) == 3 * RANK for name in done[0].change)
