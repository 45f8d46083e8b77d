"""How queries mix values, as a method that takes the place of a model's attention inside a block and is gone after.

Every method of the attention room says two things of plain causal attention: `mix`, which computes z at the cost that
the method promises, and `pattern`, its naive twin, the [T, T] weights with which z is a mixture of the values. `use`
lets a model attend so, by transformers' own door: an attention and a mask function registered under their own name.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from headwise.anatomy import anatomy, nearest_unit
from headwise.attend import attend_openly
from headwise.method import Method
from headwise.probe import Layer, implementation
from headwise.site import Unit, head

if TYPE_CHECKING:
    import polars as pl

MIXING = "headwise_mixing_"
Note = Callable[[str, Tensor], None]


def quiet(name: str, value: Tensor) -> None:
    """A note that nobody keeps."""


@dataclass(frozen=True)
class AttentionMethod(Method):
    """Base of the attention room: queries [B, H, Tq, d], keys and values [B, Hkv, Tk, d] -> z [B, H, Tq, dv].

    A method sees causal attention without padding whose last query stands at the last key; `attend` takes care of the
    rest. Class attribute `resumes`: whether queries may be fewer than keys, as they are behind a KV cache.
    """

    resumes: ClassVar[bool] = True

    def mix(self, q: Tensor, k: Tensor, v: Tensor, scale: float, note: Note = quiet) -> Tensor:
        """Give z [B, H, Tq, dv]. `note(name, value)` may be told numbers [B, H] about what was done."""
        raise TypeError(f"{type(self).__name__} does not say how it mixes.")

    def pattern(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The naive twin: weights [B, H, Tq, Tk] with which `mix` equals weights @ values; every row sums to 1."""
        raise TypeError(f"{type(self).__name__} does not show its pattern.")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        note: Note = quiet,
    ) -> Tensor:
        """Mix values under a mask that is causal, with padding on the left or without.

        Args:
            q: [B, H, Tq, d]; k [B, Hkv, Tk, d]; v [B, Hkv, Tk, dv]; already rotated where the model rotates.
            mask: boolean [B or 1, 1, Tq, Tk], true where a key may be seen; None for causal attention over all keys.
            scale: factor of the scores, 1 / sqrt(d) unless given.
            note: is told numbers [b, H] about what was done.

        Returns:
            z [B, H, Tq, dv]; zero where a query is padding.

        Raises:
            ValueError: the mask is of another kind, or queries are fewer than keys and the method cannot resume.
        """
        return self._rows(q, k, v, visible(mask, q, k), lambda *qkv: self.mix(*qkv, _scale(q, scale), note))

    def naive(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        """The same as `attend`, from the pattern in the open."""

        def openly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = self.pattern(q, k, _scale(q, scale))
            return weights.to(v.dtype) @ per_head(v, q.shape[1])

        return self._rows(q, k, v, visible(mask, q, k), openly)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, seen: "Visible", mix: Callable[..., Tensor]) -> Tensor:
        """Rows with equal padding together, each without its padding."""
        length, keys = q.shape[2], seen.end - min(seen.pads)
        if not self.resumes and length < keys:
            raise ValueError(
                f"{type(self).__name__} needs the queries of all {keys} keys and got {length}: run the model without "
                "a KV cache (use_cache=False)."
            )
        k, v = k[:, :, : seen.end], v[:, :, : seen.end]
        if not any(seen.pads):
            return mix(q, k, v)
        z = v.new_zeros(*q.shape[:3], v.shape[-1])
        for pad in sorted(set(seen.pads)):
            rows = [row for row, own in enumerate(seen.pads) if own == pad]
            first = max(0, pad - (seen.end - length))
            z[rows, :, first:] = mix(q[rows, :, first:], k[rows, :, pad:], v[rows, :, pad:])
        return z


@dataclass(frozen=True)
class Visible:
    """What a causal mask leaves: `pads`, hidden columns on the left of each row, and `end`, one past the last key."""

    pads: list[int]
    end: int


