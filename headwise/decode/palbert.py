"""PALBERT: Teaching ALBERT to Ponder. Balagansky and Gavrilov, 2022. arXiv:2204.03276

With PonderNet (Banino et al., 2021, arXiv:2107.05407), whose sampled exit is its baseline.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from headwise.method import Method
from headwise.skipping import Depths, exiting


@dataclass(frozen=True)
class PALBERT(Method):
    """An encoder learns at which layer to stop, and stops where it is likelier than not that it should have by then.

    Layer l stops with the chance lambda_l, if none before it did; the last layer takes what is left. PonderNet draws
    the layer from these chances; Q-exit takes the first layer at which they have summed up to `quantile`.

    Fields:
        quantile: chance at which Q-exit stops, above 0 and below 1.
        prior: chance to stop of the geometric prior, from which exits are kept near; 1 / prior layers are its mean.
        weight: of the distance to that prior in the loss.

    Raises:
        ValueError: a quantile or a prior that is no chance.
    """

    row: ClassVar[str] = "s155"
    quantile: float = 0.5
    prior: float = 0.3
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.quantile < 1 and 0 < self.prior < 1):
            raise ValueError(
                f"quantile is {self.quantile} and prior {self.prior}; allowed are chances above 0 and below 1."
            )

    def exits(self, chances: Tensor) -> Tensor:
        """[B, L] the chance that each layer is the one that stops, from lambdas [B, L]; rows sum to 1."""
        chances = torch.cat([chances[:, :-1], torch.ones_like(chances[:, :1])], 1)
        going = torch.cat([torch.ones_like(chances[:, :1]), (1 - chances[:, :-1]).cumprod(1)], 1)
        return chances * going

    def loss(self, chances: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Expected loss over exits, and the distance to the prior: lambdas [B, L], logits [B, L, C], labels [B]."""
        p = self.exits(chances)
        each = cross_entropy(logits.transpose(1, 2), labels[:, None].expand(-1, logits.shape[1]), reduction="none")
        prior = self.exits(torch.full_like(chances[:1], self.prior))
        far = (p * (p.clamp_min(1e-9).log() - prior.log())).sum(1)
        return (p * each).sum(1).mean() + self.weight * far.mean()

    def leaves(self, chances: Tensor) -> Tensor:
        """[B] the layer, from 0, at which Q-exit stops."""
        return (self.exits(chances).cumsum(1) > self.quantile).int().argmax(1)

    def drawn(self, chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B] the layer, from 0, that PonderNet draws."""
        return torch.multinomial(self.exits(chances), 1, generator=generator)[:, 0]

    @contextmanager
    def stopping(self, model: PreTrainedModel, heads: "PonderHeads") -> Iterator[Depths]:
        """Inside the block the encoder really stops: rows that left pass its later layers by.

        The last hidden state of a row is then that of its exit, and `heads.classify` of it is the answer.
        """
        kept: dict[str, Tensor] = {}

        def decide(number: int, before: Tensor, after: Tensor) -> Tensor:
            now = after[:, 0]
            chance = heads.chance(now, kept["before"] if number else torch.zeros_like(now))
            going = kept["going"] * (1 - chance) if number else 1 - chance
            kept["before"], kept["going"] = now, going
            return ((1 - going) > self.quantile)[:, None].expand(after.shape[:2])

        with exiting(model, decide) as depths:
            yield depths


class PonderHeads(nn.Module):
    """What reads the first token's state after each layer: the answer, and the chance to stop.

    Args:
        width: of the state. classes: of the answer.
        deep: three layers read the chance from the state and the one before it, as in the paper; else one layer reads
            it from the state alone, as PonderNet does.
    """

    def __init__(self, width: int, classes: int, deep: bool = True) -> None:
        super().__init__()
        self.answer, self.deep = nn.Linear(width, classes), deep
        first = (nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()) if deep else ()
        self.ponder = nn.Sequential(*first, nn.Linear(width, 1))

    def classify(self, states: Tensor) -> Tensor:
        """First tokens' states [..., D] -> logits [..., C]."""
        return self.answer(states)

    def chance(self, now: Tensor, before: Tensor) -> Tensor:
        """First tokens' states after a layer and after the one before it, [B, D] each -> lambda [B]."""
        return self.ponder(torch.cat([now, before], -1) if self.deep else now)[..., 0].sigmoid()

    def forward(self, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """`hidden_states` of an encoder, the embedding first -> lambdas [B, L], logits [B, L, C]."""
        tokens = torch.stack([state[:, 0] for state in states[1:]], 1)
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
        return self.chance(tokens, before), self.classify(tokens)
