"""One file a paper: does its headline claim hold here, on real parts, with its baseline beside it?

    from headwise import replicate

    replicate.names()                  # the files of this room
    replicate.run("fact_or_context")   # or by row: replicate.run("s058")

Each file fixes its thresholds as class attributes, and `judge` turns the measured checks into an outcome. Listing
reads the files as syntax trees, so that torch is imported only by what runs.
"""

import ast
import difflib
import functools
import importlib
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

_HERE = Path(__file__).parent
OUTCOMES = {"holds": "holds", "partly": "partly", "fails": "does not"}
KEYS = ("seed", "name", "claim", "paper", "measured", "baseline", "outcome", "seconds", "versions")


@dataclass(frozen=True)
class Outcome:
    """What one run of a replication found.

    Attributes:
        measured: our figure, in words.
        baseline: what the same measurement gives without the method.
        outcome: holds, partly or fails; made by `judge`.
        numbers: every number behind the words.
        checks: each condition by name, and whether it was met.
    """

    measured: str
    baseline: str
    outcome: str
    numbers: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"{self.outcome!r} is not an outcome: {', '.join(OUTCOMES)}.")


@dataclass(frozen=True)
class Replication:
    """Base of every replication.

    Class attributes: `row`, the row of the mission; `claim`, one sentence; `paper`, the paper's figure in words;
    `changed`, what was changed after results had been seen, so that readers can discount it.

    Fields:
        full: more prompts, and so more minutes.
    """

    full: bool = False

    row: ClassVar[str] = ""
    claim: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    changed: ClassVar[str] = ""

    def run(self, seed: int = 0) -> Outcome:
        """Measure. The same seed gives the same numbers on the same machine."""
        raise TypeError(f"{type(self).__name__} does not say how it is run.")


@dataclass(frozen=True)
class Entry:
    """A replication as it stands in its file, read without running it."""

    name: str
    row: str
    claim: str
    paper: str
    title: str
    class_name: str
    changed: str


def judge(checks: dict[str, bool]) -> str:
    """The outcome rule. The first check is the claim itself: unmet, the claim fails; met with all others, it holds."""
    if not checks:
        raise ValueError("An outcome needs at least one check; none was given.")
    met = [bool(value) for value in checks.values()]
    return "fails" if not met[0] else "holds" if all(met) else "partly"


def settle(measured: str, baseline: str, checks: dict[str, bool], numbers: dict[str, Any]) -> Outcome:
    """An outcome from its checks; those not met are named in the words."""
    checks = {name: bool(value) for name, value in checks.items()}
    missed = [name for name, met in checks.items() if not met]
    words = f"{measured}. Not met: {'; '.join(missed)}" if missed else measured
    return Outcome(words, baseline, judge(checks), numbers, checks)


