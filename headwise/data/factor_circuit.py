"""Weights by hand that find the hidden factor of a prompt and answer by match and copy; see `HiddenFactors`.

The stream has fields that never mix. Layer 0 has a head for each factor, which gathers the labels of examples with the
same value; the MLP notes where these differ from the example's own label. Layer 1 gathers the notes of all examples,
and its MLP keeps of the item only the factors without a note. Layer 2 matches those and copies the label.
"""

from typing import cast

import torch
from torch import nn

from headwise.data.hidden_factors import HiddenFactors
from headwise.tiny import Tiny, TinyConfig

# What a match adds to a score, what one note takes from a factor, and how sure the answer is.
SURE, STRICT, LOUD = 25.0, 400.0, 12.0


class _Fields:
    """Where everything lies in the stream."""

    def __init__(self, lesson: HiddenFactors) -> None:
        f, v = lesson.factors, lesson.values
        sizes = {"one": 1, "example": 1, "item": f * v, "label": v, "same": f * v, "note": f, "notes": f}
        sizes |= {"kept": f * v, "said": v}
        self.at, self.width = {}, 0
        for name, size in sizes.items():
            self.at[name] = list(range(self.width, self.width + size))
            self.width += size

    def __getitem__(self, name: str) -> list[int]:
        return self.at[name]


def by_hand(lesson: HiddenFactors) -> Tiny:
    """A model of three layers with written weights, its in-weights component perfect."""
    fields, f, v = _Fields(lesson), lesson.factors, lesson.values
    shape = {"layers": 3, "heads": f, "head_dim": f * v + 1, "width": fields.width, "mlp": f * v, "norm": "none"}
    model = TinyConfig(**lesson.config(**shape)).build(0).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
        _read_in(model, lesson, fields)
        for factor in range(f):
            mine = slice(factor * v, (factor + 1) * v)
            _head(model, 0, factor, fields["item"][mine], fields["item"][mine], fields)
            _move(model, 0, factor, fields["label"], fields["same"][mine])
            up, down = model.blocks[0].mlp.up_proj.weight, model.blocks[0].mlp.down_proj.weight
            for unit, same, own in zip(
                range(mine.start, mine.stop), fields["same"][mine], fields["label"], strict=True
            ):
                up[unit, same], up[unit, own], down[fields["note"][factor], unit] = 1.0, -1.0, 1.0
        _head(model, 1, 0, [], [], fields)
        _move(model, 1, 0, fields["note"], fields["notes"])
        up, down = model.blocks[1].mlp.up_proj.weight, model.blocks[1].mlp.down_proj.weight
        for unit in range(f * v):
            up[unit, fields["item"][unit]], up[unit, fields["notes"][unit // v]] = 1.0, -STRICT
            down[fields["kept"][unit], unit] = 1.0
        _head(model, 2, 0, fields["kept"], fields["item"], fields)
        _move(model, 2, 0, fields["label"], fields["said"])
        model.readout.out.weight[:, fields["said"]] = LOUD * torch.eye(v)
    return model


def _read_in(model: Tiny, lesson: HiddenFactors, fields: _Fields) -> None:
    """Items as the values they are made of, labels as they are, and whether a label is there."""
    linear, v = model.embed, lesson.values
    assert isinstance(linear, nn.Linear)
    linear.bias[fields["one"]] = 1.0
    made = nn.functional.one_hot(lesson.made_of(torch.arange(lesson.items)), v).float()
    linear.weight[fields["item"], : lesson.items] = made.flatten(1).T
    first = lesson.items + lesson.factors
    linear.weight[fields["label"], first:] = torch.eye(v)
    linear.weight[fields["example"], first:] = 1.0


def _head(model: Tiny, layer: int, head: int, asks: list[int], has: list[int], fields: _Fields) -> None:
    """Looks at examples only, and most at those that have what it asks for."""
    part = model.blocks[layer].attention
    size = cast(int, model.config.head_dim)
    start = head * size
    loud = SURE * size**0.5
    for channel, (ask, have) in enumerate(zip(asks, has, strict=True)):
        part.q_proj.weight[start + channel, ask] = loud
        part.k_proj.weight[start + channel, have] = 1.0
    part.q_proj.weight[start + size - 1, fields["one"]] = 4 * loud
    part.k_proj.weight[start + size - 1, fields["example"]] = 1.0


def _move(model: Tiny, layer: int, head: int, source: list[int], target: list[int]) -> None:
    """Copies one field of what is looked at into another."""
    part, start = model.blocks[layer].attention, head * cast(int, model.config.head_dim)
    for channel, (a, b) in enumerate(zip(source, target, strict=True)):
        part.v_proj.weight[start + channel, a] = 1.0
        part.o_proj.weight[b, start + channel] = 1.0
