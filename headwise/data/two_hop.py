"""Hopping Too Late: Exploring the Limitations of Large Language Models on Multi-Hop Queries. Biran et al., 2024.
arXiv:2406.12775

Row s139 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, ask, check_count, encode, lay_out
from headwise.data.words import CAPITALS
from headwise.task import Batch, Task

PLACES = {
    "France": "Marseille, Lyon, Bordeaux, Toulouse, Versailles, Strasbourg",
    "Germany": "Munich, Hamburg, Cologne, Frankfurt, Dresden, Stuttgart, Leipzig",
    "Italy": "Milan, Naples, Venice, Florence, Turin, Pisa, Sicily",
    "Spain": "Barcelona, Seville, Granada, Bilbao, Ibiza", "Portugal": "Porto, Madeira",
    "England": "Manchester, Liverpool, Oxford, Stonehenge", "Scotland": "Glasgow, Loch Ness, Aberdeen",
    "Ireland": "Cork, Galway, Limerick", "Norway": "Bergen, Trondheim", "Sweden": "Gothenburg, Uppsala",
    "Poland": "Krakow, Gdansk, Wroclaw", "Austria": "Salzburg, Innsbruck",
    "Greece": "Delphi, Crete, Olympia, Santorini", "Turkey": "Istanbul, Izmir, Cappadocia, Ephesus",
    "Russia": "Siberia, Vladivostok, Lake Baikal, Kazan", "Ukraine": "Odessa, Chernobyl, Kharkiv",
    "Switzerland": "Zurich, Geneva, Basel", "Belgium": "Antwerp, Bruges, Ghent", "Croatia": "Dubrovnik",
    "Denmark": "Aarhus", "China": "Shanghai, Hong Kong, Tibet, Shenzhen, Wuhan",
    "Japan": "Osaka, Kyoto, Hiroshima, Mount Fuji, Nagasaki, Okinawa",
    "India": "Mumbai, Bangalore, Kolkata, Chennai, Goa, Rajasthan", "Nepal": "Mount Everest, Pokhara",
    "Thailand": "Phuket, Chiang Mai", "Vietnam": "Saigon", "Indonesia": "Bali, Sumatra",
    "Pakistan": "Karachi, Lahore", "Iran": "Isfahan, Persepolis", "Iraq": "Mosul, Basra, Babylon",
    "Syria": "Aleppo, Palmyra", "Jordan": "Petra", "Egypt": "Alexandria, Luxor, Giza, Aswan",
    "Morocco": "Casablanca, Marrakesh", "Kenya": "Mombasa", "Ethiopia": "Lalibela",
    "Canada": "Toronto, Vancouver, Montreal, Quebec, Calgary", "Cuba": "Guantanamo",
    "Colombia": "Medellin, Cartagena", "Peru": "Machu Picchu, Cusco", "Chile": "Easter Island",
    "Australia": "Sydney, Melbourne, Brisbane, Tasmania", "Nigeria": "Lagos",
}  # fmt: skip
COUNTRY_OF = {place: land for land, places in PLACES.items() for place in places.split(", ")}


@dataclass(frozen=True)
class TwoHop(Task):
    """A place is named, and the capital of its country asked for, without the country: two facts in one step.

    Corrupt prompts name a place in another country, whose capital is the foil. Answers are first tokens of names.
    Every place comes up once before any comes up again. `hops` asks for each of the two facts alone.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in 94 %, by 4.94 on average, and is the top
    token in 20 %; in corrupt prompts in 2 %. Alone, each of the two facts is the top token in 70 %.
    """

    row: ClassVar[str] = "s139"
    template: str = "People from {place} live in a country whose capital is"

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "place" and "end".

        Raises:
            ValueError: the template has no place for the {place} before its last word, or the tokenizer has no two
                places of equal length.
        """
        rows = self._rows(tokenizer, n, seed)
        clean, corrupt = [], []
        for place, other in rows:
            ends = (CAPITALS[COUNTRY_OF[place]], CAPITALS[COUNTRY_OF[other]])
            clean.append(_prompt(tokenizer, self.template, place, ends))
            corrupt.append(_prompt(tokenizer, self.template, other, ends))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def hops(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> tuple[Batch, Batch]:
        """The facts behind the prompts of `make`, row by row: the country of the place, and that country's capital.

        Neither has corrupt prompts; the foils are the other place's country, and its capital.
        """
        rows = self._rows(tokenizer, n, seed)
        lands = [(COUNTRY_OF[a], COUNTRY_OF[b]) for a, b in rows]
        ends = [(CAPITALS[a], CAPITALS[b]) for a, b in lands]
        asked = (
            [
                _prompt(tokenizer, "People from {place} live in the country of", a, land)
                for (a, _), land in zip(rows, lands, strict=True)
            ],
            [
                _prompt(tokenizer, "The capital of {place} is", land, end)
                for (land, _), end in zip(lands, ends, strict=True)
            ],
        )
        first, second = (lay_out(self, tokenizer, one, [], n, seed, hop=i) for i, one in enumerate(asked, 1))
        return first, second

    def _rows(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> list[tuple[str, str]]:
        """Pairs of places with as many tokens, in different countries whose capitals and names begin differently."""
        check_count(n)
        if "{place}" not in self.template.rpartition(" ")[0]:
            raise ValueError(f"The template {self.template!r} has no {{place}} before its last word.")
        start = self.template.partition("{place}")[0]
        sizes = {place: len(encode(tokenizer, start + place)) for place in COUNTRY_OF}
        draw = random.Random(f"two hop {seed}")
        pairs = {a: [b for b in sizes if sizes[b] == sizes[a] and _apart(a, b)] for a in sizes}
        pool = [a for a, others in pairs.items() if others]
        if not pool or tokenizer.unk_token_id in {i for a in pool[:3] for i in encode(tokenizer, start + a)}:
            raise ValueError("This tokenizer has no two places with the same number of tokens.")
        order: list[str] = []
        rows = []
        for _ in range(n):
            order = order or draw.sample(pool, len(pool))
            place = order.pop()
            rows.append((place, draw.choice(pairs[place])))
        return rows


def _apart(place: str, other: str) -> bool:
    """Whether two places differ in the beginnings of their names, of their countries and of the capitals."""
    here, there = COUNTRY_OF[place], COUNTRY_OF[other]
    return all(a[:2] != b[:2] for a, b in ((place, other), (here, there), (CAPITALS[here], CAPITALS[there])))


def _prompt(tokenizer: PreTrainedTokenizerBase, template: str, place: str, ends: tuple[str, str]) -> Prompt:
    start, rest = template.split("{place}")
    body, _, last = rest.rpartition(" ")
    pieces = [(start, None), (place, "place"), (body, None), (f" {last}", "end")]
    prompt, (answer, foil) = ask(tokenizer, pieces, [f" {end}" for end in ends])
    return prompt._replace(answer=answer, foil=foil)
