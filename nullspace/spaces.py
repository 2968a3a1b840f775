"""`NullSpace` (one site), `NullSpaces` (a model) and `compute_null_spaces`: the whole calibration in one call."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from nullspace import plan, report, solvers, store
from nullspace.batches import example_of, length
from nullspace.checkpoint import Checkpoint, fingerprint_of_run
from nullspace.covariance import Covariance
from nullspace.listening import precision_of
from nullspace.progress import Progress, reporter
from nullspace.sites import Site, find_targets, weight_shape
from nullspace.stream import check_options, resolve_strategy, stream_covariances
from nullspace.weights import tensor_of

logger = logging.getLogger(__name__)


# Excess leak, by estimate, above which a float32 sum is not trusted and the site is summed again in float64.
TOLERANCE = 1e-4
# A leak below this is none: the excess over it is not counted.
NO_LEAK = 1e-8
# What float64 sums leave of an exact null space, where no massive tokens make the norm of X meaningless.
QUIET = 1e-7


# Module name → (d_out, d_in) of its weight, and its fingerprint where it has one.
Weights: TypeAlias = Mapping[str, tuple[tuple[int, int], torch.Tensor | None]]


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The r quietest directions of one site's input: C U = U Λ (arXiv 2503.02659, eq. 6–7; U is the paper's U_null).

    Attributes:
        basis: (d_in, rank) float64, orthonormal columns, by ascending eigenvalue.
        eigenvalues: (rank,) float64, ascending, ≥ 0: λ_i = ‖u_iᵀX‖², summed over tokens.
        trace: tr C = ‖X‖_F².
        tokens: tokens that were summed, padding left out.
        gap: (λ_{r+1} − λ_r) / λ_{r+1}, between 0 and 1: how clearly the spectrum says where to cut. Near 0 the next direction is as
            quiet as the last one, and the basis, but not its leak, depends on rounding and on the data's chance.
        outliers: tokens whose norm exceeded 8 × the median.
        nullity: eigenvalues, of those that were found, that are zero as far as the sum can tell: not above `Covariance.error_norm`.
            Where it exceeds the rank, any basis within the null space would have done as well.
        precision: `"mixed"` (float32 chains into float64 sums, outlier tokens in float64), `"fp64"` or `"qr"`.
        excess_estimate: how much louder than the quietest basis this one may be for rounding's sake: leak / optimum − 1, by
            second-order perturbation theory (`estimated_excess`). Rather too high than too low.
        excess_bound: the same without any theory of how errors fall (Ky Fan's inequality, `bounded_excess`): never too low if the
            error of the sum is what it is taken for, and often too high by many orders.
        effective_rank: exp of the entropy of σ / Σσ of X (eq. 2–3); None unless it was asked for with `spectrum=True`.
        site: which input, and which layers hear it.
    """

    basis: torch.Tensor
    eigenvalues: torch.Tensor
    trace: float
    tokens: int
    gap: float
    outliers: int
    nullity: int
    precision: str
    excess_estimate: float
    excess_bound: float
    site: Site
    effective_rank: float | None = None

    @property
    def rank(self) -> int:
        """Number of basis vectors."""
        return self.basis.shape[1]

    @property
    def leak(self) -> float:
        """‖UᵀX‖_F / ‖X‖_F = √(Σ λ / tr C): the part of the calibration input that the space hears, 0 for a true null space."""
        return float(self.eigenvalues.sum() / self.trace) ** 0.5 if self.trace > 0 else 0.0

    @classmethod
    def from_covariance(
        cls,
        covariance: Covariance,
        rank: int,
        *,
        site: Site | None = None,
        spectrum: bool = False,
    ) -> NullSpace:
        """The bottom of a second moment.

        Args:
            covariance: the sums, with at least one token.
            rank: 1 ≤ rank < d_in.
            site: which input this is; a site without a name by default.
            spectrum: report the effective rank too.

        Raises:
            ValueError: if the rank is out of range or there are no tokens.
        """
        if not 1 <= rank < covariance.d_in:
            raise ValueError(f"rank must be between 1 and d_in - 1 = {covariance.d_in - 1}, not {rank}")
        if covariance.tokens == 0:
            raise ValueError("the covariance has no tokens")
        squared = covariance.products != "qr"
        if squared:
            known, vectors = solvers.partial_eigh(covariance.matrix(), rank, overwrite=True, every=spectrum)
        else:
            known, vectors = solvers.bottom_right_singular(covariance.root(), rank)
        known = known.clamp(min=0).cpu()
        values, behind = known[:rank], float(known[rank])
        error, trace = covariance.error_norm, covariance.trace
        return cls(
            basis=vectors.cpu().contiguous(),
            eigenvalues=values.clone(),
            trace=trace,
            tokens=covariance.tokens,
            gap=(behind - float(values[rank - 1])) / behind if behind > 0 else 0.0,
            outliers=covariance.outliers,
            nullity=int((known <= (error if squared else error**2)).sum()),
            precision=covariance.products,
            excess_estimate=estimated_excess(known, rank, error, trace, d_in=covariance.d_in, squared=squared),
            excess_bound=bounded_excess(values, error, trace, squared=squared),
            site=site or Site(members=("",), d_in=covariance.d_in),
            effective_rank=solvers.effective_rank(known.sqrt()) if spectrum else None,
        )

    def facts(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON takes it; the inverse is `from_facts`."""
        return {
            "members": list(self.site.members),
            "d_in": self.site.d_in,
            "rank": self.rank,
            "tokens": self.tokens,
            "trace": self.trace,
            "gap": self.gap,
            "outliers": self.outliers,
            "precision": self.precision,
            "excess_estimate": self.excess_estimate,
            "excess_bound": self.excess_bound,
            "nullity": self.nullity,
            "effective_rank": self.effective_rank,
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> NullSpace:
        """A space of what `facts` gave and its two tensors, `basis` and `eigenvalues`."""
        names = ("trace", "tokens", "gap", "outliers", "nullity", "precision", "excess_estimate", "excess_bound", "effective_rank")
        return cls(
            basis=tensors["basis"],
            eigenvalues=tensors["eigenvalues"],
            site=Site(tuple(facts["members"]), facts["d_in"]),
            **{name: facts[name] for name in names},
        )


def estimated_excess(
    eigenvalues: torch.Tensor, rank: int, error_norm: float, trace: float, *, d_in: int | None = None, squared: bool = True
) -> float:
    """How much leak rounding may have cost the bottom `rank` eigenvectors of a perturbed second moment: leak / optimum − 1.

    Second-order perturbation theory with a random error of entry size e = ‖E‖_F / d: the basis picks up the energy
    Σ_{i ≤ r < j} e² / max(λ_j − λ_i, e). An error E of X instead of C puts e · (σ_i + σ_j) in the place of e: the entries of
    EᵀX + XᵀE in the singular basis. Where even λ_{r+1} is below ‖E‖₂ the computed eigenvalues say nothing, and all of ‖E‖₂ counts.

    Args:
        eigenvalues: ascending, more than r of them; those that are not known count as the last one, which they exceed.
        rank: r < d.
        error_norm: ‖E‖_F (`Covariance.error_norm`).
        trace: tr C, against which a leak below 1e-8 counts as none.
        d_in: order of C; by default, as many as there are eigenvalues.
        squared: whether the error is one of C; otherwise of X.
    """
    if trace == 0:
        return 0.0
    values = eigenvalues.to(torch.float64).clamp(min=0)
    unknown = (d_in or len(values)) - len(values)
    values = torch.cat([values, values[-1:].expand(unknown)])
    near, far = values[:rank, None], values[None, rank:]
    entry = torch.full_like(near - far, error_norm / len(values))
    if not squared:
        entry = entry * (near.sqrt() + far.sqrt())
    entry = entry.clamp(min=torch.finfo(torch.float64).tiny)
    picked_up = float((entry * (entry / torch.maximum(far - near, entry))).sum())
    noise = float(2 * entry[:, 0].max() * len(values) ** 0.5)  # the spectral norm of a random matrix of such entries
    if values[rank] <= noise:
        picked_up += float((noise - values[:rank]).clamp(min=0).sum())
    return (1 + picked_up / max(float(values[:rank].sum()), NO_LEAK**2 * trace)) ** 0.5 - 1


def bounded_excess(values: torch.Tensor, error_norm: float, trace: float, *, squared: bool = True) -> float:
    """How much leak rounding can have cost at the most: leak / optimum − 1.

    With S the sum of the r computed eigenvalues and e = ‖E‖: the basis hears at most S + r e, the best one at least S − r e (Ky Fan
    1949). An error E of X instead of C changes the norm of X on any r directions by at most √r · e: √S ± √r · e.

    Args:
        values: (r,), the computed bottom eigenvalues.
        error_norm: ‖E‖_F, which bounds the spectral norm.
        trace: tr C, against which a leak below 1e-8 counts as none.
        squared: whether the error is one of C; otherwise of X.
    """
    if trace == 0:
        return 0.0
    heard, none = float(values.sum()), NO_LEAK**2 * trace
    if squared:
        most, least = heard + len(values) * error_norm, heard - len(values) * error_norm
    else:
        spread = len(values) ** 0.5 * error_norm
        most, least = (heard**0.5 + spread) ** 2, max(heard**0.5 - spread, 0.0) ** 2
    return (max(most, none) / max(least, none)) ** 0.5 - 1


class _Stored:
    """A space that is read when it is asked for, and again when nobody holds it any more."""

    def __init__(self, directory: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        self.site = Site(tuple(entry["members"]), entry["d_in"])
        self.shapes: Mapping[str, list[int]] = entry["weight_shapes"]
        self._directory, self._entry, self._manifest = directory, entry, manifest
        self._space: weakref.ref[NullSpace] | None = None

    def _read(self) -> dict[str, torch.Tensor]:
        return store.read_tensors(self._directory, self._entry["file"], self._manifest)

    def space(self) -> NullSpace:
        space = None if self._space is None else self._space()
        if space is None:
            space = NullSpace.from_facts(self._entry, self._read())
            self._space = weakref.ref(space)
        return space

    def weights(self) -> Weights:
        tensors = self._read()
        return {name: ((shape[0], shape[1]), tensors.get(f"fingerprint.{name}")) for name, shape in self.shapes.items()}


class NullSpaces(Mapping[str, NullSpace]):
    """Module name → `NullSpace`; the members of a site share one object.

    Args:
        spaces: one a site.
        weights: module name → (d_out, d_in) and fingerprint (`nullspace.store.fingerprint`) of its weight, by which the model is
            known again.
    """

    def __init__(self, spaces: Iterable[NullSpace], weights: Weights | None = None) -> None:
        self._spaces: tuple[NullSpace | _Stored, ...] = tuple(spaces)
        self._of = {name: space for space in self._spaces for name in space.site.members}
        self._weights = dict(weights or {})

    def __getitem__(self, name: str) -> NullSpace:
        found = self._of[name]
        return found.space() if isinstance(found, _Stored) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __repr__(self) -> str:
        return f"NullSpaces({len(self._spaces)} sites, {len(self)} layers)"

    def _weight(self, name: str) -> tuple[tuple[int, int], torch.Tensor | None] | None:
        found = self._of[name]
        return (found.weights() if isinstance(found, _Stored) else self._weights).get(name)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order in which the model called them."""
        return tuple(space.site for space in self._spaces)

    def summary(self) -> str:
        """A table: site, layers, d_in, tokens, rank, leak, gap, outliers, precision, and the effective rank where known."""
        return report.text_table(report.rows(self))

    def check(self, name: str, module: nn.Module) -> None:
        """Whether these spaces are for this layer of this model.

        Args:
            name: the layer's name in the model that was calibrated.
            module: the linear layer.

        Raises:
            ValueError: showing both sides, if the name is unknown or the shape or the fingerprint differs.
        """
        if name not in self._of:
            known = ", ".join(list(self._of)[:3])
            raise ValueError(f"there is no null space for {name!r}; the spaces are for {known}, … ({len(self)} layers)")
        shape = weight_shape(module)
        known_shape, known_print = self._weight(name) or ((shape[0], self._of[name].site.d_in), None)
        if shape != known_shape:
            raise ValueError(
                f"these spaces are for another model: {name!r} has weight {shape} here and had {known_shape} at calibration"
            )
        found = _sample(module)
        if known_print is not None and found is not None and not store.same_fingerprint(known_print, found):
            raise ValueError(
                f"these spaces are for another model: the weight of {name!r} begins with {_head(found)} here and with "
                f"{_head(known_print)} at calibration"
            )

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a directory: `nullspace.json` and one safetensors file a site. Whole or not at all.

        Args:
            directory: must not exist yet, or be empty.
            overwrite: replace an earlier directory of ours.

        Raises:
            FileExistsError: if the directory is in the way.
            OSError: if it cannot be written; then nothing is left behind.
        """
        with store.new_directory(directory, overwrite=overwrite) as part:
            self.write(part)

    def write(self, directory: Path) -> None:
        """The content of `save`, into a directory that somebody else makes and renames."""
        directory.mkdir(parents=True, exist_ok=True)
        entries: list[dict[str, Any]] = []
        for index, each in enumerate(self._spaces):
            space = each.space() if isinstance(each, _Stored) else each
            weights = each.weights() if isinstance(each, _Stored) else self._weights
            name = f"{index:04d}-{re.sub(r'[^A-Za-z0-9._-]', '_', space.site.name)[:200]}.safetensors"
            tensors = {"basis": space.basis, "eigenvalues": space.eigenvalues}
            shapes = {}
            for member in space.site.members:
                if member in weights:
                    shapes[member], sample = weights[member]
                    if sample is not None:
                        tensors[f"fingerprint.{member}"] = sample
            store.write_tensors(directory / name, tensors)
            entries.append({"file": name, **space.facts(), "weight_shapes": shapes})
        store.write_manifest(directory, "spaces", {"sites": entries}, files=tuple(e["file"] for e in entries))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> NullSpaces:
        """Read what `save` wrote, checking every byte; the bases stay in their files until they are asked for, one by one.

        Raises:
            FileNotFoundError: if there is no such directory.
            ValueError: naming the file that is missing, truncated, altered or not ours.
        """
        manifest = store.read_manifest(directory, "spaces")
        found = cls(())
        found._spaces = tuple(_Stored(Path(directory), entry, manifest) for entry in manifest["sites"])
        for entry in manifest["sites"]:
            store.check_file(directory, entry["file"], manifest)
        found._of = {name: space for space in found._spaces for name in space.site.members}
        return found


def compute_null_spaces(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    rank: int = 128,
    targets: str | Iterable[str] = "all-linear",
    strategy: str = "auto",
    precision: str | Mapping[str, str] = "auto",
    tolerance: float = TOLERANCE,
    spectrum: bool = False,
    device: torch.device | str | None = None,
    hidden_states: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Progress = True,
) -> NullSpaces:
    """Run the model over the loader and find, for every linear layer, the directions that its input hardly ever takes.

    Args:
        model: any module; run in eval mode, without gradients, and left as it was found.
        loader: an iterable of mappings that the model takes (`input_ids`, `attention_mask`, …), or of tensors. It should yield
            at least d_in + rank tokens: with fewer, part of the null space is only what the data did not show.
        rank: columns of each basis: at least the rank of the adapters that will be made of it.
        targets: `"all-linear"`, a list of name endings, or a regular expression: see `nullspace.sites.find_targets`.
        strategy: how the model is run: see `stream_covariances`.
        precision: `"auto"`: the fast sums of `Covariance`, and a second pass in float64 over just those sites, if there are any,
            whose bases rounding may have made louder than `tolerance` allows (`NullSpace.excess_estimate`), and a third one
            by QR where float64 is short too. `"fp64"`: every product in float64 at once. `"qr"`: no product at all. Or a
            mapping from regular expressions for layer names to these: see `stream_covariances`.
        tolerance: excess leak, by estimate, that `"auto"` accepts.
        spectrum: report effective ranks too.
        device, hidden_states: for the layerwise strategy: see `stream_covariances`.
        checkpoint: a directory for what is finished, site by site. A run that was cut off and is called again with the same
            arguments goes on behind the last finished site (with `strategy="layerwise"`, in the block where it was), and ends
            with the same bits. The caller deletes it. The loader must give the same batches every time.
        progress: True for bars, False for none, or a callable (`nullspace.progress.Progress`).

    Returns:
        A mapping from module name to `NullSpace`.

    Raises:
        ValueError: see `stream_covariances`; before the forward pass if the rank does not fit a layer, or if the checkpoint is
            that of another run (another model, data, or setting: which ones is said), damaged, or asked for with a loader that
            can be read only once.

    Warns:
        UserWarning: naming the sites that saw fewer than d_in + rank tokens; and those that a second pass should sum again, if
            the loader can be read only once.

    Out of memory, PyTorch's error comes with what the run was going to take, and the cheapest setting that fits
    (`nullspace.plan`).
    """
    if not isinstance(targets, str):
        targets = list(targets)
    check_options(strategy, precision, hidden_states)
    modules = find_targets(model, targets)
    check_rank(modules, rank)
    if strategy == "auto":
        strategy, hidden_states = resolve_strategy(model, loader, targets, device=device, hidden_states=hidden_states, rank=rank)
        device = None if strategy == "resident" else device
        hidden_states = "auto" if strategy == "resident" else hidden_states
    report_progress = reporter(progress)
    kept: Checkpoint | None = None
    if checkpoint is not None:
        settings = {
            "rank": rank,
            "precision": precision if isinstance(precision, str) else dict(precision),
            "tolerance": tolerance,
            "spectrum": spectrum,
            "strategy": strategy,
        }
        kept = Checkpoint(checkpoint, fingerprint_of_run(model, loader, modules, settings))
    spaces = [NullSpace.from_facts(facts, tensors) for facts, tensors in kept.load()] if kept is not None else []
    done = {name for space in spaces for name in space.site.members}

    def explain() -> str:
        return plan.advice(
            model, targets=targets, strategy=strategy, batch=example_of(loader), batches=length(loader), device=device, rank=rank
        )

    def measure(chosen: str | list[str], precision: str | Mapping[str, str], forward: str) -> list[NullSpace]:
        def renamed(stage: str, done: int, total: int | None, tokens: int) -> None:
            report_progress(forward if stage == "forward" else stage, done, total, tokens)

        found: list[NullSpace] = []
        # A caller in inference mode would otherwise get bases that no later training step may touch.
        with torch.inference_mode(False), _explaining_memory(explain):
            stream = stream_covariances(
                model,
                loader,
                targets=chosen,
                strategy=strategy,
                precision=precision,
                device=device,
                hidden_states=hidden_states,
                progress=renamed,
            )
            for ready in _side_by_side(stream):
                for space in _decompose(ready, rank, spectrum):
                    if kept is not None:
                        kept.keep(space.site.name, space.facts(), {"basis": space.basis, "eigenvalues": space.eigenvalues})
                    logger.info("%s: leak %.1e, rounding %.0e of it", space.site, space.leak, space.excess_estimate)
                    found.append(space)
                    members = sum(len(s.site.members) for s in found)
                    report_progress("null spaces", members + (len(done) if forward == "forward" else 0), len(modules), 0)
        return found

    left = [name for name in modules if name not in done]
    if left:
        spaces += measure(left if done else targets, precision, "forward")
    once = isinstance(loader, Iterator)
    for better in ("fp64", "qr"):
        unsure = [
            s
            for s in spaces
            if precision_of(s.site.name, precision) == "auto"
            and s.precision not in (better, "qr")
            and s.excess_estimate > tolerance
        ]
        if better == "qr":  # without massive tokens a leak as small as this is none, and more digits of it are worth no pass
            unsure = [s for s in unsure if s.outliers > 0 or s.leak > QUIET]
        if once:
            break
        if not unsure:
            continue
        again = {s.site: s for s in measure([m for s in unsure for m in s.site.members], better, f"forward, {better}")}
        spaces = [again.get(s.site, s) for s in spaces]
    if once and unsure:
        warnings.warn(
            f"rounding may have cost {len(unsure)} of {len(spaces)} sites more than {tolerance:g} of their leak (at worst "
            f"{max(s.excess_estimate for s in unsure):.1g}, by estimate): {_few_names(unsure)}. The loader can be read only once, "
            "so they were not summed again: use precision='fp64', or a loader that can be read twice.",
            stacklevel=2,
        )
    _warn_of_few_tokens(spaces)
    return NullSpaces(spaces, {n: (weight_shape(m), _sample(m)) for n, m in modules.items()})


@contextlib.contextmanager
def _explaining_memory(explain: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # PyTorch's allocator for the CPU raises a plain RuntimeError.
        if not isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        try:
            text = explain()
        except Exception:  # advice is not worth hiding the error for
            raise error from None
        kind = torch.cuda.OutOfMemoryError if isinstance(error, torch.cuda.OutOfMemoryError) else MemoryError
        raise kind(f"{error}\n{text}") from error


def _side_by_side(stream: Iterator[tuple[Site, Covariance]]) -> Iterator[list[tuple[Site, Covariance]]]:
    """Sites that are to be decomposed together, drawn before that begins: the model may have to run for the next one.

    Several a thread, so that no thread waits for one that has a larger site; but no more than weigh little.
    """
    ready: list[tuple[Site, Covariance]] = []
    weight = 0
    for pair in stream:
        ready.append(pair)
        d = pair[1].d_in
        weight += 4 * d * d
        together = solvers.side_by_side(d, pair[1].device)
        del pair  # the consumer frees the sums, and no name here holds them back
        if together == 1 or len(ready) >= solvers.TURNS * together or weight >= solvers.TOGETHER_BYTES:
            yield ready
            ready, weight = [], 0
    if ready:
        yield ready


def _decompose(ready: list[tuple[Site, Covariance]], rank: int, spectrum: bool) -> Iterator[NullSpace]:
    """The null spaces of some sites, which are forgotten on the way.

    A small one goes through the pool even when it comes alone: with one thread its bits do not depend on who is beside it.
    """

    def solve(pair: tuple[Site, Covariance]) -> NullSpace:
        return NullSpace.from_covariance(pair[1], rank, site=pair[0], spectrum=spectrum)

    small = [pair for pair in ready if solvers.side_by_side(pair[1].d_in, pair[1].device) > 1]
    large = ready[len(small) :]  # at most one: it ends the drawing
    ready.clear()
    if small:
        # The largest first: what is left at the end is short.
        order = sorted(range(len(small)), key=lambda i: -small[i][1].d_in)
        threads = min(len(small), min(solvers.side_by_side(c.d_in, c.device) for _, c in small))
        with solvers.one_thread_each(threads) as pool:
            solved = dict(zip(order, pool.map(solve, [small[i] for i in order]), strict=True))
        small.clear()
        yield from (solved.pop(i) for i in range(len(order)))
    while large:
        yield solve(large.pop())


def check_rank(modules: Mapping[str, nn.Module], rank: int) -> None:
    """Raise `ValueError`, naming the layer, if a basis of `rank` columns does not fit it."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    for name, module in modules.items():
        d_out, d_in = weight_shape(module)
        if rank >= d_in:
            raise ValueError(f"rank {rank} does not leave {name!r} (d_in = {d_in}) anything to hear: it must be below d_in")
        if rank > d_out:
            raise ValueError(
                f"rank {rank} is larger than the weight of {name!r} ({d_out} × {d_in}) allows: choose rank ≤ {d_out}, or leave "
                "the layer out of targets"
            )


def _warn_of_few_tokens(spaces: list[NullSpace]) -> None:
    short = [s for s in spaces if s.tokens < s.site.d_in + s.rank]
    if short:
        needed = max(s.site.d_in + s.rank for s in short)
        warnings.warn(
            f"{len(short)} of {len(spaces)} sites saw fewer tokens ({min(s.tokens for s in short)}) than d_in + rank ({needed} at "
            f"most): {_few_names(short)}. Part of their null space is only what these data did not show: use at least {needed} "
            "tokens.",
            stacklevel=3,
        )


def _few_names(spaces: list[NullSpace]) -> str:
    return ", ".join(s.site.name for s in spaces[:4]) + (", …" if len(spaces) > 4 else "")


def _sample(module: nn.Module) -> torch.Tensor | None:
    """The fingerprint of a layer's weight; None where its values are nowhere at hand."""
    try:
        return store.fingerprint(tensor_of(module, "weight"))
    except ValueError:
        return None


def _head(sample: torch.Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in sample[:4].tolist()) + ", …]"
