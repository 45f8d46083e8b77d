"""CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality.
Dumitru et al., 2025. arXiv:2502.08923

Its second half: copying goes together with any other drafter, which is asked where there is nothing to copy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from headwise.drafting import Draft, Drafter, News, Reading
from headwise.method import Method
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class Either(DraftMethod):
    """The first of two drafting methods that has something to propose; both hear of everything that is added.

    Fields:
        first: asked first, for example `CopySpec()`.
        second: asked for the rows for which the first has nothing, for example draft heads.
    """

    first: DraftMethod
    second: DraftMethod

    def __post_init__(self) -> None:
        for one in (self.first, self.second):
            if not isinstance(one, DraftMethod):
                raise ValueError(f"{one!r} does not draft; allowed are methods of the decode room that do.")

    def identity(self) -> dict[str, Any]:
        """The method's name and fields, with those of the two methods."""
        parts: dict[str, Method] = {"first": self.first, "second": self.second}
        return {**super().identity(), "fields": {name: one.identity() for name, one in parts.items()}}

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """Both drafters as one."""
        return _Both(self.first.drafter(model), self.second.drafter(model))


class _Both(Drafter):
    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.parts = (first, second)
        self.wants_hidden = first.wants_hidden or second.wants_hidden

    @contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        """Both watch."""
        with self.parts[0].watch(model), self.parts[1].watch(model):
            yield

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Both begin."""
        for part in self.parts:
            part.begin(model, texts, sampling)

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        """Both hear of it."""
        for part in self.parts:
            part.accept(news, read)

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """The first's drafts, and the second's where those are empty."""
        found = {row: draft for row, draft in self.parts[0].propose(rooms).items() if draft.tokens}
        rest = {row: room for row, room in rooms.items() if row not in found}
        return {**(self.parts[1].propose(rest) if rest else {}), **found}
