"""The command line: help and lists, and what is wrong, said in a sentence."""

import errno
import json
import os
import subprocess
import sys
import time

import pytest
from command_line import refused, run

# Help and lists


def test_help_answers_in_a_third_of_a_second():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "headwise", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
        if times[-1] < 0.3:
            return
    # A machine that is busy with other tests is slower than the command is.
    assert min(times) < 0.3 * max(1.0, os.getloadavg()[0] / 2), times


@pytest.mark.parametrize("command", ["ls", "show", "map", "prove", "report", "replicate"])
def test_every_command_has_help_and_json(capsys, command):
    result = run(capsys, command, "--help")
    assert result.code == 0
    assert "--json" in result.out


def test_version(capsys):
    assert run(capsys, "--version").out.strip() == "headwise 0.1.0"


def test_ls_lists_methods_with_their_papers(capsys):
    result = run(capsys, "ls")
    assert result.code == 0
    assert "heads.induction" in result.out and "2209.11895" in result.out


def test_ls_json_is_the_contract(capsys):
    entries = json.loads(run(capsys, "ls", "heads", "--json").out)
    assert entries
    assert all(list(entry) == ["name", "room", "title", "authors", "year", "arxiv", "seed"] for entry in entries)
    assert {entry["room"] for entry in entries} == {"heads"}


def test_show(capsys):
    result = run(capsys, "show", "heads.induction")
    assert "Olsson" in result.out and "arXiv:2209.11895" in result.out
    entry = json.loads(run(capsys, "show", "heads.induction", "--json").out)
    assert entry["class"] == "Induction" and entry["summary"]


# What is wrong is said in a sentence


def test_an_unknown_command_has_a_nearest_name(capsys):
    result = run(capsys, "mpa")
    assert result.code == 2
    assert "Did you mean 'map'?" in result.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("ls", "head"), ("There is no room 'head'", "'heads'")),
        (("show", "heads.inductio"), ("There is no method 'heads.inductio'", "Did you mean 'heads.induction'")),
        (("map", "default", "heads.inductio"), ("Did you mean 'heads.induction'",)),
        (("map", "default", "data.ioi"), ("data.ioi does not score heads",)),
        (("map", "default", "heads.induction", "--task", "inducton"), ("Did you mean 'data.induction'",)),
        (("map", "default", "heads.induction", "--task", "heads.sink"), ("heads.sink is not a task",)),
        (("map", "default", "--task", "induction"), ("--task goes with methods",)),
        (("map", "no/such/folder"), ("There is no file or folder no/such/folder", "Allowed:")),
        (("map", "default", "--dtype", "float3"), ("Did you mean 'float32'",)),
        (("prove", "default", "L0.H0", "inducton"), ("'inducton' is not a role", "induction")),
        (("prove", "default", "L0.H0", "sink"), ("can be seen but not proved",)),
        (("prove", "default", "L0.H99", "induction"), ("'L0.H99' is not a head of SmolLM2-135M-Instruct",)),
        (("report", "no-such-atlas"), ("no-such-atlas is not an atlas",)),
        (("replicate", "s0588"), ("There is no replication 's0588'", "s058")),
    ],
)
def test_bad_words_are_one_sentence(capsys, tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    refused(run(capsys, *words), *parts)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run(capsys, "map", "no-such/model"), "Model 'no-such/model'", "Allowed:")


def test_an_unreadable_folder_is_one_sentence(capsys, decoder, monkeypatch):
    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    refused(run(capsys, "map", decoder), "cannot be read: permission denied")


def test_an_encoder_given_a_decoder_task_is_one_sentence(capsys, encoder, tmp_path):
    result = run(capsys, "map", encoder, "heads.ablation", "--task", "induction", "--out", tmp_path / "a")
    refused(result, "tiny-encoder is an encoder (BertForMaskedLM)", "heads.ablation on induction")
    refused(run(capsys, "prove", encoder, "L0.H0", "induction"), "is an encoder")


def test_a_model_without_tokenizer_is_one_sentence(capsys, decoder, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((decoder / file).read_bytes())
    refused(run(capsys, "map", tmp_path, "heads.induction", "--out", tmp_path / "a"), "has no tokenizer")


def test_a_vision_model_needs_no_tokenizer(capsys, tmp_path):
    from families import FAMILIES

    FAMILIES["vit"].build().save_pretrained(tmp_path / "vit")
    words = ("map", tmp_path / "vit", "--n", "4", "--json", "--out", tmp_path / "a")
    result = run(capsys, *words, "heads.entropy")
    assert result.code == 0, result.err
    assert "entropy" in json.loads(result.out)["units"][0]["scores"]
    refused(run(capsys, *words, "heads.induction"), "pixel_values, not tokens")
    refused(run(capsys, *words, "heads.ablation"), "tells 2 classes apart")
    whole = run(capsys, *words[:-3], "--out", tmp_path / "a")
    assert whole.code == 0 and "Report:" in whole.out, whole.err


def test_a_file_where_the_atlas_should_be_is_one_sentence(capsys, decoder, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = run(capsys, "map", decoder, "heads.entropy", "--n", "4", "--out", tmp_path / "file" / "atlas")
    refused(result, "cannot be used")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_of_ours_is_not_hidden(capsys, monkeypatch):
    def broken(_):
        raise KeyError("ours")

    monkeypatch.setattr("headwise.method.catalogue", broken)
    with pytest.raises(KeyError):
        run(capsys, "ls")


def test_a_reader_that_leaves_is_no_error():
    pipe = f"{sys.executable} -m headwise ls --json | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.split() == ["[", "0"]
