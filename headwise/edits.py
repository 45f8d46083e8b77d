"""Edits that hold a value at a site while a model is trained, and just so while it is measured.

    hold = [Edit("L1.pattern", pattern("match"), heads=(3,)), Edit("L1.z", 0.0, spare=(3,))]
    with holding(model, hold, Scene(lesson, batch)):
        model(**batch.inputs)

An edit in training is a clamp; the same edit on a model that was trained without it is a progress measure: how good
would the model be if only this part were perfect?
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.do import Intervention, do
from headwise.lesson import Lesson
from headwise.listen import Handler, Place
from headwise.schedule import When, always
from headwise.site import Site, head_axis
from headwise.tap import Tap, tap
from headwise.task import Batch

GRADS = ("cut", "through", "ste")
LOGITS = "logits"


@dataclass(eq=False)
class Scene:
    """What an edit may know of the forward pass that it changes.

    Attributes:
        lesson, batch: what the model is shown; None where a model is run by others.
        step: updates made so far.
        taken: what each `Pass` gave on these inputs.
        seen: values of this very pass that edits asked for (`reads`).
        off: True while another pass on the same model runs.
    """

    lesson: Lesson | None = None
    batch: Batch | None = None
    step: int = 0
    taken: "dict[Pass, Tensor]" = field(default_factory=dict)
    seen: Tap | None = None
    off: bool = False

    def cell(self, name: str) -> Tensor:
        """Cells [B or 1, Tq, Tk] of a pattern by their meaning. Raises ValueError where the lesson names none such."""
        cells = {} if self.lesson is None or self.batch is None else self.lesson.cells(self.batch)
        if name not in cells:
            known = ", ".join([*PATTERNS, *cells])
            raise ValueError(f"{name!r} is no pattern here; known are {known}.")
        return cells[name]

    def known(self) -> tuple[Lesson, Batch]:
        """Lesson and batch. Raises ValueError where the model is run without them."""
        if self.lesson is None or self.batch is None:
            raise ValueError("This edit asks what the prompts mean; it works where a lesson is taught or measured.")
        return self.lesson, self.batch


Value = Callable[[Tensor, Scene], Tensor]


@dataclass(frozen=True, eq=False)
class Pass:
    """Another forward pass on the same inputs, whose value at one site an edit puts in.

    Attributes:
        read: the site that is read, whole: "L1.pattern".
        edits: under which it runs.
        model: a `frozen` model to graft from; None for the live one, to which gradients then flow through the pass.
    """

    read: str
    edits: "tuple[Edit, ...] | list[Edit]" = ()
    model: PreTrainedModel | None = None


@dataclass(frozen=True, eq=False)
class Edit:
    """A value that is held at a site.

    Attributes:
        site: as in `do`: "L1.pattern", "L1.H3.z", "L0.resid_pre"; or "logits", what the model gives.
        to: a number, a tensor that broadcasts to the value, a function of (value, scene), or a `Pass`.
        heads: only these heads of the layer; `spare`: all but these.
        positions: only these columns, as in `do`.
        mix: how much of the value is replaced, 0 to 1 (or beyond, to overshoot).
        grad: "through": gradients flow to wherever `to` came from; "cut": to nowhere; "ste": as if nothing were held
            (straight through). The share 1 - mix of the live value always keeps its gradient.
        when: the steps of training at which it holds; measuring ignores it.

    Raises:
        ValueError: grad is none of the three, or heads and spare are both given.
    """

    site: str
    to: "float | Tensor | Value | Pass" = 0.0
    heads: tuple[int, ...] | None = None
    spare: tuple[int, ...] = ()
    positions: list[int] | None = None
    mix: float = 1.0
    grad: str = "through"
    when: When = always

    def __post_init__(self) -> None:
        if self.grad not in GRADS:
            raise ValueError(f"{self.grad!r} is no way for gradients; allowed are {', '.join(GRADS)}.")
        if self.heads is not None and self.spare:
            raise ValueError(f"{self.site}: give heads {self.heads} or spare {self.spare}, not both.")

    def value(self, live: Tensor, site: Site | None, scene: Scene) -> Tensor:
        """What takes the place of the live value, of the same shape."""
        target = self._target(live, site, scene)
        target = torch.as_tensor(target, device=live.device, dtype=live.dtype).expand_as(live)
        if self.grad != "through":
            target = target.detach()
        if self.mix != 1.0:
            target = self.mix * target + (1 - self.mix) * live
        if self.grad == "ste":
            # live - live.detach() is exactly 0, so that the value is the target to the last bit.
            target = target.detach() + (live - live.detach())
        if site is None or site.index is not None or not (self.heads is not None or self.spare):
            return target
        axis = head_axis(site)
        if axis is None:
            raise ValueError(f"{self.site} has no heads; leave out heads and spare.")
        return torch.where(self._chosen(live.shape[axis], axis, live), target, live)

    def _target(self, live: Tensor, site: Site | None, scene: Scene) -> "Tensor | float":
        if isinstance(self.to, Pass):
            taken = scene.taken[self.to]
            axis = None if site is None or site.index is None else head_axis(site)
            return taken if axis is None or taken.shape[axis] == 1 else taken.narrow(axis, site.index, 1)
        return self.to(live, scene) if callable(self.to) else self.to

    def _chosen(self, count: int, axis: int, live: Tensor) -> Tensor:
        named = self.spare if self.heads is None else self.heads
        if any(not 0 <= index < count for index in named):
            raise ValueError(f"{self.site}: heads {named} do not fit; the layer has heads 0 to {count - 1}.")
        chosen = torch.zeros(count, dtype=torch.bool, device=live.device)
        chosen[list(named)] = True
        chosen = ~chosen if self.heads is None else chosen
        return chosen.view([-1 if a == axis else 1 for a in range(live.ndim)])


@dataclass(frozen=True, eq=False)
class _Held(Intervention):
    """An edit bound to the scene it plays in."""

    edit: Edit
    scene: Scene

    def handler(self, site: Site) -> Handler:
        change = super().handler(site)
        return lambda value, place: None if self.scene.off else change(value, place)

    def new(self, value: Tensor, site: Site, place: Place) -> Tensor:
        return self.edit.value(value, site, self.scene)


@contextmanager
def holding(model: PreTrainedModel, edits: "Iterable[Edit]", scene: Scene | None = None) -> Iterator[Scene]:
    """Hold edits in every forward pass inside the block; passes that they need run first, on the same inputs.

    Raises:
        ValueError: an edit names a site that the model does not offer, or holds a value that does not fit.
    """
    edits, scene = list(edits), scene or Scene()
    inside = [edit for edit in edits if edit.site != LOGITS]
    outside = [edit for edit in edits if edit.site == LOGITS]
    reads = sorted({site for edit in edits for site in getattr(edit.to, "reads", ())})
    passes = list(dict.fromkeys(edit.to for edit in edits if isinstance(edit.to, Pass)))

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if not scene.off:
            scene.taken = {one: _run(one, model, args, kwargs, scene) for one in passes}

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        if not scene.off:
            for edit in outside:
                output.logits = edit.value(output.logits, None, scene)
        return output

    with ExitStack() as stack:
        stack.enter_context(do(model, *[_Held(e.site, edit=e, scene=scene, positions=e.positions) for e in inside]))
        if reads:
            scene.seen = stack.enter_context(tap(model, *reads, grad=True))
        if passes:
            stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        if outside:
            stack.callback(model.register_forward_hook(after).remove)
        yield scene


def _run(one: Pass, model: PreTrainedModel, args: tuple, kwargs: dict, scene: Scene) -> Tensor:
    """What a pass gives at the site that it reads."""
    who = model if one.model is None else one.model
    inner = Scene(scene.lesson, scene.batch, scene.step)
    live = one.model is None and torch.is_grad_enabled()
    scene.off = True
    try:
        gradients = nullcontext() if live else torch.no_grad()
        with gradients, holding(who, one.edits, inner), tap(who, one.read, grad=live) as taken:
            who(*args, **kwargs)
        return taken[one.read]
    finally:
        scene.off = False


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model for grafts: in evaluation mode, never to get a gradient. It is changed in place and handed back."""
    return model.eval().requires_grad_(False)


