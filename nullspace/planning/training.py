"""Memory for training the adapter afterwards: with PEFT and AdamW, one device, batches of one shape.

Memory of the peak, in bytes, with T tokens a batch, V entries of the vocabulary, hidden width d and P parameters of the adapter:

- weights: as they are stored, and with 4 bits the largest layer once more, dequantised (QLoRA, arXiv 2305.14314);
- adapter: 4 P (PEFT keeps an adapter in float32), P = Σ r (d_in + d_out) over the target layers;
- gradients: 4 Q; optimizer: 8 Q, the two moments of AdamW (arXiv 1711.05101) in float32; Q = P, or Σ r d_out with A frozen,
  Σ r d_in with B frozen;
- activations: what autograd keeps for the backward pass. Without checkpointing, Σ over blocks of what a block keeps; with it
  (arXiv 1604.06174), one hidden state a block. Either way the arguments of the blocks, and 4 T d of the last norm;
- loss or block: the logits, which a loop that logs them holds, and the larger of 12 T V of log-probabilities, their gradient and
  that of the logits; or, when the loss is done, the gradients that flow in a block's backward pass, three of T and the widest
  layer's d_in (of a gated MLP: its product's and both factors'), with checkpointing beside what the block keeps when it is computed
  again.

What a block keeps is counted, not estimated: each kind of block runs once on the meta device with the adapter's products beside its
target layers, and the tensors that autograd saves are added up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nullspace.model.blocks import is_encoder_decoder
from nullspace.model.experts import ExpertMatrix, is_fused
from nullspace.model.linear import is_linear, output_head, weight_of, weight_shape
from nullspace.model.routing import routing
from nullspace.model.weights import size_in_bytes, stored_bytes
from nullspace.model.wrappers import named_modules
from nullspace.planning.forecast import LIBRARIES
from nullspace.planning.meta_run import watch
from nullspace.planning.plan import MARGIN, Workload
from nullspace.planning.survey import Survey, TensorShape
from nullspace.planning.units import gigabytes

SINGLE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Training:
    """Memory of a training run.

    Attributes:
        checkpointing: whether blocks are computed again in the backward pass (`gradient_checkpointing`).
        parts: bytes by name: weights, adapter, gradients, optimizer, activations, loss or block, libraries.
        counted: whether the activations were counted; if not, they are estimated, with a tendency to be too high.
    """

    checkpointing: bool
    parts: Mapping[str, int]
    counted: bool

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    def fits(self, memory: float | None) -> bool:
        """Whether it leaves the margin of this memory that plans leave; None for no limit."""
        return memory is None or self.bytes <= MARGIN * memory

    def cells(self) -> dict[str, str]:
        """A row of a table: column title → text."""
        shown = {name: gigabytes(size) for name, size in self.parts.items() if name != "libraries"}
        return {"checkpointing": "yes" if self.checkpointing else "no", **shown, "all": gigabytes(self.bytes)}


def training(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    survey: Survey,
    workload: Workload,
    *,
    freeze_a: bool = False,
    freeze_b: bool = False,
) -> list[Training]:
    """Memory for training an adapter on some layers, without and with checkpointing.

    Args:
        model: on any device, the meta device included, with the weights as they will be stored.
        targets: name → layer; those that the survey has not reached get no adapter.
        survey: of this model for this workload.
        workload: whose batch size, length and rank count.
        freeze_a: whether B alone is trained; then no adapted layer keeps its input.
        freeze_b: whether A alone is trained.
    """
    adapted = {name: layer for name, layer in targets.items() if name in survey.reached}
    size = sum(workload.rank * sum(weight_shape(layer)) for layer in adapted.values())
    shapes = [weight_shape(layer) for layer in adapted.values()]
    trained = workload.rank * sum(d_out * (not freeze_b) + d_in * (not freeze_a) for d_out, d_in in shapes)
    kept, counted = kept_by_blocks(model, adapted, survey, workload.rank, trained=(not freeze_a, not freeze_b))
    head, tokens = output_head(model), workload.batch_size * workload.length
    vocabulary = 0 if head is None else weight_shape(head)[0]
    always = {
        "weights": size_in_bytes(model) + _dequantised(model, survey.dtype),
        "adapter": SINGLE * size,
        "gradients": SINGLE * trained,
        "optimizer": 2 * SINGLE * trained,
    }
    rest = survey.arguments + survey.hidden // survey.dtype.itemsize * SINGLE
    activations = {False: sum(kept), True: len(kept) * survey.hidden}
    flowing = 3 * tokens * _widest(survey) * survey.dtype.itemsize
    block = {False: flowing, True: max(kept, default=0) + flowing}
    logits, loss = tokens * vocabulary * survey.dtype.itemsize, tokens * vocabulary * 3 * SINGLE
    return [
        Training(
            again,
            {
                **always,
                "activations": activations[again] + rest,
                "loss or block": logits + max(loss, block[again]),
                "libraries": LIBRARIES[workload.device],
            },
            counted,
        )
        for again in (False, True)
    ]


def kept_by_blocks(
    model: nn.Module, targets: Mapping[str, nn.Module], survey: Survey, rank: int, *, trained: tuple[bool, bool] = (True, True)
) -> tuple[list[int], bool]:
    """What autograd keeps of each block for the backward pass, and whether it was counted.

    Blocks of one kind (class, shapes, settings, targets, arguments) are counted once. Not counted, but taken as twice the peak of
    the forward pass: where the survey has no forward pass, or layers outside of the blocks are trained too (encoders).
    """
    outside = is_encoder_decoder(model) or any(site.block is None for site in survey.sites)
    estimate = [2 * size for size in survey.block_activations] or [2 * survey.activations]
    if not survey.tracked or outside or len(survey.block_calls) != len(survey.blocks):
        return estimate, False
    known: dict[Any, int] = {}
    kept = []
    names = {id(module): name for name, module in named_modules(model).items()}
    for index, block in enumerate(survey.blocks):
        inside = _inside(targets, names[id(block)])
        kind = _kind(block, inside, survey.block_calls[index])
        if kind not in known:
            try:
                known[kind] = kept_by_block(block, inside, survey.block_calls[index], rank, survey.dtype, trained=trained)
            except Exception:  # kernels without a derivative on the meta device
                return estimate, False
        kept.append(known[kind])
    return kept, True


def kept_by_block(
    block: nn.Module,
    targets: Mapping[str, nn.Module],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    rank: int,
    dtype: torch.dtype,
    *,
    trained: tuple[bool, bool] = (True, True),
) -> int:
    """Bytes that autograd saves in a block's forward pass; weights and the block's arguments other than hidden states left out.

    An adapted layer saves its input, and A x of rank r. In a model of 16 bits the training is taken to run under autocast: PEFT
    casts the input to the adapter's float32, autocast casts it back, so each adapted layer keeps a copy of its own. Experts that
    are one tensor are adapted as PEFT does it, by a sum W + BA of the size of W, which is kept.

    Args:
        block: any module.
        targets: name in the block → layer.
        call: arguments of the block, with `TensorShape`s in the place of tensors.
        rank: of the adapter.
        dtype: of the model.
        trained: whether A has a gradient, and B.
    """
    stacks = {f"{layer.experts_name}.{layer.parameter}" for layer in targets.values() if isinstance(layer, ExpertMatrix)}
    own = {name for name, _ in block.named_parameters() if any(stack.endswith(f".{name}") for stack in stacks)}
    fused = {name: module for name, module in named_modules(block).items() if is_fused(module)}
    with routing(fused, lambda routed: None), watch(block, trained=own) as (live, run):
        given = torch.utils._pytree.tree_map_only(TensorShape, TensorShape.empty, call)
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors[1:]:
            live.ignore(tensor)
        tensors[0].requires_grad_()
        saved: dict[int, torch.UntypedStorage] = {}
        factors: list[torch.Tensor] = []  # kept, as the storages of saved tensors are: another would take the place of a freed one

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in live.ignored:
                saved[storage._cdata] = storage
            return tensor

        def beside(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = args[0]
            d_out, d_in = weight_shape(module)
            a = torch.empty(rank, d_in, dtype=dtype, device="meta", requires_grad=trained[0])
            b = torch.empty(d_out, rank, dtype=dtype, device="meta", requires_grad=trained[1])
            factors.extend((a, b))
            if dtype.itemsize < SINGLE:  # copies of autocast, as A and B are
                x = x.clone()
            else:
                live.ignore(a)
                live.ignore(b)
            return (output + functional.linear(functional.linear(x, a), b)).to(output.dtype)

        hooks = [module.register_forward_hook(beside) for module in targets.values() if not isinstance(module, ExpertMatrix)]
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = run(*given[0], **given[1])
        finally:
            for hook in hooks:
                hook.remove()
        del output
        return sum(storage.nbytes() for storage in saved.values())


def _widest(survey: Survey) -> int:
    """The largest input of a layer in numbers a token: of routed experts, those of all rows of a token."""
    widths: dict[str, float] = {}
    for site in survey.sites:
        name = site.name.partition("[")[0]
        widths[name] = widths.get(name, 0.0) + site.share * site.d_in
    return math.ceil(max(widths.values(), default=0))


def _inside(targets: Mapping[str, nn.Module], block: str) -> dict[str, nn.Module]:
    return {name.removeprefix(f"{block}."): layer for name, layer in targets.items() if name.startswith(f"{block}.")}


def _kind(block: nn.Module, targets: Mapping[str, nn.Module], call: Any) -> Any:
    """What two blocks that keep the same have in common."""
    plain = (bool, int, float, str)
    settings = tuple(
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain) and key not in ("layer_idx", "layer_number", "training")
    )
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in block.named_parameters())
    given = tuple(
        (tuple(leaf.shape), leaf.dtype) for leaf in torch.utils._pytree.tree_leaves(call) if isinstance(leaf, TensorShape)
    )
    return type(block), settings, shapes, frozenset(targets), given


def _dequantised(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest layer that is stored in fewer bits, as it is multiplied with."""
    weights = [weight_of(module) for module in model.modules() if is_linear(module)]
    packed = [math.prod(w.shape) for w in weights if stored_bytes(w) < w.numel() * dtype.itemsize]
    return max(packed, default=0) * dtype.itemsize
