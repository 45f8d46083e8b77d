"""The exact effect of every unit, with the prefix shared.

Changing head h of layer l leaves layers 0 to l-1 as they were. So the residual stream is cached once, and each variant
starts at layer l from the cache: over all layers this halves the work. The logits are computed only at the columns that
hold answers. `share_prefix=False` is the naive twin: a full forward pass for every unit.

Matrix products take the fastest kernel; with `dtype="bfloat16"` the difference of a variant from the unchanged run is
rounded, which keeps the order of the heads (docs/bench.md) but not the last digits.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.anatomy import Anatomy, anatomy
from headwise.matmul import Products, fast_matmul
from headwise.narrow import Window, narrowed, pads_of
from headwise.progress import hidden
from headwise.site import Site, Unit
from headwise.tap import Place, listen, tap
from headwise.task import Batch, Metric, answer_logits, logprob

log = logging.getLogger(__name__)

HOWS = ("zero", "mean", "resample", "restore")


@dataclass(frozen=True)
class Effects:
    """What happened to a metric, prompt by prompt.

    Attributes:
        base: [B] the metric of the run that is changed (clean prompts; corrupt prompts for restore).
        other: [B] the metric of the opposite prompts, or None when the batch has none.
        changed: {unit: [B]} the metric with that unit changed.
        how: zero, mean, resample, restore or stream.
    """

    base: Tensor
    other: Tensor | None
    changed: dict[str, Tensor]
    how: str

    def of(self, unit: str) -> Tensor:
        """[B] what the unit is worth: the loss when it is taken away, or the gain when it is restored."""
        return self.changed[unit] - self.base if self.how == "restore" else self.base - self.changed[unit]

    @property
    def gap(self) -> Tensor | None:
        """[B] clean minus corrupt: what there is to lose or to restore."""
        if self.other is None:
            return None
        return self.other - self.base if self.how == "restore" else self.base - self.other


def effects(
    model: PreTrainedModel,
    batch: Batch,
    units: list[str] | None = None,
    how: "str | Window" = "mean",
    metric: Metric = logprob,
    *,
    share_prefix: bool = True,
    prompts: int = 8,
    variants: int = 1,
    dtype: str = "float32",
    label: str | None = None,
) -> Effects:
    """Change one unit at a time and measure.

    Args:
        units: heads ("L5.H1"), KV heads with all that read them ("L5.G0") and sublayers ("L5.mlp", "L5.attn"); None for
            every head of the main stack.
        how: "zero"; "mean", over this batch's prompts and columns; "resample", the value of the corrupt prompt (or of
            the next prompt where there are none); "restore", the clean value into the corrupt run; or a `Window`, what
            it is when it sees only that.
        prompts: prompts in one forward pass; variants: units changed side by side, as further rows of it.
        dtype: "float32"; or "bfloat16", which rounds each variant's difference from the unchanged run: faster, for the
            memory of what enters and leaves the linear layers in one part.
        label: text of the progress bar, None for no bar.

    Raises:
        ValueError: an unknown `how` or `dtype`, a unit that does not exist, or restore without corrupt prompts.
    """
    if how not in HOWS and not isinstance(how, Window):
        raise ValueError(f"{how!r} is not a way to change a unit: {', '.join(HOWS)}.")
    body = anatomy(model)
    units = body.units() if units is None else units
    sites = {unit: _site(body, unit) for unit in units}
    batch = (batch.flipped() if how == "restore" else batch).to(model.device)
    if isinstance(how, Window):
        batch = replace(batch, corrupt=None)
    parts: list[Effects] = []
    bar = tqdm(total=len(units) * -(-len(batch) // prompts), desc=label, disable=label is None or hidden(), leave=False)
    with torch.no_grad(), fast_matmul(model, dtype) as products, bar:
        means = _means(model, batch, sites, prompts) if how == "mean" else {}
        for chunk in _even_chunks(batch, prompts, how):
            job = (chunk, sites, how, metric, means, share_prefix, variants, bar.update)
            parts.append(_scan_chunk(model, body, products, *job))
            products.forget()
    other = None if parts[0].other is None else torch.cat([p.other for p in parts])
    changed = {unit: torch.cat([p.changed[unit] for p in parts]) for unit in units}
    return Effects(torch.cat([p.base for p in parts]), other, changed, parts[0].how)


def _even_chunks(batch: Batch, prompts: int, how: "str | Window") -> Iterator[Batch]:
    """Parts of the batch; resampling from the next prompt needs at least two in each part."""
    for chunk in batch.chunks(prompts):
        if how == "resample" and batch.corrupt is None and len(chunk) < 2:
            raise ValueError(f"Resampling needs corrupt prompts, or at least 2 prompts a part; here is {len(chunk)}.")
        yield chunk


def _site(body: Anatomy, unit: str) -> Site:
    part = Unit.parse(unit)
    if part.letter not in ("H", "G", "mlp", "attn"):
        raise ValueError(f"{unit}: effects are measured of heads (L5.H1, L5.G0) and sublayers (L5.mlp, L5.attn).")
    kind, index = ("z", part.index) if part.letter in ("H", "G") else (part.letter, None)
    if part.letter == "G":
        body.resolve(Site(part.layer, "v", part.index, stack=part.stack))
        index = part.index * _wide(body, unit)
    return body.resolve(Site(part.layer, kind, index, stack=part.stack))[0]


def _wide(body: Anatomy, unit: str) -> int:
    """How many query heads a unit is: all that read it where it is a KV head."""
    part = Unit.parse(unit)
    layer = body.layer(part.layer, part.stack)
    return layer.heads // layer.kv_heads if part.letter == "G" else 1


def _means(model: PreTrainedModel, batch: Batch, sites: dict[str, Site], prompts: int) -> dict[Site, Tensor]:
    """Mean value of each place over the real columns of all prompts."""
    sums: dict[Site, Tensor] = {}
    count = 0.0
    for chunk in batch.chunks(prompts):
        mask = chunk.inputs.get("attention_mask")

        def reduce(value: Tensor, mask: Tensor | None = mask) -> Tensor:
            if mask is None or mask.shape != value.shape[:2]:
                return value.sum((0, 1))
            return (value * mask.view(*mask.shape, *[1] * (value.ndim - 2)).to(value.dtype)).sum((0, 1))

        whole = {site.whole for site in sites.values()}
        with torch.no_grad(), tap(model, *whole, reduce=reduce) as t:
            model.base_model(**_for_base(model, chunk.inputs))
        for site in whole:
            sums[site] = sums.get(site, 0) + t[site]
        # A stack whose columns are not those of the mask (images, encoders) counts all of its own.
        count += float(mask.sum()) if mask is not None else 0
    if count == 0:
        with torch.no_grad(), tap(model, *sums) as t:
            model.base_model(**_for_base(model, batch.take(slice(0, 1)).inputs))
        return {site: sums[site] / (len(batch) * t[site].shape[1]) for site in sums}
    return {site: value / count for site, value in sums.items()}


def _for_base(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if k != "labels"}


def _scan_chunk(
    model: PreTrainedModel,
    body: Anatomy,
    products: Products,
    chunk: Batch,
    sites: dict[str, Site],
    how: "str | Window",
    metric: Metric,
    means: dict[Site, Tensor],
    share_prefix: bool,
    variants: int,
    advance: Callable[[int], object],
) -> Effects:
    whole = list(dict.fromkeys(site.whole for site in sites.values()))
    starts = list(dict.fromkeys(Site(site.layer, "resid_pre") for site in whole if site.stack == ""))
    other = None
    source: dict[Site, Tensor] = {}
    if chunk.corrupt is not None:
        with tap(model, *whole) as t:
            other = metric(answer_logits(model, chunk, chunk.corrupt), chunk)
        source = {site: t[site] for site in whole}
    narrow = _narrow(model, chunk, whole, how, source) if isinstance(how, Window) else nullcontext()
    with tap(model, *starts, *whole) as t, noting_tuples(body) as tuples, products.remember(), narrow:
        logits = answer_logits(model, chunk)
    base = metric(logits, chunk)
    prefix = {site: t[site] for site in starts}
    if how == "resample" and chunk.corrupt is None:
        source = {site: t[site].roll(1, 0) for site in whole}
    share_prefix = share_prefix and len(starts) > 0 and all(site.stack == "" for site in whole)
    run = _Runner(model, body, chunk, metric, {s.layer: v for s, v in prefix.items()} if share_prefix else {}, tuples)
    if share_prefix and not run.agrees(base):
        log.warning("%s cannot be started from a middle layer; scanning with full forward passes.", body.model_type)
        run = replace(run, prefix={})
    changed: dict[str, Tensor] = {}
    by_place: dict[Site, list[str]] = {}
    for unit, site in sites.items():
        by_place.setdefault(site.whole, []).append(unit)
    for place, names in by_place.items():
        new = means.get(place) if how == "mean" else source.get(place) if how != "zero" else None
        for start in range(0, len(names), variants):
            group = names[start : start + variants]
            wide = [_wide(body, unit) for unit in group]
            for unit, value in zip(group, run([sites[u] for u in group], new, wide), strict=True):
                changed[unit] = value
            advance(len(group))
    name = "stream" if isinstance(how, Window) else how
    return Effects(base.cpu(), None if other is None else other.cpu(), changed, name)


def _narrow(
    model: PreTrainedModel, chunk: Batch, whole: list[Site], how: Window, source: dict[Site, Tensor]
) -> AbstractContextManager[None]:
    """While the unchanged run passes, `source` takes what each layer's z would be if its heads saw only a window."""
    if any(site.kind != "z" or site.stack for site in whole):
        raise ValueError("Only heads of the main stack can be given a window: L5.H1 or L5.G0.")

    def keep(layer: int, _: Tensor, near: Callable[[], Tensor]) -> None:
        source[Site(layer, "z")] = near()

    layers = {site.layer for site in whole if site.layer is not None}
    return narrowed(model, how, keep, layers=layers, pads=pads_of(chunk))


