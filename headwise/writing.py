"""Where headwise keeps files between runs, and files that are either old or complete, never half-written."""

import os
from collections.abc import Callable
from pathlib import Path


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write through a temporary neighbour and rename, so that `path` is either old or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def home() -> Path:
    """The folder for what headwise keeps between runs: `HEADWISE_HOME`, else `~/.cache/headwise`."""
    return Path(os.environ.get("HEADWISE_HOME") or "~/.cache/headwise").expanduser()