def visible(mask: "Tensor | None", q: Tensor, k: Tensor) -> Visible:
    """Read a mask. Raises ValueError when it is not causal with padding on the left."""
    rows, length, keys = q.shape[0], q.shape[2], k.shape[2]
    if mask is None:
        return Visible([0] * rows, keys)
    columns = torch.arange(keys, device=mask.device)
    last = mask[:, 0, -1, :keys]
    end = int(torch.where(last, columns + 1, 0).max())
    pads = torch.where(last.any(-1), last.int().argmax(-1), end)[:, None, None]
    at = torch.arange(end - length, end, device=mask.device)[:, None]
    expected = (columns >= pads) & (columns <= at)
    real = at >= pads
    if mask.shape[1] > 1 or bool(((mask[:, 0, :, :keys] != expected) & real).any()):
        raise ValueError(
            "The attention mask is not causal with padding on the left (a sliding window, packed or right-padded "
            "rows?); methods of the attention room work under no other mask."
        )
    pads = pads.flatten().tolist()
    return Visible(pads * rows if len(pads) == 1 else pads, end)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, Hkv, T, d] once for each query head, [B, H, T, d]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def causal(length: int, keys: int, device: "torch.device | None" = None) -> Tensor:
    """[Tq, Tk] true where the key is not after the query; the last query stands at the last key."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)


def softmax_scores(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Plain attention weights [B, H, Tq, Tk] in float32 over the keys that are seen."""
    scores = (q @ per_head(k, q.shape[1]).transpose(2, 3)).float() * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@dataclass
class Notes:
    """What a method told while it was used: one list of numbers [b, H] for each name and layer."""

    told: dict[tuple[int, str], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    heads: dict[int, list[int]] = field(default_factory=dict)

    def table(self) -> "pl.DataFrame":
        """One row a head: unit, layer, index, and the mean of each number over prompts and passes."""
        import polars as pl

        names = list(dict.fromkeys(name for _, name in self.told))
        rows = []
        for layer, heads in sorted(self.heads.items()):
            means = {name: torch.cat(self.told[layer, name]).mean(0) for name in names if (layer, name) in self.told}
            for place, index in enumerate(heads):
                found = {name: float(value[place]) for name, value in means.items()}
                rows.append({"unit": head(layer, index), "layer": layer, "index": index, **found})
        return pl.DataFrame(rows)


@dataclass(eq=False)
class _Entry:
    """One method on one layer. `masks` remembers the last mask that was read, which all layers share."""

    method: AttentionMethod
    heads: list[int]
    layer: int
    notes: Notes
    masks: list

    def visible(self, mask: Tensor | None) -> Tensor | None:
        """The mask as booleans, without the work where it was just seen."""
        if mask is None or mask.dtype == torch.bool:
            return mask
        if not self.masks or self.masks[0]() is not mask:
            if bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()):
                raise ValueError(
                    f"The attention mask of layer {self.layer} carries biases; {type(self.method).__name__} would "
                    "leave them out."
                )
            self.masks[:] = [weakref.ref(mask), mask == 0]
        return self.masks[1]


_entered: "weakref.WeakKeyDictionary[nn.Module, list[_Entry]]" = weakref.WeakKeyDictionary()


def _attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: object,
) -> tuple:
    """The registered attention function. Past `original`, the signature is transformers' own."""
    entries = _entered.get(module)
    if not entries:
        if original == "eager":
            return attend_openly(module, query, key, value, attention_mask, lambda _, seen: seen, options)
        return ALL_ATTENTION_FUNCTIONS[original](module, query, key, value, attention_mask, **options)
    _check_options(entries[-1], module, options)
    scale = options.get("scaling")
    mask = entries[-1].visible(attention_mask)
    owner = {index: entry for entry in entries for index in entry.heads}
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    parts: list[tuple[list[int], Tensor]] = []
    for entry in dict.fromkeys([*map(owner.get, range(heads))]):
        mine = [index for index in range(heads) if owner.get(index) is entry]
        q, k, v = query, key, value
        if len(mine) < heads:
            shared = [index // group for index in mine]
            q, k, v = query[:, mine], key[:, shared], value[:, shared]
        if entry is None:
            whole = mask is None and query.shape[2] > 1
            z = scaled_dot_product_attention(q, k, v, mask, is_causal=whole, scale=scale)
        else:
            note = partial(_tell, entry)
            z = entry.method.attend(q, k, v, mask, scale, note)
        parts.append((mine, z))
    z = parts[0][1] if len(parts) == 1 else torch.cat([z for _, z in parts], 1)
    if len(parts) > 1:
        order = [index for mine, _ in parts for index in mine]
        z = z[:, torch.tensor(order).argsort().to(z.device)]
    return z.transpose(1, 2).contiguous(), None


def _tell(entry: _Entry, name: str, value: Tensor) -> None:
    entry.notes.told[entry.layer, name].append(value.detach().float().cpu())


def _check_options(entry: _Entry, module: nn.Module, options: dict) -> None:
    """Refuse what a method would leave out."""
    who = type(entry.method).__name__
    given = [name for name in ("softcap", "position_bias", "s_aux", "sinks") if options.get(name) is not None]
    given += ["sinks"] * (getattr(module, "sinks", None) is not None and "sinks" not in given)
    if given:
        raise ValueError(f"Layer {entry.layer} attends with {', '.join(given)}, which {who} would leave out.")
    if module.training and options.get("dropout"):
        raise ValueError(
            f"Layer {entry.layer} trains with attention dropout {options['dropout']}, which {who} does not do; set it "
            "to 0 in the config."
        )


def _renamed(name: str) -> str:
    """The name under which a model of this implementation is entered, registered on first use."""
    original = name.removeprefix(MIXING)
    if original not in ("eager", "sdpa"):
        raise ValueError(
            f"Methods of the attention room enter models that attend by 'eager' or 'sdpa', not by {original!r}; enter "
            "them before anything else."
        )
    if MIXING + original not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(MIXING + original, partial(_attend, original))
        AttentionMaskInterface.register(MIXING + original, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return MIXING + original


@contextmanager
def use(
    model: PreTrainedModel,
    method: AttentionMethod,
    layers: "Iterable[int] | None" = None,
    heads: "Iterable[str] | None" = None,
) -> Iterator[Notes]:
    """The model attends by this method inside the block, with gradients where they are asked for.

    Blocks may stand inside each other, with other methods for other heads; for the same head the innermost counts.

    Args:
        model: any model whose attention calls transformers' attention interface and is causal.
        method: a method of the attention room.
        layers: attention layers; None for all.
        heads: heads "L5.H1" or KV heads "L5.G0" (with all query heads that read them); None for all. Not with `layers`.

    Raises:
        ValueError: a layer or head that does not exist, or a model that cannot be entered.
    """
    body = anatomy(model)
    chosen = _chosen(model, layers, heads)
    notes, masks = Notes(), []
    entered: list[tuple[nn.Module, _Entry]] = []
    for number, indices in chosen.items():
        layer = body.layer(number)
        _check_layer(layer, method, model)
        notes.heads[number] = indices
        entered.append((layer.attention, _Entry(method, indices, number, notes, masks)))
    with implementation(model, _renamed):
        for module, entry in entered:
            _entered.setdefault(module, []).append(entry)
        try:
            yield notes
        finally:
            for module, entry in entered:
                _entered[module].remove(entry)


def _check_layer(layer: Layer, method: AttentionMethod, model: PreTrainedModel) -> None:
    if not layer.interface:
        raise ValueError(
            f"{type(model).__name__} never calls transformers' attention interface, so {type(method).__name__} cannot "
            "be put into it."
        )
    if not getattr(layer.attention, "is_causal", True):
        raise ValueError(
            f"{type(model).__name__} looks both ways; {type(method).__name__} is made for causal attention only."
        )


def _chosen(
    model: PreTrainedModel, layers: "Iterable[int] | None", heads: "Iterable[str] | None"
) -> dict[int, list[int]]:
    """Query heads by layer."""
    body = anatomy(model)
    if heads is None:
        numbers = body.layers if layers is None else list(layers)
        return {number: list(range(body.heads(number))) for number in numbers}
    if layers is not None:
        raise ValueError("Give layers or heads, not both: a head's name says its layer.")
    chosen: dict[int, set[int]] = {}
    for text in heads:
        unit = Unit.parse(text)
        if unit.letter not in ("H", "G") or unit.stack:
            raise ValueError(f"{text} is no attention head of the main stack; write L5.H1 or L5.G0.")
        count, kv = body.heads(unit.layer), body.kv_heads(unit.layer)
        have = count if unit.letter == "H" else kv
        if unit.index >= have:
            hint = nearest_unit(text, [str(Unit("", unit.layer, unit.letter, i)) for i in range(have)])
            raise ValueError(f"{text}: layer {unit.layer} has {unit.letter}0 to {unit.letter}{have - 1}.{hint}")
        group = count // kv
        own = [unit.index] if unit.letter == "H" else range(unit.index * group, (unit.index + 1) * group)
        chosen.setdefault(unit.layer, set()).update(own)
    return {number: sorted(found) for number, found in sorted(chosen.items())}
