"""The documents: every snippet runs, every command parses, every column, key and error message is what the code has."""

import ast
import difflib
import json
import re
import shlex
import tomllib
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
import typer
from families import FAMILIES, SILENT
from safetensors import safe_open
from typer.testing import CliRunner

import headwise
from headwise import cli, models, replicate, score
from headwise.atlas import BENCH, Atlas
from headwise.claim import ROLES
from headwise.graph import COLUMNS as GRAPH
from headwise.terminal import INTERRUPTED

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
GENERATED = ("methods.md", "replications.md", "bench.md", "planted.md", "LOG.md")
BY_HAND = [page for page in PAGES if page.name not in GENERATED]
REAL_MODEL = ("README.md",)
TERMINAL = (
    INTERRUPTED,
    "There is no space left on the disk. What was finished is kept; free some, or use --out.",
    "There is not enough memory. Fewer prompts (--n) or --dtype bfloat16 need less.",
    "… cannot be used: ….",
    "This needs the package …, which is not installed: pip install …",
)
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


def test_the_readme_names_every_command_and_family():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {line.split()[1] for line in commands(ROOT / "README.md")} == set(typer.main.get_command(cli.app).commands)
    part = text.split("The tests build a small one of each of ")[1].split(", and\ncheck that")[0]
    assert set(re.findall(r"\w+", part)) - {"and"} == set(FAMILIES)
    silent = (
        text.split("modernbert, t5, bart and vit")[1].split(" compute attention by themselves")[0].split("own. ")[1]
    )
    assert set(re.findall(r"\w+", silent)) - {"and"} == set(SILENT)


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


# Contracts


