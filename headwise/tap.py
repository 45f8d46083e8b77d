"""Read values at sites of a running model: z and most others under its own attention, patterns in the open."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.listen import Handler, Place, listen
from headwise.site import Site, head_axis, time_axis

if TYPE_CHECKING:
    from headwise.task import Batch


class Tap:
    """Values captured while a model ran; see `tap`."""

    def __init__(self, sites: list[Site]) -> None:
        self._values: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def __getitem__(self, address: "str | Site") -> Tensor:
        """The value of the last forward pass at a site; a head's own slice when the address names one."""
        site = Site.parse(address)
        values = self._all(site)
        if not values:
            raise ValueError(f"{address} was not reached: no forward pass ran inside the tap.")
        value = values[-1]
        if site in self._values:
            return value
        if site.position is not None and replace(site, position=None) not in self._values:
            value = value.narrow(time_axis(site), site.position % value.shape[time_axis(site)], 1)
        return value if site.index is None else value.select(head_axis(site), site.index)

    def _all(self, site: Site) -> list[Tensor]:
        for key in (site, site.whole):
            if key in self._values:
                return self._values[key]
        have = ", ".join(map(str, list(self._values)[:4]))
        near = difflib.get_close_matches(str(site), list(map(str, self._values)), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{site} was not tapped; this tap reads {have}{' ...' if len(self._values) > 4 else ''}.{hint}"
        )

    def every(self, address: "str | Site") -> list[Tensor]:
        """The values of all forward passes, for a tap made with `every=True`."""
        return list(self._all(Site.parse(address)))

    def by_layer(self, kind: str, stack: str = "") -> dict[int, Tensor]:
        """The values of one kind by real layer number."""
        chosen = {s.layer: v[-1] for s, v in self._values.items() if s.kind == kind and s.stack == stack and v}
        return {layer: value for layer, value in chosen.items() if layer is not None}

    def stack(self, kind: str, stack: str = "") -> Tensor:
        """The values of one kind, first axis the tapped layers. Raises ValueError when their shapes differ."""
        values = self.by_layer(kind, stack)
        if len({v.shape for v in values.values()}) != 1:
            raise ValueError(f"{kind} has {len(values)} layers of different shapes here; use by_layer({kind!r}).")
        return torch.stack(list(values.values()))


@contextmanager
def tap(
    model: PreTrainedModel,
    *sites: "str | Site",
    positions: list[int] | None = None,
    rows: list[int] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    grad: bool = False,
    every: bool = False,
) -> "Iterator[Tap]":
    """Read values at sites while the model runs inside the block.

    Shapes: z [B, T, H, d]; q [B, H, T, d]; k, v [B, Hkv, T, d]; scores, pattern [B, H, Tq, Tk]; resid_pre,
    resid_mid, resid_post, attn, mlp [B, T, D]; neurons [B, T, F]. z, q, k, v leave SDPA in place; scores
    and pattern need softmax in the open, in their layers only.

    Args:
        sites: addresses such as "z" (all layers), "L5.pattern", "L9.H6.z", "L3.mlp@-1".
        positions: only these columns (query columns for scores and pattern).
        rows: only these prompts.
        reduce: applied to each value as it passes, so that the whole is never held.
        grad: keep the values attached to the graph (then rows, positions and heads must be all of them).
        every: keep every forward pass rather than the last.

    Raises:
        ValueError: a site that this model does not offer.
    """
    body = anatomy(model)
    chosen = list(dict.fromkeys(site for text in sites for site in body.resolve(text)))
    if not chosen:
        raise ValueError("A tap needs at least one site, for example 'z' or 'L5.pattern'.")
    taken = Tap(chosen)

    def reader(site: Site) -> Handler:
        def read(value: Tensor, place: Place) -> Tensor | None:
            if grad and torch.is_grad_enabled() and not value.requires_grad:
                value.requires_grad_()
            kept = _select(value if grad else value.detach(), site, place, rows, positions)
            if kept is None:
                return None
            store = taken._values[site]
            if not every:
                store.clear()
            store.append(kept if reduce is None else reduce(kept))
            # With grad, what was captured must be what the model goes on with.
            return value if grad else None

        return read

    with listen(model, [(site, reader(site)) for site in chosen]):
        yield taken


def _select(
    value: Tensor, site: Site, place: Place, rows: list[int] | None, positions: list[int] | None
) -> Tensor | None:
    """The chosen part of a value; None when this pass has none of the chosen columns."""
    wanted = [site.position] if site.position is not None else positions
    columns = place.columns(wanted, value.shape[time_axis(site)])
    if columns == [] and wanted:
        return None
    if rows is not None:
        value = value[rows]
    if columns is not None:
        value = value.index_select(time_axis(site), torch.tensor(columns, device=value.device, dtype=torch.long))
    return value if site.index is None else value.select(head_axis(site), site.index)


def per_row(
    model: PreTrainedModel,
    batch: "Batch",
    site: str,
    reduce: Callable[[Tensor], Tensor],
    rows: int = 8,
) -> dict[int, Tensor]:
    """One number per prompt and head: runs the batch in parts and reduces each layer's value while it passes.

    Args:
        site: for example "pattern".
        reduce: from a value such as pattern [b, H, Tq, Tk] to [b, H].

    Returns:
        {layer: [B, H]} on the CPU in float32.
    """
    kind, stack = Site.parse(site).kind, Site.parse(site).stack
    parts: dict[int, list[Tensor]] = {}
    for part in batch.chunks(rows):
        with torch.no_grad(), tap(model, site, reduce=reduce) as t:
            model.base_model(**part.to(model.device).inputs)
        for layer, value in t.by_layer(kind, stack).items():
            parts.setdefault(layer, []).append(value.float().cpu())
    return {layer: torch.cat(values) for layer, values in parts.items()}