# What is put in

PATTERNS = ("previous", "self", "first", "uniform", "none")


def _plain(name: str, live: Tensor) -> Tensor:
    """A pattern [Tq, Tk] that needs no meaning, for a value [..., Tq, Tk]."""
    queries, keys = live.shape[-2:]
    eye = torch.eye(keys, device=live.device, dtype=live.dtype)
    if name == "first":
        eye = torch.zeros_like(eye).index_fill_(1, torch.tensor([0], device=live.device), 1.0)
    elif name == "none":
        eye = torch.zeros_like(eye)
    elif name == "uniform":
        eye = torch.ones_like(eye).tril()
        eye = eye / eye.sum(-1, keepdim=True)
    elif name == "previous":
        eye = torch.cat([eye[:1], eye[:-1]])
    return eye[keys - queries :]


@dataclass(frozen=True)
class _Pattern:
    name: str

    def __call__(self, live: Tensor, scene: Scene) -> Tensor:
        if self.name in PATTERNS:
            return _plain(self.name, live)
        cells = scene.cell(self.name).to(live.dtype)[:, None]
        count = cells.sum(-1, keepdim=True)
        return torch.where(count > 0, cells / count.clamp_min(1), live)


def pattern(name: str) -> Value:
    """For the site "pattern": where each query looks.

    Args:
        name: "previous" (the first position looks at itself), "self", "first", "uniform" over what it may see, "none";
            or a cell of the lesson, such as "match": queries that have such a cell look only there, all others as they
            do.
    """
    return _Pattern(name)


