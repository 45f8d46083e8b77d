"""Generating on the command line, and ways to generate side by side."""

import json

import pytest
import torch
from command_line import WORDS, run, tiny_decoder
from test_docs import keys

import headwise as hw
from headwise.data.requests import COPYING, OPEN, Request, copying, open_ended
from headwise.decoding import Way, compare, named_draft, usual
from headwise.kv_cache import kv_units
from headwise.matmul import offered
from headwise.plan import Plan

PROMPT = " ".join(f"w{i}" for i in [5, 9, 7, 30, 31, 5, 9, 7, 30, 31, 5, 9])

# Every word stands in it, so that whatever the model says, there is a place to copy from.
WHOLE = " ".join(f"w{i}" for i in range(2, WORDS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def opened(folder):
    return hw.open_model(str(folder))


def test_generate_says_the_same_with_every_draft(capsys, folder, opened, tmp_path):
    texts = {}
    plan = Plan.of(opened[0], {"full": hw.cache.Preallocated()}, dict.fromkeys(kv_units(opened[0]), "full"))
    plan.save(tmp_path / "plan.json")
    for draft in ("none", "copyspec:gamma=1", "head_copying:least=0", "either:first=(copyspec),second=(prompt_lookup)"):
        for more in ((), ("--plan", tmp_path / "plan.json", "--force")):
            words = ("generate", folder, "--prompt", WHOLE, "--draft", draft, "--tokens", 12, "--json", *more)
            found = json.loads(run(capsys, *words).out)
            texts[draft, more] = found["text"]
            assert sorted(found) == sorted(keys("headwise generate --json"))
            assert found["tokens"] == 12 and (found["drafted"] == 0) == (draft == "none")
    assert len(set(texts.values())) == 1
    shown = run(capsys, "generate", folder, "--prompt", WHOLE, "--draft", "prompt_lookup", "--tokens", 12)
    assert shown.out.strip() == next(iter(texts.values())) and "drafted tokens accepted" in shown.err
    sampled = run(capsys, "generate", folder, "--prompt", PROMPT, "--sample", "--tokens", 5, "--json")
    assert json.loads(sampled.out)["tokens"] == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--prompt", " "), "The prompt is empty"),
        (("--prompt", PROMPT, "--tokens", "0"), "max_new_tokens is 0; allowed is 1 or more."),
        (("--prompt", PROMPT, "--tokens", "99999"), "ask for at most 2037 with --tokens"),
        (("--prompt", PROMPT * 3000), "tokens, and this model reads at most"),
        (("--prompt", PROMPT, "--draft", "copyspec:gamma=0"), "gamma is 0"),
        (("--prompt", PROMPT, "--draft", "copyspec:gama=2"), "'gama=2' is no field; allowed are gamma, tokens"),
        (("--prompt", PROMPT, "--draft", "copyspec:gamma=two"), "which is no number"),
        (("--prompt", PROMPT, "--draft", "copyspek"), "Did you mean 'decode.copyspec'?"),
        (("--prompt", PROMPT, "--draft", "either:first=(copyspec)"), "either needs second"),
        (("--prompt", PROMPT, "--draft", "cache.duo"), "cache.duo does not draft"),
        (("--prompt", PROMPT, "--draft", "paced:of=(copyspec),least=0"), "1 <= least <= start <= most"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(capsys, folder, words, sentence):
    found = run(capsys, "generate", folder, *words)
    assert found.code == 2 and sentence in found.err and not found.out and len(found.err.splitlines()) == 1


def test_bench_measures_drafts(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(capsys, "bench", folder, "decode.copyspec", "--tokens", 6, "--rounds", 1, "--json")
    rows = json.loads(found.out)
    assert set(rows) == {"repeats a text", "does not"}
    for kind in rows.values():
        assert sorted(kind[0]) == sorted(keys("headwise generate --json", 1))
        assert [row["name"] for row in kind] == ["greedy", "prompt lookup (transformers)", "decode.copyspec"]
        assert all(row["same"] == 1 and row["tokens"] == 48 for row in kind)
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table wraps its heads
    assert "tokens a pass" in run(capsys, "bench", folder, "decode.copyspec", "--tokens", 4, "--rounds", 1).out
    mixed = run(capsys, "bench", folder, "decode.copyspec", "cache.duo")
    assert mixed.code == 2 and "one kind at a time" in mixed.err


@pytest.mark.skipif(not offered(torch.ones(1, 1)), reason="packs on a CPU with AVX-512")
def test_bench_measures_each_once_more_with_packed_weights(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(capsys, "bench", folder, "decode.copyspec", "--tokens", 4, "--rounds", 1, "--packed", "--json")
    usual = ["greedy", "prompt lookup (transformers)", "decode.copyspec"]
    for kind in json.loads(found.out).values():
        assert [row["name"] for row in kind] == [*usual, *(f"{name}, packed" for name in usual)]
        assert all(row["same"] == 1 for row in kind)


@pytest.mark.skipif(not offered(torch.ones(1, 1)), reason="packs on a CPU with AVX-512")
def test_bench_measures_caches_of_the_default_model_with_packed_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--at", 64, "--tokens", 2, "--rounds", 1, "--no-quality", "--packed", "--json")
    rows = json.loads(run(capsys, "bench", "default", "cache.duo:sink=4,recent=16", *words).out)
    held = {row["cache"]: row["bytes"] for row in rows}
    usual = ["DynamicCache", "StaticCache", "cache.duo:sink=4,recent=16"]
    assert list(held) == [*usual, *(f"{name}, packed" for name in usual)]
    assert all(held[name] == held[f"{name}, packed"] > 0 for name in usual) and held[usual[2]] < held[usual[0]]
    assert all(row["decode_ms"] > 0 and row["kept"] is None for row in rows)


def test_ways_are_compared_request_by_request(opened):
    model, tokenizer = opened
    ids = [[int(word[1:]) for word in PROMPT.split()], [40, 41, 42, 40, 41]]
    requests = [Request("made up", ("",), one) for one in ids]
    duo = hw.cache.Duo(sink=2, recent=6)
    ways = usual(hw.decode.CopySpec(gamma=2)) | {
        "plan": Way(treatments=duo),
        "plan + copyspec": Way(hw.decode.CopySpec(gamma=2), treatments=duo),
    }
    found = {one.name: one for one in compare(model, tokenizer, ways, requests, tokens=8, rounds=2)}
    assert list(found) == list(ways) and not hw.detach.__globals__["_attached"]
    for one in found.values():
        assert len(one.rounds) == 2 and len(one.each) == 2 and one.seconds > 0 and one.tokens == 16
    assert found["greedy"].per_pass == 1 and found["greedy"].acceptance is None and found["greedy"].faster == 1
    assert found["decode.copyspec"].same == found["prompt lookup (transformers)"].same == 1
    assert found["decode.copyspec"].per_pass > 1 and found["decode.copyspec"].sources["copyspec"][1] > 0
    assert found["plan"].per_pass == 1
    together = compare(model, tokenizer, {"greedy": Way(), "copy": Way(hw.decode.CopySpec(gamma=2))}, requests, rows=2)
    assert together[1].same == 1 and together[0].rows == 2
    with pytest.raises(ValueError, match="0 requests, 64 tokens, 5 rounds and 1 rows were given"):
        compare(model, tokenizer, ways, [])


def test_methods_are_made_from_words(opened):
    made = named_draft("paced:of=(either:first=(copyspec:gamma=5,tokens=20),second=(head_copying)),most=20", *opened)
    assert made.of.first == hw.decode.CopySpec(gamma=5, tokens=20) and made.most == 20
    assert len(made.of.second.heads) == 6
    assert named_draft('head_copying:heads=["L0.H1"]', *opened).heads == ("L0.H1",)
    assert made.identity()["fields"]["of"]["fields"]["first"]["fields"]["gamma"] == 5


def test_requests_are_made_again_by_their_seed(opened):
    tokenizer = opened[1]
    for make, kinds in ((copying, COPYING), (open_ended, OPEN)):
        first = make(tokenizer, 50, 3)
        assert first == make(tokenizer, 50, 3) != make(tokenizer, 50, 4)
        assert {one.kind for one in first} == set(kinds) and all(one.ids for one in first)
        assert len({one.turns for one in first}) >= 45
    with pytest.raises(ValueError, match="0 prompts were asked for"):
        copying(tokenizer, 0)
