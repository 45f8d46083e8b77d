"""Observable Propagation: A Data-Efficient Approach to Uncover Feature Vectors in Transformers. Dunefsky and Cohan,
2023. arXiv:2312.16291

Row s059 of the mission.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.direct import predicts
from headwise.reader import FeatureMethod, Map, Reader, states
from headwise.site import head
from headwise.tap import tap
from headwise.task import Batch
from headwise.weights import Weights


@dataclass(frozen=True)
class ObsProp(FeatureMethod):
    """For each path of heads, the direction whose amount in what its first head attends to moves an observable.

    An observable is a sum of logits minus a sum of others, such as "she" minus "he". It is carried backwards through
    the OV circuits of a path. Norms leave its direction as it is and divide by their mean scale on the prompts, over
    the columns that are attended to, the first column apart (`found["scales"]`). A map gives what one attended column
    adds to the observable, in logits, where the heads attend to nothing else; `amounts` does so for the first as well.

    Fields:
        plus, minus: token ids of the observable; those of the batch's first answer and foil by default.
        chains: paths of two heads are followed for so many of the strongest last heads.
    """

    row: ClassVar[str] = "s059"
    needs: ClassVar[str] = "pronouns"
    plus: tuple[int, ...] = ()
    minus: tuple[int, ...] = ()
    chains: int = 4

    def fit(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Reader:
        """Maps "L5.H1" (the head writes to the logits) and "L2.H3>L5.H1" (the second reads the first's values).

        Raises:
            ValueError: no prompts, no observable, or a model whose weights cannot be read by head.
        """
        predicts(model, "Observable propagation")
        plus, minus = self._observable(batches)
        weights = Weights(model)
        scales = _scales(weights, batches)
        toward = weights.readout[list(plus)].sum(0) - (weights.readout[list(minus)].sum(0) if minus else 0)
        toward = toward.cpu() / scales["final"]
        maps = {}
        for layer in weights.layers:
            for index in range(weights.heads(layer)):
                maps[head(layer, index)] = _through(weights, layer, index, toward, scales)
        strongest = sorted(maps, key=lambda name: -float(maps[name].weight.norm()))[: self.chains]
        for name in strongest:
            layer, last = _place(name)
            for before in (n for n in weights.layers if n < layer):
                for index in range(weights.heads(before)):
                    one = _through(weights, before, index, maps[name].weight[:, 0], scales)
                    maps[f"{head(before, index)}>{head(layer, last)}"] = one
        found = {"plus": list(plus), "minus": list(minus), "scales": {k: round(v, 6) for k, v in scales.items()}}
        return Reader.of(self, model, batches, maps, outputs=("observable",), found=found)

    def _observable(self, batches: Sequence[Batch]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.plus:
            return self.plus, self.minus
        if not batches or batches[0].foil is None:
            raise ValueError("An observable needs token ids: give `plus` and `minus`, or prompts with answer and foil.")
        return (int(batches[0].answer[0, 0]),), (int(batches[0].foil[0, 0]),)


def _place(name: str) -> tuple[int, int]:
    layer, index = name.removeprefix("L").split(".H")
    return int(layer), int(index)


def _scales(weights: Weights, batches: Sequence[Batch]) -> dict[str, float]:
    """What each norm divides by, as harmonic means over the prompts.

    "L5" before the heads of a layer, over the columns that they attend to but the first, which is "L5 first"; "L5
    after" them and "final", over the columns that predict answers.
    """
    last = max(weights.body.blocks[weights.stack])
    sites = {f"L{n} after": (f"L{n}.attn", weights.post_norm(n)) for n in weights.layers}
    sites["final"] = (f"L{last}.resid_post", weights.final)
    used = {name: (site, norm) for name, (site, norm) in sites.items() if norm is not None}
    values = states(weights.model, batches, [site for site, _ in used.values()])
    device, dtype = weights.model.device, weights.model.dtype
    found = dict.fromkeys(sites, 1.0)
    for name, (site, norm) in used.items():
        found[name] = 1 / float((1 / norm.scale(values[site].to(device, dtype))).mean())
    return found | _attended(weights, batches)


def _attended(weights: Weights, batches: Sequence[Batch]) -> dict[str, float]:
    """What the norm before each layer's heads divides by, "L5 first" in the first column, "L5" in those behind it."""
    norms = {n: norm for n in weights.layers if (norm := weights.pre_norm(n)) is not None}
    found = {f"L{n}{which}": 1.0 for n in weights.layers for which in ("", " first")}
    inverse: dict[str, list[Tensor]] = defaultdict(list)
    for part in (part.to(weights.model.device) for batch in batches for part in batch.chunks(8)):
        first, seen = first_column(part), part.inputs.get("attention_mask", torch.ones_like(part.ids)) > 0
        with torch.no_grad(), tap(weights.model, *(f"L{n}.resid_pre" for n in norms)) as t:
            weights.model.base_model(**part.inputs)
        for n, norm in norms.items():
            values = 1 / norm.scale(t[f"L{n}.resid_pre"])[..., 0]
            inverse[f"L{n} first"].append(values[first])
            inverse[f"L{n}"].append(values[seen & ~first])
    for name, values in inverse.items():
        # Prompts of one token have a first column only.
        there = torch.cat(values) if sum(map(len, values)) else torch.cat(inverse[f"{name} first"])
        found[name] = 1 / float(there.mean())
    return found


def first_column(batch: Batch) -> Tensor:
    """[B, T] true for the first token of each prompt, behind its padding."""
    seen = batch.inputs.get("attention_mask", torch.ones_like(batch.ids)) > 0
    return seen & (seen.cumsum(1) == 1)


def amounts(reader: Reader, name: str, values: Tensor, first: Tensor) -> Tensor:
    """[B, T] what each column adds to the observable, where the first head of a path attends to nothing else.

    Attention rests on the first column, whose values are so large that the norm divides them by a scale of its own.

    Args:
        values: [B, T, D] at the map's site; first: [B, T] true for the first column of each prompt.
    """
    one, constant = reader[name], reader[name].bias.to(values.device)
    return (one(values)[..., 0] - constant) * column_scale(reader, one.site.split(".")[0], first) + constant


def column_scale(reader: Reader, layer: str, first: Tensor) -> Tensor:
    """[B, T] by what readings at a layer such as "L5" are multiplied: 1, in the first column the ratio of scales."""
    scales = reader.found["scales"]
    return torch.where(first, scales[layer] / scales[f"{layer} first"], 1.0)


def _through(weights: Weights, layer: int, index: int, toward: Tensor, scales: dict[str, float]) -> Map:
    """A functional of the residual stream behind a head, as one of what the head attends to."""
    ov, norm = weights.ov(layer, index), weights.pre_norm(layer)
    back = ov.B.cpu() @ toward / scales[f"L{layer} after"]
    constant = torch.zeros(ov.B.shape[0])
    if norm is not None:
        constant = constant + norm.shift.cpu() @ weights.v(layer, index).cpu()
    bias = weights.bias("v", layer, index)
    constant = constant if bias is None else constant + bias.cpu()
    vector = ov.A.cpu() @ back / scales[f"L{layer}"]
    return Map(f"L{layer}.resid_pre", vector[:, None], (constant @ back)[None])


def coupling(reader: Reader, names: Sequence[str] = ()) -> Tensor:
    """[n, n] coupling coefficients of feature vectors: how much of the second an amount 1 of the first brings along.

    Where activations lie evenly around the first vector y, a column with y . x = 1 has on average y' . x = (y . y') /
    (y . y). The table is therefore not symmetric.

    Args:
        names: maps of the reader, in this order; all by default.
    """
    vectors = torch.stack([reader[name].weight[:, 0] for name in names or reader.maps])
    inner = vectors @ vectors.T
    return inner / inner.diagonal()[:, None].clamp_min(1e-30)