@dataclass(frozen=True)
class _Runner:
    """Runs variants of one part of a batch, from the cached residual where there is one."""

    model: PreTrainedModel
    body: Anatomy
    chunk: Batch
    metric: Metric
    prefix: dict[int, Tensor]
    tuples: set[int]

    def agrees(self, base: Tensor) -> bool:
        """Whether starting from the deepest cached residual gives the metric of the full run."""
        return starts(lambda: self._measure(1, [], max(self.prefix))[0], base.cpu(), self.model.dtype)

    def __call__(self, sites: list[Site], new: Tensor | None, wide: list[int]) -> list[Tensor]:
        """The metric [B] of each variant: `wide` heads from that variant's site on replaced by `new` (None: zero)."""
        rows = len(self.chunk)
        axis = 2 if sites[0].kind == "z" else None

        def change(value: Tensor, _: Place) -> Tensor:
            out = value.clone()
            for i, site in enumerate(sites):
                part = out[i * rows : (i + 1) * rows]
                given = new
                if axis is not None:
                    part = part.narrow(axis, site.index, wide[i])
                    given = None if new is None else new.narrow(new.ndim - 2, site.index, wide[i])
                if given is None:
                    part.zero_()
                else:
                    part.copy_(given.to(part.dtype))
            return out

        return self._measure(len(sites), [(sites[0].whole, change)], sites[0].layer)

    def _measure(self, copies: int, wanted: list, layer: int) -> list[Tensor]:
        inputs = {k: v.repeat(copies, *[1] * (v.ndim - 1)) for k, v in self.chunk.inputs.items()}
        batch = self.chunk if copies == 1 else self.chunk.take(torch.arange(len(self.chunk)).repeat(copies))
        begin = nullcontext()
        if self.prefix:
            begin = starting(self.model, layer, self.prefix[layer].repeat(copies, 1, 1), self.tuples)
        with begin, listen(self.model, wanted):
            values = self.metric(answer_logits(self.model, batch, inputs), batch)
        return list(values.cpu().split(len(self.chunk)))


