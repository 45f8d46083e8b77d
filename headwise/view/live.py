"""The page that is watched while an experiment of the lab is trained: the Training view, one run at a time.

Every run writes `training.js` into its folder as it goes, aside first and then under its name. It is one call of a
function with JSON in it: a page that was opened from the disk may not read a file beside it, but may run one. The page
asks once a second for the file of the run that it shows, until that run is done.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise.comparison import Condition, place_of
from headwise.site import head
from headwise.training import Run
from headwise.view.gather import FORMAT
from headwise.view.report import block, page
from headwise.view.training import of_tape
from headwise.writing import write_aside

NAME = "training.js"
PAGE = "training.html"
# What lies beside the page may run too: the files of the runs.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'self' file:; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass
class Live:
    """What `train(watch=...)` is given: writes what is on the tape of a run into its folder.

    Fields:
        pause: seconds from one writing to the next; more where that would take a twentieth of the time. The end of a
            run is always written.
    """

    pause: float = 1.0
    _due: float = field(default=0.0, init=False, repr=False)

    def __call__(self, run: Run) -> None:
        """Write the file of a run that has a folder."""
        began = time.monotonic()
        if run.folder is None or (began < self._due and not run.done):
            return
        _tell(run.folder, run.step, run.training.steps, run.done, of_tape(run.tape, run.folder))
        now = time.monotonic()
        self._due = now + max(self.pause, 20 * (now - began))


def write(folder: Path, name: str, conditions: Mapping[str, Condition], seeds: Sequence[int]) -> Path:
    """Write the page for the runs that `compare` will keep in a folder, and return where it is.

    Args:
        name: what the page is headed, such as that of the experiment.
        conditions: all that will be trained, each with every seed, in this order.

    Raises:
        ValueError: the built files are missing from the package.
        OSError: the folder cannot be written.
    """
    runs = []
    for condition, one in conditions.items():
        for seed in seeds:
            place = place_of(condition, seed)
            runs.append({"name": f"{condition}, seed {seed}", "place": place})
            if not (folder / place / NAME).is_file():
                _tell(folder / place, 0, one.training.steps, False, None)
    out = folder / PAGE
    text = page(_data(name, list(conditions.values()), runs), POLICY)
    write_aside(out, lambda path: path.write_text(text, encoding="utf-8"))
    return out


def _tell(folder: Path, step: int, of: int, done: bool, training: dict[str, Any] | None) -> None:
    text = f"headwiseTold({block({'step': step, 'of': of, 'done': done, 'training': training})});\n"
    write_aside(folder / NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _data(name: str, conditions: list[Condition], runs: list[dict[str, str]]) -> dict[str, Any]:
    """What `gather` hands back, of models of which nothing is known yet but their heads."""
    layers = max(one.model.layers for one in conditions)
    heads = max(one.model.heads for one in conditions)
    unknown = {"stack": "", "role": "unknown", "verdict": "unknown", "sentence": ""}
    return {
        "format": FORMAT,
        "about": {"model": name},
        "atlas": "",
        "summary": f"{len(runs)} runs of {name}, as they are trained.",
        "does": {},
        "stacks": [{"name": "", "title": "", "layers": list(range(layers)), "width": heads}],
        "heads": [
            {"unit": head(layer, index), "layer": layer, "index": index, **unknown}
            for layer in range(layers)
            for index in range(heads)
        ],
        "scores": [],
        "tests": {},
        "claims": {},
        "patterns": [],
        "readouts": {},
        "tradeoffs": None,
        "circuits": None,
        "training": None,
        "live": {"runs": runs},
    }
