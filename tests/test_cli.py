import errno
import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch
import transformers
from command_line import run, tiny_decoder, words_tokenizer

from headwise import cli
from headwise.atlas import Atlas
from headwise.claim import Claim, Rung
from headwise.data.planted import Planted
from headwise.score import COLUMNS, Score

NAN = float("nan")


def refused(result, *parts):
    """One sentence on stderr, nothing on stdout, exit code 2."""
    assert result.code == 2
    assert result.out == ""
    assert len(result.lines) == 1, result.err
    assert "Traceback" not in result.err
    for part in parts:
        assert part in result.err


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("models") / "tiny-decoder")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def atlas(tmp_path):
    """A small atlas with one score and two claims."""
    folder = tmp_path / "atlas"
    folder.mkdir()
    about = {
        "format": 1,
        "model": "tiny",
        "model_type": "llama",
        "fingerprint": "0" * 16,
        "layers": [0],
        "heads": {"0": 2},
        "kv_heads": {"0": 2},
        "tokenizer": "",
        "version": "0",
        "created": "2026-01-01T00:00:00+00:00",
    }
    (folder / "atlas.json").write_text(json.dumps(about))
    found = Atlas(folder)
    rows = [("L0.H0", 0, 0, 0.9, 0.8, 1.0, 4), ("L0.H1", 0, 1, 0.1, NAN, NAN, 4)]
    found.add(Score("induction", pl.DataFrame(rows, schema=COLUMNS, orient="row")))
    rung = Rung("needed", "resample (logprob)", 1.0, 0.9, 1.1, 0.1, 0.01, NAN, 8, 0.5, True)
    found.add_claims([Claim("L0.H0", "induction", "proved", [rung]), Claim("L0.H1", "induction", "refuted", [rung])])
    return found


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


# Work, and what is left of it when it stops


def test_map_with_methods(capsys, decoder, tmp_path):
    out = tmp_path / "a"
    result = run(capsys, "map", decoder, "heads.entropy", "heads.sink", "--n", "4", "--out", out)
    assert result.code == 0, result.err
    assert str(out) in result.out and "L0.H0" in result.out
    result = run(capsys, "map", decoder, "heads.previous_token", "--n", "4", "--out", out, "--json")
    found = json.loads(result.out)
    assert list(found) == ["atlas", "model", "units"] and found["model"] == "tiny-decoder"
    assert len(found["units"]) == 8
    assert list(found["units"][0]) == ["unit", "role", "verdict", "scores"]
    assert {"entropy", "sink", "previous_token"} <= set(found["units"][0]["scores"])


def test_methods_go_on_from_what_is_there(capsys, decoder, tmp_path, monkeypatch):
    from headwise.heads import Entropy

    words = ("map", decoder, "heads.entropy", "--n", "4", "--out", tmp_path / "a")
    first = run(capsys, *words)
    with monkeypatch.context() as patch:
        patch.setattr(Entropy, "score", None)
        assert run(capsys, *words).out == first.out
    assert run(capsys, *words, "--seed", "1").out != first.out


def test_two_models_of_one_name_have_folders_of_their_own():
    from headwise.models import folder_of

    model = type("Model", (), {"config": type("Config", (), {"_name_or_path": "some-lab/tiny", "model_type": "x"})})
    assert folder_of("some-lab/tiny", model) == "some-lab--tiny"
    assert folder_of("default", model) == folder_of("./some-lab/tiny", model) == folder_of("a/b/c", model) == "tiny"


def test_methods_that_read_patterns_work_on_an_encoder(capsys, encoder, tmp_path):
    result = run(capsys, "map", encoder, "heads.entropy", "--n", "4", "--out", tmp_path / "a", "--json")
    assert result.code == 0, result.err
    assert len(json.loads(result.out)["units"]) == 2


def test_the_whole_map_of_a_small_model(capsys, decoder, tmp_path):
    out = tmp_path / "a"
    result = run(capsys, "map", decoder, "--n", "8", "--out", out, "--json")
    assert result.code == 0, result.err
    assert len(json.loads(result.out)["units"]) == 8
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")[:400]
    again = run(capsys, "map", decoder, "--n", "8", "--out", out)
    assert again.code == 0, again.err
    assert "Report:" in again.out and "report.html" in again.out


def test_an_atlas_of_other_weights_is_left_alone(capsys, decoder, atlas):
    before = sorted(p.read_bytes() for p in atlas.path.rglob("*") if p.is_file())
    refused(run(capsys, "map", decoder, "heads.entropy", "--out", atlas.path), "is the atlas of tiny", "--out")
    assert sorted(p.read_bytes() for p in atlas.path.rglob("*") if p.is_file()) == before