def _entry(file: Path) -> Entry | None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(b) == "Replication" for b in node.bases):
            texts = dict.fromkeys(("row", "claim", "paper", "changed"), "")
            for line in node.body:
                named = isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                if named and line.value is not None and line.target.id in texts:
                    texts[line.target.id] = str(ast.literal_eval(line.value))
            title = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
            return Entry(file.stem, **texts, title=title, class_name=node.name)
    return None


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every replication, in the order of the rows."""
    found = [entry for file in sorted(_HERE.glob("*.py")) if file.stem != "__init__" and (entry := _entry(file))]
    return tuple(sorted(found, key=lambda entry: entry.row))


def names() -> list[str]:
    """Names of all replications."""
    return [entry.name for entry in entries()]


def find(name: str) -> Entry:
    """The replication of that name or row.

    Raises:
        ValueError: there is none; the nearest one is named.
    """
    for entry in entries():
        if name in (entry.name, entry.row):
            return entry
    known = [key for entry in entries() for key in (entry.name, entry.row)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"There is no replication {name!r}.{hint} All of them: {', '.join(names())}.")


def run(name: str, full: bool = False, seed: int = 0, record: "str | Path | None" = None) -> dict[str, Any]:
    """Run one replication.

    Args:
        name: a file name ("fact_or_context") or a row ("s058").
        full: more prompts, and so more minutes.
        seed: randomness of prompts, controls and training.
        record: a folder that keeps the result as `<name>.json`, with every number behind it; None keeps nothing.

    Returns:
        {seed, name, claim, paper, measured, baseline, outcome, seconds, versions}; `seed` is the row of the mission.

    Raises:
        ValueError: there is no such replication.
    """
    entry = find(name)
    one = getattr(importlib.import_module(f"headwise.replicate.{entry.name}"), entry.class_name)(full=full)
    began = time.perf_counter()
    outcome = one.run(seed)
    row = {
        "seed": entry.row,
        "name": entry.name,
        "claim": entry.claim,
        "paper": entry.paper,
        "measured": outcome.measured,
        "baseline": outcome.baseline,
        "outcome": outcome.outcome,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }
    if record is not None:
        keep(row, outcome, Path(record), full=full, randomness=seed)
    return row


def keep(row: dict[str, Any], outcome: Outcome, folder: Path, full: bool, randomness: int) -> Path:
    """Write a result with its numbers; the words of the outcome come from the checks alone."""
    folder.mkdir(parents=True, exist_ok=True)
    behind = {key: asdict(outcome)[key] for key in ("checks", "numbers")}
    made = {"full": full, "randomness": randomness, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    path = folder / f"{row['name']}.json"
    path.write_text(json.dumps({**row, **made, **behind}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    from importlib.metadata import version

    from headwise.score import release

    found = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"headwise": release(), **found, "python": platform.python_version()}


def kept(folder: "str | Path") -> list[dict[str, Any]]:
    """The results kept in a folder, in the order of the rows.

    Raises:
        ValueError: a file there is not a result.
    """
    rows = []
    for file in sorted(Path(folder).glob("*.json")):
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as problem:
            raise ValueError(f"{file.name} is not a kept replication: {problem}.") from problem
        missing = [key for key in KEYS if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{file.name} is not a kept replication: it lacks {', '.join(missing)}.")
        rows.append(row)
    return sorted(rows, key=lambda row: row["seed"])


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """The results as a Markdown table: system, claim, figures, baseline, outcome, seconds, versions."""
    head = ("System", "Claim", "Paper's figure", "Our figure", "Baseline", "Outcome", "Seconds", "Versions")
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        made = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        cells = [
            f"{row['seed']} `{row['name']}{' --full' if row.get('full') else ''}`",
            *(row[key] for key in ("claim", "paper", "measured", "baseline")),
            OUTCOMES[row["outcome"]],
            f"{row['seconds']:.0f}",
            made,
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def page(folder: "str | Path") -> str:
    """The text of docs/replications.md from the kept results."""
    rows = kept(folder)
    changed = {entry.name: entry.changed for entry in entries()}
    count = {word: sum(row["outcome"] == word for row in rows) for word in OUTCOMES}
    text = [
        "# Replications",
        "",
        "Does the headline claim of a paper hold here, on a small real model or on one trained in minutes? Each row is",
        "made by `headwise replicate NAME`, with `--full` where it stands behind the name (more prompts or seeds);",
        "this page is written from the results kept in `docs/replications/`, with every number behind them.",
        "Thresholds stand in each file of `headwise/replicate/`; code compares and decides.",
        "A claim *holds* when every check is met, holds *partly* when the first check, the claim itself, is met and",
        "another is not, and *does not* hold when the first is not met. The checks that were not met are named.",
        "Seconds are those of one thread on two cores that were busy with other work, so they are too many.",
        "",
        f"Of {len(rows)}: {count['holds']} hold, {count['partly']} hold partly, {count['fails']} do not.",
        "",
        markdown(rows),
        "## Checks",
        "",
    ]
    for row in rows:
        text += [f"### {row['seed']} {row['name']}", "", f"Made {row.get('when', 'at an unknown time')[:10]}.", ""]
        text += [f"- {'met' if met else 'not met'}: {name}" for name, met in row.get("checks", {}).items()]
        text.append("")
        if said := changed.get(row["name"]):
            text += [f"Changed after results had been seen: {said}", ""]
    return "\n".join(text).rstrip() + "\n"
