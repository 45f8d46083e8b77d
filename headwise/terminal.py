"""How the command line speaks: tables and JSON on stdout, progress and one-sentence troubles on stderr."""

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.atlas import Atlas
    from headwise.claim import Claim
    from headwise.score import Score

INTERRUPTED = "Interrupted. What was finished is kept; the same command goes on from there."


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def tell(text: str) -> None:
    """Say on stderr what is going on, where somebody watches."""
    if sys.stderr.isatty() and os.environ.get("HEADWISE_PROGRESS") != "0":
        sys.stderr.write(text + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN: numbers that do not exist become null."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(value: Any) -> None:
    say(json.dumps(_plain(value), indent=2, ensure_ascii=False, default=str))


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], stretch: tuple[int, ...] = ()) -> None:
    """A table as wide as the terminal; the columns `stretch` wrap, the others only where they would not fit."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index not in stretch)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    if not stretch and sum(widths) + 3 * len(widths) > console.width:
        for column in table.columns:
            column.no_wrap = False
    console.print(table)


def print_roles(atlas: "Atlas") -> None:
    from headwise.claim import ROLES
    from headwise.view.words import summary_sentence

    rows = []
    for role in ROLES:
        found: dict[str, list[str]] = {"proved": [], "refuted": [], "unknown": []}
        for claim in atlas.claims(role=role.name):
            found[claim.verdict].append(claim.unit)
        if any(found.values()):
            rows.append((role.name, *(" ".join(units) or "-" for units in found.values())))
    if rows:
        print_table(("role", "proved", "looks like it, refuted", "not settled"), rows, stretch=(1, 2, 3))
    say(summary_sentence(atlas.heads()))
    skipped = atlas.about.get("skipped", {})
    if skipped:
        say(f"Left out, for reasons that {atlas.path / 'atlas.json'} gives: {', '.join(sorted(skipped))}.")


def print_scores(scores: "list[Score]") -> None:
    rows = []
    for score in scores:
        table = score.table.filter(score.table["unit"].is_in(score.top(8))).sort("value", descending=True)
        rows += [
            (score.name, row["unit"], _number(row["value"]), f"{_number(row['low'])} to {_number(row['high'])}")
            for row in table.iter_rows(named=True)
        ]
    print_table(("score", "head", "value", "95 % interval"), rows)


def claim_entry(claim: "Claim") -> dict[str, Any]:
    from dataclasses import asdict

    rungs = [asdict(rung) for rung in claim.rungs]
    return {"unit": claim.unit, "role": claim.role, "verdict": claim.verdict, "says": claim.sentence(), "rungs": rungs}


def print_ladder(claim: "Claim") -> None:
    rows = [
        (
            rung.step,
            rung.score,
            f"{_number(rung.value)}  ({_number(rung.low)} to {_number(rung.high)})",
            _number(rung.null),
            _number(rung.p_holm),
            "holds" if rung.passed else "fails",
        )
        for rung in claim.rungs
    ]
    print_table(("step", "number", "value and 95 % interval", "random heads", "p (Holm)", ""), rows)
    say(claim.sentence())


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def stop(sentence: str, code: int = 2) -> None:
    sys.stderr.write(sentence.strip() + "\n")
    raise SystemExit(code)


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Turn what a user can cause into one sentence on stderr and exit code 2, or 130 after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        stop(INTERRUPTED, 130)
    except ValueError as error:
        stop(" ".join(str(error).split()))
    except ImportError as error:
        if error.name is None or error.name.startswith("headwise"):
            raise
        package = {"sklearn": "scikit-learn"}.get(error.name, error.name)
        stop(f"This needs the package {package}, which is not installed: pip install {package}")
    except (OSError, RuntimeError) as error:
        sentence = _trouble(error)
        if sentence is None:
            raise
        stop(sentence)


def _trouble(error: Exception) -> str | None:
    """The sentence for a failure of the machine; None for an error that is ours."""
    text = str(error)
    # Rust writers (polars, safetensors) give the number of the error only in their text.
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in text or "No space left" in text:
        return "There is no space left on the disk. What was finished is kept; free some, or use --out."
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return "There is not enough memory. Fewer prompts (--n) or --dtype bfloat16 need less."
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}."
    return None
