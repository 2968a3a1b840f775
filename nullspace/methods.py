"""The methods by name: what each needs, whether it changes the base, and how its factors are computed.

`nullspace.factors` has the mathematics, one pure function a method; `METHODS` is the list that `inject_adapters`, `write_init` and
the command line choose from. A new method is a function there and an entry here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from nullspace import factors
from nullspace.artifacts.covariances import Covariances
from nullspace.artifacts.sitewise import Sitewise
from nullspace.artifacts.spaces import NullSpaces
from nullspace.checks import FRACTION, NOT_NEGATIVE, POSITIVE, Range, check_integer, check_one_of, check_real
from nullspace.errors import InputError
from nullspace.factors import Allocation, LowRank, budget
from nullspace.model.linear import weight_shape
from nullspace.moments.covariance import Covariance
from nullspace.moments.directions import Directions

OTHER = {"A": "B", "B": "A"}
"""The other factor."""


@dataclass(frozen=True)
class Sources:
    """What the factors are computed from, beside the weight.

    Attributes:
        spaces: null spaces (`"lora-null"`, `"b-zero"`).
        covariances: second moments: of the data to be preserved (`"corda-kpm"`, `"corda-exact"`, `"mica-data"`, and null spaces, if
            `spaces` is None), or of the task (`"contrast"`, `"inflora"`, `"corda-ipm"`, `"eva"`, `"sc-lora"`, `"astra"`).
        preserve: second moments of the data to be preserved, for `"contrast"`, `"inflora"` and `"sc-lora"`.
        sigma_scale: see `nullspace.factors.lora_null`.
        beta: see `nullspace.factors.sc_lora`.
        damping: see `nullspace.factors.corda` and `nullspace.factors.contrast`.
        share: see `nullspace.factors.inflora`.
        split: A takes `split` times its share of the product, and B 1 / `split` of its own.
        window: which singular triples are taken: between 0, the largest, and 1, the smallest (`nullspace.factors.skipped`); by
            default the method's own.
        seed: of random numbers (`"orthogonal"`), at least 0.
        allocation: how a budget was distributed over the layers. Each layer's null space is then cut to the rank that it got.
        directions: collects the layers whose data span too few directions.
    """

    spaces: NullSpaces | None = None
    covariances: Covariances | None = None
    preserve: Covariances | None = None
    sigma_scale: float = 1.0
    beta: float = 0.5
    damping: float = factors.DAMPING
    share: float = factors.SHARE
    split: float = 1.0
    window: float | None = None
    seed: int = 0
    allocation: Allocation | None = None
    directions: Directions = field(default_factory=Directions, compare=False)

    def of_model(self) -> Iterator[Sitewise]:
        """All that was computed for a certain model."""
        yield from (each for each in (self.spaces, self.covariances, self.preserve) if each is not None)


@dataclass(frozen=True)
class Layer:
    """One linear layer that is to get an adapter.

    Attributes:
        name: in the base model.
        weight: (d_out, d_in) W₀; None for a method that does not read it.
        d_out: rows of the weight.
        d_in: its columns.
        rank: r of the adapter.
        device: for factors that are made without a weight.
    """

    name: str
    weight: torch.Tensor | None
    d_out: int
    d_in: int
    rank: int
    device: torch.device


@dataclass(frozen=True)
class Method:
    """How adapters start.

    Attributes:
        needs: the sources that must be given, by their names in `Sources`; `"spaces"` may be computed from `covariances`.
        changes_base: whether the product B A is not zero, so that it has to be subtracted somewhere. These methods read the weight.
        reads: whether it reads the weight and leaves it as it is.
        options: the numbers of `Sources` that it takes, by name.
        start: computes the factors.
        draws: whether it draws random numbers, by `Sources.seed`.
        even: whether the rank must be even.
        frozen: the factor that is frozen unless the caller says otherwise (`frozen_factor`), `"A"` or `"B"`.
        zero: the factor that starts at zero: with it frozen, nothing is learned.
        of_task: whether `covariances` are of the task's data; if not, of what is to be preserved.
        ranges: of options that are narrower here than in `OPTIONS`.
        shares: of the directions that a start of the layer's rank takes, in the method's objective; None if that is no sum over
            directions, or the start of a smaller rank does not take some of the same.
        spares: whether the smallest shares are wanted.
    """

    needs: tuple[str, ...]
    changes_base: bool
    options: tuple[str, ...]
    start: Callable[[Layer, Sources], LowRank]
    draws: bool = False
    even: bool = False
    reads: bool = False
    frozen: str | None = None
    zero: str | None = None
    of_task: bool = False
    ranges: Mapping[str, Range] = field(default_factory=dict)
    shares: Callable[[Layer, Sources], torch.Tensor] | None = None
    spares: bool = False

    @property
    def data(self) -> dict[str, str]:
        """The data that it calibrates on, `"task"` or `"keep"` (what is to be preserved) → the source that is of them."""
        return {"task" if name == "covariances" and self.of_task else "keep": name for name in self.needs}

    def allowed(self, option: str) -> Range:
        """The range of one of its options."""
        return self.ranges.get(option, OPTIONS[option])

    @property
    def reads_weight(self) -> bool:
        """Whether the factors are made of the weight."""
        return self.changes_base or self.reads


def _weight(layer: Layer) -> torch.Tensor:
    assert layer.weight is not None
    return layer.weight


def _basis(layer: Layer, given: Sources) -> torch.Tensor:
    assert given.spaces is not None
    basis = given.spaces[layer.name].basis
    return basis if given.allocation is None else basis[:, : layer.rank]


def _leaks(layer: Layer, given: Sources) -> torch.Tensor:
    assert given.spaces is not None
    space = given.spaces[layer.name]
    return space.eigenvalues[: layer.rank] / (space.trace or 1.0)


def _moment(
    layer: Layer, given: Sources, source: Covariances | None, *, window: float = factors.LARGEST
) -> tuple[Covariance, torch.Tensor]:
    """A layer's covariance and its matrix, whose rank is compared with what the method needs."""
    assert source is not None
    covariance = source[layer.name].completed(layer.d_in + layer.rank)
    c = covariance.matrix()
    given.directions.look_at(layer.name, covariance, layer.rank, c, spared=spared(window, layer.d_out, layer.d_in, layer.rank))
    return covariance, c


