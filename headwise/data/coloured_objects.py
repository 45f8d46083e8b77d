"""Circuit Component Reuse Across Tasks in Transformer Language Models. Merullo et al., 2023. arXiv:2310.08744

Row s121 of the mission.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Piece, ask, check_count, lay_out, one_token_words
from headwise.data.words import COLOURS, OBJECTS
from headwise.task import Batch, Task

EXAMPLES = (
    (("gray", "silver", "golden"), ("desk", "watch", "ring"), 1),
    (("gray", "golden", "violet"), ("bottle", "phone", "scarf"), 0),
    (("silver", "violet", "gray"), ("desk", "pencil", "mug"), 2),
)


@dataclass(frozen=True)
class ColouredObjects(Task):
    """Three objects are named with their colours, and the colour of one is asked for; the foil is that of another one.

    Corrupt prompts ask for the object of the foil. Answered examples with other words come first, as many as
    `examples`: without any, a small model does not answer with a colour. `about["colours"]` are the ids of all colours.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) a colour is always the top token, but the right one in 44 %, and it
    beats the foil in 59 %, by 0.49 on average (in corrupt prompts in 44 %): little better than a guess.
    """

    row: ClassVar[str] = "s121"
    examples: int = 2

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "colour_0", "object_0" to "colour_2", "object_2" (in the list), "asked" (the object) and "end".

        Raises:
            ValueError: `examples` is not 0 to 3, or fewer than 4 colours or objects are one token for this tokenizer.
        """
        check_count(n)
        if not 0 <= self.examples <= len(EXAMPLES):
            raise ValueError(f"{self.examples} examples were asked for; allowed are 0 to {len(EXAMPLES)}.")
        colours = one_token_words(tokenizer, COLOURS, 4, "colours")
        objects = one_token_words(tokenizer, OBJECTS, 4, "objects")
        draw = random.Random(f"coloured objects {seed}")
        clean, corrupt, ways = [], [], []
        for _ in range(n):
            said, things = draw.sample(colours, 3), draw.sample(objects, 3)
            right, wrong = draw.sample(range(3), 2)
            options = [f" {colour}" for colour in colours]
            prompt, ways = ask(tokenizer, self._pieces(said, things, things[right]), options)
            other, _ = ask(tokenizer, self._pieces(said, things, things[wrong]), options)
            answer, foil = (ways[colours.index(said[i])] for i in (right, wrong))
            clean.append(prompt._replace(answer=answer, foil=foil))
            corrupt.append(other)
        return lay_out(self, tokenizer, clean, corrupt, n, seed, colours=ways)

    def _pieces(self, colours: list[str], objects: list[str], asked: str) -> list[Piece]:
        start = "".join(
            f"{''.join(text for text, _ in _question(*said, said[1][right]))} {said[0][right]}.\n"
            for *said, right in EXAMPLES[: self.examples]
        )
        return [(start, None), *_question(colours, objects, asked)]


def _question(colours: tuple[str, ...] | list[str], objects: tuple[str, ...] | list[str], asked: str) -> list[Piece]:
    pieces: list[Piece] = [("Q: On the table, I see", None)]
    for i, (colour, thing) in enumerate(zip(colours, objects, strict=True)):
        article = " an" if colour[0] in "aeiou" else " a"
        pieces += [(article if i < 2 else f" and{article}", None), (f" {colour}", f"colour_{i}")]
        pieces += [(f" {thing}", f"object_{i}"), ("," if i < 2 else ". What color is the", None)]
    return [*pieces, (f" {asked}", "asked"), ("?\nA", None), (":", "end")]
