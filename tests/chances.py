"""Sampling under drafts against the model's own distribution, by a chi-square test; and rules of acceptance that are
wrong, which the test must find out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.accepting import pick
from headwise.drafting import Drafter
from headwise.verifying import Verifying, run

Text = tuple[int, ...]
START = torch.tensor([[5, 9, 4, 11]])
STEPS, TOP = 4, 3


def flatter(model: PreTrainedModel) -> PreTrainedModel:
    """The model, changed in place so that no continuation is all but certain."""
    with torch.no_grad():
        model.lm_head.weight *= 0.3
    return model


def continuations(model: PreTrainedModel) -> tuple[dict[Text, float], dict[Text, list[int]]]:
    """The chance of every continuation of `START` by top-k sampling, from the model; what may follow each text."""
    found: dict[Text, float] = {(): 1.0}
    follows: dict[Text, list[int]] = {}
    for _ in range(STEPS):
        said = torch.tensor(list(found), dtype=torch.long).view(len(found), -1)
        with torch.no_grad():
            scores = model(torch.cat([START.expand(len(said), -1), said], 1)).logits[:, -1].double()
        best, longer = scores.topk(TOP), {}
        for row, (text, chance) in enumerate(found.items()):
            follows[text] = best.indices[row].tolist()
            for token, one in zip(follows[text], best.values[row].softmax(-1).tolist(), strict=True):
                longer[*text, token] = chance * one
        found = longer
    return found, follows


def p_value(
    model: PreTrainedModel, drafter: Callable[[dict[Text, list[int]]], Drafter], rows: int = 400, times: int = 8
) -> float:
    """Chi-square of `rows` x `times` texts of `STEPS` tokens against the model's own distribution.

    `drafter` is made from what may follow what. One row in ten and more must have had a drafted token accepted.
    """
    chances, follows = continuations(model)
    torch.manual_seed(7)
    counts = dict.fromkeys(chances, 0)
    how = {"max_new_tokens": STEPS, "do_sample": True, "top_k": TOP, "pad_token_id": 0, "eos_token_id": None}
    for _ in range(times):
        found = run(Verifying(drafter(follows)), model, START.repeat(rows, 1), how)
        assert found.stats.accepted > rows / 10
        for said in found.ids[:, START.shape[1] :].tolist():
            counts[tuple(said)] += 1
    n = rows * times
    # Cells of few expected draws are put together.
    large = [said for said, chance in chances.items() if chance * n >= 8]
    cells = [(counts[said], chances[said] * n) for said in large]
    rest = (n - sum(count for count, _ in cells), n - sum(expected for _, expected in cells))
    cells += [rest] if rest[1] > 1 else []
    square = sum((count - expected) ** 2 / expected for count, expected in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(square / 2.0)))


Given = Sequence[tuple[int, Tensor | None]]


def too_willing(p: Tensor, given: Given) -> tuple[int, int | None]:
    """Accepts a fifth more than it may."""
    for which, (token, _) in enumerate(given):
        if float(torch.rand(())) < 1.2 * float(p[token]):
            return token, which
    return pick(p, [])


def draws_again(p: Tensor, given: Given) -> tuple[int, int | None]:
    """Draws from p where it should draw from what refused tokens leave of it."""
    for which, (token, q) in enumerate(given):
        if float(torch.rand(())) < float(p[token]) / (1 if q is None else float(q[token])):
            return token, which
    return pick(p, [])


def forgets_siblings(p: Tensor, given: Given) -> tuple[int, int | None]:
    """Half the time right, half the time as `draws_again`."""
    return pick(p, given[:1]) if float(torch.rand(())) < 0.5 else draws_again(p, given)
