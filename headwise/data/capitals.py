"""Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models. Lv et al., 2024.
arXiv:2403.19521

Row s092 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, ask, check_count, encode, lay_out
from headwise.data.words import CAPITALS
from headwise.task import Batch, Task


def by_length(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> dict[int, list[str]]:
    """Words by their number of tokens after a blank: those that the tokenizer knows, and never one alone."""
    groups: dict[int, list[str]] = {}
    for word in words:
        ids = encode(tokenizer, f"of {word}")
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
            groups.setdefault(len(ids), []).append(word)
    return {size: group for size, group in groups.items() if len(group) > 1}


@dataclass(frozen=True)
class Capitals(Task):
    """A country is named and its capital asked for; corrupt prompts name another country, whose capital is the foil.

    Answers are the first token of the capital's name. Every country comes up once before any comes up again.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer is the top token in 69 % and beats the foil in all.
    """

    row: ClassVar[str] = "s092"
    template: str = "The capital of {country} is"
    countries: tuple[str, ...] = ()

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "country" and "end"; `countries` limits the choice, for example to those that a model knows.

        Raises:
            ValueError: a country is not in the list, or the tokenizer has no two countries of equal length.
        """
        check_count(n)
        groups = by_length(tokenizer, chosen(self.countries))
        if not groups:
            raise ValueError("This tokenizer has no two of the chosen countries with the same number of tokens.")
        if "{country}" not in self.template:
            raise ValueError(f"The template {self.template!r} has no place for the {{country}}.")
        draw = random.Random(f"capitals {seed}")
        pool = [(country, group) for group in groups.values() for country in group]
        clean, corrupt = [], []
        order: list[tuple[str, list[str]]] = []
        for _ in range(n):
            order = order or draw.sample(pool, len(pool))
            country, group = order.pop()
            others = [c for c in group if c != country and CAPITALS[c][:2] != CAPITALS[country][:2]]
            other = draw.choice(others or [c for c in group if c != country])
            clean.append(self._prompt(tokenizer, country, country, other))
            corrupt.append(self._prompt(tokenizer, other, country, other))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, said: str, country: str, other: str) -> Prompt:
        start, rest = self.template.split("{country}")
        body, _, end = rest.rpartition(" ")
        pieces = [(start, None), (said, "country"), (body, None), (f" {end}", "end")]
        prompt, (answer, foil) = ask(tokenizer, pieces, (f" {CAPITALS[country]}", f" {CAPITALS[other]}"))
        return prompt._replace(answer=answer, foil=foil)


def chosen(countries: tuple[str, ...]) -> list[str]:
    """The countries asked for, or all. Raises ValueError for one that is not in the list."""
    for country in countries:
        if country not in CAPITALS:
            raise ValueError(f"The capital of {country!r} is not in the list; known are {', '.join(CAPITALS)}.")
    return list(countries or CAPITALS)
