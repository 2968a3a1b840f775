"""`write_init`: `inject_adapters` and `save_init` in one, tensor by tensor."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from nullspace.artifacts import records, store
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.locks import temporary_folder
from nullspace.artifacts.residual import Change, change_of, clearest, mark_file
from nullspace.artifacts.shared_writes import written_once
from nullspace.artifacts.spaces import NullSpaces
from nullspace.distributed import Job
from nullspace.errors import InputError
from nullspace.factors import DAMPING, SHARE
from nullspace.integrations.peft.base import Source, check_plan, copy_base, files_of, source_of, write_base
from nullspace.integrations.peft.budget import budget_facts, patterns_of_parameters, within_budget
from nullspace.integrations.peft.experts.adapters import ExpertAdapter
from nullspace.integrations.peft.experts.checks import warn_of_two
from nullspace.integrations.peft.experts.layout import layers_by_parameter, stacked
from nullspace.integrations.peft.files import ADAPTER_WEIGHTS, init_record, located, record_start, save_adapter
from nullspace.integrations.peft.folders.cards import write_cards
from nullspace.integrations.peft.layers import check_layers, check_servable, held_weight, lora_layers, stored_weight, zero_factor
from nullspace.integrations.peft.made_for import entries_of
from nullspace.integrations.peft.shell import BasePlan, on_disk, plan_base, saving_here, without_weights
from nullspace.integrations.peft.start import random_seed, residual_of, start_of, with_spaces
from nullspace.integrations.peft.subtracted import add_second, refuse_settings
from nullspace.integrations.peft.targets import own_config
from nullspace.integrations.peft.watch import warn_of_dropout
from nullspace.methods import METHODS, Sources, check_method, check_sources, frozen_factor
from nullspace.model.experts import ExpertMatrix, named_layers
from nullspace.model.sharded import is_model_sharded, prepare_to_gather
from nullspace.model.weights import tensor_of
from nullspace.model.wrappers import unwrap, unwrapped
from nullspace.progress import Progress, reporter

# What `save_pretrained` puts into one file at the most, by default.
SHARD_BYTES = 50 * 10**9


def write_init(
    out: str | os.PathLike[str],
    model: nn.Module,
    config: LoraConfig,
    spaces: NullSpaces | None = None,
    *,
    method: str = "lora-null",
    covariances: Covariances | None = None,
    preserve: Covariances | None = None,
    freeze_a: bool | None = None,
    freeze_b: bool | None = None,
    residual: str = "auto",
    sigma_scale: float = 1.0,
    beta: float = 0.5,
    damping: float = DAMPING,
    share: float = SHARE,
    split: float = 1.0,
    window: float | None = None,
    rank_budget: int | None = None,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool | Progress = True,
) -> Path:
    """`inject_adapters` and `save_init` in one, tensor by tensor: the model is left alone, and may be offloaded to the disk.

    In memory is one weight at a time, in its own dtype and once in float64. What is written is the same to the bit, but for this:

    - If accelerate reads the weights from a safetensors checkpoint in its own dtype, `OUT/base` is a copy of that checkpoint
      (weights, configurations, tokenizer, code) in which the targets alone are replaced. All else stays as it is: tensors that the
      model class does not know, the division into files, the form of experts that the model has fused.
    - Experts that are one tensor in the model are read, changed and written in the form that the checkpoint has for them (one
      tensor for each expert in most families). In memory are the tensors whose parts are written side by side: both of a layer,
      and their parts once more.
    - Of a model in memory whose checkpoint joins several weights into one, all residuals are in memory at once.

    Where the base cannot change, because it is quantised for instance, `OUT/subtracted` is the second, frozen adapter.

    Args:
        out: as in `save_init`: a directory that must not exist yet, or be empty.
        model: transformers' base model, on any device, or with weights that accelerate keeps on the disk
            (`nullspace.integrations.transformers.load_model(..., offload=True)`). If it is sharded over the processes of the
            default group (FSDP2, ZeRO-3, DTensors of tensor parallelism), all of them have to call this with the same arguments:
            weights are gathered one at a time, and the first process writes.
        config: as in `inject_adapters`.
        spaces, method, covariances, preserve, sigma_scale, beta, damping, share, split, window, rank_budget: as in
            `inject_adapters`.
        freeze_a, freeze_b: the same; the adapter's configuration, its card and the record say so.
        residual: as in `inject_adapters`.
        tokenizer: saved beside the base, if given.
        record: JSON-able facts to keep in `nullspace.json`.
        overwrite: replace an earlier directory of ours.
        max_shard_bytes: of one file of the base's weights; a larger tensor gets a file of its own. A copy keeps its files.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Raises:
        ValueError: as `inject_adapters`, before anything is written; if the configuration makes PEFT save more than A and B (use
            `inject_adapters` and `save_init`); and naming the tensor, if the model is offloaded, its checkpoint cannot be copied
            (it is not safetensors, or of another dtype) and joins several weights into one: load it whole.
        TypeError: as `inject_adapters`; and if the model has no `save_pretrained`.
        FileExistsError: if `out` is in the way, or another run is writing to it.
        OSError: if it cannot be written; then nothing is left behind.
    """
    model = unwrap(model)
    job = Job() if is_model_sharded(model) else Job.alone()
    with job.sharing_errors(), unwrapped(model):
        given = Sources(spaces, covariances, preserve, sigma_scale, beta, damping, share, split, window, random_seed(method))
        freeze = (freeze_a, freeze_b)
        output = _Output(Path(out), tokenizer, freeze, residual, record or {}, overwrite, max_shard_bytes, rank_budget)

        def write() -> None:
            _write(output, model, config, given, method, reporter(progress, bars=job.first), job)

        if job.count == 1:
            written_once(out, write)
        else:
            write()
    return Path(out)


class _Output(NamedTuple):
    """The arguments of `write_init` that say what is written, and where."""

    folder: Path
    tokenizer: Any
    freeze: tuple[bool | None, bool | None]
    """A, B"""
    residual: str
    record: Mapping[str, Any]
    overwrite: bool
    max_shard_bytes: int
    rank_budget: int | None


def _write(output: _Output, model: nn.Module, config: LoraConfig, given: Sources, method: str, report: Progress, job: Job) -> None:
    check_method(method, given)
    check_sources(method, given)
    frozen = frozen_factor(method, *output.freeze)
    resolved = store.resolved(output.folder)
    sharded = prepare_to_gather(model, job)
    config = own_config(config, model, given, job)
    budget: dict[str, Any] = {"rank_budget": output.rank_budget, "frozen": frozen, "residual": output.residual}
    config, given = within_budget(config, model, given, method, **budget, job=job)
    reserved = store.reserved(resolved, overwrite=output.overwrite) if job.first else contextlib.nullcontext()
    with reserved, temporary_folder() as plans:
        with torch.random.fork_rng(devices=[]), patterns_of_parameters():  # the numbers that PEFT draws are not used
            peft_model = get_peft_model(without_weights(model), config)
        adapter = peft_model.active_adapter
        layers = lora_layers(peft_model, adapter)
        modules = named_layers(model)
        bases = {name: modules[name] for name in layers}
        targets = layers_by_parameter(layers)
        given = with_spaces(method, given, max((layer.r[adapter] for layer in layers.values()), default=1))
        check_layers(bases, {name: layer.r[adapter] for name, layer in layers.items()}, method, given, job)
        freeze: dict[str, Any] = {"freeze_a": frozen == "A", "freeze_b": frozen == "B"}
        residual = check_servable(model, bases, method, residual=output.residual, **freeze, offloaded=True)
        refuse_settings(config, residual, frozen)
        job.exchange(None)  # an error on any rank must be known before the others wait for it in a gather
        entries = entries_of(bases)
        shell = without_weights(model)
        base: Source | BasePlan | None = None
        if residual == "base":
            base = source_of(model, list(targets))
            if base is None and job.first:  # transformers saves nothing in the other processes
                base = plan_base(shell, plans / "base", strict=sharded or on_disk(model))
            base = job.exchange(base)[0]
        if isinstance(base, BasePlan):
            check_plan(model, base, targets)
        original = config.base_model_name_or_path
        config.base_model_name_or_path = os.path.abspath(output.folder / "base") if residual == "base" else located(original)
        files = _plan_adapters(peft_model, config, layers, plans, residual)
        if not job.first:  # the first process writes, the others take part in gathering
            reads = targets if METHODS[method].reads_weight else {}
            for name in _gathered(base, reads, residual, output.max_shard_bytes):
                _fetch(name, modules, job)
            job.exchange(None)
            return
        with store.new_directory(resolved, overwrite=output.overwrite) as part:
            if given.spaces is not None:
                given.spaces.write(part / "spaces")
            shutil.copytree(plans, part, dirs_exist_ok=True)
            with contextlib.ExitStack() as stack:
                written = [stack.enter_context(file.opened(part)) for file in files]
                zero = zero_factor(residual, frozen)
                starts = _Starts(modules, layers, targets, adapter, method, given, zero, report, job, written)
                _write_weights(part / "base", base, starts, model, shell, residual, output.max_shard_bytes)
            if starts.changes:
                mark_file(part / "base" / "config.json", method, located(original), clearest(starts.changes))
            if residual == "base" and output.tokenizer is not None:
                output.tokenizer.save_pretrained(part / "base")
            more = {**budget_facts(given), **output.record}
            facts = init_record(model, original, method, config, residual, frozen, given.spaces, more)
            record_start(part, facts, config.revision, entries)
            write_cards(part, facts)
            records.write_manifest(part, "init", facts)
        report("adapters", len(layers), len(layers), 0)
    given.directions.warn(f"method {method!r}", stacklevel=3)
    warn_of_dropout(config, method, residual, stacklevel=5)
    if residual == "adapter":
        warn_of_two(bases, stacklevel=5)
    job.exchange(None)


def _write_weights(
    folder: Path, base: Source | BasePlan | None, starts: _Starts, model: nn.Module, shell: Any, residual: str, max_shard_bytes: int
) -> None:
    """All A and B, and the base's weights if they become residuals."""
    if isinstance(base, Source):
        copy_base(folder, base, starts.residual)
    elif isinstance(base, BasePlan):
        write_base(folder, base, shell, starts.targets, starts.residual, starts.fetch, max_shard_bytes)
    elif residual == "base":
        state = {**model.state_dict(), **{tensor: starts.residual(tensor) for tensor in starts.targets}}
        with saving_here(shell):
            shell.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_bytes)
    else:
        for tensor in starts.targets:
            starts.start(tensor, starts.stored(tensor))