def second_time(real, error):
    """`real`, which fails on its second call."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "There is no space left on the disk."),
        (KeyboardInterrupt(), 130, "Interrupted. What was finished is kept"),
        (RuntimeError("CUDA out of memory."), 2, "There is not enough memory."),
    ],
)
def test_a_run_that_stops_leaves_the_atlas_whole(capsys, decoder, tmp_path, monkeypatch, error, code, says):
    out = tmp_path / "a"
    words = ("map", decoder, "heads.entropy", "heads.sink", "--n", "4", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(pl.DataFrame, "write_parquet", second_time(pl.DataFrame.write_parquet, error))
        result = run(capsys, *words)
    assert result.code == code
    assert len(result.lines) == 1 and says in result.err
    assert Atlas(out).names() == ["entropy"]
    assert not list(out.rglob("*.part"))
    assert run(capsys, *words).code == 0
    assert Atlas(out).names() == ["entropy", "sink"]


@pytest.mark.slow
def test_ctrl_c_on_a_real_run(tmp_path):
    out = tmp_path / "a"
    command = [sys.executable, "-m", "headwise", "map", "default", "--out", str(out)]
    # A shell starts background jobs deaf to Ctrl-C, and what they start inherits that.
    hearing = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **hearing)
    end = time.monotonic() + 240
    while time.monotonic() < end and not list(out.rglob("*.parquet")):
        time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert err.strip().splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in err
    assert Atlas(out).names()
    assert not list(out.rglob("*.part"))


def test_prove_prints_the_ladder(capsys, decoder, monkeypatch):
    claim = Claim(
        "L0.H0",
        "induction",
        "proved",
        [
            Rung("seen", "induction", 0.9, 0.8, 1.0, NAN, NAN, NAN, 8, NAN, True),
            Rung("needed", "resample (logprob)", 1.5, 1.0, 2.0, 0.1, 0.001, 0.002, 8, 0.5, True),
            Rung("enough", "restore (logprob)", 1.5, 1.0, 2.0, 0.1, 0.001, 0.002, 8, 0.5, True),
        ],
    )
    monkeypatch.setattr(cli, "_prove", lambda *_: claim)
    result = run(capsys, "prove", decoder, "L0.H0", "induction")
    assert result.code == 0
    assert [word in result.out for word in ("seen", "needed", "enough", "proved")] == [True] * 4
    entry = json.loads(run(capsys, "prove", decoder, "L0.H0", "induction", "--json").out)
    assert entry["verdict"] == "proved" and entry["rungs"][0]["null"] is None


def test_prove_confirms_a_planted_head_and_refutes_a_decoy(capsys, tmp_path):
    planted = Planted(decoys=("mute",)).build(seed=3)
    planted.model.save_pretrained(tmp_path / "planted")
    planted.tokenizer.save_pretrained(tmp_path / "planted")
    unit = next(unit for unit, part in planted.truth.items() if part == "induction")
    for head, verdict in ((unit, "proved"), (next(iter(planted.decoys)), "refuted")):
        result = run(capsys, "prove", tmp_path / "planted", head, "induction", "--n", "12", "--json")
        assert result.code == 0, result.err
        entry = json.loads(result.out)
        assert (entry["unit"], entry["verdict"]) == (head, verdict)
        assert [rung["step"] for rung in entry["rungs"]] == ["seen", "needed", "enough"]


def test_report(capsys, atlas, tmp_path):
    result = run(capsys, "report", atlas.path)
    assert result.code == 0, result.err
    assert (atlas.path / "report.html").is_file()
    result = run(capsys, "report", atlas.path, "-o", tmp_path / "x.html", "--json")
    assert json.loads(result.out)["report"] == str(tmp_path / "x.html")


@pytest.fixture
def outcome(monkeypatch):
    row = {
        "seed": "s058",
        "name": "fact_or_context",
        "claim": "a",
        "paper": "b",
        "measured": "c",
        "baseline": "d",
        "outcome": "partly",
        "seconds": 1.0,
        "versions": {"torch": "1"},
    }
    monkeypatch.setattr("headwise.replicate.names", lambda: ["fact_or_context"])
    monkeypatch.setattr("headwise.replicate.run", lambda *_, **__: row)
    return row


def test_replicate_prints_a_list(capsys, outcome):
    assert json.loads(run(capsys, "replicate", "--json").out) == [outcome]
    assert "fact_or_context" in run(capsys, "replicate", "--table").out
    assert "partly" in run(capsys, "replicate", "s058").out


def test_one_replication_that_cannot_run_does_not_stop_the_others(capsys, outcome, monkeypatch):
    monkeypatch.setattr("headwise.replicate.names", lambda: ["first", "second"])

    def only_second(name, **_):
        if name == "first":
            raise ValueError("No runs pass.")
        return outcome

    monkeypatch.setattr("headwise.replicate.run", only_second)
    result = run(capsys, "replicate", "--json")
    assert result.code == 2
    assert json.loads(result.out) == [outcome]
    assert result.err.strip() == "first could not be run: No runs pass."


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


@pytest.mark.parametrize("progress", ["0", "1"])
def test_no_bars_and_no_chatter_where_nobody_watches(decoder, tmp_path, progress):
    command = [sys.executable, "-m", "headwise", "map", str(decoder), "heads.entropy", "--n", "4", "--json"]
    env = {**os.environ, "HEADWISE_PROGRESS": progress, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path / "a")], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    json.loads(done.stdout)
