"""Eliciting Latent Predictions from Transformers with the Tuned Lens. Belrose et al., 2023. arXiv:2303.08112"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headwise.direct import predicts
from headwise.progress import hidden
from headwise.reader import FeatureMethod, Map, Reader, ending, layers_of, states
from headwise.task import Batch


@dataclass(frozen=True)
class TunedLens(FeatureMethod):
    """A logit lens behind an affine map a layer, trained to say what the model will say in the end.

    The map begins as the identity, so that without a step the lens is the logit lens. Every fourth column is held out;
    `found["kl"]` tells how far each layer is from the model's own prediction there, in nats, before and after.

    Fields:
        layers: which; all by default.
        steps: training steps; columns: columns in one; lr: step size of Adam, which falls to zero.
    """

    layers: tuple[int, ...] = ()
    steps: int = 200
    columns: int = 32
    lr: float = 1e-3
    seed: int = 0

    def fit(self, model: PreTrainedModel, batches: Sequence[Batch]) -> Reader:
        """One map a layer, "L5".

        Raises:
            ValueError: a layer that the model does not have, no prompts, fewer than 8 columns, or no language model.
        """
        predicts(model, "A tuned lens")
        numbers = layers_of(model, self.layers)
        last = f"L{max(layers_of(model, ()))}.resid_post"
        sites = [f"L{n}.resid_post" for n in numbers]
        values = states(model, batches, list(dict.fromkeys([*sites, last])))
        many = len(values[last])
        if many < 8:
            raise ValueError(
                f"A tuned lens cannot be trained and tested on {many} columns; give prompts with 8 or more."
            )
        held = torch.arange(many) % 4 == 3
        asking = [p for p in model.parameters() if p.requires_grad]
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            with ending(model) as end:
                maps, kl = self._train(end, {s: values[s] for s in sites}, values[last], held)
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)
        named = {f"L{n}": Map(site, *maps[site]) for n, site in zip(numbers, sites, strict=True)}
        found = {"kl": {f"L{n}": kl[site] for n, site in zip(numbers, sites, strict=True)}}
        return Reader.of(self, model, batches, named, ends="logits", found=found)

    def _train(
        self, end: Callable[[Tensor], Tensor], values: dict[str, Tensor], last: Tensor, held: Tensor
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, list[float]]]:
        width = last.shape[-1]
        shift = {site: torch.zeros(width, width, requires_grad=True) for site in values}
        bias = {site: torch.zeros(width, requires_grad=True) for site in values}

        def maps() -> dict[str, tuple[Tensor, Tensor]]:
            return {site: (torch.eye(width) + shift[site].detach(), bias[site].detach().clone()) for site in values}

        before = _apart(end, values, last, held, maps())
        optimizer = torch.optim.Adam([*shift.values(), *bias.values()], lr=self.lr)
        draw = torch.Generator().manual_seed(self.seed)
        pool = (~held).nonzero()[:, 0]
        for step in tqdm(range(self.steps), desc="tuned lens", disable=hidden(), leave=False):
            optimizer.param_groups[0]["lr"] = self.lr * (1 - step / self.steps)
            rows = pool[torch.randint(len(pool), (self.columns,), generator=draw)]
            with torch.no_grad():
                goal = end(last[rows]).log_softmax(-1)
            optimizer.zero_grad()
            for site, value in values.items():
                # One layer at a time: the logits of all of them at once would be many gigabytes.
                given = value[rows] + value[rows] @ shift[site] + bias[site]
                _kl(goal, end(given)).mean().backward()
            optimizer.step()
        after = _apart(end, values, last, held, maps())
        return maps(), {site: [before[site], after[site]] for site in values}


def _kl(goal: Tensor, logits: Tensor) -> Tensor:
    """[N] nats by which the lens is from the goal [N, V], both as log-probabilities."""
    return (goal.exp() * (goal - logits.log_softmax(-1))).sum(-1)


@torch.no_grad()
def _apart(end: Callable, values: dict, last: Tensor, held: Tensor, maps: dict) -> dict[str, float]:
    rows = held.nonzero()[:64, 0]
    goal = end(last[rows]).log_softmax(-1)
    ends = {site: end(Map(site, *maps[site])(value[rows])) for site, value in values.items()}
    return {site: float(_kl(goal, logits).mean()) for site, logits in ends.items()}
