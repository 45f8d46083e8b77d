"""The vocabulary of planted models: one token a word, all words of the plain-text tasks, and made-up ones."""

import re
from itertools import islice, product
from typing import NamedTuple

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from headwise.data import ioi, needle, prose, words

SPECIAL = ("<pad>", "<s>", "<unk>")
LISTS = ("days", "months", "words", "ordinals")
DIGITS = tuple("0123456789")


class Lexicon(NamedTuple):
    """A tokenizer, and the ids of its classes of words."""

    tokenizer: PreTrainedTokenizerFast
    names: list[int]
    triggers: list[int]
    lists: list[list[int]]
    giving: int


def lexicon(plain: int) -> Lexicon:
    """A tokenizer with `plain` made-up words beside those of the tasks."""
    texts = [
        *ioi.TEMPLATES, needle.STEM, ". , : ? and",
        *prose.PEOPLE, *prose.VERBS, *prose.KINDS, *prose.THINGS, *prose.WHERE, *prose.WHEN, *prose.LINKS,
        *prose.STATES, "stood it a an the A An The",
    ]  # fmt: skip
    texts += [text[0].upper() + text[1:] for text in texts if text[0].isalpha()]
    said = [word for text in texts for word in re.findall(r"[A-Za-z]+|[.,:?]", re.sub(r"\{\w+\}", "", text))]
    lists = [*(words.ORDERED[kind] for kind in LISTS), list(DIGITS)]
    known = [*SPECIAL, *said, *words.NAMES, *words.PLACES, *words.GIFTS, *(word for one in lists for word in one)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(known))}
    made_up = ("".join(parts) for parts in product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz", "aeiou"))
    for word in islice((w for w in made_up if w not in vocab), plain):
        vocab[word] = len(vocab)
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    return Lexicon(
        tokenizer,
        names=[vocab[word] for word in words.NAMES],
        triggers=[vocab[word] for word in (":", *DIGITS)],
        lists=[[vocab[word] for word in one] for one in lists],
        giving=vocab["to"],
    )
