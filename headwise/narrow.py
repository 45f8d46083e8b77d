"""Heads that see only the first tokens and the latest ones, simulated by masks: what a small KV cache would leave them.

Nothing is freed here. It is how a head's need of a full cache is measured, and the naive twin of what really frees it.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import Anatomy, anatomy, nearest_unit
from headwise.listen import Call, Handler, Place, listen
from headwise.site import Site, Unit
from headwise.task import Batch

# From the layer's number, its z [B, T, H, d] and a function that gives the narrow z of the same shape, to what goes on.
Change = Callable[[int, Tensor, Callable[[], Tensor]], Tensor | None]
# Where less than this share of the keys is in anyone's window, as behind a long past, the others are not read.
FEW = 0.5


@dataclass(frozen=True)
class Window:
    """The keys that a streaming head sees: the first `sink` tokens of its row and the last `recent`, its own included.

    Raises:
        ValueError: sink below 0 or recent below 1.
    """

    sink: int = 16
    recent: int = 64

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise ValueError(f"sink is {self.sink} and recent {self.recent}; allowed are sink >= 0 and recent >= 1.")

    def sees(self, queries: Tensor, keys: Tensor, pads: Tensor | None = None) -> Tensor:
        """Who sees whom: columns of queries [Q] and keys [K], columns of left padding [B] -> [B or 1, 1, Q, K]."""
        first = torch.zeros(1, dtype=torch.long, device=keys.device) if pads is None else pads.to(keys.device)
        first, rows = first[:, None, None, None], queries[None, None, :, None]
        seen = (keys <= rows) & (keys >= first) & ((keys < first + self.sink) | (keys > rows - self.recent))
        return seen if pads is None else seen | (keys == rows)


@contextmanager
def narrowed(
    model: PreTrainedModel,
    window: Window,
    change: Change,
    *,
    layers: Collection[int] | None = None,
    pads: Tensor | None = None,
    start: int = 0,
) -> Iterator[None]:
    """Inside the block `change` decides, layer by layer, what of its narrow z a layer goes on with.

    Args:
        window: what narrow heads see.
        change: called with the layer's number, z [B, T, H, d], and a function that computes the narrow z of all its
            heads from the same queries, keys and values; what it returns goes on, None leaves z as it is.
        layers: the attention layers that are asked; None for all of the main stack.
        pads: [B] columns of left padding of each row, None where there is none.
        start: queries in earlier columns see everything.

    Raises:
        ValueError: a layer whose attention does not call transformers' interface.
    """
    body = anatomy(model)
    chosen = body.layers if layers is None else sorted(layers)
    for layer in chosen:
        body.resolve(Site(layer, "q"))

    # One layer's is mostly the next one's.
    @lru_cache(maxsize=4)
    def sight(offset: int, first: int, length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Who sees whom, [B or 1, 1, Q, K], and the columns of keys that are seen at all, None for all or most."""
        queries = torch.arange(length, device=device) + offset
        keys = torch.arange(width, device=device) + first
        seen = window.sees(queries, keys, pads)
        if start > 0:
            seen = seen | (queries < start)[:, None] & (keys <= queries[:, None])
        columns = seen.any((0, 1, 2)).nonzero()[:, 0]
        return seen, columns if len(columns) < FEW * width else None

    def handler(value: Tensor, place: Place) -> Tensor | None:
        call, layer = place.call, place.site.layer
        if call is None or layer is None:
            return None

        def near() -> Tensor:
            seen, columns = sight(place.offset, place.keys, call.length, call.width, value.device)
            mask = _both(call, seen, value.dtype)
            return call.again(mask) if columns is None else call.again(mask[..., columns], columns)

        return change(layer, value, near)

    wanted: list[tuple[Site, Handler]] = [(Site(layer, "z"), handler) for layer in chosen]
    with listen(model, wanted):
        yield


def _both(call: Call, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask of the call, and on top of it what is seen."""
    mask = call.mask
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return seen
    mask = mask[..., : seen.shape[-1]]
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(dtype).min)


@contextmanager
def streaming(
    model: PreTrainedModel,
    units: Collection[str],
    window: Window | None = None,
    *,
    pads: Tensor | None = None,
    start: int = 0,
) -> Iterator[None]:
    """Inside the block these KV heads ("L5.G0") see only their window; all others see everything.

    Raises:
        ValueError: a unit that is no KV head of this model.
    """
    body = anatomy(model)
    by_layer: dict[int, set[int]] = {}
    for unit in checked(body, units):
        part = Unit.parse(unit)
        by_layer.setdefault(part.layer, set()).add(part.index)
    silent = {
        layer: torch.tensor([body.group(layer, head) in groups for head in range(body.heads(layer))])
        for layer, groups in by_layer.items()
    }

    def change(layer: int, z: Tensor, near: Callable[[], Tensor]) -> Tensor:
        return torch.where(silent[layer].to(z.device)[:, None], near(), z)

    with narrowed(model, window or Window(), change, layers=silent, pads=pads, start=start):
        yield


def kv_heads(model: PreTrainedModel) -> list[str]:
    """Every KV head of the main stack, as "L5.G0"."""
    body = anatomy(model)
    return [str(Unit("", layer, "G", i)) for layer in body.layers for i in range(body.kv_heads(layer))]


def checked(body: Anatomy, units: Collection[str]) -> list[str]:
    """The units, all of them KV heads of this model. Raises ValueError with the nearest one otherwise."""
    known = [str(Unit("", layer, "G", i)) for layer in body.layers for i in range(body.kv_heads(layer))]
    for unit in units:
        if unit not in known:
            raise ValueError(f"{unit!r} is not a KV head of this model.{nearest_unit(unit, known)}")
    return list(units)


def pads_of(batch: Batch) -> Tensor | None:
    """[B] columns of left padding of each row, None where there is none."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    return mask.shape[1] - mask.sum(-1)


def alone(batch: Batch, row: int) -> Batch:
    """One prompt of a batch of tokens, without its left padding.

    Raises:
        ValueError: the batch holds no tokens.
    """
    one = batch.take([row])
    width, mask = one.ids.shape[1], one.inputs.get("attention_mask")
    start = 0 if mask is None else int(mask[0].argmax())
    cut = {k: v[:, start:] if v.ndim > 1 and v.shape[1] == width else v for k, v in one.inputs.items()}
    spans = {name: edges - start for name, edges in one.spans.items()}
    return replace(one, inputs=cut, corrupt=None, against=None, at=one.at - start, spans=spans)
