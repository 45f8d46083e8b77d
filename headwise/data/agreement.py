"""Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies. Linzen et al., 2016. arXiv:1611.01368"""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, ask, check_count, lay_out, one_token_words
from headwise.task import Batch, Task

NOUNS = {
    "key": "keys", "book": "books", "picture": "pictures", "door": "doors", "letter": "letters", "box": "boxes",
    "car": "cars", "table": "tables", "window": "windows", "bird": "birds", "tree": "trees", "boy": "boys",
    "girl": "girls", "teacher": "teachers", "student": "students", "farmer": "farmers", "doctor": "doctors",
    "house": "houses", "friend": "friends", "author": "authors", "player": "players", "child": "children",
}  # fmt: skip
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
LINKS = ("near", "behind", "beside", "with", "above", "from")


@dataclass(frozen=True)
class Agreement(Task):
    """A noun, a second noun that depends on it, and the verb: its number is that of the first, not of the nearest.

    Answer and foil are the two forms of one verb. Corrupt prompts have the first noun in the other number, so that the
    foil is right. Rows go through all four pairs of numbers; in half of them the second noun misleads.
    On SmolLM2-135M-Instruct (64 prompts, seed 0) the answer beats the foil in 83 %, by 1.51 on average, and in 69 %
    where the second noun misleads; in corrupt prompts in 17 %. A verb is never the top token there.
    """

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "subject", "attractor" (the second noun) and "end" (the same token).

        Raises:
            ValueError: fewer than 6 nouns are one token for this tokenizer in both numbers.
        """
        check_count(n)
        plurals = one_token_words(tokenizer, list(NOUNS.values()), 6, "plural nouns", before="the ")
        pairs = [(one, many) for one, many in NOUNS.items() if many in plurals]
        singular = one_token_words(tokenizer, [one for one, _ in pairs], 6, "nouns", before="the ")
        pairs = [pair for pair in pairs if pair[0] in singular]
        draw = random.Random(f"agreement {seed}")
        clean, corrupt = [], []
        for row in range(n):
            subject, attractor = draw.sample(pairs, 2)
            number, nearest = row % 2, row // 2 % 2
            verbs, link = draw.choice(VERBS), draw.choice(LINKS)
            answer, foil = verbs[number], verbs[1 - number]
            clean.append(self._prompt(tokenizer, subject[number], link, attractor[nearest], answer, foil))
            corrupt.append(self._prompt(tokenizer, subject[1 - number], link, attractor[nearest], answer, foil))
        return lay_out(self, tokenizer, clean, corrupt, n, seed)

    def _prompt(
        self, tokenizer: PreTrainedTokenizerBase, subject: str, link: str, attractor: str, answer: str, foil: str
    ) -> Prompt:
        pieces = [("The", None), (f" {subject}", "subject"), (f" {link} the", None), (f" {attractor}", "attractor")]
        prompt, (right, wrong) = ask(tokenizer, pieces, (f" {answer}", f" {foil}"))
        spans = {**prompt.spans, "end": (len(prompt.ids) - 1, len(prompt.ids))}
        return prompt._replace(spans=spans, answer=right, foil=wrong)
