"""The do-operator: interventions on sites, for chosen heads, positions and rows, undone when the block is left.

    with do(model, Zero("L5.H1"), Patch("L9.H6", clean), Scale("L18.H6", 3.0, rows=[0, 1])):
        model(**inputs)

Values are replaced, never changed in place, so gradients flow. Works under `generate`: positions are columns of the
whole sequence, negative ones count from the end of the prompt, None means every column, generated ones included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.listen import Handler, Place, listen
from headwise.site import KINDS, Site, head_axis, time_axis
from headwise.tap import Tap

Source = Tap | Tensor
REPLACEMENTS = ("zero", "mean", "resample")


def replacement(name: str) -> str:
    """The name again, if it says what can take a head's place. Raises ValueError with the known names."""
    if name not in REPLACEMENTS:
        raise ValueError(f"{name!r} cannot take a head's place: zero, mean or resample.")
    return name


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base: what happens to the value at one site.

    Attributes:
        site: an address; a head without a kind means its z.
        rows: prompts of the batch that are touched, None for all.
        positions: columns that are touched (query columns for scores and pattern), None for all.
    """

    site: str
    rows: list[int] | None = field(default=None, kw_only=True)
    positions: list[int] | None = field(default=None, kw_only=True)

    default: ClassVar[str] = "z"

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        """What takes the value's place; must broadcast to it."""
        raise TypeError(f"{type(self).__name__} does not say what takes the value's place.")

    def address(self) -> Site:
        """The site as given, with this intervention's own kind where the address names none."""
        site = Site.parse(self.site)
        named = str(self.site).split("@")[0].split(".")[-1] in KINDS
        return site if named or site.kind == "neurons" or self.default == "z" else replace(site, kind=self.default)

    def handler(self, site: Site) -> Handler:
        """The function that `listen` calls with each passing value."""
        positions = [site.position] if site.position is not None else self.positions

        def edit(value: Tensor, place: Place) -> Tensor | None:
            time = time_axis(site)
            columns = place.columns(positions, value.shape[time])
            if columns == []:
                return None
            axis = head_axis(site) if site.index is not None else None
            part = value if axis is None else value.narrow(axis, site.index, 1)
            try:
                new = self.new(part, site, place).to(part.dtype).expand_as(part)
            except RuntimeError as error:
                raise ValueError(
                    f"{site}: {type(self).__name__} does not fit a value of shape {list(part.shape)}: {error}"
                ) from error
            where = self._where(part, time, columns)
            new = new if where is None else torch.where(where, new, part)
            if axis is None:
                return new
            whole = value.clone()
            whole.narrow(axis, site.index, 1).copy_(new)
            return whole

        return edit

    def _where(self, part: Tensor, time: int, columns: list[int] | None) -> Tensor | None:
        if self.rows is None and columns is None:
            return None
        shape = [1] * part.ndim
        where = torch.ones(shape, dtype=torch.bool, device=part.device)
        for axis, chosen in ((0, self.rows), (time, columns)):
            if chosen is None:
                continue
            if axis == 0 and any(not -len(part) <= r < len(part) for r in chosen):
                raise ValueError(f"{self.site}: rows {chosen} do not fit a batch of {len(part)}.")
            line = torch.zeros(part.shape[axis], dtype=torch.bool, device=part.device)
            line[torch.tensor(chosen, dtype=torch.long)] = True
            where = where & line.view([-1 if a == axis else 1 for a in range(part.ndim)])
        return where


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """Replace the value by zero."""

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """Multiply the value by `alpha`. Scaling a head's z is scaling its value vectors."""

    alpha: float

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        return value * self.alpha


def _slice_of(source: Source, site: Site, value: Tensor) -> Tensor:
    """The source's value for this site, with the axes of `value` (a head's axis kept, of length 1)."""
    axis = head_axis(site)
    if isinstance(source, Tap):
        taken = source[site.whole] if site.whole in source._values else source[replace(site, position=None)]
        if axis is not None and site.index is not None and taken.ndim == value.ndim:
            taken = taken.narrow(axis, site.index, 1)
        source = taken
    if axis is not None and site.index is not None and source.ndim == value.ndim - 1:
        source = source.unsqueeze(axis)
    return source.to(value.device, value.dtype)


