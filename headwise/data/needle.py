"""Retrieval Head Mechanistically Explains Long-Context Factuality. Wu et al., 2024. arXiv:2404.15574

Row s066 of the mission.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, check_count, continuation, encode, lay_out, shared_start
from headwise.data.prose import sentences
from headwise.task import Batch, Task

STEM = "The secret code is:"


@dataclass(frozen=True)
class Needle(Task):
    """A secret code stands somewhere in long plain prose, and the prompt ends by asking for it.

    The answer is the code's first token, the foil that of the code in the corrupt prompt; span "needle" holds the whole
    code. Rows go through `depths` in turn. On SmolLM2-135M-Instruct (27 prompts, 9 depths, seed 0) the answer
    is the top token in all, with probability 0.67; in corrupt prompts the foil beats it in all.
    """

    row: ClassVar[str] = "s066"
    length: int = 500
    depths: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    digits: int = 5

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Prompts of about `length` tokens. Corrupt prompts hold another code of as many tokens.

        Spans: "needle" (the code in the prose) and "question" (the last line). about["code_tokens"] is the length of
        the code; the digits of a code all differ, so that each of its tokens comes once in the prompt.

        Raises:
            ValueError: a depth outside 0 to 1, digits outside 1 to 10, or a length too short for the sentences.
        """
        check_count(n)
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"The depths {self.depths} must be one or more numbers from 0 to 1.")
        if not 1 <= self.digits <= 10:
            raise ValueError(f"A code of {self.digits} digits was asked for; allowed are 1 to 10.")
        draw = random.Random(f"needle {seed}")
        lead, codes = self._codes(tokenizer, draw)
        clean, corrupt = [], []
        for row in range(n):
            (said, code), (_, other) = next(codes), next(codes)
            while other[0] == code[0]:
                _, other = next(codes)
            ahead, behind = self._prose(tokenizer, f"needle {seed} {row}", self.depths[row % len(self.depths)])
            text = " ".join(part for part in (ahead, f"{STEM} {said}.", behind) if part) + f"\n{STEM}"
            ids = encode(tokenizer, text) + lead
            start = _place(ids, code)
            stop = start + len(code)
            question = (len(ids) - len(lead) - len(encode(tokenizer, STEM)), len(ids))
            prompt = Prompt(ids, {"needle": (start, stop), "question": question}, text, code[0], other[0])
            clean.append(prompt)
            corrupt.append(prompt._replace(ids=ids[:start] + other + ids[stop:]))
        return lay_out(self, tokenizer, clean, corrupt, n, seed, code_tokens=len(code))

    def _prose(self, tokenizer: PreTrainedTokenizerBase, seed: str, depth: float) -> tuple[str, str]:
        room = self.length - 2 * len(encode(tokenizer, STEM)) - self.digits - 4
        flow, said, used = sentences(seed), [], 0
        while used <= room:
            said.append(next(flow))
            used += len(encode(tokenizer, f" {said[-1]}"))
        said.pop()
        if not said:
            raise ValueError(f"{self.length} tokens have no room for a needle in prose; try 60 or more.")
        cut = round(depth * len(said))
        return " ".join(said[:cut]), " ".join(said[cut:])

    def _codes(
        self, tokenizer: PreTrainedTokenizerBase, draw: random.Random
    ) -> tuple[list[int], Iterator[tuple[str, list[int]]]]:
        """Ids that stand before every code (a blank of its own, or none), and endless codes of equally many ids."""

        def ways() -> Iterator[tuple[str, list[int]]]:
            while True:
                said = "".join(draw.sample("0123456789", self.digits))
                yield said, continuation(tokenizer, STEM, f" {said}")

        sample = [way for _, way in islice(ways(), 200)]
        lead = sample[0][: shared_start(sample)]
        size = Counter(map(len, sample)).most_common(1)[0][0]
        if size == len(lead) or any(tokenizer.unk_token_id in way for way in sample):
            raise ValueError("This tokenizer does not know the digits, so that it cannot tell one code from another.")

        def codes() -> Iterator[tuple[str, list[int]]]:
            for said, way in ways():
                if len(way) == size and len(set(way[len(lead) :])) == size - len(lead):
                    yield said, way[len(lead) :]

        return lead, codes()


def _place(ids: list[int], code: list[int]) -> int:
    for start in range(len(ids) - len(code) + 1):
        if ids[start : start + len(code)] == code:
            return start
    raise ValueError("This tokenizer writes the code in another way inside the prose than at its end.")
