"""A trained model and its history: experiments that hold circuits while they form. An experiment is a file.

The parts that experiments are made of are names of this room too: `Tiny`, `TinyConfig`; `train`, `Training`, `Run`,
`measure`; `Edit`, `Pass`, `pattern`, `scale`, `value_of`, `copied`, `frozen`, `holding`; `Reset`, `Switch`; `steps`,
`every`, `after`; `Lesson`, `Experiment`, `Condition`, `compare`.
"""

import importlib
from typing import Any

from headwise.method import room_exports

_PARTS = {
    **dict.fromkeys(("Tiny", "TinyConfig"), "tiny"),
    **dict.fromkeys(("Lesson", "Shape", "generator"), "lesson"),
    **dict.fromkeys(("Training", "Run", "train", "measure"), "training"),
    **dict.fromkeys(("Edit", "Pass", "Scene", "copied", "frozen", "holding", "pattern", "scale", "value_of"), "edits"),
    **dict.fromkeys(("Reset", "Switch"), "resets"),
    **dict.fromkeys(("always", "steps", "every", "after"), "schedule"),
    **dict.fromkeys(("Comparison", "Condition", "compare"), "comparison"),
    "Experiment": "experiment",
    "grown_claims": "growth",
    "EditCallback": "trainer_callback",
    "Tape": "tape",
}
_experiment, _experiments, _names = room_exports(__name__, __file__)

__all__ = sorted([*_PARTS, *_names])


def __getattr__(name: str) -> Any:
    return getattr(importlib.import_module(f"headwise.{_PARTS[name]}"), name) if name in _PARTS else _experiment(name)


def __dir__() -> list[str]:
    return list(__all__)
