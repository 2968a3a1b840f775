"""`prepare`: calibration and `inject_adapters` in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn

from nullspace.distributed import Job
from nullspace.integrations.peft.budget import check_rank_budget, largest_ranks, within_budget
from nullspace.integrations.peft.experts.checks import refuse_sharded_experts
from nullspace.integrations.peft.from_data.calibration import Calibration, calibrated, check_spaces_rank, read_arguments
from nullspace.integrations.peft.inject import adapt, check_adapter_name, check_model, inject_adapters
from nullspace.integrations.peft.layers import check_layers, check_servable
from nullspace.integrations.peft.subtracted import refuse_settings
from nullspace.integrations.peft.targets import checked_config, exact_config, rank_of, wanted_layers
from nullspace.methods import Sources, frozen_factor
from nullspace.model.sharded import is_model_sharded
from nullspace.model.wrappers import unwrap, unwrapped
from nullspace.progress import Progress


def prepare(
    model: nn.Module,
    tokenizer: Any,
    config: LoraConfig,
    *,
    task: Any = None,
    keep: Any = None,
    method: str = "contrast",
    samples: int = 256,
    length: int | None = None,
    batch_size: int = 4,
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "auto",
    experts: str = "auto",
    device: torch.device | str | None = None,
    freeze_a: bool | None = None,
    freeze_b: bool | None = None,
    residual: str = "auto",
    rank_budget: int | None = None,
    adapter_name: str = "default",
    progress: bool | Progress = True,
    **numbers: float,
) -> PeftModel:
    """Calibrate a model on a task and on what it must keep, and give it adapters: ready for `Trainer` and TRL's trainers.

    >>> peft_model = nullspace.prepare(model, tokenizer, LoraConfig(r=16), task=train, keep=["…"])       # doctest: +SKIP
    >>> trainer = SFTTrainer(peft_model, train_dataset=train, processing_class=tokenizer)                # doctest: +SKIP

    The same as `compute_covariances` (`compute_null_spaces` for `"lora-null"` and `"b-zero"`) and `inject_adapters`, whose factors
    it gives. What can be refused is refused before the first forward pass. All data are read before that.

    | method | `task` | `keep` |
    |---|---|---|
    | `"contrast"` (default), `"inflora"`, `"sc-lora"` | needed | needed |
    | `"lora-null"`, `"b-zero"`, `"corda-kpm"`, `"corda-exact"`, `"mica-data"` | | needed |
    | `"corda-ipm"`, `"eva"`, `"astra"` | needed | |
    | `"milora"`, `"pissa"`, `"olora-tail"`, `"mica"`, `"orthogonal"` | | |

    Args:
        model: the base model; changed in place, as by `get_peft_model`.
        tokenizer: transformers' tokenizer of the model, or a processor; None if no text has to be read.
        config: PEFT's. Rank, scaling and targets count, as in `inject_adapters`: `target_modules=None` is every linear layer but
            the output head. `init_lora_weights` is ignored.
        task: examples of what is to be learned; a few dozen are enough. One of:

            - rows as TRL's trainers take them: a `datasets.Dataset`, iterable or not, a `DatasetDict` (its split "train"), a list
              of mappings; with `text`, `messages`, `prompt` and `completion`, `chosen` (`rejected` is not read), `input_ids`, …
              (see `load_texts`). Conversations go through the tokenizer's chat template;
            - a list of texts, the name of a file or of a hub data set, a list of file names, what `load_texts` returns;
            - batches of tokens: a `DataLoader` such as a trainer's `get_train_dataloader()`, any iterable of what the model takes.
              They are used to the end as they are, whatever `samples`, `length` and `batch_size` say;
            - second moments: `Covariances`, or a folder that `nullspace covariances` or `nullspace merge` wrote.
        keep: what must not be forgotten, in the same forms and, for `"lora-null"` and `"b-zero"`, null spaces (`NullSpaces`, or a
            folder of `nullspace compute`). By default a small corpus made of the documentation and code that every Python carries,
            about which there is a warning: it stands for English technical text alone.
        method: see `inject_adapters`, which has all of them. `"contrast"` and `"inflora"` freeze A and leave the base as it is.
        samples, batch_size: sequences of each of the two, and of a batch.
        length: tokens a sequence; by default 1024, or the model's positions if it has fewer.
        strategy, precision, experts, device: how the model is run: see `nullspace.stream_covariances`.
        freeze_a, freeze_b, residual, rank_budget, adapter_name: see `inject_adapters`.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).
        numbers: `sigma_scale`, `beta`, `damping`, `share`, `split` and `window`, of methods that take them: see `inject_adapters`.

    Returns:
        The `PeftModel`. Where its base is a residual (`"lora-null"` with A trained, CorDA, …), call `save_init` before training.

    Second moments are kept in the system's directory for temporary files (`TMPDIR`) until the adapter is written, 4 · d_in² bytes a
    site and argument; several processes must share it. Null spaces are kept in memory.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the argument, row, layer or file. Before the first forward pass: as
            `inject_adapters`; for `task` or `keep` that the method needs and lacks, or does not use; as `load_texts` and
            `PackedBatches`; for token ids that the model has no embedding for, and a first batch that it does not take. Later: as
            `nullspace.stream_covariances`, for what the data themselves do.
        OSError: if second moments cannot be written.

    On any error the model is as it was.

    Warns:
        UserWarning: as `compute_covariances` and `inject_adapters`; if `keep` is not given; for texts that fill fewer than
            `samples` sequences.
    """
    model, job = unwrap(model), Job()
    how = Calibration(samples, length, batch_size, strategy, precision, experts, device, progress)
    with job.sharing_errors(), unwrapped(model):
        given = read_arguments(method, task, keep, numbers)
        own = checked_config(config, model)
        check_adapter_name(adapter_name)
        check_rank_budget(rank_budget, own, method, numbers.get("window"))
        frozen = frozen_factor(method, freeze_a, freeze_b)
        budget: dict[str, Any] = {"rank_budget": rank_budget, "frozen": frozen, "residual": residual}
        start: dict[str, Any] = {"method": method, "residual": residual, "adapter_name": adapter_name}
        if not given.data:
            start |= numbers | {name: getattr(given.sources, name) for name in ("spaces", "covariances", "preserve")}
            return inject_adapters(model, config, freeze_a=freeze_a, freeze_b=freeze_b, rank_budget=rank_budget, **start)
        how.check(model)
        weights_job = job if is_model_sharded(model) else Job.alone()
        check_model(model, own, weights_job)
        layers = wanted_layers(own, model, list(given.sources.of_model()))
        exact = exact_config(own, model, layers, warn=job.first)
        ranks = {name: rank_of(name, exact) for name in layers}
        if rank_budget is not None:
            ranks = largest_ranks(layers, exact, given.sources, method)
        _check_start(model, layers, exact, ranks, given.sources, method, frozen, residual, weights_job)
        rank = max(ranks.values())
        if "spaces" in given.data:
            check_spaces_rank(layers, rank)
        loaders, before = given.loaders(how, tokenizer, model), set(layers)
        with calibrated(model, layers, given, loaders, how, rank, job) as sources:
            if set(layers) != before:
                exact = exact_config(own, model, layers, warn=False)
            exact, sources = within_budget(exact, model, sources, method, **budget, job=weights_job)
            return adapt(model, exact, sources, **start, frozen=frozen, job=weights_job)


def _check_start(
    model: nn.Module,
    layers: Any,
    config: LoraConfig,
    ranks: Mapping[str, int],
    sources: Sources,
    method: str,
    frozen: str | None,
    residual: str,
    job: Job,
) -> None:
    """The checks of `start_adapter`, before there is an adapter."""
    refuse_sharded_experts(layers)
    check_layers(layers, ranks, method, sources, job)
    freeze: dict[str, Any] = {"freeze_a": frozen == "A", "freeze_b": frozen == "B"}
    refuse_settings(config, check_servable(model, layers, method, residual=residual, **freeze), frozen)
