"""What heads read and write, in tokens: a few rows of each head's OV and QK circuits (Elhage et al., 2021)."""

from typing import Any

import polars as pl
import torch
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.site import head
from headwise.weights import Weights

WORDS = (
    "the", "and", "not", "she", "king", "Monday", "three", "red", "France", "Paris", "dog", "water", "good", "because",
    "1", "7", ",", ".", "(", "John", "function", "if", "blue", "day",
)  # fmt: skip


def readouts(model: PreTrainedModel, tokenizer: Any, top: int = 3) -> pl.DataFrame:
    """For each head: which tokens a source token is turned into (ov), and which tokens a query token looks for (qk).

    Sources are a fixed list of common words that are single tokens; the rows kept are those with the largest values.

    Returns:
        columns unit, circuit, source, target, value, rank; an empty table when the model's weights cannot be read so.
    """
    rows: list[tuple[str, str, str, str, float, int]] = []
    try:
        weights = Weights(model)
        sources = _sources(tokenizer)
        embedded = torch.nn.functional.normalize(weights.embed[list(sources.values())].float(), dim=-1)
        unembed = torch.nn.functional.normalize(weights.unembed.float(), dim=-1)
        body = anatomy(model)
        with torch.no_grad():
            for layer in body.layers:
                for index in range(body.heads(layer)):
                    ov = weights.ov(layer, index)
                    written = torch.nn.functional.normalize(embedded @ ov.A.float() @ ov.B.float(), dim=-1) @ unembed.T
                    rows += _rows(head(layer, index), "ov", written, list(sources), tokenizer, top)
                    qk = weights.qk(layer, index)
                    looked = torch.nn.functional.normalize(embedded @ qk.A.float() @ qk.B.float(), dim=-1) @ embedded.T
                    rows += _rows(head(layer, index), "qk", looked, list(sources), None, top)
    except ValueError:
        rows = []
    schema = {
        "unit": pl.String,
        "circuit": pl.String,
        "source": pl.String,
        "target": pl.String,
        "value": pl.Float64,
        "rank": pl.Int64,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def _sources(tokenizer: Any) -> dict[str, int]:
    found = {}
    for word in WORDS:
        for text in (f" {word}", word):
            ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            if len(ids) == 1 and ids[0] not in found.values():
                found[text] = ids[0]
                break
    if not found:
        raise ValueError("None of the source words is a single token of this tokenizer.")
    return found


def _rows(unit: str, circuit: str, table: torch.Tensor, sources: list[str], tokenizer: Any, top: int) -> list:
    """The `top` targets of the six sources that this circuit turns most decidedly into something."""
    values, targets = table.topk(min(top, table.shape[-1]), dim=-1)
    best = values[:, 0].topk(min(6, len(sources))).indices.tolist()
    name = (lambda i: tokenizer.decode([i])) if tokenizer is not None else (lambda i: sources[i])
    return [
        (unit, circuit, sources[s], name(targets[s, r].item()), values[s, r].item(), r + 1)
        for s in best
        for r in range(values.shape[1])
    ]
