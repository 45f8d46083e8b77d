"""Where each run of a few tokens came first in a text, kept up as the text grows."""


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

    def copy(self, place: int, most: int) -> list[int]:
        """At most so many tokens from a place of the text on."""
        return self.text[place : place + most]