def _matrix(layer: Layer, source: Covariances | None) -> torch.Tensor:
    """The same matrix, for a look at its eigenvalues."""
    assert source is not None
    return source[layer.name].completed(layer.d_in + layer.rank).matrix()


def spared(window: float, d_out: int, d_in: int, rank: int) -> int:
    """How many directions the data may lack that decide on the singular triples of a window.

    Those of the r smallest of min(d_out, d_in) triples are what the others leave, and may be without any input.
    """
    most = min(d_out, d_in)
    before = factors.skipped(most, rank, window)
    return d_in - (before if before == most - rank else before + rank)


def _window(given: Sources, default: float) -> float:
    return default if given.window is None else given.window


def _corda(mode: str) -> Callable[[Layer, Sources], LowRank]:
    def start(layer: Layer, given: Sources) -> LowRank:
        covariance, c = _moment(layer, given, given.covariances, window=factors.CORDA_MODES[mode])
        return factors.corda(_weight(layer), c, rank=layer.rank, mode=mode, damping=given.damping, trace=covariance.peft_trace)

    return start


def _corda_shares(mode: str) -> Callable[[Layer, Sources], torch.Tensor]:
    def shares(layer: Layer, given: Sources) -> torch.Tensor:
        update, c = _corda(mode)(layer, given), _matrix(layer, given.covariances)
        c = c / c.diagonal().mean()
        c.diagonal().add_(given.damping)
        return budget.output_shares(update, _weight(layer), c @ c)

    return shares


