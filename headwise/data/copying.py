"""Can Mamba Always Enjoy the "Free Lunch"? Ren et al., 2024. arXiv:2410.03810

Row s002 of the mission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape
from headwise.task import Batch


@dataclass(frozen=True)
class Copying(Lesson):
    """Random letters, a sign, and the same letters again: each must be said before it comes.

    Corrupt prompts hold other letters before the sign.

    Fields:
        letters: how many there are. The sign is one more token.
        count: letters in a prompt, always the same number.
    """

    row: ClassVar[str] = "s002"
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {"copying": {"source": 1.0}}

    letters: int = 16
    count: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.letters < 2 or self.count < 1:
            raise ValueError(
                f"{self.count} letters out of {self.letters} cannot be copied; allowed are 1 or more out of 2 or more."
            )

    @property
    def shape(self) -> Shape:
        """Tokens: letters, then the sign."""
        return Shape(2 * self.count, self.letters, vocab_size=self.letters + 1)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Spans: "source", the letters that are copied, and "copy", where they are said."""
        letters, others = torch.randint(self.letters, (2, n, self.count), generator=draw)
        sign = torch.full((n, 1), self.letters)
        at = torch.arange(self.count, 2 * self.count).expand(n, -1)
        ends = torch.tensor([[0, self.count], [self.count, 2 * self.count]])
        return Batch(
            inputs={"input_ids": torch.cat([letters, sign, letters[:, :-1]], 1)},
            corrupt={"input_ids": torch.cat([others, sign, letters[:, :-1]], 1)},
            at=at,
            answer=letters,
            spans={"source": ends[:1].expand(n, -1), "copy": ends[1:].expand(n, -1)},
        )

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """The cell "source": from where a letter is said to where it stood; "previous": to the token before."""
        at = torch.arange(2 * self.count, device=batch.at.device)
        away = at[:, None] - at
        return {"source": ((away == self.count) & (at[:, None] >= self.count))[None], "previous": (away == 1)[None]}

    def said(self, batch: Batch) -> Tensor:
        """[B, T] the letter at each position before the sign, else -1."""
        at = torch.arange(2 * self.count, device=batch.at.device)
        return torch.where(at < self.count, batch.ids, -1)

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Also "exact": every letter is right."""
        right = logits.argmax(-1) == batch.answer
        return {"accuracy": right.float().mean(-1), "exact": right.all(-1).float()}

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing."""
        return {"chance": log(self.letters), "perfect": 0.0}

    def remembered(self, slots: int) -> float:
        """Accuracy of a memory of so many letters that guesses the others: what a constant state would allow."""
        kept = min(slots, self.count) / self.count
        return kept + (1 - kept) / self.letters
