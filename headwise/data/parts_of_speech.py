"""Dual Process Learning: Controlling Use of In-Context vs. In-Weights Strategies with Weight Forgetting. Anand et al.,
2024. arXiv:2406.00053

Row s138 of the mission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape
from headwise.task import Batch

COPULA, BLANK, FIRST = 0, 1, 2  # token ids; words come from FIRST on


@dataclass(frozen=True)
class PartsOfSpeech(Lesson):
    """A noun and an adjective in a sentence, then one of them again: is it the noun? Three blanks are to be filled.

    A prompt is "copula adjective noun" or "noun copula adjective", then one of both words and three blanks. After the
    adjective they are that adjective three times, after the noun adjective, noun, noun. Only the first blank needs the
    part of speech. It can be seen from where the copula stands, or known by heart: words are half nouns, half
    adjectives.

    Splits: "unseen" (words that were never taught), "rare" (the rarest tenth), "swapped" (nouns where adjectives belong
    and the other way round; the answer is that of the sentence), "unclear" (no copula, words anywhere: only knowing the
    words helps).

    Fields:
        words: how many are taught; a tenth as many are not.
        zipf: the k-th noun or adjective comes in proportion to (k + 1) ** -zipf.
        ambiguous: share of the words that are as often the other part of speech.
        unclear: share of the prompts to be learned from that are like those of the split "unclear".
    """

    row: ClassVar[str] = "s138"
    tests: ClassVar[tuple[str, ...]] = ("unseen", "rare", "swapped", "unclear")
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "to copula": {"copula": 1.0},
        "to the same word": {"same": 1.0},
    }

    words: int = 1000
    zipf: float = 0.0
    ambiguous: float = 0.1
    unclear: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words < 40 or self.words % 20 or not 0 <= self.ambiguous < 1:
            raise ValueError(
                f"{self.words} words of which {self.ambiguous} are ambiguous are no vocabulary; allowed are 40, 60 and "
                "so on, with a share from 0 up to 1."
            )

    @property
    def shape(self) -> Shape:
        """Tokens: copula, blank, nouns, adjectives, unseen words. Blanks are filled with tokens."""
        size = self.unseen[1]
        return Shape(7, size, vocab_size=size)

    @property
    def taught(self) -> tuple[int, int]:
        """The first word that is taught, and the end of them: the rows of the embedding that forgetting draws anew."""
        return FIRST, FIRST + self.words

    @property
    def unseen(self) -> tuple[int, int]:
        """The first word that is not taught, and the end of them."""
        return FIRST + self.words, FIRST + self.words + self.words // 10

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """`foil`: what a model would say that took the noun for the adjective and the other way round."""
        noun, adjective = self._words(n, draw)
        after = torch.rand(n, generator=draw) < 0.5
        asked = torch.rand(n, generator=draw) < 0.5
        if self.split == "swapped":
            noun, adjective = adjective, noun
        sentence = torch.full((n, 3), COPULA)
        sentence[:, 1] = torch.where(after, COPULA, adjective)
        sentence[:, 0] = torch.where(after, noun, COPULA)
        sentence[:, 2] = torch.where(after, adjective, noun)
        share = {"unclear": 1.0, "train": self.unclear}.get(self.split, 0.0)
        if share:
            both = torch.stack([torch.full((n,), BLANK), noun, adjective], 1)
            both = both.gather(1, torch.rand(n, 3, generator=draw).argsort(-1))
            sentence = torch.where(torch.rand(n, 1, generator=draw) < share, both, sentence)
        query = torch.where(asked, noun, adjective)
        other = torch.where(asked, adjective, noun)
        blanks = torch.full((n, 3), BLANK)
        first = torch.where(asked, adjective, query)
        wrong = torch.where(asked, query, other)
        return Batch(
            inputs={"input_ids": torch.cat([sentence, query[:, None], blanks], 1)},
            at=torch.arange(4, 7).repeat(n, 1),
            answer=torch.stack([first, query, query], 1),
            foil=torch.stack([wrong, query, query], 1),
        )

    def _words(self, n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """A noun and an adjective a prompt, [n] each, never the same word."""
        if self.split == "unseen":
            low, high = self.unseen
            pair = torch.rand(n, high - low, generator=draw).topk(2, -1).indices + low
            return pair[:, 0], pair[:, 1]
        half = self.words // 2
        weight = (1.0 + torch.arange(half)) ** -self.zipf
        doubtful = (torch.arange(half) + 1) * self.ambiguous // 1 > torch.arange(half) * self.ambiguous // 1
        if self.split == "rare":
            weight[: half - half // 10] = 0
        plain = weight * ~doubtful
        if self.split != "train":
            noun, adjective = (torch.multinomial(plain, n, True, generator=draw) for _ in range(2))
            return noun + FIRST, adjective + FIRST + half
        either = torch.where(doubtful, weight / 2, weight)
        as_noun = torch.cat([either, weight * doubtful / 2])
        noun = torch.multinomial(as_noun, n, True, generator=draw)
        adjective = (torch.multinomial(as_noun, n, True, generator=draw) + half) % self.words
        clear = torch.multinomial(plain, n, True, generator=draw) + half
        return noun + FIRST, torch.where(adjective == noun, clear, adjective) + FIRST

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """From the query: "copula", and "same", the same word in the sentence."""
        ids = batch.inputs["input_ids"]
        last = (torch.arange(7, device=ids.device) == 3)[:, None]
        early = torch.arange(7, device=ids.device) < 3
        copula, same = (ids == COPULA) & early, (ids == ids[:, 3:4]) & early
        return {"copula": last & copula[:, None], "same": last & same[:, None]}

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Right are: "accuracy" all three blanks, "tokens" blank by blank, "role" the first rather than its foil."""
        right = (logits.argmax(-1) == batch.answer).float()
        first = logits[:, 0]
        role = first.gather(1, batch.answer[:, :1]) > first.gather(1, batch.foil[:, :1])
        return {"accuracy": right.amin(-1), "tokens": right.mean(-1), "role": role[:, 0].float()}

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among the taught words, and of copying without a part of speech."""
        return {"any word": log(self.words), "copied without a role": log(2) / 3, "perfect": 0.0}

    def config(self, **options: object) -> dict[str, object]:
        """An encoder, as in the paper, whose readout is the embedding: unseen words could not be said otherwise."""
        shape = {"causal": False, "tie_word_embeddings": True, "pos": "learned", "heads": 1, "mlp": 128}
        return super().config(**(shape | {"embed_std": 0.125} | options))