def _corda_exact(layer: Layer, given: Sources) -> LowRank:
    window = _window(given, factors.SMALLEST)
    _, c = _moment(layer, given, given.covariances, window=window)
    return factors.corda_exact(_weight(layer), c, rank=layer.rank, window=window)


def _astra(layer: Layer, given: Sources) -> LowRank:
    window = _window(given, factors.LARGEST)
    _, c = _moment(layer, given, given.covariances, window=window)
    return factors.astra(_weight(layer), c, rank=layer.rank, window=window)


def _mica_data(layer: Layer, given: Sources) -> LowRank:
    _, c = _moment(layer, given, given.covariances, window=factors.SMALLEST)
    return factors.mica_data(_weight(layer), c, rank=layer.rank)


def _of_outputs(start: Callable[[Layer, Sources], LowRank]) -> Callable[[Layer, Sources], torch.Tensor]:
    return lambda layer, given: budget.output_shares(start(layer, given), _weight(layer), _matrix(layer, given.covariances))


def _contrast(layer: Layer, given: Sources) -> LowRank:
    assert given.preserve is not None
    _, task = _moment(layer, given, given.covariances)
    keep = given.preserve[layer.name].completed(layer.d_in + layer.rank).matrix()
    return factors.contrast(task.to(layer.device), keep, layer.d_out, rank=layer.rank, damping=given.damping)


def _contrast_ratios(layer: Layer, given: Sources) -> torch.Tensor:
    task, keep = (_matrix(layer, source) for source in (given.covariances, given.preserve))
    return budget.input_ratios(_contrast(layer, given), task, keep, damping=given.damping)


def _inflora(layer: Layer, given: Sources) -> LowRank:
    assert given.preserve is not None
    _, task = _moment(layer, given, given.covariances)
    keep = given.preserve[layer.name].completed(layer.d_in + layer.rank).matrix()
    return factors.inflora(task.to(layer.device), keep, layer.d_out, rank=layer.rank, share=given.share)


def _eva(layer: Layer, given: Sources) -> LowRank:
    assert given.covariances is not None
    covariance = given.covariances[layer.name].completed(layer.d_in + layer.rank)
    c, mean = covariance.matrix(), covariance.mean()
    given.directions.look_at(layer.name, covariance, layer.rank, factors.centred(c, mean, covariance.mass))
    return factors.eva(c, mean, covariance.mass, layer.d_out, rank=layer.rank)


def _variances(layer: Layer, given: Sources) -> torch.Tensor:
    assert given.covariances is not None
    covariance = given.covariances[layer.name].completed(layer.d_in + layer.rank)
    return budget.input_shares(_eva(layer, given), factors.centred(covariance.matrix(), covariance.mean(), covariance.mass))


def _sc_lora(layer: Layer, given: Sources) -> LowRank:
    moments = [_moment(layer, given, source) for source in (given.covariances, given.preserve)]
    per_token = [c / covariance.mass for covariance, c in moments]
    return factors.sc_lora(_weight(layer), *per_token, rank=layer.rank, beta=given.beta)


def _sc_shares(layer: Layer, given: Sources) -> torch.Tensor:
    assert given.covariances is not None
    assert given.preserve is not None
    plus, minus = (_matrix(layer, source) / source[layer.name].mass for source in (given.covariances, given.preserve))
    plus, minus = (1 - given.beta) * plus, given.beta * minus
    return budget.output_shares(_sc_lora(layer, given), _weight(layer), plus - minus, total=plus + minus)


def _of_weight(start: Callable[..., LowRank]) -> Callable[[Layer, Sources], torch.Tensor]:
    return lambda layer, _: budget.output_shares(start(_weight(layer), rank=layer.rank), _weight(layer))


