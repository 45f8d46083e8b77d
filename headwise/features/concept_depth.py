"""Exploring Concept Depth: How Large Language Models Acquire Knowledge at Different Layers? Jin et al., 2024.
arXiv:2404.07066

Row s140 of the mission. The control task is that of Hewitt and Liang, 2019 (arXiv:1909.03368).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.reader import FeatureMethod, Map, Reader, layers_of, states
from headwise.task import Batch


@dataclass(frozen=True)
class ConceptDepth(FeatureMethod):
    """A linear probe a layer for each concept, and the depth at which it knows what it will know.

    A batch is a concept: its answers are the labels, its last column `at` is what is read, `about["concept"]` names it.
    Where `about["groups"]` has a number a prompt, those of one number are all fitted on or all tested on.
    `found` holds for each the accuracy on held-out prompts by layer, that of probes for shuffled labels ("control"),
    and "jumps" and "converges": the first layer whose accuracy is 1.1 times that of the layer below it, and the first
    whose accuracy is within `within` of the best of all layers, as shares of the depth (None where it never jumps).

    Fields:
        share: prompts on which probes are fitted, drawn at random; the rest tests them.
        ridge: weight of the penalty, in units of the mean variance of a feature.
        control: shuffled labellings, over which the control is a mean.
    """

    row: ClassVar[str] = "s140"
    share: float = 0.6
    ridge: float = 1.0
    within: float = 0.03
    control: int = 4
    seed: int = 0

    def fit(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Reader:
        """Maps "concept/L5" to one number a class; tables "concept/right" [layers, tested prompts], 1 where right.

        Raises:
            ValueError: no prompts, a concept with fewer than two classes, or two concepts of one name.
        """
        numbers = layers_of(model, ())
        sites = [f"L{n}.resid_post" for n in numbers]
        maps, tables, found = {}, {}, {}
        for batch in batches:
            name = str(batch.about.get("concept", batch.about.get("task", "concept")))
            classes, labels = batch.answer[:, 0].cpu().unique(return_inverse=True)
            if len(classes) < 2 or name in found:
                raise ValueError(
                    f"The concept {name!r} has {len(classes)} class on these prompts, or stands twice; a probe needs "
                    "two classes or more, and a name of its own."
                )
            last = Batch(batch.inputs, at=batch.at[:, -1:].clone(), answer=batch.answer[:, -1:])
            values = states(model, [last], sites)
            draw = torch.Generator().manual_seed(self.seed)
            groups = torch.tensor(batch.about.get("groups", list(range(len(labels)))))
            order = groups.unique()[torch.randperm(len(groups.unique()), generator=draw)]
            cut = min(max(1, round(self.share * len(order))), len(order) - 1)
            seen, unseen = (torch.isin(groups, part).nonzero()[:, 0] for part in (order[:cut], order[cut:]))
            shuffled = [labels[torch.randperm(len(labels), generator=draw)] for _ in range(self.control)]
            right, chance = [], []
            for number, site in zip(numbers, sites, strict=True):
                probe = _Probe(values[site], seen, self.ridge)
                weight, bias = probe.fitted(labels, len(classes))
                maps[f"{name}/L{number}"] = Map(site, weight, bias)
                right.append(_hits(values[site], weight, bias, labels, unseen))
                others = [_hits(values[site], *probe.fitted(one, len(classes)), one, unseen) for one in shuffled]
                chance.append(float(torch.stack(others).float().mean()) if others else float("nan"))
            tables[f"{name}/right"] = torch.stack(right).to(torch.uint8)
            accuracy = tables[f"{name}/right"].float().mean(1)
            found[name] = {
                "layers": numbers,
                "classes": classes.tolist(),
                "accuracy": accuracy.tolist(),
                "control": chance,
                **depths(accuracy, self.within),
            }
        if not found:
            raise ValueError("There are no prompts to read activations on; give at least one batch.")
        return Reader.of(self, model, batches, maps, tables=tables, found=found)


class _Probe:
    """Ridge regression onto plus and minus one a class, solved over prompts, of which there are fewer than features."""

    def __init__(self, values: Tensor, seen: Tensor, ridge: float) -> None:
        self.mean = values[seen].mean(0)
        self.scale = values[seen].std(0).clamp_min(1e-6)
        self.given = (values[seen] - self.mean) / self.scale
        self.seen = seen
        gram = self.given @ self.given.T
        self.inverse = torch.linalg.inv(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)))

    def fitted(self, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Weight [D, classes] and bias [classes] on values as the model has them."""
        goal = torch.nn.functional.one_hot(labels[self.seen], classes).float() * 2 - 1
        middle = goal.mean(0)
        weight = self.given.T @ (self.inverse @ (goal - middle)) / self.scale[:, None]
        return weight, middle - self.mean @ weight


def _hits(values: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    return (values[rows] @ weight + bias).argmax(-1) == labels[rows]


def depths(accuracy: Tensor, within: float = 0.03) -> dict[str, float | None]:
    """Where accuracies by layer [L] first jump, and first are near their best: shares of the depth in 0 to 1."""
    many = len(accuracy)
    rise = accuracy[1:] / accuracy[:-1].clamp_min(1e-9)
    jumps = (rise >= 1.1).nonzero()
    near = (accuracy >= accuracy.max() - within).nonzero()
    return {
        "jumps": float(jumps[0, 0] + 1) / max(many - 1, 1) if len(jumps) else None,
        "converges": float(near[0, 0]) / max(many - 1, 1),
    }
