"""How does GPT-2 compute greater-than?: Interpreting mathematical abilities in a pre-trained language model.
Hanna et al., 2023. arXiv:2305.00586
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, check_count, continuation, lay_out, one_token_words, write
from headwise.data.words import EVENTS
from headwise.task import Batch, Task

CENTURIES = tuple(range(11, 20))


@dataclass(frozen=True)
class GreaterThan(Task):
    """Something lasted from one year to another of the same century: the end must be later than the start.

    Where a tokenizer writes years in pairs of digits, the pair is asked for; where it writes digits one by one, the
    tens. Corrupt prompts start in the year 01, so that nearly every end is later. The answer is the nearest later
    number and the foil the nearest earlier one; `probability_gap` weighs all later against all earlier ones.
    On SmolLM2-135M-Instruct, which writes single digits (64 prompts, seed 0), the answer beats the foil in all, by 4.46
    on average, and is the top token in 36 %; the probability gap is +0.62. In corrupt prompts it is -0.77 (the model
    repeats the 0), and the answer beats the foil in 17 %.
    """

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Spans "century", "start" (the digits after it) and "end".

        `about["numbers"]` are the ids of the numbers that may follow, from the smallest to the largest.

        Raises:
            ValueError: the tokenizer knows fewer than 4 of the events, or joins the digits of years into other tokens.
        """
        check_count(n)
        events = one_token_words(tokenizer, EVENTS, 4, "events", before="The ")
        known = {century: numbers(tokenizer, century) for century in CENTURIES}
        known = {century: found for century, found in known.items() if len(found) > 3 and found == known[CENTURIES[-1]]}
        if not known:
            raise ValueError("This tokenizer joins the digits of years, so the last two cannot be asked for.")
        ids = list(known[CENTURIES[-1]].values())
        draw = random.Random(f"greater than {seed}")
        clean, corrupt = [], []
        for _ in range(n):
            event, century = draw.choice(events), draw.choice(list(known))
            place = draw.randrange(2, len(ids) - 1)
            label = list(known[century])[place]
            year = f"{label}{draw.randrange(1, 10)}" if len(label) == 1 else label
            prompt = self._prompt(tokenizer, event, century, year)
            clean.append(prompt._replace(answer=ids[place + 1], foil=ids[place - 1]))
            corrupt.append(self._prompt(tokenizer, event, century, "01"))
        return lay_out(self, tokenizer, clean, corrupt, n, seed, numbers=ids)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, event: str, century: int, year: str) -> Prompt:
        pieces = [(f"The {event} lasted from the year", None), (f" {century}", "century"), (year, "start")]
        return write(tokenizer, [*pieces, (" to the year", None), (f" {century}", "end")])


def numbers(tokenizer: PreTrainedTokenizerBase, century: int) -> dict[str, int]:
    """What may follow the two digits of a century, in order, and its id: "00" to "99", or "0" to "9" for single digits.

    Empty where the tokenizer writes neither pairs nor single digits after this century.
    """
    ways: dict[str, list[int]] = {}
    for year in range(100):
        try:
            ways[f"{year:02d}"] = continuation(tokenizer, f"the year {century}", f"{year:02d}")
        except ValueError:
            continue
    if tokenizer.unk_token_id in {token for way in ways.values() for token in way}:
        return {}
    pairs = {year: way[0] for year, way in ways.items() if len(way) == 1}
    if "01" in pairs:
        return pairs
    tens = {year[0]: way[0] for year, way in ways.items() if len(way) == 2}
    return tens if len(set(tens.values())) == 10 else {}


def probability_gap(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of all later numbers minus that of all earlier ones; equal numbers count for nothing.

    The paper's metric, except that it counts an equal number as too early. logits [B, P, V] -> [B], from -1 to 1.
    """
    ids = torch.tensor(batch.about["numbers"], device=logits.device)
    probs = logits[:, 0].float().softmax(-1)[:, ids]
    place = torch.arange(len(ids), device=logits.device)
    answer, foil = ((ids == one.to(ids.device)).long().argmax(-1, keepdim=True) for one in (batch.answer, batch.foil))
    return (probs * ((place >= answer).float() - (place <= foil).float())).sum(-1)
