"""A circuit for Python docstrings in a 4-layer attention-only transformer. Heimersheim and Janiak, 2023."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, ask, check_count, lay_out, one_token_words
from headwise.data.words import ARGUMENTS, FUNCTIONS, NOUNS
from headwise.task import Batch, Task


@dataclass(frozen=True)
class Docstring(Task):
    """A function with four arguments and a docstring that names the first two: the third is the next one to be named.

    Corrupt prompts swap the third and the fourth argument in the head of the function, so that the foil is right.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in 97 %, by 3.89 on average, and is the top
    token in 97 %; in corrupt prompts in 2 %.
    """

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "argument_0" to "argument_3" (in the head), "said_0", "said_1" (in the docstring) and "end".

        Raises:
            ValueError: fewer than 8 of the arguments, or 8 of the nouns, are one token for this tokenizer.
        """
        check_count(n)
        names = one_token_words(tokenizer, ARGUMENTS, 8, "arguments", before="self, ")
        nouns = one_token_words(tokenizer, NOUNS, 8, "nouns")
        draw = random.Random(f"docstring {seed}")
        clean, corrupt = [], []
        for _ in range(n):
            arguments = draw.sample(names, 4)
            words = [draw.choice(FUNCTIONS), *draw.sample(nouns, 6)]
            clean.append(self._prompt(tokenizer, arguments, arguments, words))
            corrupt.append(self._prompt(tokenizer, [*arguments[:2], *arguments[:1:-1]], arguments, words))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(
        self, tokenizer: PreTrainedTokenizerBase, head: list[str], arguments: list[str], words: list[str]
    ) -> Prompt:
        pieces = [(f"def {words[0]}(self", None)]
        for i, name in enumerate(head):
            pieces += [(",", None), (f" {name}", f"argument_{i}")]
        pieces.append((f'):\n    """The {words[1]} of the {words[2]}\n\n', None))
        for i in range(2):
            about = words[3 + 2 * i : 5 + 2 * i]
            pieces += [("    :param", None), (f" {arguments[i]}", f"said_{i}"), (f": {' '.join(about)}\n", None)]
        pieces += [("    :", None), ("param", "end")]
        prompt, (answer, foil) = ask(tokenizer, pieces, [f" {name}" for name in arguments[2:]])
        return prompt._replace(answer=answer, foil=foil)
