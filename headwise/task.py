"""Prompts with an answer key (Batch), the tasks that make them, and the metrics that read logits."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from headwise.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Prompts as a model takes them, with what it should answer and where.

    Attributes:
        inputs: what `model(**inputs)` takes; every tensor has the prompts as its first axis.
        at: [B, P] columns whose logits predict the answer (0 where a model has one output per prompt).
        answer: [B, P] token (or class) ids that are right.
        foil: [B, P] ids that a model without the skill would rather say, or None.
        weight: [B, P] 1 where the answer has a token, 0 where a shorter answer is over; None where all count.
        against: the same prompts with the foil as their answer, where answers or foils are several tokens, or None.
        corrupt: the same inputs, minimally changed so that the answer is lost, or None.
        spans: named column ranges [B, 2], start and end (exclusive).
        texts: one readable prompt a row.
        about: how the batch was made: task, version, seed, n and the task's own fields.
    """

    inputs: dict[str, Tensor]
    at: Tensor
    answer: Tensor
    foil: Tensor | None = None
    corrupt: dict[str, Tensor] | None = None
    weight: Tensor | None = None
    against: "Batch | None" = None
    spans: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answer)

    @property
    def ids(self) -> Tensor:
        """[B, T] token ids. Raises ValueError when the inputs are not tokens."""
        if "input_ids" not in self.inputs:
            raise ValueError(
                f"This batch holds {', '.join(self.inputs)}, not tokens: "
                f"{self.about.get('task', 'its task')} cannot be used here."
            )
        return self.inputs["input_ids"]

    def take(self, rows: "list[int] | slice | Tensor") -> "Batch":
        """The chosen prompts only."""

        def pick(value: Tensor) -> Tensor:
            return value[rows]

        order = torch.arange(len(self))[rows].tolist()
        return replace(
            self,
            inputs={k: pick(v) for k, v in self.inputs.items()},
            corrupt=None if self.corrupt is None else {k: pick(v) for k, v in self.corrupt.items()},
            at=pick(self.at),
            answer=pick(self.answer),
            foil=None if self.foil is None else pick(self.foil),
            weight=None if self.weight is None else pick(self.weight),
            against=None if self.against is None else self.against.take(rows),
            spans={k: pick(v) for k, v in self.spans.items()},
            texts=[self.texts[i] for i in order] if self.texts else [],
        )

    def split(self, share: float = 0.5) -> "tuple[Batch, Batch]":
        """A development part (`share` of the prompts) and the held-out rest, by position."""
        cut = min(max(1, round(len(self) * share)), len(self) - 1)
        if len(self) < 2:
            raise ValueError(f"A batch of {len(self)} prompt cannot be split; make at least 2.")
        dev, held_out = self.take(slice(0, cut)), self.take(slice(cut, None))
        dev = replace(dev, about=self.about | {"part": f"rows 0 to {cut - 1}"})
        return dev, replace(held_out, about=self.about | {"part": f"rows {cut} to {len(self) - 1}"})

    def chunks(self, rows: int) -> "Iterator[Batch]":
        """The batch in parts of at most `rows` prompts."""
        for start in range(0, len(self), max(1, rows)):
            yield self.take(slice(start, start + max(1, rows)))

    def flipped(self) -> "Batch":
        """The batch with corrupt prompts as its inputs. Raises ValueError when the task has none."""
        if self.corrupt is None:
            raise ValueError(
                f"{self.about.get('task', 'This task')} has no corrupt prompts; restore and resample need them."
            )
        against = None if self.against is None else self.against.flipped()
        return replace(self, inputs=self.corrupt, corrupt=self.inputs, against=against)

    def to(self, device: "torch.device | str") -> "Batch":
        """The batch on another device."""

        def move(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(device) for k, v in values.items()}

        return replace(
            self,
            inputs=move(self.inputs),
            corrupt=None if self.corrupt is None else move(self.corrupt),
            spans=move(self.spans),
            at=self.at.to(device),
            answer=self.answer.to(device),
            foil=None if self.foil is None else self.foil.to(device),
            weight=None if self.weight is None else self.weight.to(device),
            against=None if self.against is None else self.against.to(device),
        )


@dataclass(frozen=True)
class Task(Method):
    """Base of the data room: a recipe that makes prompts with an answer key."""

    version: ClassVar[int] = 1

    def make(self, tokenizer: "PreTrainedTokenizerBase", n: int, seed: int = 0) -> Batch:
        """Make `n` prompts; the same tokenizer, n and seed give the same batch."""
        raise TypeError(f"{type(self).__name__} does not say how its prompts are made.")

    def about(self, n: int, seed: int) -> dict[str, Any]:
        """The provenance that every batch of this task carries."""
        return {"task": self.identity()["name"], "version": self.version, "n": n, "seed": seed, **asdict(self)}


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor, padded on the left.

    Returns:
        ids [B, T] and attention mask [B, T], 1 where a token is real.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def with_needle(batch: Batch) -> Batch:
    """The batch with its needle said after the question, and answers at each of the needle's tokens."""
    if "needle" not in batch.spans:
        raise ValueError(f"{batch.about.get('task', 'This batch')} marks no span 'needle'; use data.needle.")
    spans = batch.spans["needle"]
    lengths = (spans[:, 1] - spans[:, 0]).unique().tolist()
    if len(lengths) != 1 or lengths[0] < 1:
        raise ValueError(
            f"Needles of {', '.join(map(str, lengths))} tokens cannot stand side by side; make them equal."
        )
    ids, size = batch.ids, lengths[0]
    needle = ids.gather(1, spans[:, :1] + torch.arange(size))
    inputs = {k: v for k, v in batch.inputs.items() if k in ("input_ids", "attention_mask")}
    inputs["input_ids"] = torch.cat([ids, needle[:, :-1]], 1)
    if "attention_mask" in inputs:
        more = torch.ones_like(needle[:, :-1])
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], more.to(inputs["attention_mask"].dtype)], 1)
    at = ids.shape[1] - 1 + torch.arange(size).expand(len(ids), -1)
    return replace(batch, inputs=inputs, at=at, answer=needle, foil=None, corrupt=None)