@dataclass(frozen=True)
class _Scale:
    alpha: float

    def __call__(self, live: Tensor, scene: Scene) -> Tensor:
        return live * self.alpha


def scale(alpha: float) -> Value:
    """The live value times `alpha`; of "scores", a temperature."""
    return _Scale(alpha)


@dataclass(frozen=True)
class _Value:
    site: str
    along: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.site,)

    def __call__(self, live: Tensor, scene: Scene) -> Tensor:
        source = scene.seen[self.site]
        if not self.along:
            return source
        if self.along in PATTERNS:
            return _plain(self.along, source.new_empty(source.shape[1], source.shape[1])) @ source
        cells = scene.cell(self.along).to(source.dtype)
        count = cells.sum(-1, keepdim=True)
        return torch.where(count > 0, (cells / count.clamp_min(1)) @ source, source)


def value_of(site: str, along: str = "") -> Value:
    """What an earlier site of the same pass holds; at "L0.resid_pre" that is the embedding.

    Args:
        site: of the residual stream, [B, T, D].
        along: "previous" and the other patterns: every position gets the value of what it would look at; or a cell of
            the lesson: positions that have such a cell do, the others keep their own.
    """
    return _Value(site, along)


@dataclass(frozen=True)
class _Copied:
    head: str
    floor: float = 1e-6

    @property
    def reads(self) -> tuple[str, ...]:
        return (f"L{Site.parse(self.head).layer}.pattern",)

    def __call__(self, live: Tensor, scene: Scene) -> Tensor:
        lesson, batch = scene.known()
        row = scene.seen[self.reads[0]][:, Site.parse(self.head).index]
        if live.shape[1] != row.shape[1]:
            row = row[:, batch.at.unique()]
        said = lesson.said(batch)
        classes = torch.nn.functional.one_hot(said.clamp_min(0), live.shape[-1]) * (said >= 0)[..., None]
        return (row @ classes.to(row.dtype) + self.floor).log()


def copied(head: str) -> Value:
    """For the site "logits": perfect copying, the log of how much a head looks at positions that say each class."""
    return _Copied(head)
