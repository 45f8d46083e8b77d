"""Accelerating Large Language Model Decoding with Speculative Sampling. Chen et al., 2023. arXiv:2302.01318

What is ours here is the length of drafts: it doubles after a draft that was accepted whole, and falls to what was
accepted of one that was not.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from headwise.drafting import Draft, Drafter, News, Reading
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class Paced(DraftMethod):
    """Drafts of another method, as long as those of the same row and source that the model agreed to lately.

    Reading a token that is refused costs as much as reading one that stays, most of all on a CPU.

    Fields:
        of: the method that drafts; let it propose at least `most` tokens.
        start: tokens of the first drafts. least, most: what a draft is never shorter and never longer than.
    """

    of: DraftMethod
    start: int = 6
    least: int = 2
    most: int = 24

    def __post_init__(self) -> None:
        if not isinstance(self.of, DraftMethod):
            raise ValueError(f"{self.of!r} does not draft; allowed are methods of the decode room that do.")
        if not 1 <= self.least <= self.start <= self.most:
            raise ValueError(
                f"least is {self.least}, start {self.start}, most {self.most}; allowed is 1 <= least <= start <= most."
            )

    def identity(self) -> dict[str, Any]:
        """The method's name and fields, with those of the method inside it."""
        whole = {"of": self.of.identity(), "start": self.start, "least": self.least, "most": self.most}
        return {**super().identity(), "fields": whole}

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """The other method's drafter, on a lead."""
        return _Lead(self, self.of.drafter(model))


class _Lead(Drafter):
    def __init__(self, method: Paced, inner: Drafter) -> None:
        self.method, self.inner = method, inner
        self.wants_hidden = inner.wants_hidden
        self.lengths: dict[tuple[int, str], int] = {}
        self.sent: dict[int, tuple[str, int]] = {}

    @contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        """As the drafter inside does."""
        with self.inner.watch(model):
            yield

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Forget what was learned of other texts."""
        self.lengths, self.sent = {}, {}
        self.inner.begin(model, texts, sampling)

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        """Learn from what became of the last drafts."""
        for row, one in news.items():
            if row in self.sent:
                source, sent = self.sent.pop(row)
                gained = len(one.tokens) - 1
                length = 2 * sent if gained >= sent else gained + 1
                self.lengths[row, source] = min(max(length, self.method.least), self.method.most)
        self.inner.accept(news, read)

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """The drafts inside, cut to length."""
        found = {}
        for row, draft in self.inner.propose(rooms).items():
            length = self.lengths.get((row, draft.source), self.method.start)
            found[row] = replace(draft.cut(length), why=draft.why)
            if draft.tokens:
                self.sent[row] = (draft.source, min(found[row].depth, rooms[row]))
        return found
