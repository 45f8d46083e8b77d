"""Arithmetic in steps: running results of a chain of numbers, how a trace of them is laid out, and how one is written.

A prompt is the question, a sign, the results step by step, another sign; the answer comes after it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def running(numbers: Tensor, modulus: int, times: "Tensor | None" = None, slips: "Tensor | None" = None) -> Tensor:
    """Results after every step: the first number, then each next one added to it or multiplied with it.

    Args:
        numbers: [B, L].
        modulus: results are remainders of it.
        times: [B, L] true where a step multiplies; the first is not used.
        slips: [B, L] what is added to a result by mistake; the steps after it go on from there.

    Returns:
        [B, L].
    """
    found: list[Tensor] = []
    for i in range(numbers.shape[1]):
        result = numbers[:, i]
        if i:
            added = found[-1] + result
            result = added if times is None else torch.where(times[:, i], found[-1] * result, added)
        found.append((result if slips is None else result + slips[:, i]) % modulus)
    return torch.stack(found, 1)


def laid_out(question: Tensor, trace: Tensor, answer: Tensor, sign: int) -> Batch:
    """Tokens of question [B, L], `sign`, trace [B, L], `sign` + 1; every result and the answer [B] are to be said.

    Returns:
        inputs [B, 2L + 2]; `at` and `answer` [B, L + 1]. Spans: "question", "trace".
    """
    rows, length = question.shape
    first = torch.full((rows, 1), sign)
    ends = torch.tensor([0, length, 2 * length + 1]).expand(rows, 3)
    return Batch(
        inputs={"input_ids": torch.cat([question, first, trace, first + 1], 1)},
        at=torch.tensor([*range(length, 2 * length), 2 * length + 1]).expand(rows, -1),
        answer=torch.cat([trace, answer[:, None]], 1),
        spans={"question": ends[:, :2], "trace": ends[:, 1:] + torch.tensor([1, 0])},
    )


def cells(length: int, device: "torch.device | str" = "cpu") -> dict[str, Tensor]:
    """Cells of prompts that are laid out so, [1, T, T]: from where something is to be said, to what it takes.

    "number": to the number that the step adds; "result": from the last sign to the last result; "question": from
    results and the last sign to all of the question.
    """
    at = torch.arange(2 * length + 2, device=device)
    row, column = at[:, None], at[None]
    saying = (row >= length) & (row != 2 * length)
    number = saying & (row - column == length) & (row < 2 * length)
    result = (row == 2 * length + 1) & (column == 2 * length)
    return {"number": number[None], "result": result[None], "question": (saying & (column < length))[None]}


@torch.no_grad()
def written(model: "PreTrainedModel", batch: Batch, draw: "torch.Generator | None" = None) -> Tensor:
    """[B, P] what a model says at the columns of the answers when it reads its own results in place of those given.

    Args:
        model: reads tokens and says results at the columns `batch.at`, the same in every prompt.
        batch: prompts whose answers stand behind their columns.
        draw: from which tokens are drawn as likely as the model finds them; without it the likeliest is taken.
    """
    ids, said = batch.ids.clone(), []
    for column in batch.at[0].tolist():
        logits = model(input_ids=ids[:, : column + 1], use_cache=False, logits_to_keep=1).logits[:, -1]
        if draw is None:
            said.append(logits.argmax(-1))
        else:
            said.append(torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0])
        if column + 1 < ids.shape[1]:
            ids[:, column + 1] = said[-1]
    return torch.stack(said, 1)