def single_token(tokenizer: "PreTrainedTokenizerBase", word: str) -> int:
    """The id of a word that is one token. Raises ValueError when the tokenizer splits it."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens for this tokenizer, where the task needs one.")
    return ids[0]


Metric = Callable[[Tensor, Batch], Tensor]


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _mean(values: Tensor, batch: Batch) -> Tensor:
    if batch.weight is None:
        return values.mean(-1)
    return (values * batch.weight).sum(-1) / batch.weight.sum(-1)


def logprob(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of the answer in nats, mean over the answer's positions. logits [B, P, V] -> [B]."""
    return _mean(_chosen(logits.float().log_softmax(-1), batch.answer), batch)


def sequence_logprob(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of the whole answer in nats, the sum over its positions. logits [B, P, V] -> [B]."""
    values = _chosen(logits.float().log_softmax(-1), batch.answer)
    return (values if batch.weight is None else values * batch.weight).sum(-1)


def logit_diff(logits: Tensor, batch: Batch) -> Tensor:
    """Logit of the answer minus logit of the foil. logits [B, P, V] -> [B]. Raises ValueError without a foil."""
    if batch.foil is None:
        raise ValueError(
            f"{batch.about.get('task', 'This task')} has no foil, so logit_diff has no meaning; use logprob."
        )
    return _mean(_chosen(logits.float(), batch.answer) - _chosen(logits.float(), batch.foil), batch)


def prob(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of the answer. logits [B, P, V] -> [B]."""
    return _mean(_chosen(logits.float().softmax(-1), batch.answer), batch)


def correct(logits: Tensor, batch: Batch) -> Tensor:
    """Share of positions at which the answer has the largest logit (or, with a foil, a larger one than the foil)."""
    if batch.foil is None:
        return _mean((logits.argmax(-1) == batch.answer).float(), batch)
    return _mean((_chosen(logits, batch.answer) > _chosen(logits, batch.foil)).float(), batch)


METRICS: dict[str, Metric] = {
    "logprob": logprob,
    "sequence_logprob": sequence_logprob,
    "logit_diff": logit_diff,
    "prob": prob,
    "correct": correct,
}


def metric(name: str) -> Metric:
    """A metric by its name in `METRICS`. Raises ValueError with the known names."""
    if name not in METRICS:
        raise ValueError(f"{name!r} is not a metric: {', '.join(METRICS)}.")
    return METRICS[name]


def answer_logits(model: "PreTrainedModel", batch: Batch, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Run the model once and keep only the logits that predict answers.

    Where the model can (`logits_to_keep`), the unembedding runs only on the columns in use.

    Returns:
        [B, P, V] logits; P is 1 for a classifier, whose single output is taken as it is.
    """
    inputs = batch.inputs if inputs is None else inputs
    columns = batch.at.unique()
    if "logits_to_keep" in model.forward.__code__.co_varnames or _takes(model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
        index = torch.searchsorted(columns, batch.at.contiguous())
    else:
        logits, index = model(**inputs).logits, batch.at
    if logits.ndim == 2:
        return logits.unsqueeze(1)
    return logits[torch.arange(len(logits), device=logits.device).unsqueeze(1), index]


def solved(model: "PreTrainedModel", batch: Batch, top: bool = False, rows: int = 32) -> Batch:
    """The prompts that the model gets right; `about["solved"]` says how many of how many.

    Right is: the answer beats the foil. Answers and foils of several tokens are compared by the log-probability of the
    whole. Without a foil, every token of the answer must be the top one.

    Args:
        model: who is asked.
        batch: prompts of any task.
        top: the answer must be the top token as well as beat the foil.
        rows: prompts run at a time.

    Raises:
        ValueError: the model gets none of the prompts right.
    """
    right: list[Tensor] = []
    with torch.no_grad():
        for part in batch.chunks(rows):
            logits = answer_logits(model, part)
            good = correct(logits, part) == 1
            if part.against is not None:
                rival = sequence_logprob(answer_logits(model, part.against), part.against)
                good = sequence_logprob(logits, part) > rival
            if top:
                good &= correct(logits, replace(part, foil=None)) == 1
            right.append(good)
    kept = torch.cat(right).nonzero().flatten()
    if not len(kept):
        raise ValueError(
            f"The model gets none of the {len(batch)} prompts of {batch.about.get('task', 'this task')} right, "
            "so there is nothing to explain; use more prompts, or a larger model."
        )
    return replace(batch.take(kept.to(batch.at.device)), about=batch.about | {"solved": f"{len(kept)} of {len(batch)}"})


def _takes(model: "PreTrainedModel", argument: str) -> bool:
    import inspect

    return argument in inspect.signature(type(model).forward).parameters
