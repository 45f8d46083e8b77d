"""Runs that several replications need: answer rates, loss on neutral text, short answers behind long contexts, time."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.data import Capitals, NeutralText
from headwise.data.words import CAPITALS
from headwise.tap import tap
from headwise.task import Batch, answer_logits, logprob


def logits_of(model: PreTrainedModel, batch: Batch, rows: int = 16) -> Tensor:
    """[B, V] logits that predict the (first) answer, in parts of `rows` prompts."""
    with torch.no_grad():
        return torch.cat([answer_logits(model, part)[:, 0].float() for part in batch.chunks(rows)])


def answers(model: PreTrainedModel, batch: Batch, rows: int = 500) -> Tensor:
    """[B, P, outputs] what the model says at every answer, in parts of `rows` prompts."""
    with torch.no_grad():
        return torch.cat([answer_logits(model, part) for part in batch.chunks(rows)])


def streams(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """[B, n, D] the stream where each y is asked for: as it was read in, and after each layer."""
    sites = ["L0.resid_pre", *(f"L{layer}.resid_post" for layer in range(model.config.num_hidden_layers))]
    with tap(model, *sites) as taken:
        answers(model, batch, rows=len(batch))
    return [taken[site][:, batch.at[0]] for site in sites]


Name = TypeVar("Name")


def shares_of_time(ways: Mapping[Name, Callable[[], object]], whole: Name, rounds: int = 7) -> dict[Name, float]:
    """Processor time of each way over that of the way `whole`: the median over rounds, in which the ways take turns.

    A round before the first is for warming up; another way begins each round.
    """
    order, spent = list(ways), {name: [] for name in ways}
    for turn in range(-1, rounds):
        for place in range(len(order)):
            name = order[(turn + place) % len(order)]
            began = time.process_time()
            ways[name]()
            if turn >= 0:
                spent[name].append(time.process_time() - began)
    return {
        name: statistics.median(a / b for a, b in zip(each, spent[whole], strict=True)) for name, each in spent.items()
    }


def line(values: list[float]) -> str:
    """Numbers side by side, with two digits."""
    return " ".join(f"{value:.2f}" for value in values)


def rates(model: PreTrainedModel, batch: Batch, rows: int = 16) -> dict:
    """In percent of prompts: how often the answer ("stated") and the foil ("memorised") is said; "said": the tokens."""
    logits = logits_of(model, batch, rows)
    said = logits.argmax(-1)
    share = {
        name: 100 * float((said == ids[:, 0]).float().mean())
        for name, ids in (("stated", batch.answer), ("memorised", batch.foil))
    }
    return {**share, "said": said}


def neutral_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 6, length: int = 128) -> float:
    """Nats a token on plain prose."""
    batch = NeutralText(length=length).make(tokenizer, n, seed=1)
    with torch.no_grad():
        parts = [logprob(answer_logits(model, part), part) for part in batch.chunks(3)]
    return -float(torch.cat(parts).mean())


def continued(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """[B, T - prompt] log-probability, in nats, of each token behind a prompt under the model without any rule."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt + 1).logits
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]


def whole_answers(model: PreTrainedModel, batch: Batch, rows: int = 4) -> Tensor:
    """[B] true where every token of the answer has the largest logit."""
    with torch.no_grad():
        parts = [(answer_logits(model, part).argmax(-1) == part.answer).all(-1) for part in batch.chunks(rows)]
    return torch.cat(parts)


def known_countries(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> tuple[str, ...]:
    """Countries whose capital the model ranks first without help, in alphabetical order."""
    batch = Capitals().make(tokenizer, len(CAPITALS), seed)
    right = (logits_of(model, batch).argmax(-1) == batch.answer[:, 0]).tolist()
    known = [text for ok, text in zip(right, batch.texts, strict=True) if ok]
    return tuple(sorted(c for c in CAPITALS if any(f" {c} " in f"{text} " for text in known)))
