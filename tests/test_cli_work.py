"""What commands do, and what is left of it when they stop."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
from command_line import refused, run

from headwise import cli
from headwise.atlas import Atlas
from headwise.claim import Claim, Rung
from headwise.data.planted import Planted
from headwise.score import COLUMNS, Score

NAN = float("nan")


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


@pytest.mark.parametrize("progress", ["0", "1"])
def test_no_bars_and_no_chatter_where_nobody_watches(decoder, tmp_path, progress):
    command = [sys.executable, "-m", "headwise", "map", str(decoder), "heads.entropy", "--n", "4", "--json"]
    env = {**os.environ, "HEADWISE_PROGRESS": progress, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(tmp_path / "a")], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    json.loads(done.stdout)
