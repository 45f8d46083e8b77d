"""The do-operator: interventions on sites, for chosen heads, positions and rows, undone when the block is left.

    with do(model, Zero("L5.H1"), Patch("L9.H6", clean), Scale("L18.H6", 3.0, rows=[0, 1])):
        model(**inputs)

Values are replaced, never changed in place, so gradients flow. Works under `generate`: positions are columns of the whole
sequence, negative ones count from the end of the prompt, and None means every column, generated ones included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.site import Site
from headwise.tap import Handler, Place, Tap, listen

Source = Tap | Tensor


def _head_axis(site: Site) -> int | None:
    if site.kind == "neurons":
        return 2
    if site.kind == "z":
        return 2
    return 1 if site.kind in ("q", "k", "v", "q_pre", "k_pre", "scores", "pattern") else None


def _time_axis(site: Site) -> int:
    return 2 if site.kind in ("q", "k", "v", "q_pre", "k_pre", "scores", "pattern") else 1


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
        bare = site.kind == "z" and not str(self.site).split("@")[0].endswith("z")
        return replace(site, kind=self.default) if bare else site

    def handler(self, site: Site) -> Handler:
        """The function that `listen` calls with each passing value."""
        positions = [site.position] if site.position is not None else self.positions

        def edit(value: Tensor, place: Place) -> Tensor | None:
            time = _time_axis(site)
            columns = place.columns(positions, value.shape[time])
            if columns == []:
                return None
            axis = _head_axis(site) if site.index is not None else None
            part = value if axis is None else value.narrow(axis, site.index, 1)
            new = self.new(part, site, place).to(part.dtype)
            where = self._where(part, time, columns)
            new = new.expand_as(part) if where is None else torch.where(where, new, part)
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
    axis = _head_axis(site)
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
        source = _slice_of(self.source, site, value)
        time = _time_axis(site)
        if source.ndim < value.ndim or source.shape[time] == 1 and value.shape[time] != source.shape[time]:
            return source.expand_as(value)
        if site.kind in ("scores", "pattern") and (place.offset or source.shape[-1] != value.shape[-1]):
            return value
        there = source.shape[time] - place.offset
        if there <= 0:
            return value
        length = min(there, value.shape[time])
        taken = source.narrow(time, place.offset, length)
        if taken.shape[0] not in (1, value.shape[0]):
            raise ValueError(f"{site}: the source has {taken.shape[0]} rows, this run has {value.shape[0]}.")
        if length == value.shape[time]:
            return taken
        rest = value.narrow(time, length, value.shape[time] - length)
        return torch.cat([taken.expand(value.shape[0], *taken.shape[1:]), rest], time)


@dataclass(frozen=True, eq=False)
class Freeze(Patch):
    """Keep the attention pattern of another run. Source: a tap of "pattern", or a tensor [B, H, Tq, Tk] or [B, Tq, Tk]."""

    default: ClassVar[str] = "pattern"


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """Replace the value by the source's mean over prompts and columns: what the place says on average."""

    source: Source

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        if isinstance(self.source, Tensor) and self.source.ndim < value.ndim - 1:
            return self.source.to(value.device, value.dtype).expand_as(value)
        source = _slice_of(self.source, site, value)
        return source.mean((0, _time_axis(site)), keepdim=True).expand_as(value)


@dataclass(frozen=True, eq=False)
class Resample(Intervention):
    """Replace the value by that of another prompt: of the source's rows drawn at random, or of this batch's own rows."""

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
    """Remove the part of the value that lies in a subspace. Source: directions [d] or [k, d], independent of each other."""

    source: Tensor

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        directions = torch.atleast_2d(self.source).to(value.device, torch.float32)
        basis = torch.linalg.qr(directions.T).Q.to(value.dtype)
        return value - (value @ basis) @ basis.T


@dataclass(frozen=True, eq=False)
class Cut(Intervention):
    """Cut attention edges: the chosen queries no longer see the chosen keys, and what is left is normalised again.

    The same as setting the scores to minus infinity; a query that has nothing left to see gets z = 0.
    """

    default: ClassVar[str] = "pattern"

    keys: list[int]
    queries: list[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", self.queries)

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        span = replace(place, offset=0) if site.stack != "cross" else replace(place, offset=0, prompt=value.shape[-1])
        keys = span.columns(self.keys, value.shape[-1])
        kept = value.clone()
        kept[..., torch.tensor(keys, dtype=torch.long)] = 0
        # With an attention sink the row does not sum to 1; the sink's share stays in the denominator.
        left = kept.sum(-1, keepdim=True)
        sink = (1 - value.sum(-1, keepdim=True)).clamp_min(0)
        total = torch.where(sink > 1e-4, left + sink, left)
        return torch.where(total > 0, kept / total.clamp_min(torch.finfo(value.dtype).tiny), kept)


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
            raise ValueError(f"{one!r} is not an intervention; use Zero, Mean, Resample, Patch, Scale, Add, Project, Freeze or Cut.")
        wanted += [(site, one.handler(site)) for site in body.resolve(one.address())]
    with listen(model, wanted):
        yield
