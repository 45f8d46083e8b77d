"""The documents: every snippet runs, every command parses, every column, key and error message is what the code has."""

import ast
import difflib
import json
import re
import shlex
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

import headwise
from headwise import cli, models
from headwise.atlas import Atlas

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
GENERATED = ("methods.md", "replications.md", "bench.md", "planted.md", "LOG.md")
BY_HAND = [page for page in PAGES if page.name not in GENERATED]
REAL_MODEL = ("README.md",)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of one language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = ((text.count("\n", 0, m.start()) + 2, m[2], m[1]) for m in FENCE.finditer(text))
    return [(line, code) for line, code, kind in found if kind == language]


@pytest.fixture(scope="module")
def stand_in():
    """A tiny model with random weights, under the default model's name and with its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.default_model_path())
    sizes = {"hidden_size": 36, "intermediate_size": 24, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(
        **sizes,
        num_hidden_layers=6,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                size = 1.0 if len(parameter) == len(tokenizer) else 0.5 / parameter.shape[-1] ** 0.5
                parameter.normal_(0, size)
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    return model, tokenizer


@pytest.mark.parametrize("page", [p for p in BY_HAND if blocks(p, "python")], ids=lambda p: p.name)
def test_python_runs(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name not in REAL_MODEL:
        opened = request.getfixturevalue("stand_in")
        monkeypatch.setattr(headwise, "open_model", lambda *_args, **_options: opened)
    names: dict = {"__name__": f"docs.{page.stem.lower()}"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def commands(page: Path) -> list[str]:
    lines = [line for _, code in blocks(page, "console") for line in code.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("headwise ")]


@pytest.mark.parametrize("page", [p for p in BY_HAND if commands(p)], ids=lambda p: p.name)
def test_commands_parse(page):
    group = typer.main.get_command(cli.app)
    for line in commands(page):
        name, *words = shlex.split(line, comments=True)[1:]
        if name.startswith("--"):
            continue
        assert name in group.commands, line
        with group.commands[name].make_context(name, words):
            pass


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in BY_HAND:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


@pytest.mark.parametrize("page", BY_HAND, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        there = (page.parent / path) if path else page
        if there.name in GENERATED:
            continue
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_names_of_the_package_exist():
    for page in BY_HAND:
        for name in set(re.findall(r"\bhw\.(\w+)", page.read_text(encoding="utf-8"))):
            assert getattr(headwise, name), f"{page.name}: hw.{name}"