def table(title: str, number: int = 0, page: str = "contracts.md") -> list[list[str]]:
    """The rows of the n-th table under a heading, backticks removed."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    part = re.split(r"^#+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    tables = re.findall(r"(?:^\|.*\n)+", part, re.M)
    lines = tables[number].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def first(title: str, number: int = 0) -> list[str]:
    return [row[0] for row in table(title, number)]


def keys(title: str, number: int = 0) -> list[str]:
    """The keys of a table in which some rows explain several."""
    return [key for cell in first(title, number) for key in re.findall(r"\w+", cell)]


def schema(frame: pl.DataFrame) -> list[list[str]]:
    return [[name, str(kind)] for name, kind in frame.schema.items()]


@pytest.fixture(scope="module")
def run(stand_in):
    """Run a command on the stand-in and read its JSON."""
    patch = pytest.MonkeyPatch()
    patch.setattr(models, "open_model", lambda *_args, **_options: stand_in)

    def call(*words: str):
        done = CliRunner().invoke(cli.app, [*words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    yield call
    patch.undo()


@pytest.fixture(scope="module")
def mapped(run, tmp_path_factory):
    """What `headwise map --json` says of the stand-in, and the atlas that it wrote."""
    folder = tmp_path_factory.mktemp("atlas")
    said = run("map", "default", "--n", "4", "--out", str(folder))
    return said, Atlas(folder)


def test_json_of_ls_and_show(run):
    for row in run("ls"):
        assert list(row) == first("headwise ls --json")
    assert list(run("show", "heads.induction")) == first("headwise ls --json") + first("headwise show --json")


def test_json_of_map(mapped):
    said, _ = mapped
    assert list(said) == first("headwise map --json")
    assert len(said["units"]) == 54
    for unit in said["units"]:
        assert list(unit) == first("headwise map --json", 1)


def test_json_of_prove_and_report(run, mapped, tmp_path):
    said = run("prove", "default", "L5.H1", "induction", "--n", "4", "--seed", "0")
    assert list(said) == first("headwise prove --json")
    columns = first("claims.parquet")
    assert list(said["rungs"][0]) == columns[columns.index("step") :]
    page = tmp_path / "page.html"
    assert list(run("report", str(mapped[1].path), "-o", str(page))) == first("headwise report --json")


def test_json_of_replicate():
    assert list(replicate.KEYS) == first("headwise replicate --json")
    assert all(word in dict(table("headwise replicate --json"))["outcome"] for word in replicate.OUTCOMES)


def test_files_of_an_atlas(mapped):
    _, atlas = mapped
    assert set(atlas.about) <= set(first("atlas.json")) and len(atlas.about) >= len(first("atlas.json")) - 1
    for done in atlas.about["tasks"].values():
        assert list(done) == ["n", "accuracy", "clean", "corrupt"]
    file = next(atlas.path.glob("scores/step=0/score=induction/*.parquet"))
    frame = pl.read_parquet(file, hive_partitioning=False)
    assert schema(frame) == [row[:2] for row in table("Scores")]
    note = json.loads(pl.read_parquet_metadata(file)["headwise"])
    assert sorted(note) == sorted(first("Scores", 1))
    assert sorted(note["about"]) == sorted(first("Scores", 2))
    assert all(rung in dict(table("Scores", 1))["evidence"] for rung in score.EVIDENCE)
    assert schema(pl.read_parquet(atlas.path / "claims.parquet")) == [row[:2] for row in table("claims.parquet")]
    assert schema(atlas.readouts()) == [row[:2] for row in table("readouts.parquet")] and len(atlas.readouts())
    with safe_open(atlas.path / "patterns" / "induction.safetensors", framework="numpy") as held:
        assert sorted(held.metadata()) == sorted(first("Patterns"))
        assert held.get_tensor("L5").dtype == "uint8" and held.get_tensor("L5").shape[0] == 9
    drawn = blocks(ROOT / "docs" / "contracts.md", "text")[0][1]
    # `headwise plan`, `bench` and `why` write these, and readers that are kept.
    later = {"plans", "bench.parquet", "graphs", "readers"}
    named = {line.split("/")[0].strip() for line in drawn.splitlines()[1:]}
    assert named - later == {path.name for path in atlas.path.iterdir()}
    atlas.add_bench([{key: None for key in BENCH if key != "when"} | {"cache": "a", "at": 1, "bytes": 1}])
    assert schema(atlas.bench()) == [row[:2] for row in table("bench.parquet")]


def test_files_of_graphs_and_readers(stand_in, tmp_path):
    assert [[name, str(kind)] for name, kind in GRAPH.items()] == [row[:2] for row in table("graphs/<name>.parquet")]
    headwise.features.LogitLens().fit(stand_in[0], []).save(tmp_path)
    assert list(json.loads((tmp_path / "config.json").read_text())) == first("readers/<name>/config.json")


def test_masks(tmp_path):
    headwise.Mask.of(["L5.H1"]).save(tmp_path / "mask.json")
    held = json.loads((tmp_path / "mask.json").read_text())
    assert list(held) == first("Masks") and held["format"] == dict(table("Masks"))["format"]


def test_roles():
    assert table("Roles") == [[r.name, r.score, str(r.threshold), r.task or "no task"] for r in ROLES]


def test_environment():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "headwise").rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", sources))
    assert read == set(first("Environment"))


def test_exit_codes():
    assert first("Exit codes") == ["0", "1", "2", "130"]
    assert CliRunner().invoke(cli.app, ["ls", "nowhere"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["ls"]).exit_code == 0


def test_floors():
    with (ROOT / "pyproject.toml").open("rb") as file:
        layers = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]["layers"]
    enforced = [set(re.findall(r"\w+", layer)) for layer in layers]
    place = {name: number for number, names in enumerate(enforced) for name in names}
    rows = [
        [word for word in re.findall(r"\w+", row[1]) if word != "then"] for row in table("Floors", page="design.md")
    ]
    assert {name for row in rows for name in row} <= set(place)
    highest = 0
    for row in rows:
        assert min(place[name] for name in row) >= highest
        highest = max(place[name] for name in row)


# Errors


def raised() -> list[str]:
    """Every sentence that the package raises for a user to read; what varies stands as an ellipsis."""
    found = []
    for path in sorted((ROOT / "headwise").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
            if call and call.args and getattr(call.func, "id", "") in ("ValueError", "ImportError", "OSError"):
                found.append(_plain(_sentence(call.args[0])))
    return [text for text in dict.fromkeys(found) if re.search("[a-z]{3}", text)]


def _sentence(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values)
    return _sentence(node.left) + _sentence(node.right) if isinstance(node, ast.BinOp) else "…"


def _plain(text: str) -> str:
    return re.sub(r"…(?:[\s.]*…)*", "…", " ".join(text.split())).strip()


def test_every_error_is_explained():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    listed = [_plain(line) for line in re.findall(r"^> (.+)$", text, re.M)]
    sentences = [*raised(), *(_plain(text) for text in TERMINAL)]
    missing = [one for one in sentences if not difflib.get_close_matches(one, listed, n=1, cutoff=0.8)]
    assert not missing, "docs/errors.md does not explain:\n" + "\n".join(f"> {one}" for one in missing)
    gone = [one for one in listed if not difflib.get_close_matches(one, sentences, n=1, cutoff=0.8)]
    assert not gone, "docs/errors.md explains what is no longer raised:\n" + "\n".join(gone)
