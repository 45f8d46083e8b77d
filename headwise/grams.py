"""Where each run of a few tokens came first in a text, kept up as the text grows; a drafter that copies from there."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from headwise.drafting import Draft, Drafter, News, Reading

SHARE = 4


class Grams:
    """The first place of every run of `size` tokens that has a token behind it.

    Memory is bounded: of more than `most` different runs the oldest are forgotten, so that what is found is then the
    first place among those that are remembered.
    """

    def __init__(self, sizes: tuple[int, ...], most: int) -> None:
        self.sizes, self.most = sizes, most
        self.text: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}

    def add(self, tokens: list[int]) -> None:
        """Lengthen the text."""
        for token in tokens:
            end = len(self.text)
            for size in self.sizes:
                if end >= size:
                    self._behind.setdefault(tuple(self.text[end - size :]), end)
            self.text.append(token)
        while len(self._behind) > self.most:
            del self._behind[next(iter(self._behind))]

    def behind(self, size: int) -> int | None:
        """The place behind the first run that is the same as the last `size` tokens, None where there is none."""
        return self._behind.get(tuple(self.text[-size:])) if len(self.text) >= size else None

    def beside(self, place: int, ahead: int) -> int | None:
        """The place behind the last token's nearest twin around a place, None where there is none.

        Looked at are `ahead` tokens from the place on, then half as many before it, the nearest first.
        """
        last = len(self.text) - 1
        places = [*range(place, min(place + ahead, last)), *range(place - 1, max(place - ahead // 2, 0) - 1, -1)]
        return next((at + 1 for at in places if self.text[at] == self.text[last]), None)

    def copy(self, place: int, most: int) -> list[int]:
        """At most so many tokens from a place of the text on."""
        return self.text[place : place + most]


def repeated(text: list[int], size: int = 4) -> float:
    """Share of a text's runs of `size` tokens that stood in it before, 0 to 1; 0 where it is shorter than a run."""
    runs = [tuple(text[start : start + size]) for start in range(len(text) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class Copies(Drafter):
    """Proposes what stood behind the first run that is the same as the last tokens, the longest run first.

    Where there is no such run and the row was copying, one token is enough to go on: its nearest twin around the place
    that the copy had come to. A draft begun so of which nothing is accepted ends the copy.

    Args:
        sizes: lengths of runs that are looked for.
        tokens: proposed at most. Rows that are read together share them, for all are read as wide as the longest draft;
            each gets `SHARE` at least.
        source: who proposes, for the counts. remember: runs in the index of a row.
        near: tokens ahead in which a copy is taken up again; 0 never does.
    """

    def __init__(
        self, sizes: tuple[int, ...], tokens: int, source: str, remember: int = 1_000_000, near: int = 0
    ) -> None:
        self.sizes, self.tokens = tuple(sorted(sizes, reverse=True)), tokens
        self.source, self.remember, self.near = source, remember, near
        self.rows: list[Grams] = []
        self.copying: dict[int, int] = {}
        self.sent: dict[int, tuple[int, bool]] = {}

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Index the prompts."""
        self.copying, self.sent = {}, {}
        self.rows = [Grams(self.sizes, self.remember) for _ in texts]
        for row, text in zip(self.rows, texts, strict=True):
            row.add(text)

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        """Index what was added, and follow each copy to where it went apart."""
        for row, one in news.items():
            self.rows[row].add(one.tokens)
            if row in self.sent:
                place, again = self.sent.pop(row)
                accepted = len(one.tokens) - 1
                self.copying[row] = place + accepted
                if again and not accepted:
                    del self.copying[row]

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """What stood behind the longest run that is not new, or where a copy goes on."""
        most = min(self.tokens, max(SHARE, self.tokens // max(1, len(rooms))))
        return {row: self._one(row, most) for row in rooms}

    def _one(self, row: int, most: int) -> Draft:
        text = self.rows[row]
        for size in self.sizes:
            if (place := text.behind(size)) is not None:
                self.sent[row] = (place, False)
                return Draft(text.copy(place, most), source=self.source)
        if row in self.copying and (place := text.beside(self.copying[row], self.near)) is not None:
            self.sent[row] = (place, True)
            return Draft(text.copy(place, most), source=f"{self.source}, taken up")
        least = self.sizes[-1]
        new = "the last token is new" if least == 1 else f"the last {least} tokens are new"
        return Draft([], source=self.source, why=new)
