"""One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings.
Gurioli et al., 2025. arXiv:2503.03008
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, normalize
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.method import Method
from headwise.progress import hidden
from headwise.skipping import skipping, stack_blocks

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ModularExits(Method):
    """Trains an encoder so that any of several depths gives good embeddings, deep ones teaching shallow ones.

    An embedding is the mean of the states after a layer over the tokens of a text, of length 1. Both texts of a pair
    should find each other among all of the batch, at every exit; later exits count more, as in the paper. An earlier
    exit also learns which texts the last one finds alike. The paper's projections, its language modelling and its loss
    over repositories are left out.

    Fields:
        exits: numbers of layers, the last one the deepest. One exit is plain fine-tuning.
        temperature: of the similarities. guide: weight of what the last exit teaches.
        length: tokens of a text at most.

    Raises:
        ValueError: exits that are none, or not in order.
    """

    row: ClassVar[str] = "s141"
    exits: tuple[int, ...] = (2, 4, 6)
    temperature: float = 0.05
    guide: float = 1.0
    length: int = 32

    def __post_init__(self) -> None:
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits are {self.exits}; allowed are numbers of layers from 1 on, in order, each once.")

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError where the model has fewer layers than an exit says."""
        have = len(stack_blocks(model))
        if self.exits[-1] > have:
            raise ValueError(f"An exit after layer {self.exits[-1]} was asked for; this model has {have} layers.")

    def loss(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """The loss of a batch: for every exit the embeddings [B, D] of the first and of the second texts."""
        total, weights = first[0].new_zeros(()), 0.0
        right = torch.arange(len(first[0]), device=first[0].device)
        alike = [one @ other.T / self.temperature for one, other in zip(first, second, strict=True)]
        for place, said in enumerate(alike):
            weight = self.exits[place] / self.exits[-1]
            here = (cross_entropy(said, right) + cross_entropy(said.T, right)) / 2
            if place < len(alike) - 1 and self.guide:
                for one, top in ((said, alike[-1].detach()), (said.T, alike[-1].detach().T)):
                    told = kl_div(one.log_softmax(1), top.log_softmax(1), log_target=True, reduction="batchmean")
                    here = here + self.guide * told / 2
            total, weights = total + weight * here, weights + weight
        return total / weights

    def train(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Pairs,
        *,
        steps: int = 60,
        batch: int = 24,
        rate: float = 1e-4,
        seed: int = 0,
    ) -> list[float]:
        """Train the encoder in place on pairs of texts that belong together; hands back the loss of every step.

        Raises:
            ValueError: fewer pairs than a batch, or fewer layers than an exit says.
        """
        self.check(model)
        if len(pairs) < batch or min(steps, batch) < 1:
            raise ValueError(
                f"{len(pairs)} pairs for {steps} batches of {batch} were given; allowed is a batch or more."
            )
        draw = torch.Generator().manual_seed(seed)
        learned = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
        losses = []
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of dropout
            for step in tqdm(range(steps), desc="exits", disable=hidden(), leave=False):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
                chosen = [pairs[place] for place in torch.randperm(len(pairs), generator=draw)[:batch].tolist()]
                sides = [self._all(model, tokenizer, [pair[side] for pair in chosen]) for side in (0, 1)]
                loss = self.loss(*sides)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
        model.eval()
        return losses

    def _all(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Tensor]:
        """The embeddings [B, D] at every exit, with gradients."""
        inputs = self._inputs(model, tokenizer, texts)
        states = model(**inputs, output_hidden_states=True).hidden_states
        return [_mean(states[number], inputs["attention_mask"]) for number in self.exits]

    @torch.no_grad()
    def embed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], number: int
    ) -> Tensor:
        """Embeddings [N, D] after so many layers; the later ones do not run. Raises ValueError where there are none."""
        blocks = list(stack_blocks(model))
        if not 1 <= number <= len(blocks):
            raise ValueError(f"There is no exit after layer {number}; this model has {len(blocks)} layers.")
        found = []
        with skipping(model, blocks[number:]):
            for start in range(0, len(texts), 64):
                inputs = self._inputs(model, tokenizer, texts[start : start + 64])
                found.append(_mean(model(**inputs).last_hidden_state, inputs["attention_mask"]))
        return torch.cat(found)

    def _inputs(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict:
        coded = tokenizer(texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        return {name: coded[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    real = mask[..., None].to(states.dtype)
    return normalize((states * real).sum(1) / real.sum(1), dim=-1)
