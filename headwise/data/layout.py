"""From pieces of text to token columns: the shared way in which tasks lay out their prompts, for any tokenizer."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from headwise.task import Batch, Task, pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, str | None]
_ORDINARY = re.compile(r"^[Ġ▁]?[A-Za-z][A-Za-z0-9]*$")


class Prompt(NamedTuple):
    """One prompt without its start token: ids, named ranges of them, the readable text, and ids to predict after it."""

    ids: list[int]
    spans: dict[str, tuple[int, int]]
    text: str
    answer: int = 0
    foil: int = 0


def start_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token a prompt starts with: the tokenizer's BOS, else its CLS, else none."""
    for token in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        if isinstance(token, int):
            return [token]
    return []


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that fills the left of short prompts; it is masked, so any id will do where there is no pad token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def ordinary_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of plain words and pieces of words; every token that is not special where the tokenizer has no such words.

    Raises:
        ValueError: there are fewer than 4 of them.
    """
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    size = len(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    pool = [i for i, token in enumerate(tokens) if token and i not in special and _ORDINARY.match(token)]
    if len(pool) < 4:
        pool = [i for i in range(size) if i not in special]
    if len(pool) < 4:
        raise ValueError(f"This tokenizer has {len(pool)} ordinary tokens, where random prompts need at least 4.")
    return pool


def continuation(tokenizer: "PreTrainedTokenizerBase", stem: str, more: str) -> list[int]:
    """Ids that `more` adds after `stem`. Raises ValueError where the two melt into other tokens."""
    before, whole = encode(tokenizer, stem), encode(tokenizer, stem + more)
    if whole[: len(before)] != before:
        raise ValueError(
            f"This tokenizer joins {more!r} with the end of {stem!r}, so the text cannot be continued there."
        )
    return whole[len(before) :]


def shared_start(rows: Iterable[Sequence[int]]) -> int:
    """How many leading ids all rows have in common."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def one_token_words(
    tokenizer: "PreTrainedTokenizerBase", words: Sequence[str], need: int, what: str, before: str = "and "
) -> list[str]:
    """Those words that are one known token where they follow `before`.

    Raises:
        ValueError: fewer than `need` of them are.
    """
    unknown = tokenizer.unk_token_id
    stem = encode(tokenizer, before.rstrip(" "))
    kept = []
    for word in words:
        whole = encode(tokenizer, before + word)
        if whole[: len(stem)] == stem and len(whole) == len(stem) + 1 and whole[-1] != unknown:
            kept.append(word)
    if len(kept) < need:
        raise ValueError(
            f"Only {len(kept)} of {len(words)} {what} (such as {words[0]!r}) are one token for this tokenizer; "
            f"the task needs {need}."
        )
    return kept


def write(tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[Piece]) -> Prompt:
    """Encode pieces of text as one text, and find the token range of every named piece.

    A token belongs to a piece when it holds one of its characters other than leading blanks.
    """
    text = "".join(piece for piece, _ in pieces)
    spans: dict[str, tuple[int, int]] = {}
    chars, at = {}, 0
    for piece, name in pieces:
        if name is not None:
            chars[name] = (at + len(piece) - len(piece.lstrip(" ")), at + len(piece))
        at += len(piece)
    if tokenizer.is_fast:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
        for name, (low, high) in chars.items():
            inside = [i for i, (a, b) in enumerate(offsets) if a < high and b > low]
            spans[name] = (inside[0], inside[-1] + 1) if inside else (0, 0)
    else:
        ids = encode(tokenizer, text)
        for name, (low, high) in chars.items():
            ahead = encode(tokenizer, text[:low].rstrip(" "))
            spans[name] = (shared_start([ahead, ids]), shared_start([encode(tokenizer, text[:high]), ids]))
    return Prompt(ids, spans, text)


def ask(
    tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[Piece], options: Sequence[str]
) -> tuple[Prompt, list[int]]:
    """A prompt that stops where the options differ, and the id by which each option goes on.

    Tokens that all options share (such as a blank before digits) become the end of the prompt.

    Raises:
        ValueError: two options go on with the same token, or an option cannot follow the text.
    """
    prompt = write(tokenizer, pieces)
    ways = [continuation(tokenizer, prompt.text, option) for option in options]
    shared = shared_start(ways) if len(set(options)) > 1 else 0
    firsts = [way[shared] if len(way) > shared else -1 for way in ways]
    if -1 in firsts or tokenizer.unk_token_id in firsts:
        raise ValueError(
            f"This tokenizer has no token by which {options[0]!r} and {options[-1]!r} could be told apart."
        )
    return prompt._replace(ids=prompt.ids + ways[0][:shared]), firsts


def lay_out(
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    n: int,
    seed: int,
    **about: object,
) -> Batch:
    """Prompts as a left-padded batch that is read at its last column.

    Raises:
        ValueError: a corrupt prompt has another length than its clean one.
    """
    first = start_ids(tokenizer)
    ids, mask = pad_left([first + p.ids for p in prompts], pad_id(tokenizer))
    other = None
    if corrupt:
        for clean, changed in zip(prompts, corrupt, strict=True):
            if len(clean.ids) != len(changed.ids):
                raise ValueError(f"{clean.text!r} and {changed.text!r} differ in their number of tokens.")
        other = {"input_ids": pad_left([first + p.ids for p in corrupt], pad_id(tokenizer))[0], "attention_mask": mask}
    return Batch(
        inputs={"input_ids": ids, "attention_mask": mask},
        corrupt=other,
        at=torch.full((len(prompts), 1), ids.shape[1] - 1),
        answer=torch.tensor([[p.answer] for p in prompts]),
        foil=torch.tensor([[p.foil] for p in prompts]),
        spans=columns(prompts, ids.shape[1]),
        texts=[p.text for p in prompts],
        about={**task.about(n, seed), **about},
    )


def columns(prompts: Sequence[Prompt], width: int) -> dict[str, Tensor]:
    """Ranges inside prompts as ranges of columns of the left-padded batch."""
    spans = {}
    for name in prompts[0].spans:
        rows = [[width - len(p.ids) + edge for edge in p.spans[name]] for p in prompts]
        spans[name] = torch.tensor(rows)
    return spans


def check_count(n: int, most: int | None = None, what: str = "prompts") -> None:
    """Raises ValueError when n prompts cannot be made."""
    if n < 1 or (most is not None and n > most):
        allowed = "at least 1" if most is None else f"1 to {most}"
        raise ValueError(f"{n} {what} were asked for; allowed is {allowed}.")
