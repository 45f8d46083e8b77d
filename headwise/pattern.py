"""Which cells of an attention pattern a detector looks at, and the base of all detectors that look at patterns."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from headwise.anatomy import anatomy
from headwise.method import HeadMethod
from headwise.score import COLUMNS, Score
from headwise.site import Unit
from headwise.tap import per_row
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PatternMethod(HeadMethod):
    """Base of detectors that turn each head's attention pattern into one number a prompt."""

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """From the pattern [b, H, Tq, Tk] of one layer on these prompts to [b, H]."""
        raise TypeError(f"{type(self).__name__} does not say how it reads a pattern.")

    def score(self, model: "PreTrainedModel", batch: Batch | None) -> Score:
        """One forward pass in chunks of prompts; patterns are reduced while they pass."""
        return score_together([self], model, batch)[0]


def score_together(
    methods: list[PatternMethod], model: "PreTrainedModel", batch: Batch | None, at_once: int = 8
) -> list[Score]:
    """The scores of several detectors from the same forward passes, `at_once` prompts in each.

    Raises:
        ValueError: there are no prompts, or the model offers no patterns.
    """
    if batch is None:
        names = ", ".join(method.identity()["name"] for method in methods)
        raise ValueError(f"{names}: patterns are looked at on prompts, and there are none.")
    parts: dict[int, list[Tensor]] = {}
    for part in batch.chunks(at_once):
        part = part.to(model.device)

        def reduce(pattern: Tensor, part: Batch = part) -> Tensor:
            return torch.stack([method.read(pattern.float(), part) for method in methods], -1)

        for layer, value in per_row(model, part, "pattern", reduce, rows=at_once).items():
            parts.setdefault(layer, []).append(value)
    values = {layer: torch.cat(rows) for layer, rows in parts.items()}
    return [
        Score.of_heads(method, model, batch, {layer: value[..., i] for layer, value in values.items()})
        for i, method in enumerate(methods)
    ]


def real(batch: Batch, width: int) -> Tensor:
    """[B, T] true where a column holds a token rather than padding; images have no padding.

    The main stack of an encoder-decoder is its decoder, whose tokens are `decoder_input_ids`.
    """
    decoding = "decoder_input_ids" in batch.inputs
    mask = batch.inputs.get("decoder_attention_mask" if decoding else "attention_mask")
    if mask is None:
        some = next(iter(batch.inputs.values()))
        return torch.ones(len(some), width, dtype=torch.bool, device=some.device)
    return mask.bool()


def answering(pattern: Tensor, batch: Batch) -> Tensor:
    """The pattern [B, H, Tq, Tk] at the queries that predict answers: [B, H, P, Tk]."""
    rows = torch.arange(len(pattern), device=pattern.device)[:, None]
    return pattern.transpose(1, 2)[rows, batch.at.to(pattern.device)].transpose(1, 2)


def option_ends(batch: Batch) -> Tensor:
    """[B, options] the column of the last token of each option of a multiple-choice prompt.

    Raises:
        ValueError: the batch marks no options (spans option_end_0, option_end_1 ...).
    """
    names = [f"option_end_{i}" for i in range(len(batch.spans)) if f"option_end_{i}" in batch.spans]
    if "decoder_input_ids" in batch.inputs:
        raise ValueError("Options stand in the encoder's prompt, which an encoder-decoder's main stack does not see.")
    if len(names) < 2:
        raise ValueError(f"{batch.about.get('task', 'This batch')} marks no options; use data.multiple_choice.")
    return torch.stack([batch.spans[name][:, 1] - 1 for name in names], 1)


def right_option(batch: Batch) -> Tensor:
    """[B] the number of the right option, by the place of the answer among the letters."""
    letters = batch.about.get("letters")
    if not letters:
        raise ValueError(f"{batch.about.get('task', 'This batch')} names no option letters; use data.multiple_choice.")
    right = batch.answer[:, -1:] == torch.tensor(letters, device=batch.answer.device)
    if not right.any(-1).all():
        raise ValueError("Some answers are none of the option letters that the batch names.")
    return right.int().argmax(-1)


def earlier_same(batch: Batch) -> Tensor:
    """[B, Tq, Tk] true where the key is an earlier occurrence of the query's own token."""
    ids = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
    ids = batch.ids if ids is None else ids
    there = real(batch, ids.shape[1])
    same = (ids[:, :, None] == ids[:, None, :]) & there[:, :, None] & there[:, None, :]
    return same.tril(-1)


def after_same(batch: Batch) -> Tensor:
    """[B, Tq, Tk] true where the key stands right after an earlier occurrence of the query's token."""
    same = earlier_same(batch)
    shifted = torch.zeros_like(same)
    shifted[:, :, 1:] = same[:, :, :-1]
    return shifted.tril(-1)


def landing(pattern: Tensor, cells: Tensor) -> Tensor:
    """Mean attention that lands on the chosen cells, over the queries that have one.

    Args:
        pattern: [B, H, Tq, Tk].
        cells: [B, Tq, Tk], true where attention counts.

    Returns:
        [B, H]; NaN for a prompt without such a query.
    """
    queries = cells.any(-1).sum(-1, keepdim=True)
    landed = torch.einsum("bhqk,bqk->bh", pattern, cells.to(pattern.dtype))
    return torch.where(queries > 0, landed / queries.clamp_min(1), float("nan"))


def mean_over_queries(values: Tensor, queries: Tensor) -> Tensor:
    """Mean of values [B, H, Tq] over the queries [B, Tq] that count: [B, H]; NaN for a prompt without one."""
    weight = queries.to(values.dtype)[:, None]
    count = weight.sum(-1)
    total = torch.where(weight > 0, values, 0.0).sum(-1)
    return torch.where(count > 0, total / count.clamp_min(1), float("nan"))


def to_kv_heads(score: Score, model: "PreTrainedModel") -> Score:
    """A KV head is worth what its best query head is worth: the maximum over each group, as a score of KV heads."""
    if score.kind != "head":
        raise ValueError(f"{score.name} is a score of kind {score.kind!r}; only scores of heads have KV groups.")
    body = anatomy(model)
    groups = [body.group(layer, index) for layer, index in score.table.select("layer", "index").iter_rows()]
    table = score.table.with_columns(pl.Series("index", groups, dtype=pl.Int64))
    table = table.with_columns(pl.col("value").fill_nan(None))
    best = table.sort("value", descending=True, nulls_last=True).group_by("layer", "index", maintain_order=True).first()
    best = best.sort("layer", "index").with_columns(pl.col("value").fill_null(float("nan")))
    names = [str(Unit("", layer, "G", index)) for layer, index in best.select("layer", "index").iter_rows()]
    best = best.with_columns(pl.Series("unit", names, dtype=pl.String)).select(list(COLUMNS))
    return Score(score.name, best, "kv", score.evidence, score.about, score.step)
