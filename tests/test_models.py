"""Opening models: the default one, folders, dtypes, fingerprints, and what cannot be opened."""

import errno
import gc
import json
import re
import time
from pathlib import Path

import pytest
import regex
import torch
import transformers
from gguf_files import byte_letters, tiny_llama

from headwise.models import fingerprint, name_of, open_model

TEXT = "The capital of France is Paris.\n\nIt's  1234\n 56, isn't it?\t<|im_start|>user\ncafé 漢字 🙂<|im_end|>\n"


@pytest.fixture(scope="module")
def default():
    return open_model("default")


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def own_ids(tokenizer, text):
    """Byte-pair encoding written out plainly, with llama.cpp's rule here: digits apart, then GPT-2's words."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    rank = {tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(model["merges"])}
    letters = byte_letters()
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ids = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if part in special:
            ids.append(special[part])
            continue
        for piece in regex.split(r"(\p{N})", part):
            for word in words.findall(piece):
                symbols = [letters[b] for b in word.encode()]
                while len(symbols) > 1:
                    pairs = list(zip(symbols, symbols[1:], strict=False))
                    best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
                    if pairs[best] not in rank:
                        break
                    symbols[best : best + 2] = ["".join(pairs[best])]
                ids += [model["vocab"][s] for s in symbols]
    return ids


def test_the_default_model_knows_where_paris_is(default):
    model, tokenizer = default
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**ids).logits[0, -1].topk(3).indices
    assert " Paris" in [tokenizer.decode([i]) for i in best]
    assert not model.training and model.dtype == torch.float32
    assert name_of(model) == "SmolLM2-135M-Instruct"


def test_the_default_model_is_a_good_model_of_english(default):
    """Swapped halves of q and k would leave words likely but text surprising."""
    model, tokenizer = default
    text = "When the sun went down, the children walked back to the house, where their mother was waiting for them."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 3.0


def test_the_default_tokenizer_splits_as_the_gguf_says(default):
    _, tokenizer = default
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert ids == own_ids(tokenizer, TEXT)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith("Hi<|im_end|>\n")
    assert tokenizer.pad_token == "<|im_end|>" and tokenizer.model_max_length == 8192


def test_the_default_model_opens_fast(default):
    start = time.process_time()  # other work on the machine does not count
    open_model("default")
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_of_garbage_is_left_as_it_was(running, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    (gc.enable if running else gc.disable)()
    try:
        open_model(tmp_path / "m")
        with pytest.raises(ValueError, match="cannot be opened"):
            (tmp_path / "m" / "config.json").write_text('{"model_type": "no such type"}')
            open_model(tmp_path / "m")
        assert gc.isenabled() == running
    finally:
        gc.enable()


def test_a_fingerprint_is_quick_and_the_same_after_saving(default, tmp_path):
    model, _ = default
    start = time.process_time()
    mark = fingerprint(model)
    assert time.process_time() - start < 0.25
    assert re.fullmatch("[0-9a-f]{16}", mark)
    tiny = tiny_llama()
    tiny.save_pretrained(tmp_path / "tiny")
    again, tokenizer = open_model(tmp_path / "tiny")
    assert fingerprint(again) == fingerprint(tiny) != mark
    assert tokenizer is None and name_of(again) == "tiny"


def test_a_fingerprint_sees_any_tensor_scaled_and_any_head_zeroed():
    model = tiny_llama()
    mark = fingerprint(model)
    for _, value in model.named_parameters():
        kept = value.detach().clone()
        with torch.no_grad():
            value.mul_(1.01)
            assert fingerprint(model) != mark
            value.copy_(kept)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
    assert fingerprint(model) != mark


KINDS = {
    "LlamaForCausalLM": tiny_llama,
    "GPT2LMHeadModel": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ),
    "BertForMaskedLM": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
    "ViTForImageClassification": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
        )
    ),
    "BertModel": lambda: transformers.BertModel(
        transformers.BertConfig(
            vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_opens_with_the_head_it_was_saved_with(kind, tmp_path):
    torch.manual_seed(0)
    model = KINDS[kind]()
    model.save_pretrained(tmp_path)
    opened, companion = open_model(tmp_path)
    assert type(opened).__name__ == kind
    assert companion is None
    assert fingerprint(opened) == fingerprint(model)


def test_dtype_is_passed_on_and_checked(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert open_model(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no dtype 'bfloat'.*Did you mean 'bfloat16'"):
        open_model(tmp_path, dtype="bfloat")
    with pytest.raises(ValueError, match="Device 'gpu9' cannot be used"):
        open_model(tmp_path, device="gpu9")


def empty_folder(path):
    path.mkdir()
    return path


def folder_with(path, text):
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def file_with(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: empty_folder(d / "x"), "holds no config.json"),
        (lambda d: folder_with(d / "x", "{not json"), "is not valid JSON"),
        (lambda d: folder_with(d / "x", '{"model_type": "nonesuch"}'), "cannot be opened as a model"),
        (lambda d: folder_with(d / "x", '{"model_type": "llama"}'), "cannot be opened as a model"),
        (lambda d: file_with(d / "x.txt", b"hello"), "not a GGUF file"),
        (lambda d: file_with(d / "x.gguf", b""), "not a GGUF file"),
        (lambda d: file_with(d / "x.gguf", b"GGUF" + bytes(100)), "cannot be read as a GGUF model"),
        (lambda d: d / "nowhere", "There is no file or folder"),
        (lambda d: "my.gguf", "There is no file or folder"),
        (lambda d: "what is this?", "neither a path that exists nor a hub id"),
        (lambda d: "no-such/model", "neither in the local cache nor to be had from the hub"),
        (lambda d: "defalt", "Did you mean 'default'"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(make, says, tmp_path, own_home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=says) as caught:
        open_model(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_has_a_nearest_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Did you mean 'model.gguf'"):
        open_model(tmp_path / "modle.gguf")


def test_a_folder_without_permission_is_one_sentence(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match="cannot be read: permission denied"):
        open_model(tmp_path)


def test_no_network_is_said_at_once(monkeypatch):
    def no_address(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("headwise.models.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="no network"):
        open_model("no-such/model")
    assert time.perf_counter() - start < 5


def test_a_broken_tokenizer_is_one_sentence(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="has a tokenizer that cannot be opened"):
        open_model(tmp_path)
