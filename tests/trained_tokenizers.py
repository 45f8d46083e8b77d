"""Small tokenizers of three kinds, trained on the words of the tasks, and one of words alone."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headwise.data import agreement
from headwise.data.ioi import TEMPLATES
from headwise.data.needle import STEM
from headwise.data.passkeys import ALPHABET
from headwise.data.planted_words import lexicon
from headwise.data.prose import sentences
from headwise.data.two_hop import COUNTRY_OF
from headwise.data.words import (
    ARGUMENTS,
    CAPITALS,
    COLOURS,
    EVENTS,
    GIFTS,
    GROCERIES,
    MEN,
    NAMES,
    NOUNS,
    OBJECTS,
    ORDERED,
    PLACES,
    ROLES,
    WOMEN,
)

PHRASES = (
    "Q: On the table, I see a an and. What color is the\nA:",
    "Answer: I need to buy, and. I already have the and the, so I still need the",
    "So is such a good, isn't she he it",
    "def self, param",
)
GROUPS = (
    WOMEN, MEN, ROLES, ARGUMENTS, COLOURS, OBJECTS, GROCERIES,
    agreement.LINKS, agreement.NOUNS, agreement.NOUNS.values(), "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
)  # fmt: skip


def corpus() -> list[str]:
    flow = sentences("tests")
    texts = [next(flow) for _ in range(60)]
    texts += [
        f"The capital of {land} is {city}. Q: What is the capital of {land}? A:" for land, city in CAPITALS.items()
    ]
    texts += [
        t.format(a=n, b=n, s=n, place=p, gift=g)
        for t in TEMPLATES
        for n in NAMES
        for p, g in zip(PLACES, GIFTS, strict=False)
    ]
    texts += [f'Which option is "{noun}"?\nA. {noun}\nAnswer: A' for noun in NOUNS] * 3
    texts += [f"{STEM} {i}.\n{STEM} {i}." for i in range(10)]
    texts += [" and ".join(["and", *words]) for words in ORDERED.values()] * 10
    texts += [ALPHABET, 'Passkey "dog":']
    texts += [*PHRASES, *(" and ".join(["", *group, "is"]) for group in GROUPS)] * 10
    texts += [f"The {event} lasted from the year 1732 to the year 17" for event in EVENTS] * 3
    texts += [f"{place} is a place in {land}." for place, land in COUNTRY_OF.items()]
    return texts


def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")


def word_piece() -> PreTrainedTokenizerFast:
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=list(special.values()), show_progress=False)
    inner.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def marked_words() -> PreTrainedTokenizerFast:
    """Blanks are part of the word, as in SentencePiece; there is no start token."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


MAKERS = {"bytes": byte_level, "pieces": word_piece, "marked": marked_words, "words": lambda: lexicon(100).tokenizer}
