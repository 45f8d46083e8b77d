"""Does Circuit Analysis Interpretability Scale? Evidence from Multiple Choice Capabilities in Chinchilla.
Lieberum et al., 2023. arXiv:2307.09458

Row s109 of the mission.
"""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape
from headwise.task import Batch


@dataclass(frozen=True)
class LetteredChoices(Lesson):
    """A word that is asked for, then options with letters, each a letter and a word: which letter has that word?

    A prompt is asked word, letter, word, letter, word, ..., end. Half of the prompts to learn from have the first
    letters in order, as in A to D, the others any letters in any order. Corrupt prompts ask for another option's word.

    Fields:
        options: in a prompt.
        letters: how many there are; their token ids come first.
        words: how many there are; their ids come next, and last the token at the end.
    """

    row: ClassVar[str] = "s109"
    tests: ClassVar[tuple[str, ...]] = ("in order", "random letters")

    options: int = 4
    letters: int = 12
    words: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        most = min(self.letters, self.words)
        if not 2 <= self.options <= most:
            raise ValueError(
                f"{self.options} options do not fit {self.letters} letters and {self.words} words; "
                f"allowed are 2 to {most}."
            )

    @property
    def shape(self) -> Shape:
        """Letters, words and the end; one class a token."""
        count = self.letters + self.words + 1
        return Shape(2 * self.options + 2, count, vocab_size=count)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Spans: "match" the letter that is the answer, "rival" the letter of the corrupt prompt, "asked"."""
        words = torch.rand(n, self.words, generator=draw).topk(self.options, -1).indices + self.letters
        mixed = torch.rand(n, self.letters, generator=draw).topk(self.options, -1).indices
        ordered = {"in order": 1.0, "random letters": 0.0}.get(self.split, 0.5)
        in_order = torch.rand(n, 1, generator=draw) < ordered
        letters = torch.where(in_order, torch.arange(self.options), mixed)
        right = torch.randint(self.options, (n, 1), generator=draw)
        other = (right + torch.randint(1, self.options, (n, 1), generator=draw)) % self.options
        at = torch.full((n, 1), 2 * self.options + 1)
        return Batch(
            inputs=self._prompts(words, letters, right),
            corrupt=self._prompts(words, letters, other),
            at=at,
            answer=letters.gather(1, right),
            foil=letters.gather(1, other),
            spans={
                "match": torch.cat([2 * right + 1, 2 * right + 2], 1),
                "rival": torch.cat([2 * other + 1, 2 * other + 2], 1),
                "asked": torch.tensor([[0, 1]]).repeat(n, 1),
            },
        )

    def _prompts(self, words: Tensor, letters: Tensor, asked: Tensor) -> dict[str, Tensor]:
        """[B, T] ids."""
        end = torch.full_like(asked, self.letters + self.words)
        pairs = torch.stack([letters, words], -1).flatten(1)
        return {"input_ids": torch.cat([words.gather(1, asked), pairs, end], 1)}

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among all tokens, and among the letters of the prompt."""
        return {"any token": log(self.shape.outputs), "letters of the prompt": log(self.options), "perfect": 0.0}