def _gathered(base: Source | BasePlan | None, reads: Iterable[str], residual: str, max_shard_bytes: int) -> Iterator[str]:
    """Names of the tensors that `_write_weights` gathers, in its order; `reads`: those that the method reads."""
    if isinstance(base, BasePlan):
        files = files_of(base, max_shard_bytes).filename_to_tensors.values()
        yield from base.owners(key for keys in files for key in keys)
    elif residual != "base":
        yield from reads


@dataclass
class _Starts:
    """Computes A and B one layer at a time, and writes them to the files of one adapter, or of two."""

    modules: Mapping[str, nn.Module]
    layers: Mapping[str, Any]
    targets: Mapping[str, list[str]]
    """Tensor → the layers whose weights it holds: one, or all experts."""
    adapter: str
    method: str
    given: Sources
    zero: str | None
    """The factor that starts at zero, whatever the method's is."""
    report: Progress
    job: Job
    files: Sequence[_AdapterFile]
    changes: list[Change] = field(default_factory=list)
    """Of the weights that have become residuals."""
    done: int = 0

    def start(self, tensor: str, stored: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Compute and write A and B of the layers whose weights a tensor holds.

        Args:
            tensor: of `targets`.
            stored: its values; for a method that does not read them, the tensor as it is.

        Returns:
            Layer → A (r, d_in) and B (d_out, r).
        """
        made = {}
        for name in self.targets[tensor]:
            self.report("adapters", self.done, len(self.layers), 0)
            a, b = start_of(name, self.layers[name], self._part(name, stored), self.adapter, self.method, self.given)
            made[name] = torch.zeros_like(a) if self.zero == "A" else a, torch.zeros_like(b) if self.zero == "B" else b
            self.done += 1
        first = self.layers[self.targets[tensor][0]]
        path, (a, b) = (first.path, stacked([*made.values()])) if isinstance(first, ExpertAdapter) else (name, made[name])
        for file in self.files:
            file.write(path, a, b)
        return made

    def _part(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """A layer's weight in the tensor that holds it; the tensor itself where the method does not read the weight."""
        module = self.modules[name]
        if isinstance(module, ExpertMatrix) and METHODS[self.method].reads_weight:
            return module.of_stack(stored)
        return stored

    def fetch(self, tensor: str) -> torch.Tensor:
        return _fetch(tensor, self.modules, self.job)

    def stored(self, tensor: str) -> torch.Tensor:
        """The values of a tensor of `targets`, dequantised; where the method does not read it, the tensor as it is."""
        module = self.modules[self.targets[tensor][0]]
        if not METHODS[self.method].reads_weight:
            return held_weight(module)
        if isinstance(module, ExpertMatrix):
            return self.fetch(tensor)
        self.job.exchange(None)
        return stored_weight(module)

    def residual(self, tensor: str) -> torch.Tensor:
        """W₀ − s·BA of the layers whose weights a tensor holds, in the layout and dtype of the tensor."""
        stored = self.fetch(tensor)
        rest: torch.Tensor | None = None
        for name, (a, b) in self.start(tensor, stored).items():
            module, before = self.modules[name], self._part(name, stored)
            after = residual_of(name, self.layers[name], before, self.adapter, a, b)
            self.changes.append(change_of(name, before, after))
            if not isinstance(module, ExpertMatrix):
                return after
            rest = torch.empty_like(stored) if rest is None else rest
            module.of_stack(rest).copy_(after)
        assert rest is not None
        return rest


def _fetch(name: str, modules: Mapping[str, nn.Module], job: Job) -> torch.Tensor:
    """The values of a tensor of the model. A collective, if it is sharded."""
    job.exchange(None)  # an error on any rank must be known before the others wait for it in a gather
    module, _, tensor = name.rpartition(".")
    return tensor_of(modules[module], tensor)


class _AdapterPlan(NamedTuple):
    """What PEFT would write."""

    folder: str
    sign: int
    """−1 for the adapter that subtracts the product of the other one."""
    keys: dict[tuple[str, str], str]
    """(name of PEFT's layer, "lora_A" or "lora_B") → name in the file."""
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @contextlib.contextmanager
    def opened(self, part: Path) -> Iterator[_AdapterFile]:
        """Context manager: the file of weights, to be filled."""
        with records.TensorFile(part / self.folder / ADAPTER_WEIGHTS, self.tensors, self.metadata) as file:
            yield _AdapterFile(file, self)


class _AdapterFile(NamedTuple):
    file: records.TensorFile
    plan: _AdapterPlan

    def write(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """A and B of a layer."""
        self.file.write(self.plan.keys[name, "lora_A"], a)
        self.file.write(self.plan.keys[name, "lora_B"], b if self.plan.sign > 0 else -b)


def _plan_adapters(
    peft_model: PeftModel, config: LoraConfig, layers: Mapping[str, Any], plans: Path, residual: str
) -> list[_AdapterPlan]:
    """The adapter and, where that is what subtracts its product, the second one."""
    adapter = peft_model.active_adapter
    made = [_plan_adapter(peft_model, adapter, layers, plans, "adapter", 1)]
    if residual == "adapter":
        with torch.random.fork_rng(devices=[]):
            second = add_second(peft_model, config, adapter)
        made.append(_plan_adapter(peft_model, second, layers, plans, "subtracted", -1))
    return made


def _plan_adapter(
    peft_model: PeftModel, adapter: str, layers: Mapping[str, Any], plans: Path, kind: str, sign: int
) -> _AdapterPlan:
    """Let PEFT save stand-ins, to see under which names it saves what; its configuration and model card stay in the folder."""
    state = peft_model.state_dict()
    wanted: dict[str, tuple[str, str]] = {}
    for name in {layer.path if isinstance(layer, ExpertAdapter) else name for name, layer in layers.items()}:
        for part in ("lora_A", "lora_B"):
            wanted[f"base_model.model.{name}.{part}.{adapter}.weight"] = (name, part)
    order = list(state)
    folder = plans / kind
    save_adapter(peft_model, adapter, folder, {name: torch.tensor([index]) for index, name in enumerate(order)})
    keys: dict[tuple[str, str], str] = {}
    tensors: dict[str, torch.Tensor] = {}
    path = folder / ADAPTER_WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118
            origin = order[int(file.get_tensor(key))]
            if origin not in wanted:
                raise InputError(
                    f"with this LoraConfig PEFT saves {key!r}, which is neither an A nor a B: use inject_adapters and save_init"
                )
            keys[wanted[origin]], tensors[key] = key, state[origin]
    path.unlink()
    return _AdapterPlan(kind, sign, keys, tensors, metadata)
