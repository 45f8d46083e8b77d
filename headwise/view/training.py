"""What was measured while a model was trained, as the Training view shows it: a line a head, and what was held when."""

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise import schedule
from headwise.tape import Tape
from headwise.view.plain import number

if TYPE_CHECKING:
    from headwise.atlas import Atlas

POINTS = 300


def training(atlas: "Atlas") -> dict[str, Any] | None:
    """The tape of the run that an atlas belongs to, or else scores of its training steps; None without either."""
    folder = atlas.path.parent
    if atlas.path.name == "atlas" and (folder / "tape.parquet").is_file():
        return _of_run(folder)
    return _of_steps(atlas)


def _of_run(folder: Path) -> dict[str, Any] | None:
    try:
        tape = Tape.load(folder / "tape.parquet")
    except ValueError:
        return None
    return of_tape(tape, folder)


def of_tape(tape: Tape, folder: Path) -> dict[str, Any] | None:
    """What a tape holds, and what run.json in that folder says was held; None before anything was measured."""
    try:
        asked = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        asked = {}
    steps = sorted({step for step, *_ in tape.rows})
    if not steps:
        return None
    lesson = asked.get("lesson") or {}
    name = f"{lesson.get('name', 'a lesson')}, seed {asked.get('seed', '?')}"
    # An absolute path would say whose machine it was.
    file = (Path(folder.name) if folder.is_absolute() else folder) / "tape.parquet"
    code = f'from pathlib import Path\n\nfrom headwise.tape import Tape\n\ntape = Tape.load(Path("{file.as_posix()}"))'
    return {
        "name": name,
        "steps": [steps[0], steps[-1]],
        "curves": _curves(tape),
        "held": [_held(one, tape, steps) for one in asked.get("edits", [])],
        "code": code,
        "call": "tape.curve(METRIC, SPLIT, UNIT)",
    }


def _of_steps(atlas: "Atlas") -> dict[str, Any] | None:
    """Scores that the atlas keeps under training steps; step 0 is the model's own, and no point of training."""
    tape = Tape()
    steps = sorted(int(p.name.removeprefix("step=")) for p in (atlas.path / "scores").glob("step=*"))
    for step in (one for one in steps if one > 0):
        for name in atlas.names(step):
            score = atlas.score(name, step)
            for unit, value in score.table.select("unit", "value").iter_rows():
                tape.add(step, name, "checkpoints", unit, value)
    seen = sorted({step for step, *_ in tape.rows})
    if len(seen) < 2:
        return None
    return {
        "name": f"{len(seen)} checkpoints",
        "steps": [seen[0], seen[-1]],
        "curves": _curves(tape),
        "held": [],
        "code": f'from headwise.atlas import Atlas\n\natlas = Atlas("atlas/{atlas.path.name}")',
        "call": f"[atlas.score(METRIC, step)[UNIT] for step in {seen}]",
    }


def _curves(tape: Tape) -> list[dict[str, Any]]:
    found = []
    for metric, split, unit in dict.fromkeys((m, s, u) for _, m, s, u, _ in tape.rows):
        steps, values = tape.curve(metric, split, unit)
        kept = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int))
        found.append(
            {
                "metric": metric,
                "split": split,
                "unit": unit,
                "steps": [steps[i] for i in kept],
                "values": [number(values[i]) for i in kept],
                "phase": phase(steps, values),
            }
        )
    return found


def phase(steps: list[int], values: list[float], half: float = 0.5, most: float = 0.25) -> list[int] | None:
    """The shortest stretch of steps in which half of all that ever changes does so; None where that takes long.

    Args:
        half: the share of the distance from the smallest to the largest value.
        most: the longest stretch that counts as a change of phase, as a share of all steps.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    good = np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) < 4 or not np.ptp(y) > 0:
        return None
    far = np.abs(y[None, :] - y[:, None]) >= half * np.ptp(y)
    length = np.where(far & (x[None, :] > x[:, None]), x[None, :] - x[:, None], np.inf)
    first, last = np.unravel_index(np.argmin(length), length.shape)
    return [int(x[first]), int(x[last])] if length[first, last] <= most * (x[-1] - x[0]) else None


def _held(told: dict[str, Any], tape: Tape, steps: list[int]) -> dict[str, Any]:
    """What was done to the model, in words, and the steps at which it was on, as far as run.json tells."""
    kind = str(told.get("kind", "edit"))
    what = next((_plain(told[key]) for key in ("site", "parameter", "name", "lesson") if key in told), "")
    heads = _plain(told.get("heads", "None"))
    of = f" of heads {', '.join(map(str, heads))}" if heads else ""
    when = _schedule(told.get("when"))
    if when is None:
        return {"text": f"{kind} {what}{of}", "spans": None}
    if isinstance(when, schedule.Every):
        return {"text": f"{kind} {what}{of} at every {when.n}th step", "spans": []}
    ends = [one for one in _numbers(told.get("when")) if steps[0] < one <= steps[-1]]
    grid = sorted({*steps, *ends})
    spans: list[list[int]] = []
    for i, step in enumerate(grid):
        if when.on(step, tape):
            end = grid[i + 1] if i + 1 < len(grid) else step
            if spans and spans[-1][1] == step:
                spans[-1][1] = end
            else:
                spans.append([step, end])
    return {"text": f"{kind} {what}{of}", "spans": spans}


def _plain(told: Any) -> Any:
    """A value as run.json tells it: numbers and texts stand as Python writes them."""
    if isinstance(told, dict):
        return str(told.get("name") or told.get("kind") or "")
    if isinstance(told, list):
        return [_plain(one) for one in told]
    try:
        return ast.literal_eval(told) if isinstance(told, str) else told
    except (ValueError, SyntaxError):
        return told


def _numbers(told: Any) -> list[int]:
    values = [_plain(one) for one in told.values() if not isinstance(one, dict)] if isinstance(told, dict) else []
    inner = (
        [n for one in told.values() if isinstance(one, dict) for n in _numbers(one)] if isinstance(told, dict) else []
    )
    return [one for one in values if isinstance(one, int) and not isinstance(one, bool)] + inner


def _schedule(told: Any) -> "schedule.When | None":
    """The schedule that run.json tells of; None where it hangs on a function, or is of a kind unknown here."""
    kinds = {
        kind.__name__: kind for kind in (schedule.When, schedule.Not, schedule.Both, schedule.Steps, schedule.Every)
    }
    kinds["After"] = schedule.After
    if not isinstance(told, dict) or told.get("kind") not in kinds or told.get("condition", "None") != "None":
        return None
    fields = {}
    for key, value in told.items():
        if key != "kind":
            fields[key] = _schedule(value) if isinstance(value, dict) else _plain(value)
    if any(value is None for key, value in fields.items() if key in ("inner", "left", "right")):
        return None
    return kinds[told["kind"]](**fields)
