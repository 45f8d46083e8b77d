"""Make Your LLM Fully Utilize the Context. An et al., 2024. arXiv:2404.16811

Row s150 of the mission.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape
from headwise.task import Batch

ASKED = ("uniform", "ends", "start")
WAYS = ("forward", "backward", "both")


@dataclass(frozen=True)
class AnswerAnywhere(Lesson):
    """Keys with values, then some of the keys again: what was the value of each? Which places are asked for matters.

    The split "anywhere" asks for all places alike, whatever is asked in training. Corrupt prompts have other answers at
    the places that are asked for, of symbols that do not stand in the prompt.

    Fields:
        pairs: keys with values in a prompt, all different.
        questions: how many are asked for, one after the other.
        symbols: how many keys there are, and how many values; at least twice as many as pairs.
        asked: in training, "uniform": any place; "ends": the first and the last eighth; "start": the first quarter.
        way: "forward" from key to value, "backward" from value to key, or "both" mixed.
    """

    row: ClassVar[str] = "s150"
    tests: ClassVar[tuple[str, ...]] = ("anywhere",)
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {"retrieval": {"answer": 1.0}, "previous_token": {"pair": 1.0}}

    pairs: int = 16
    questions: int = 4
    symbols: int = 32
    asked: str = "uniform"
    way: str = "forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.asked not in ASKED or self.way not in WAYS:
            raise ValueError(
                f"asked={self.asked!r}, way={self.way!r} is unknown; allowed are {', '.join(ASKED)} and "
                f"{', '.join(WAYS)}."
            )
        if not (8 <= self.pairs <= self.symbols // 2 and 1 <= self.questions <= len(self.places)):
            raise ValueError(
                f"{self.questions} questions about {self.pairs} pairs of {self.symbols} symbols do not work; allowed "
                f"are 8 to {self.symbols // 2} pairs, and 1 to {len(self.places)} questions here."
            )

    @property
    def places(self) -> list[int]:
        """The places that are asked for in training: 0 is the first pair."""
        eighth = max(1, self.pairs // 8)
        every = list(range(self.pairs))
        return {"uniform": every, "ends": every[:eighth] + every[-eighth:], "start": every[: 2 * eighth]}[self.asked]

    @property
    def shape(self) -> Shape:
        """Tokens: keys, then values."""
        return Shape(2 * (self.pairs + self.questions) - 1, 2 * self.symbols, vocab_size=2 * self.symbols)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Spans "place_0" and so on: the pair in which the answer of a question stands."""
        keys, values = (torch.rand(n, self.symbols, generator=draw).argsort(-1) for _ in "kv")
        values = values + self.symbols
        places = torch.arange(self.pairs) if self.split == "anywhere" else torch.tensor(self.places)
        place = places[torch.rand(n, len(places), generator=draw).argsort(-1)[:, : self.questions]]
        every = torch.stack([keys, values], -1)
        context, others = every[:, : self.pairs], every[:, self.pairs : 2 * self.pairs]
        back = torch.full((n, self.questions), self.way == "backward")
        if self.way == "both":
            back = torch.rand(n, self.questions, generator=draw) < 0.5
        pair = context.gather(1, place[..., None].expand(-1, -1, 2))
        asked = torch.where(back[..., None], pair.flip(-1), pair)
        ids = torch.cat([context.flatten(1), asked.flatten(1)], 1)[:, :-1]
        # Backward the key of the pair is what is told anew, forward its value.
        told = torch.stack([back, ~back], -1)
        change = torch.zeros_like(context, dtype=torch.bool).scatter(1, place[..., None].expand(-1, -1, 2), told)
        changed = torch.where(change, others, context)
        at = (2 * self.pairs + 2 * torch.arange(self.questions)).expand(n, -1)
        source = 2 * place + (~back).long()
        return Batch(
            inputs={"input_ids": ids},
            corrupt={"input_ids": torch.cat([changed.flatten(1), ids[:, 2 * self.pairs :]], 1)},
            at=at,
            answer=asked[..., 1],
            spans={f"place_{i}": torch.stack([source[:, i], source[:, i] + 1], -1) for i in range(self.questions)},
        )

    def sources(self, batch: Batch) -> Tensor:
        """[B, questions] the columns in which the answers stand."""
        return torch.stack([batch.spans[f"place_{i}"][:, 0] for i in range(self.questions)], 1)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """The cell "answer": from a question to the column of its answer; "pair": from a value to its key."""
        length = batch.ids.shape[1]
        at = torch.arange(length, device=batch.at.device)
        answer = torch.zeros(len(batch), length, length, dtype=torch.bool, device=batch.at.device)
        rows = torch.arange(len(batch), device=batch.at.device)[:, None]
        answer[rows, batch.at, self.sources(batch)] = True
        pair = (at[:, None] - at == 1) & (at[:, None] % 2 == 1) & (at[:, None] < 2 * self.pairs)
        return {"answer": answer, "pair": pair[None]}

    def said(self, batch: Batch) -> Tensor:
        """[B, T] every symbol of the context, else -1."""
        at = torch.arange(batch.ids.shape[1], device=batch.at.device)
        return torch.where(at < 2 * self.pairs, batch.ids, -1)

    def by_place(self, right: Tensor, batch: Batch) -> list[float]:
        """Mean of a number [B, questions] at each of the places; NaN where none was asked for."""
        place = self.sources(batch) // 2
        return [float(right[place == i].float().mean()) for i in range(self.pairs)]

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among all symbols of a kind, and among those of the prompt."""
        return {"any symbol": log(self.symbols), "symbols of the prompt": log(self.pairs), "perfect": 0.0}