def _orthogonal(layer: Layer, given: Sources) -> LowRank:
    # Seeded by the layer's name, so that the order of the layers does not matter.
    generator = torch.Generator().manual_seed(given.seed ^ zlib.crc32(layer.name.encode()))
    return factors.orthogonal(layer.d_in, layer.d_out, rank=layer.rank, generator=generator, device=layer.device)


METHODS: Mapping[str, Method] = {
    "lora-null": Method(
        needs=("spaces",),
        changes_base=True,
        options=("sigma_scale", "split"),
        start=lambda layer, given: factors.lora_null(
            _weight(layer), _basis(layer, given), rank=layer.rank, sigma_scale=given.sigma_scale
        ),
        shares=_leaks,
        spares=True,
    ),
    "b-zero": Method(
        needs=("spaces",),
        changes_base=False,
        options=(),
        start=lambda layer, given: factors.b_zero(_basis(layer, given), layer.d_out, rank=layer.rank),
        zero="B",
        shares=_leaks,
        spares=True,
    ),
    "contrast": Method(
        needs=("covariances", "preserve"),
        changes_base=False,
        options=("damping",),
        start=_contrast,
        frozen="A",
        zero="B",
        of_task=True,
        ranges={"damping": POSITIVE},
        shares=_contrast_ratios,
    ),
    "inflora": Method(("covariances", "preserve"), False, ("share",), _inflora, frozen="A", zero="B", of_task=True),
    "corda-kpm": Method(("covariances",), True, ("damping", "split"), _corda("kpm"), shares=_corda_shares("kpm"), spares=True),
    "corda-ipm": Method(("covariances",), True, ("damping", "split"), _corda("ipm"), of_task=True, shares=_corda_shares("ipm")),
    "corda-exact": Method(
        needs=("covariances",),
        changes_base=True,
        options=("split", "window"),
        start=_corda_exact,
        shares=_of_outputs(_corda_exact),
        spares=True,
    ),
    "astra": Method(("covariances",), True, ("split", "window"), _astra, of_task=True, shares=_of_outputs(_astra)),
    "sc-lora": Method(("covariances", "preserve"), True, ("beta", "split"), _sc_lora, of_task=True, shares=_sc_shares),
    "milora": Method(
        needs=(),
        changes_base=True,
        options=("split", "window"),
        start=lambda layer, given: factors.milora(_weight(layer), rank=layer.rank, window=_window(given, factors.SMALLEST)),
        shares=_of_weight(factors.milora),
        spares=True,
    ),
    "pissa": Method(
        needs=(),
        changes_base=True,
        options=("split",),
        start=lambda layer, _: factors.pissa(_weight(layer), rank=layer.rank),
        shares=_of_weight(factors.pissa),
    ),
    "olora-tail": Method(
        needs=(),
        changes_base=True,
        options=("split",),
        start=lambda layer, _: factors.olora_tail(_weight(layer), rank=layer.rank),
        shares=_of_weight(factors.olora_tail),
        spares=True,
    ),
    "mica": Method(
        needs=(),
        changes_base=False,
        options=(),
        start=lambda layer, _: factors.mica(_weight(layer), rank=layer.rank),
        reads=True,
        frozen="B",
        zero="A",
        shares=_of_weight(factors.mica),
        spares=True,
    ),
    "mica-data": Method(
        needs=("covariances",),
        changes_base=False,
        options=(),
        start=_mica_data,
        reads=True,
        frozen="B",
        zero="A",
        shares=_of_outputs(_mica_data),
        spares=True,
    ),
    "eva": Method(("covariances",), False, (), _eva, of_task=True, zero="B", shares=_variances),
    "orthogonal": Method((), False, (), _orthogonal, draws=True, even=True),
}


OPTIONS: Mapping[str, Range] = {
    "sigma_scale": POSITIVE,
    "beta": FRACTION,
    "damping": NOT_NEGATIVE,
    "share": FRACTION,
    "split": POSITIVE,
    "window": FRACTION,
}
"""The numbers of `Sources` and their ranges."""


