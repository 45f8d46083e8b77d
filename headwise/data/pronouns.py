"""Identifying a Preliminary Circuit for Predicting Gendered Pronouns in GPT-2 Small. Mathwin et al., 2023."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, ask, check_count, lay_out, one_token_words
from headwise.data.words import MEN, ROLES, WOMEN
from headwise.task import Batch, Task


@dataclass(frozen=True)
class Pronouns(Task):
    """Somebody is praised in a sentence that ends in a question tag: the pronoun must fit the first name.

    Answer and foil are "she" and "he". Corrupt prompts have a name of the other gender, so that the foil is right.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in all, by 3.36 on average, and is the top
    token in 31 % (the others go on with "it"); in corrupt prompts it never beats the foil.
    """

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "name", "role" and "end". Women and men take turns.

        Raises:
            ValueError: fewer than 6 names of either gender, or no role, are one token for this tokenizer.
        """
        check_count(n)
        names = [
            one_token_words(tokenizer, group, 6, what, before="So ")
            for group, what in ((WOMEN, "names of women"), (MEN, "names of men"))
        ]
        roles = one_token_words(tokenizer, ROLES, 1, "roles", before="good ")
        draw = random.Random(f"pronouns {seed}")
        clean, corrupt = [], []
        for row in range(n):
            mine, other = (draw.choice(names[(row + i) % 2]) for i in (0, 1))
            role, said = draw.choice(roles), ("she", "he") if row % 2 == 0 else ("he", "she")
            clean.append(self._prompt(tokenizer, mine, role, said))
            corrupt.append(self._prompt(tokenizer, other, role, said))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, name: str, role: str, said: tuple[str, str]) -> Prompt:
        pieces = [("So", None), (f" {name}", "name"), (" is such a good", None), (f" {role}", "role")]
        prompt, (answer, foil) = ask(
            tokenizer, [*pieces, (", isn", None), ("'t", "end")], [f" {word}" for word in said]
        )
        return prompt._replace(answer=answer, foil=foil)