@dataclass(frozen=True, eq=False)
class Patch(Intervention):
    """Replace the value by that of another run, column by column; columns the other run did not have stay."""

    source: Source

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        source, time = _slice_of(self.source, site, value), time_axis(site)
        if source.ndim < value.ndim or (source.shape[time] == 1 and value.shape[time] != 1):
            return source
        if source.shape[0] not in (1, value.shape[0]):
            raise ValueError(f"{site}: the source has {source.shape[0]} rows, this run has {value.shape[0]}.")
        start = min(place.offset, source.shape[time])
        taken = source.narrow(time, start, min(source.shape[time] - start, value.shape[time]))
        if site.kind in ("scores", "pattern"):
            taken = _at_keys(taken, value, site, place)
        rest = value.narrow(time, taken.shape[time], value.shape[time] - taken.shape[time])
        return torch.cat([taken.expand(value.shape[0], *taken.shape[1:]), rest], time) if rest.numel() else taken


def _at_keys(taken: Tensor, value: Tensor, site: Site, place: Place) -> Tensor:
    """Another run's scores or pattern over this run's keys: keys that it did not have are not seen."""
    nothing = 0.0 if site.kind == "pattern" else torch.finfo(value.dtype).min
    start = 0 if site.stack == "cross" else min(place.keys, taken.shape[-1])
    taken = taken[..., start : start + value.shape[-1]]
    return torch.nn.functional.pad(taken, (0, value.shape[-1] - taken.shape[-1]), value=nothing)


@dataclass(frozen=True, eq=False)
class Freeze(Patch):
    """Keep another run's attention pattern. Source: a tap of "pattern", or a tensor [B, H, Tq, Tk] or [B, Tq, Tk]."""

    default: ClassVar[str] = "pattern"


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """Replace the value by the source's mean over prompts and columns: what the place says on average."""

    source: Source

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        if isinstance(self.source, Tensor) and self.source.ndim < value.ndim - 1:
            return self.source.to(value.device, value.dtype).expand_as(value)
        source = _slice_of(self.source, site, value)
        return source.mean((0, time_axis(site)), keepdim=True).expand_as(value)


@dataclass(frozen=True, eq=False)
class Resample(Intervention):
    """Replace the value by another prompt's: one of the source's rows, or of this batch's own, drawn at random."""

    source: Source | None = None
    seed: int = 0

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        source = value if self.source is None else _slice_of(self.source, site, value)
        if self.source is None and len(value) < 2:
            raise ValueError(f"{site}: resampling inside a batch of {len(value)} changes nothing; give a source.")
        generator = torch.Generator().manual_seed(self.seed)
        if self.source is None:
            shift = int(torch.randint(1, len(value), (1,), generator=generator))
            return value.roll(shift, 0)
        drawn = source[torch.randint(0, len(source), (len(value),), generator=generator)]
        return Patch(self.site, drawn).new(value, site, place)


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add a vector, or a tensor that broadcasts to the value."""

    source: Tensor

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        return value + self.source.to(value.device, value.dtype)


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """Remove the part of the value that lies in a subspace. Source: independent directions, [d] or [k, d]."""

    source: Tensor

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        exact = torch.promote_types(value.dtype, torch.float32)
        directions = torch.atleast_2d(self.source).to(value.device, exact)
        basis = torch.linalg.qr(directions.T).Q.to(value.dtype)
        return value - (value @ basis) @ basis.T


@dataclass(frozen=True, eq=False)
class Cut(Intervention):
    """Cut attention edges: the chosen queries no longer see the chosen keys; with nothing left to see, z is 0."""

    default: ClassVar[str] = "scores"

    keys: list[int]
    queries: list[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", self.queries)

    def address(self) -> Site:
        """The scores, also when the address says pattern: an edge is cut before the softmax."""
        return replace(super().address(), kind="scores")

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        width = value.shape[-1]
        prompt = width if site.stack == "cross" else place.prompt
        keys = replace(place, offset=place.keys, prompt=prompt).columns(self.keys, width)
        gone = torch.zeros(width, dtype=torch.bool, device=value.device)
        gone[torch.tensor(keys, dtype=torch.long)] = True
        kept = value.masked_fill(gone, -torch.inf)
        # What the mask hides stands at the lowest finite number and must not come back when all else is cut.
        blind = (kept <= torch.finfo(value.dtype).min / 2).all(-1, keepdim=True)
        return kept.masked_fill(blind, -torch.inf)


@contextmanager
def do(model: PreTrainedModel, *interventions: Intervention) -> Iterator[None]:
    """Run the model under interventions. Blocks nest; inner ones act after outer ones at the same site.

    Raises:
        ValueError: a site that this model does not offer, or a source whose shape does not fit.
    """
    body = anatomy(model)
    wanted: list[tuple[Site, Handler]] = []
    for one in interventions:
        if not isinstance(one, Intervention):
            names = "Zero, Mean, Resample, Patch, Scale, Add, Project, Freeze or Cut"
            raise ValueError(f"{one!r} is not an intervention; use {names}.")
        wanted += [(site, one.handler(site)) for site in body.resolve(one.address())]
    with listen(model, wanted):
        yield