def takers(option: str) -> list[str]:
    """The methods that take a number of `OPTIONS`."""
    return [name for name, each in METHODS.items() if option in each.options]


def check_method(method: str, given: Sources | None = None) -> None:
    """Raise `ValueError` for an unknown method, and for a number of `given` that is out of range or not one of its options."""
    check_one_of("method", method, METHODS)
    if given is None:
        return
    plain = Sources()
    for option in OPTIONS:
        if getattr(given, option) is not None or getattr(plain, option) is not None:
            check_real(option, getattr(given, option), METHODS[method].allowed(option))
    for option in OPTIONS:
        if getattr(given, option) != getattr(plain, option) and method not in takers(option):
            raise InputError(f"{option} belongs to {' and '.join(map(repr, takers(option)))}; {method!r} does not take it")


def frozen_factor(method: str, freeze_a: bool | None = None, freeze_b: bool | None = None) -> str | None:
    """The factor that does not train, `"A"` or `"B"`; None if both train.

    Args:
        method: one of `METHODS`.
        freeze_a: whether A is frozen; None: as the method does it.
        freeze_b: whether B is, likewise.

    Raises:
        ValueError: if nothing would be learned: with both frozen, or with the other one at zero.
    """
    entry = METHODS[method]
    said = {"A": freeze_a, "B": freeze_b}
    frozen = [factor for factor, says in said.items() if says]
    if len(frozen) == 2:
        raise InputError("with freeze_a and freeze_b nothing trains: leave out one of them")
    if not frozen:
        return None if entry.frozen is None or said[entry.frozen] is not None else entry.frozen
    if entry.zero == frozen[0]:
        raise InputError(
            f"method {method!r} starts with {frozen[0]} = 0, and with {frozen[0]} frozen nothing is learned: leave out "
            f"freeze_{frozen[0].lower()}"
        )
    return frozen[0]


def check_sources(method: str, given: Sources) -> None:
    """Raise `ValueError` if a source that the method needs is missing, or one is given that it does not use."""
    needs = METHODS[method].needs
    for what in needs:
        if getattr(given, what) is None and not (what == "spaces" and given.covariances is not None):
            raise InputError(f"method {method!r} needs {_SOURCES[what]}")
    used = {*needs, *(("covariances",) if "spaces" in needs and given.spaces is None else ())}
    for what in _SOURCES:
        if getattr(given, what) is not None and what not in used:
            raise InputError(f"method {method!r} makes no use of {what}: leave it out")


_SOURCES = {
    "spaces": "null spaces (spaces=), or covariances to find them in (covariances=)",
    "covariances": "the second moments of its data (covariances=): nullspace.compute_covariances",
    "preserve": "the second moments of what is to be preserved (preserve=): nullspace.compute_covariances",
}


def check_rank(method: str, given: Sources, name: str, module: nn.Module, rank: int) -> None:
    """Raise `ValueError`, naming the layer, if a method cannot give it an adapter of this rank."""
    rank = check_integer(f"the rank of the adapter of {name!r}", rank)
    d_out, d_in = weight_shape(module)
    if given.spaces is not None:
        columns = given.spaces[name].rank
        if rank > min(columns, d_out):
            raise InputError(
                f"the adapter of {name!r} has rank {rank}, but its null space has {columns} directions and its weight "
                f"{d_out} rows: use r ≤ {min(columns, d_out)}, or compute the spaces with a larger rank"
            )
    if rank > min(d_in, d_out):
        raise InputError(f"the adapter of {name!r} has rank {rank}, but its weight is {d_out} × {d_in}: use r ≤ {min(d_in, d_out)}")
    if METHODS[method].even and rank % 2:
        raise InputError(f"the adapter of {name!r} has rank {rank}: method {method!r} needs an even one")
