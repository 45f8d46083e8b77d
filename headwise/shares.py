"""How many KV heads must see everything: what retrieval loses as more and more of them see only a window.

Prompts are read with their answers given token by token (teacher forcing), one prompt at a time, and several choices of
streaming heads side by side as rows of one batch.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel

from headwise.anatomy import Anatomy, anatomy
from headwise.matmul import fast_matmul
from headwise.narrow import Window, alone, checked, narrowed
from headwise.progress import hidden
from headwise.scan import noting_tuples, starting, starts
from headwise.score import Score
from headwise.site import Site, Unit
from headwise.tap import tap
from headwise.task import Batch, answer_logits, logprob


@dataclass(frozen=True)
class Answers:
    """What became of the answers, one row a choice of streaming heads.

    Attributes:
        logprob: [choices, B] log-probability of the answer in nats, mean over its tokens.
        found: [choices, B] true where every token of the answer is the top one.
    """

    logprob: Tensor
    found: Tensor


@dataclass(frozen=True)
class Step:
    """One share of full heads.

    Attributes:
        full: KV heads that see everything; share: the same as a share of all.
        loss: nats of the answer's log-probability that are lost, mean over prompts.
        found: share of prompts whose answer is found.
        streaming: the KV heads that see only the window.
    """

    full: int
    share: float
    loss: float
    found: float
    streaming: tuple[str, ...]


def answers(
    model: PreTrainedModel,
    batch: Batch,
    choices: Sequence[Collection[str]],
    window: Window | None = None,
    *,
    whole: bool = False,
    at_once: int = 4,
    label: str | None = None,
) -> Answers:
    """Read every prompt under every choice of streaming KV heads ("L5.G0").

    Args:
        batch: prompts whose answers stand in them, read at `batch.at`, such as data.passkeys makes.
        whole: True reads what comes before span "question" (before the first answer, where there is no such span) with
            everything in sight, once for all choices, and only what follows under the choice: what a cache does that
            drops keys after the prefill. False: streaming heads are so from the first token on.
        at_once: choices side by side.
        label: text of the progress bar, None for no bar.

    Raises:
        ValueError: a unit that is no KV head of this model, or a batch without tokens.
    """
    window, body = window or Window(), anatomy(model)
    streams = _rows(body, choices)
    said: list[Tensor] = []
    bar = tqdm(total=len(batch) * len(choices), desc=label, disable=label is None or hidden(), leave=False)
    with torch.no_grad(), fast_matmul(model), bar:
        for row in range(len(batch)):
            prompt = opened(model, alone(batch, row).to(model.device), whole)
            parts, most = [], at_once if prompt.repeats else 1
            groups = [slice(start, start + most) for start in range(0, len(choices), most)]
            begin = _beginnings(model, prompt, [_touched(streams, group) for group in groups])
            for group in groups:
                some = {layer: rows[group].to(model.device) for layer, rows in streams.items()}
                touched, count = _touched(streams, group), len(choices[group])
                several = prompt.one.take([0] * count)
                with begin(touched, count), narrowed(model, window, _mixing(some), layers=touched):
                    logits = answer_logits(model, several, prompt.inputs(count)).float()
                right = logits.argmax(-1) == several.answer
                if several.weight is not None:
                    right |= several.weight == 0
                parts.append(torch.stack([logprob(logits, several), right.all(-1).float()]).cpu())
                bar.update(count)
            said.append(torch.cat(parts, 1))
    both = torch.stack(said, -1)
    return Answers(both[0], both[1] > 0)


def _rows(body: Anatomy, choices: Sequence[Collection[str]]) -> dict[int, Tensor]:
    """{layer: [choices, H]} true where a query head sees only the window."""
    rows = {layer: torch.zeros(len(choices), body.heads(layer), dtype=torch.bool) for layer in body.layers}
    for i, units in enumerate(choices):
        for unit in checked(body, units):
            part = Unit.parse(unit)
            wide = body.heads(part.layer) // body.kv_heads(part.layer)
            rows[part.layer][i, part.index * wide : (part.index + 1) * wide] = True
    return rows


def _touched(streams: dict[int, Tensor], group: slice) -> list[int]:
    """Layers in which one of these choices narrows a head, in order."""
    return sorted(layer for layer, rows in streams.items() if bool(rows[group].any()))


def _beginnings(
    model: PreTrainedModel, prompt: "Opened", groups: Sequence[list[int]]
) -> Callable[[list[int], int], AbstractContextManager[None]]:
    """Of layers that a group of choices changes, and how many copies of the prompt it takes, what lets the group begin
    at the first of them: below it all is as in the unchanged run. That run is made where it saves more than it costs.
    """
    blocks = sorted(anatomy(model).blocks[""])
    first = [layers[0] for layers in groups if layers]
    if sum(map(blocks.index, first)) <= len(blocks):
        return lambda *_: nullcontext()
    with tap(model, *(Site(n, "resid_pre") for n in sorted(set(first)))) as t, noting_tuples(anatomy(model)) as tuples:
        logits = answer_logits(model, prompt.one, prompt.inputs())

    def begin(layers: list[int], copies: int) -> AbstractContextManager[None]:
        if not layers:
            return nullcontext()
        return starting(model, layers[0], t[Site(layers[0], "resid_pre")].repeat(copies, 1, 1), tuples)

    def again() -> Tensor:
        with begin([max(first)], 1):
            return answer_logits(model, prompt.one, prompt.inputs())

    return begin if starts(again, logits, model.dtype) else lambda *_: nullcontext()


def _mixing(streams: dict[int, Tensor]) -> Callable[[int, Tensor, Callable[[], Tensor]], Tensor]:
    return lambda layer, z, near: torch.where(streams[layer][:, None, :, None], near(), z)


@dataclass(frozen=True)
class Opened:
    """A prompt of which nothing, or all before its question, has been read.

    Attributes:
        one: what is still to be read, as a batch of one prompt with `at` counted from there.
        cache: keys and values of what has been read, or None.
    """

    one: Batch
    cache: Cache | None

    @property
    def repeats(self) -> bool:
        """Whether it can be read several times side by side; the states of linear attention layers cannot."""
        layers = [] if self.cache is None else self.cache.layers
        return all(hasattr(layer, "batch_repeat_interleave") for layer in layers)

    def inputs(self, copies: int = 1) -> dict[str, Any]:
        """What the model takes to read on, so many times side by side; the kept cache stays as it is."""
        several = self.one.take([0] * copies).inputs
        if self.cache is None:
            return dict(several)
        held = copy.deepcopy(self.cache)
        if copies > 1:
            held.batch_repeat_interleave(copies)
        return {"input_ids": several["input_ids"], "past_key_values": held}


def opened(model: PreTrainedModel, one: Batch, whole: bool) -> Opened:
    """A prompt of `alone` to be read from its start, or (`whole`) from its question on with the context read already.

    The question is span "question"; without it, what follows the token before the first answer.

    Raises:
        ValueError: nothing stands before the question.
    """
    if not whole:
        return Opened(one, None)
    question = one.spans.get("question")
    start = int(one.at.min()) if question is None else int(question[0, 0])
    if not 0 < start <= int(one.at.min()):
        raise ValueError(
            f"The question starts at token {start}, so no context stands before it that could be read first."
        )
    cache = model.base_model(input_ids=one.ids[:, :start], use_cache=True).past_key_values
    return Opened(replace(one, inputs={"input_ids": one.ids[:, start:]}, at=one.at - start), cache)


def descend(
    model: PreTrainedModel,
    batch: Batch,
    ranking: "Score | Sequence[str]",
    shares: Sequence[float] = (1.0, 0.75, 0.6, 0.5, 0.4, 0.33, 0.25, 0.15, 0.0),
    window: Window | None = None,
    *,
    whole: bool = False,
    label: str | None = None,
) -> list[Step]:
    """Turn KV heads to streaming, the last of a ranking first, and measure retrieval at each share of full heads.

    Args:
        ranking: a score of KV heads, or all their names, those that are needed most first.
        shares: shares of KV heads that stay full, 0 to 1.
        whole: see `answers`.

    Returns:
        one step a share, from all full to the fewest.

    Raises:
        ValueError: a share outside 0 to 1, a ranking of other units than KV heads, or one that lacks some of them.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"The shares {tuple(shares)} must be one or more numbers from 0 to 1.")
    order = ranking.top(len(ranking.table)) if isinstance(ranking, Score) else list(ranking)
    body = anatomy(model)
    count = sum(body.kv_heads(layer) for layer in body.layers)
    if len(dict.fromkeys(checked(body, order))) != count:
        raise ValueError(
            f"A ranking of {len(set(order))} KV heads was given; this model has {count}, and all are needed."
        )
    counts = sorted({count, *(round(share * count) for share in shares)}, reverse=True)
    got = answers(model, batch, [order[full:] for full in counts], window, whole=whole, label=label)
    lost = (got.logprob[0] - got.logprob).mean(-1)
    found = got.found.float().mean(-1)
    return [
        Step(full, full / count, float(lost[i]), float(found[i]), tuple(order[full:])) for i, full in enumerate(counts)
    ]


def smallest(steps: Sequence[Step], keep: float = 0.95) -> Step:
    """The fewest full heads that still find `keep` of what all find; every larger share does so too.

    Raises:
        ValueError: there are no steps, or nothing is found with all heads full.
    """
    ordered = sorted(steps, key=lambda step: -step.full)
    if not ordered or ordered[0].found == 0:
        raise ValueError("No answer is found with all heads full, so no share of them can be judged by what it keeps.")
    best = ordered[0]
    for step in ordered:
        if step.found < keep * ordered[0].found:
            break
        best = step
    return best
