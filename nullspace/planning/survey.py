"""What a forecast needs to know of a model: its sites, weights, activations and flops, from shapes alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nullspace.errors import InputError
from nullspace.model.batches import evaluating, forward_options
from nullspace.model.blocks import find_blocks, is_encoder_decoder
from nullspace.model.experts import LAST, ExpertMatrix, is_fused
from nullspace.model.linear import is_linear, weight_shape
from nullspace.model.routing import Routed, routing
from nullspace.model.sites import find_targets
from nullspace.model.weights import size_in_bytes, stored_bytes
from nullspace.model.wrappers import named_modules, unwrap
from nullspace.moments.sums import STAGE_TOKENS
from nullspace.moments.sums_torch import CHAIN_TOKENS
from nullspace.moments.sums_triton import launch_tokens
from nullspace.moments.triangle import LowerTriangle
from nullspace.planning.meta_run import LiveBytes, to_meta, watch


class SiteShape(NamedTuple):
    """A site as far as shapes tell.

    Attributes:
        name: of its first layer.
        d_in: width.
        block: index of the block that it lies in; None outside of the blocks.
        triangle: bytes of its sums.
        staging: bytes that the sums keep beside the triangle until they are read.
        share: rows in its input for each token of a batch: 1, but of an expert's input.
    """

    name: str
    d_in: int
    block: int | None
    triangle: int
    staging: int
    share: float = 1.0


class TensorShape:
    """Shape and dtype of a tensor. Not a tuple, which would be a container of arguments."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorShape:
        """Of this tensor."""
        return cls(tensor.shape, tensor.dtype)

    def empty(self) -> torch.Tensor:
        """A tensor of this shape on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Survey:
    """Sites, weights, activations and flops of a model for batches of one shape. All sizes in bytes.

    Args:
        model: on any device, the meta device included.
        targets: as for `nullspace.model.sites.find_targets`.
        batch_size, length: sequences a batch, and tokens a sequence.
        device: `"cuda"` or `"cpu"`: the one that will compute.
        pooled: whether what all experts of a layer receive is summed together. Tokens are taken to be routed evenly.
        batch: an example, for models that take something else than `input_ids`; then its size counts.

    Attributes:
        sites: in the order in which they are called.
        reached: names of the targets that such a batch reaches; all of them if that is not known.
        weights: all of them; `block_weights` by block, `outside` of the blocks, of the `largest_layer` and the `largest_tensor`.
        dtype: of the weights.
        activations: the peak of a forward pass, its hooks included; `block_activations` by block, without the block's own input;
            `prologue`, before the first block, where towers and encoders run.
        blocks: modules, those of the other `block_…` attributes.
        block_calls: of each block, the positional and keyword arguments of its call, with `TensorShape`s in the place of tensors.
        hidden, arguments: of a block's call: the hidden states, and its other tensors (masks, rotary tables).
        flops: of the forward pass; `block_flops` by block; `prologue_flops` before the first block.
        tracked: whether activations, flops and sites come from a forward pass on the meta device. If not, they are estimated from
            the shapes of the layers, with a tendency to be too high.
        layered: whether there are blocks (those of `nullspace.model.blocks.find_blocks` that the batch reaches), as far as a
            forward pass shows in a chain, and no site lies behind them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: str | Iterable[str] = "all-linear",
        batch_size: int = 4,
        length: int = 1024,
        device: str = "cuda",
        pooled: bool = False,
        batch: Any = None,
    ) -> None:
        model = unwrap(model)
        chosen = find_targets(model, targets)
        self.reached = set(chosen)
        example = _example(model, batch, batch_size, length)
        self._device, self._pooled = device, pooled
        self._of_blocks: dict[int | None, list[SiteShape]] | None = None
        blocks = _blocks(model, chosen)
        self.weights = size_in_bytes(model)
        own = [[stored_bytes(t) for t in m.parameters(recurse=False)] for m in model.modules()]
        self.largest_layer = max(map(sum, own), default=0)
        self.largest_tensor = max((size for sizes in own for size in sizes), default=0)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        try:
            blocks = self._run(model, chosen, blocks, *example)
        except Exception:  # models that need data, to route tokens to experts for instance, and custom kernels
            self._estimate(model, chosen, blocks, batch_shape(batch) or (batch_size, length))
        self.blocks = blocks
        self.block_weights = [size_in_bytes(block) for block in blocks]
        self.outside = max(0, self.weights - sum(self.block_weights))

    def sites_of(self, block: int | None) -> list[SiteShape]:
        """The sites of a block, by its index; those outside of the blocks for None."""
        if self._of_blocks is None:
            self._of_blocks = {}
            for site in self.sites:
                self._of_blocks.setdefault(site.block, []).append(site)
        return self._of_blocks.get(block, [])

    def without(self, widths: Collection[int]) -> Survey:
        """The same without the sites of these widths."""
        less = copy.copy(self)
        less.sites, less._of_blocks = [site for site in self.sites if site.d_in not in widths], None
        return less

    def _run(
        self,
        model: nn.Module,
        targets: dict[str, nn.Module],
        blocks: list[nn.Module],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[nn.Module]:
        """Returns the blocks that were called."""
        self._index(blocks)
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(model))
            live, run = stack.enter_context(watch(model))
            record = _Record(live, len(blocks))

            def look(name: str, module: nn.Module) -> Any:
                def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
                    record.reached.add(name)
                    if not record.is_new(x):
                        return
                    d_in = weight_shape(module)[1]
                    rows = x.numel() // d_in
                    live.held(_update_bytes(rows, d_in, self._device))
                    if name not in record.sites:  # a layer may be called several times
                        record.add(self._site(name, module, d_in, rows, x.dtype))

                return hook

            def look_at_experts(routed: Routed) -> None:
                stack = f"{routed.experts}.{routed.parameter}"
                record.reached.update(name for e in range(len(routed.counts)) if (name := f"{stack}[{e}]") in targets)
                for site in self._sites_of_experts(routed, targets):
                    record.add(site)
                live.held(_update_bytes(max(routed.counts), routed.rows.shape[-1], self._device))

            # Those that are no targets too: their own code would ask for values.
            fused = {name: module for name, module in named_modules(model).items() if is_fused(module)}
            stack.enter_context(routing(fused, look_at_experts))
            for name, module in targets.items():
                stack.callback(module.register_forward_pre_hook(look(name, module), with_kwargs=True).remove)
            for index, block in enumerate(blocks):
                stack.callback(block.register_forward_pre_hook(record.enter(index), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(record.leave(index), with_kwargs=True).remove)
            run(*args, **{**forward_options(model, targets), **kwargs})
            record.see_peak()
        called = [block for block, size in zip(blocks, record.block_activations, strict=True) if size]
        if blocks and not called:
            raise InputError("no block was called")
        if len(called) < len(blocks):  # those that attend to images
            return self._run(model, targets, called, args, kwargs)
        self.tracked, self.layered = True, bool(blocks) and record.links.are_chain and not record.is_behind
        self.sites, self.reached = list(record.sites.values()), record.reached
        self.activations, self.prologue = record.peak, record.prologue
        self.hidden, self.arguments, self.block_calls = record.hidden, record.arguments, record.calls
        self.block_activations, self.block_flops, self.flops = record.block_activations, record.block_flops, float(live.flops)
        self.prologue_flops = record.prologue_flops
        return blocks

    def _index(self, blocks: list[nn.Module]) -> None:
        self._block_of = {id(part): i for i, block in enumerate(blocks) for part in block.modules()}

    def _estimate(self, model: nn.Module, targets: dict[str, nn.Module], blocks: list[nn.Module], shape: tuple[int, int]) -> None:
        """Assumes the outputs of all linear layers of a block at once and four hidden states, and one input for layers of the same
        parent and width."""
        self._index(blocks)
        self.tracked, self.layered = False, bool(blocks)
        tokens, itemsize = math.prod(shape), self.dtype.itemsize

        def outputs(module: nn.Module) -> int:
            return sum(weight_shape(m)[0] for m in module.modules() if is_linear(m))

        def products(module: nn.Module) -> float:
            return 2.0 * tokens * sum(math.prod(weight_shape(m)) for m in module.modules() if is_linear(m))

        inputs: dict[tuple[str, int], tuple[str, nn.Module]] = {}
        for name, module in targets.items():
            inputs.setdefault((name.rpartition(".")[0], weight_shape(module)[1]), (name, module))
        width = max((weight_shape(m)[1] for _, m in inputs.values()), default=0)
        self.hidden = tokens * width * itemsize
        self.sites = [self._site(name, module, d_in, tokens, self.dtype) for (_, d_in), (name, module) in inputs.items()]
        update = max((_update_bytes(tokens, site.d_in, self._device) for site in self.sites), default=0)
        self.block_activations = [tokens * itemsize * outputs(block) + 4 * self.hidden + update for block in blocks]
        self.block_flops = [products(block) for block in blocks]
        self.prologue, self.arguments, self.block_calls = 2 * self.hidden, 0, {}
        self.activations = max(self.block_activations, default=tokens * itemsize * outputs(model) + update) + self.hidden
        self.flops = products(model)
        self.prologue_flops = self.flops - sum(self.block_flops)

    def _sites_of_experts(self, routed: Routed, targets: Mapping[str, nn.Module]) -> list[SiteShape]:
        """The sites of what a parameter of fused experts receives."""
        stack = f"{routed.experts}.{routed.parameter}"
        names = [(f"{stack}[{number}]", count) for number, count in enumerate(routed.counts) if f"{stack}[{number}]" in targets]
        tokens, d_in, dtype = len(routed.hidden), routed.rows.shape[-1], routed.rows.dtype
        if self._pooled and routed.parameter != LAST:
            names = [(name, tokens) for name, _ in names[:1]]
        sites = [self._site(name, targets[name], d_in, rows, dtype)._replace(share=rows / tokens) for name, rows in names]
        if self._device == "cuda" or len(sites) == 1:
            return sites
        # Experts reach the number of rows that are summed together at different times: on average, half of it is staged.
        return [site._replace(staging=site.staging // 2) for site in sites]

    def _site(self, name: str, module: nn.Module, d_in: int, rows: int, dtype: torch.dtype) -> SiteShape:
        block = self._block_of.get(id(module.experts if isinstance(module, ExpertMatrix) else module))
        return SiteShape(name, d_in, block, _triangle_bytes(d_in), _staging_bytes(rows, d_in, dtype, self._device))


class _Record:
    """What one forward pass on the meta device shows: its sites, and memory and flops of each block."""

    def __init__(self, live: LiveBytes, blocks: int) -> None:
        self.sites: dict[str, SiteShape] = {}
        self.reached: set[str] = set()
        self.peak = self.prologue = self.hidden = self.arguments = 0
        self.prologue_flops = 0.0
        self.is_behind = False  # whether there is a site behind the first block and in none
        self.links = _Links()
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.block_activations, self.block_flops = [0] * blocks, [0.0] * blocks
        self._live, self._inputs = live, list[weakref.ref[torch.Tensor]]()
        self._entry = self._flops = 0
        self._has_begun = False

    def add(self, site: SiteShape) -> None:
        """Add a site, in the order of the calls."""
        self.sites[site.name] = site
        self.is_behind |= site.block is None and self._has_begun

    def is_new(self, x: torch.Tensor) -> bool:
        """Whether no layer had this tensor as its input before."""
        if any(ref() is x for ref in self._inputs):
            return False
        self._inputs.append(weakref.ref(x))
        return True

    def see_peak(self) -> None:
        """Take the peak since the last restart into account."""
        self.peak = max(self.peak, self._live.peak)

    def enter(self, index: int) -> Any:
        """A pre-hook of a block."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.see_peak()
            if index == 0:
                self._has_begun = True
                self.prologue, self.prologue_flops = self._live.peak, float(self._live.flops)
                self.hidden, self.arguments = _argument_bytes(args, kwargs)
            self.calls[index] = torch.utils._pytree.tree_map_only(torch.Tensor, TensorShape.of, (args, kwargs))
            self.links.enter(index, _tensors((args, kwargs)))
            self._live.restart()
            self._entry, self._flops = self._live.live, self._live.flops

        return hook

    def leave(self, index: int) -> Any:
        """A hook of a block."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.see_peak()
            self.links.leave(_tensors((args, kwargs)), _tensors(output))
            self.block_activations[index] = max(self.block_activations[index], self._live.peak - self._entry)
            self.block_flops[index] += self._live.flops - self._flops

        return hook


class _Links:
    """How the blocks of a forward pass are linked.

    Attributes:
        are_chain: whether each block was called once, with the first tensor that the one before it returned, with no other tensor
            that a block has made, and did not fill a cache that it was given. A layerwise run checks more
            (`nullspace.calibration.rehearsal`).
    """

    def __init__(self) -> None:
        self.are_chain = True
        self._called: set[int] = set()
        self._given: list[int] = []
        self._first: weakref.ref[torch.Tensor] | None = None
        self._others: list[weakref.ref[torch.Tensor]] = []

    def enter(self, index: int, given: list[torch.Tensor]) -> None:
        """A block is called with these tensors."""
        follows = self._first is None or any(self._first() is tensor for tensor in given)
        beside = any(ref() is tensor for ref in self._others for tensor in given)
        self.are_chain &= index not in self._called and follows and not beside
        self._called.add(index)
        self._given = [id(tensor) for tensor in given]

    def leave(self, given: list[torch.Tensor], returned: list[torch.Tensor]) -> None:
        """It has returned, and its arguments hold these tensors now."""
        self.are_chain &= [id(tensor) for tensor in given] == self._given
        self._first = weakref.ref(returned[0]) if returned else None
        self._others += [weakref.ref(tensor) for tensor in returned[1:] if id(tensor) not in self._given]


@functools.cache
def _triangle_bytes(d: int) -> int:
    """Memory of Σ x xᵀ and Σ x."""
    return LowerTriangle(d, device="meta").packed.nbytes + 8 * d


def _update_bytes(rows: int, d: int, device: str) -> int:
    """Temporary memory of `Covariance.update`. On a GPU tokens go straight into a buffer, which `_staging_bytes` counts."""
    if device == "cuda":
        return 0
    if rows < STAGE_TOKENS:  # the staged rows are joined, and their norms taken in float64
        rows = -(-STAGE_TOKENS // rows) * rows
    return 16 * min(rows, CHAIN_TOKENS) * d  # float64 copies of one chain, for its norms, its sum and its products


@functools.cache
def _staging_bytes(rows: int, d: int, dtype: torch.dtype, device: str) -> int:
    """Memory of a sum beside its triangle until it is read."""
    if device == "cuda":
        if dtype == torch.float64:
            return 0
        step = 16 // dtype.itemsize
        return launch_tokens(d) * -(-d // step) * step * dtype.itemsize
    return -(-STAGE_TOKENS // rows) * rows * d * dtype.itemsize if 0 < rows < STAGE_TOKENS else 0


def _blocks(model: nn.Module, targets: Mapping[str, nn.Module]) -> list[nn.Module]:
    try:
        return list(find_blocks(model, targets).values())
    except ValueError:
        return []


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _argument_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Of a block's call: bytes of the hidden states (its first tensor), and of the other tensors."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors((args, kwargs))}
    hidden, *others = sizes.values()
    return hidden, sum(others)


def _example(model: nn.Module, batch: Any, batch_size: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch's arguments, on the meta device."""
    two_inputs = is_encoder_decoder(model)
    if batch is None:
        ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
        return (), {"input_ids": ids, "decoder_input_ids": ids} if two_inputs else {"input_ids": ids}
    if isinstance(batch, Mapping):  # a decoder's inputs may be made of the labels
        return (), {name: value for name, value in to_meta(batch).items() if name != "labels" or two_inputs}
    values = (batch,) if isinstance(batch, torch.Tensor) else tuple(batch)
    return tuple(to_meta(dict(enumerate(values))).values()), {}  # type: ignore[arg-type]


def batch_shape(batch: Any) -> tuple[int, int] | None:
    """(sequences, tokens) of a batch; None if it has no tensor with elements."""
    if isinstance(batch, Mapping):
        names = ("input_ids", "inputs_embeds", *batch)
        first = next((batch[n] for n in names if isinstance(batch.get(n), torch.Tensor)), None)
    elif isinstance(batch, (tuple, list)):
        first = next((value for value in batch if isinstance(value, torch.Tensor)), None)
    else:
        first = batch
    if not isinstance(first, torch.Tensor) or first.ndim == 0 or first.numel() == 0:
        return None
    return (first.shape[0], first.shape[1]) if first.ndim > 1 else (1, first.shape[0])
