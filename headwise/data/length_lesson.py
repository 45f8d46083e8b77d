"""What Algorithms can Transformers Learn? A Study in Length Generalization. Zhou et al., 2023. arXiv:2310.16028

Row s048 of the mission.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from headwise.data.rasp_programs import LETTER, TASKS, letters, vocabulary
from headwise.lesson import Lesson, Shape
from headwise.task import Batch


@dataclass(frozen=True)
class LengthLesson(Lesson):
    """An algorithmic task, taught on short prompts; the split "longer" has prompts of more items.

    Everything that the answer holds is learned, and behind shorter answers nothing counts. The tasks, with
    their programs in RASP-L and in plain Python, are in `headwise.data.rasp_programs`.

    Fields:
        task: "count", "mode", "copy different letters", "copy bits with hints", "parity step by step with hints",
            "copy bits" or "parity".
        longest: items of the longest prompts that are taught; the shortest have 2.
        tested: items of the prompts of "longer".
        offsets: whether each prompt begins anywhere in the positions that the longest needs, so that all are taught.
    """

    row: ClassVar[str] = "s048"
    tests: ClassVar[tuple[str, ...]] = ("longer",)
    looks: ClassVar[Mapping[str, Mapping[str, float]]] = {"previous_token": {"previous": 1.0}}

    task: str = "copy different letters"
    longest: int = 10
    tested: int = 20
    offsets: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"{self.task!r} is no algorithmic task; there are {', '.join(TASKS)}.")
        if not 2 <= self.longest <= self.tested:
            raise ValueError(
                f"Prompts of 2 to {self.longest} items cannot be taught to be tested on {self.tested}; the longest "
                "must have 2 or more, and not more than those of the test."
            )

    @property
    def shape(self) -> Shape:
        """Tokens: the mark, two bits, letters and hints; long enough for the test."""
        prompt = TASKS[self.task].ask(random.Random(0), self.tested, self.tested)
        length = len(prompt) + len(TASKS[self.task].answer(prompt)) - 1
        return Shape(length, vocabulary(self.tested), vocab_size=vocabulary(self.tested))

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Prompts with their answers, filled up with marks on the right. Weights are 0 where nothing counts."""
        task, longer = TASKS[self.task], self.split == "longer"
        ids, at, answer, weight = [], [], [], []
        for seed in torch.randint(2**31, (n,), generator=draw).tolist():
            one = random.Random(seed)
            items = self.tested if longer else one.randint(2, self.longest)
            prompt = task.ask(one, items, self.tested)
            said = task.answer(prompt)
            ids.append(prompt + said[:-1])
            at.append([len(prompt) - 1 + i for i in range(len(said))])
            answer.append(said)
            weight.append([1] * len(said))
        inputs = {"input_ids": _filled(ids)}
        if self.offsets:
            room = torch.tensor([self.shape.length - len(row) + 1 for row in ids])
            start = (torch.rand(n, generator=draw) * room).long()
            places = start[:, None] + torch.arange(inputs["input_ids"].shape[1])
            # What fills a row up has the last position.
            inputs["position_ids"] = places.clamp_max(self.shape.length - 1)
        return Batch(inputs=inputs, at=_filled(at), answer=_filled(answer), weight=_filled(weight).float())

    @property
    def hint(self) -> int:
        """The first hint among the tokens."""
        return LETTER + letters(self.tested)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """The cell "previous": to the token before, which every program of two steps of attention begins with."""
        at = torch.arange(batch.ids.shape[1], device=batch.at.device)
        return {"previous": (at[:, None] - at == 1)[None]}

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy of tokens, and "exact": all of the answer is right, and so would be if the model wrote it."""
        counted = torch.ones_like(batch.at) if batch.weight is None else batch.weight
        wrong = (logits.argmax(-1) != batch.answer) * counted
        return {"accuracy": 1 - wrong.sum(-1) / counted.sum(-1), "exact": (wrong.sum(-1) == 0).float()}

    def lines(self) -> dict[str, float]:
        """Nats a token of guessing among all tokens."""
        return {"chance": log(vocabulary(self.tested)), "perfect": 0.0}


def _filled(rows: list[list[int]]) -> Tensor:
    """Rows of numbers, filled up with 0 on the right."""
    most = max(map(len, rows))
    return torch.tensor([row + [0] * (most - len(row)) for row in rows])
