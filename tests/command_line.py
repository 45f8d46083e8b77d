"""The command line in this process, and tiny models with a tokenizer of plain words for it to open."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from headwise import cli

WORDS = 120


def run(capsys, *words):
    """Exit code, stdout, stderr, and the lines of the latter."""
    before, sys.argv = sys.argv, ["headwise", *map(str, words)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err, lines=err.strip().splitlines())


def refused(result, *parts):
    """One sentence on stderr, nothing on stdout, exit code 2."""
    assert result.code == 2
    assert result.out == ""
    assert len(result.lines) == 1, result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def words_tokenizer(size: int = WORDS) -> transformers.PreTrainedTokenizerFast:
    """Of [UNK], [PAD] and the words w2, w3 and so on, whose numbers are their ids."""
    vocab = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, size)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


def tiny_decoder(folder: Path) -> Path:
    """A Llama of two layers with random weights, saved with that tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


def tiny_encoder(folder: Path) -> Path:
    """A BERT of one layer with random weights, saved with that tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder
