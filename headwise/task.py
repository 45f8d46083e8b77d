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
        return replace(self, inputs=self.corrupt, corrupt=self.inputs)

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


def single_token(tokenizer: "PreTrainedTokenizerBase", word: str) -> int:
    """The id of a word that is one token. Raises ValueError when the tokenizer splits it."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens for this tokenizer, where the task needs one.")
    return ids[0]


Metric = Callable[[Tensor, Batch], Tensor]


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def logprob(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of the answer in nats, mean over the answer's positions. logits [B, P, V] -> [B]."""
    return _chosen(logits.float().log_softmax(-1), batch.answer).mean(-1)


def logit_diff(logits: Tensor, batch: Batch) -> Tensor:
    """Logit of the answer minus logit of the foil. logits [B, P, V] -> [B]. Raises ValueError without a foil."""
    if batch.foil is None:
        raise ValueError(
            f"{batch.about.get('task', 'This task')} has no foil, so logit_diff has no meaning; use logprob."
        )
    return (_chosen(logits.float(), batch.answer) - _chosen(logits.float(), batch.foil)).mean(-1)


def prob(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of the answer. logits [B, P, V] -> [B]."""
    return _chosen(logits.float().softmax(-1), batch.answer).mean(-1)


def correct(logits: Tensor, batch: Batch) -> Tensor:
    """Share of positions at which the answer has the largest logit (or, with a foil, a larger one than the foil)."""
    if batch.foil is None:
        return (logits.argmax(-1) == batch.answer).float().mean(-1)
    return (_chosen(logits, batch.answer) > _chosen(logits, batch.foil)).float().mean(-1)


METRICS: dict[str, Metric] = {"logprob": logprob, "logit_diff": logit_diff, "prob": prob, "correct": correct}


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
        index = torch.searchsorted(columns, batch.at)
    else:
        logits, index = model(**inputs).logits, batch.at
    if logits.ndim == 2:
        return logits.unsqueeze(1)
    return logits[torch.arange(len(logits), device=logits.device).unsqueeze(1), index]


def _takes(model: "PreTrainedModel", argument: str) -> bool:
    import inspect

    return argument in inspect.signature(type(model).forward).parameters