@contextmanager
def noting_tuples(body: Anatomy) -> Iterator[set[int]]:
    """Numbers of the blocks whose forward returns a tuple rather than a tensor, noted while the model runs."""
    found: set[int] = set()

    def note(number: int) -> Callable[[nn.Module, object, object], None]:
        return lambda _module, _args, output: found.add(number) if isinstance(output, tuple) else None

    hooks = [block.register_forward_hook(note(number)) for number, block in body.blocks[""].items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def skipping(body: Anatomy, layer: int | None, tuples: set[int], last: int | None = None) -> Iterator[None]:
    """Blocks of the main stack below `layer`, and above `last`, hand their input on; afterwards they are as before."""
    low, high = (-1 if layer is None else layer), (max(body.blocks[""]) if last is None else last)
    blocks = {n: b for n, b in body.blocks[""].items() if not low <= n <= high}
    before: dict[int, object] = {n: b.__dict__.get("forward") for n, b in blocks.items()}
    for number, block in blocks.items():
        block.forward = _pass_on_tuple if number in tuples else _pass_on
    try:
        yield
    finally:
        for n, block in blocks.items():
            _restore(block, before[n])


@contextmanager
def starting(model: PreTrainedModel, layer: int, value: Tensor, tuples: set[int]) -> Iterator[None]:
    """Inside the block the main stack begins at `layer`, which `value` [B, T, D] enters."""
    site = Site(layer, "resid_pre")
    with skipping(anatomy(model), layer, tuples), listen(model, [(site, lambda given, _: value.to(given.dtype))]):
        yield


def starts(run: Callable[[], Tensor], whole: Tensor, dtype: torch.dtype) -> bool:
    """Whether a run that begins in the middle gives what the whole run gave; some models cannot be begun there."""
    try:
        again = run()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as problem:
        log.debug("starting from a middle layer failed: %s", problem)
        return False
    return torch.allclose(again, whole, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 5e-2)


def _restore(block: nn.Module, forward: object) -> None:
    if forward is None:
        del block.forward
    else:
        block.forward = forward


def _pass_on(hidden_states: Tensor, *_args: object, **_options: object) -> Tensor:
    return hidden_states


def _pass_on_tuple(hidden_states: Tensor, *_args: object, **_options: object) -> tuple[Tensor]:
    return (hidden_states,)
