"""Prompts of one's own: a file with a prompt, its answer, and, where wanted, a foil and a corrupt prompt a line."""

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from headwise.data.layout import Prompt, check_count, continuation, encode, lay_out, pad_id, shared_start, start_ids
from headwise.data.pair_file import Pair, checked, read_pairs
from headwise.task import Batch, Task, pad_left


class Coded(NamedTuple):
    """A pair in tokens; the foil and the corrupt prompt are empty where the pair has none."""

    text: str
    ids: list[int]
    answer: list[int]
    foil: list[int]
    corrupt: list[int]


@dataclass(frozen=True)
class Pairs(Task):
    """Prompts from JSON lines such as {"prompt": "2 + 2 =", "answer": "4", "foil": "5", "corrupt": "3 + 2 ="}.

    Where answer and foil differ in one token, as in other tasks, `logit_diff` is the metric, and tokens that both begin
    with end the prompt. Else all tokens of the answer stand in the prompt and in the batch, `sequence_logprob` is the
    metric, and `batch.against` has the same prompts with the foil as their answer.

    Fields:
        file: path of the file; pairs: the pairs themselves, instead of a file.
        between: what stands between a prompt and its answer, unless one of them has a blank or a line break there.
    """

    file: str = ""
    pairs: tuple[Pair, ...] = ()
    between: str = " "

    def read(self) -> dict[str, Pair]:
        """All pairs, each under its place in the file. Raises ValueError where the file, or one of them, is none."""
        if bool(self.file) == bool(self.pairs):
            raise ValueError(
                "Pairs come from a file or are given themselves: Pairs('mine.jsonl'), or Pairs(pairs=...)."
            )
        if self.file:
            return read_pairs(Path(self.file).expanduser())
        return checked({f"Pair {i}": Pair(*pair) for i, pair in enumerate(self.pairs, 1)})

    def make(self, tokenizer: PreTrainedTokenizerBase, n: int, seed: int = 0) -> Batch:
        """Take n of the pairs, in an order that the seed decides. Spans "prompt" and "end" (its last token).

        Raises:
            ValueError: there are fewer pairs, one of them is wrong in itself, or not for this tokenizer: prompt and
                corrupt prompt must have the same number of tokens.
        """
        pairs = self.read()
        check_count(n, len(pairs), "pairs")
        places = random.Random(f"pairs {seed}").sample(list(pairs), n)
        rows = [self._coded(tokenizer, where, pairs[where]) for where in places]
        about = {"places": places}
        if self.file:
            about["sha256"] = hashlib.sha256(Path(self.file).expanduser().read_bytes()).hexdigest()[:16]
        heads = [shared_start([row.answer, row.foil]) if row.foil else 0 for row in rows]
        if all(
            {len(row.answer), len(row.foil or row.answer)} == {head + 1} for row, head in zip(rows, heads, strict=True)
        ):
            return self._short(tokenizer, rows, heads, seed, about)
        batch = self._long(tokenizer, rows, [row.answer for row in rows], seed, about)
        foils = [row.foil for row in rows if row.foil]
        return replace(batch, against=self._long(tokenizer, rows, foils, seed, about)) if foils else batch

    def _coded(self, tokenizer: PreTrainedTokenizerBase, where: str, pair: Pair) -> Coded:
        ids, answer = self._joined(tokenizer, where, pair.prompt, pair.answer)
        foil = self._joined(tokenizer, where, pair.prompt, pair.foil)[1] if pair.foil else []
        if answer == foil:
            raise ValueError(f"{where}: this tokenizer writes {pair.answer!r} and {pair.foil!r} with the same tokens.")
        corrupt: list[int] = []
        if pair.corrupt:
            corrupt, again = self._joined(tokenizer, where, pair.corrupt, pair.answer)
            if len(corrupt) != len(ids):
                raise ValueError(
                    f"{where}: the prompt has {len(ids)} tokens and its corrupt prompt {len(corrupt)}; "
                    "both need the same number."
                )
            if corrupt == ids or again != answer:
                raise ValueError(
                    f"{where}: this tokenizer does not keep the prompt, its corrupt prompt and the answer apart."
                )
        return Coded(pair.prompt, ids, answer, foil, corrupt)

    def _joined(
        self, tokenizer: PreTrainedTokenizerBase, where: str, prompt: str, answer: str
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt without blanks at its end, and those that the answer adds to it."""
        stem = prompt.rstrip(" ")
        if stem != prompt:
            more = prompt[len(stem) :] + answer.lstrip(" ")
        else:
            more = answer if answer[0].isspace() or stem[-1].isspace() else self.between + answer
        try:
            way = continuation(tokenizer, stem, more)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not way or tokenizer.unk_token_id in way:
            raise ValueError(f"{where}: this tokenizer does not know the words of {answer!r}.")
        return encode(tokenizer, stem), way

    def _short(
        self, tokenizer: PreTrainedTokenizerBase, rows: list[Coded], heads: list[int], seed: int, about: dict
    ) -> Batch:
        """One token decides in every row."""
        clean, corrupt = [], []
        for row, head in zip(rows, heads, strict=True):
            lead, end = row.answer[:head], len(row.ids) + head
            spans = {"prompt": (0, len(row.ids)), "end": (end - 1, end)}
            foil = row.foil[head] if row.foil else 0
            clean.append(Prompt(row.ids + lead, spans, row.text, row.answer[head], foil))
            if row.corrupt:
                corrupt.append(Prompt(row.corrupt + lead, spans, row.text))
        batch = lay_out(self, tokenizer, clean, corrupt, len(rows), seed, **about)
        return batch if rows[0].foil else replace(batch, foil=None)

    def _long(
        self, tokenizer: PreTrainedTokenizerBase, rows: list[Coded], ends: list[list[int]], seed: int, about: dict
    ) -> Batch:
        """All tokens of an end are asked for, each after the right ones before it."""
        first, fill = start_ids(tokenizer), pad_id(tokenizer)
        ids, mask = pad_left([first + row.ids + end[:-1] for row, end in zip(rows, ends, strict=True)], fill)
        width, most = ids.shape[1], max(map(len, ends))
        places, sizes = torch.arange(most), torch.tensor([[len(end)] for end in ends])
        at = (width - sizes + places).clamp(max=width - 1)
        lengths = torch.tensor([len(row.ids) for row in rows])
        spans = {"prompt": torch.stack([at[:, 0] + 1 - lengths, at[:, 0] + 1], 1)}
        corrupt = None
        if rows[0].corrupt:
            other, _ = pad_left([first + row.corrupt + end[:-1] for row, end in zip(rows, ends, strict=True)], fill)
            corrupt = {"input_ids": other, "attention_mask": mask}
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask},
            corrupt=corrupt,
            at=at,
            answer=torch.tensor([end + end[-1:] * (most - len(end)) for end in ends]),
            weight=(places < sizes).long(),
            spans=spans | {"end": torch.stack([at[:, 0], at[:, 0] + 1], 1)},
            texts=[row.text for row in rows],
            about={**self.about(len(rows), seed), **about},
        )
