"""Contestants side by side: one process each, running in turn, so that the machine's moods hit all alike."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import env
import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results"
IN_PEERS = ("transformer_lens", "nnsight")


class Contestant:
    """A worker process that runs once per order."""

    def __init__(self, name: str, job: str, folder: str, batch: str, threads: int, envs: Path) -> None:
        self.name = name
        python = env.python_of(name, envs)
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HEADWISE_PROGRESS": "0",
            "PYTHONWARNINGS": "ignore",
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed by end()
        self._process = subprocess.Popen(
            [python, str(HERE / "worker.py"), name, job, folder, batch, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **quiet, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )

    def run(self, order: str = "go") -> dict:
        """One run: {"wall", "cpu", "peak_mb", "value"}. RuntimeError with the last words of a worker that fails."""
        try:
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} failed: {self._log.read().decode(errors='replace')[-2000:]}")
        return json.loads(line)

    def end(self) -> None:
        """Let the worker go."""
        if self._process.poll() is None:
            try:
                self._process.stdin.write("end\n")
                self._process.stdin.close()
                self._process.wait(30)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._log.close()


class Race:
    """The contestants of one job, all on the same tensors. Use as a context manager."""

    def __init__(self, names: list[str], job: str, folder: str, tensors: dict, threads: int, envs: Path) -> None:
        from safetensors.torch import save_file

        self._room = tempfile.TemporaryDirectory()
        batch = os.path.join(self._room.name, "batch.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, batch)
        self.by_name = {name: Contestant(name, job, folder, batch, threads, envs) for name in names}
        self.runs: dict[str, list[dict]] = {name: [] for name in names}

    def __enter__(self) -> "Race":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for contestant in self.by_name.values():
            contestant.end()
        self._room.cleanup()

    def turn(self, name: str, order: str = "go", keep: bool = True) -> dict:
        """One run of one contestant, kept for the medians unless it is a warm-up."""
        result = self.by_name[name].run(order)
        if keep:
            self.runs[name].append({**result, "load": os.getloadavg()[0]})
        return result

    def table(self, reference: str) -> dict[str, dict]:
        """Medians, and the median over rounds of the ratio to the reference of the same round."""
        found = {}
        for name, runs in self.runs.items():
            row: dict = {
                "runs": len(runs),
                "cpu_total": round(sum(r["cpu"] for r in runs), 1),
                "peak_mb": round(max((r["peak_mb"] for r in runs), default=0)),
            }
            for clock in ("wall", "cpu"):
                values = [r[clock] for r in runs]
                pairs = [r[clock] / b[clock] for r, b in zip(runs, self.runs[reference], strict=False)]
                row[clock] = round(statistics.median(values), 4)
                row[f"{clock}_least"] = round(min(values), 4)
                row[f"{clock}_ratio"] = round(statistics.median(pairs), 3)
            found[name] = row
        return found


def save(name: str, found: dict) -> None:
    """Write results with the machine's and the environments' particulars."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"when": time.strftime("%Y-%m-%d %H:%M"), **found}, indent=1) + "\n")
    print(f"wrote bench/results/{path.name}", file=sys.stderr)


def entries(name: str) -> list[dict]:
    """The entries of results that hold several measurements; none where there is no file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["entries"] if path.exists() else []


def add(name: str, found: dict, by: tuple[str, ...]) -> None:
    """Put one measurement beside those that differ from it in `by`, in place of one that does not; in their order."""
    this = tuple(found[key] for key in by)
    others = [one for one in entries(name) if tuple(one[key] for key in by) != this]
    entry = {"when": time.strftime("%Y-%m-%d %H:%M"), **found}
    save(name, {"entries": sorted([*others, entry], key=lambda one: tuple(one[key] for key in by))})


def last_words(text: str) -> str:
    """The last line that a worker wrote, files by their names alone: folders of a machine stay on it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"(?<![:/\w])(?:/[\w.~+@-]+)+/", "", lines[-1] if lines else "it said nothing")


def particulars_of_ours() -> dict[str, str]:
    """Versions in headwise's own environment."""
    return env.versions(sys.executable)


def particulars(envs: Path, names: list[str], threads: int) -> dict:
    """What every result carries."""
    peers = {name: env.versions(env.python_of(name, envs)) for name in names if name in IN_PEERS}
    return {
        "machine": machine.facts(),
        "threads": threads,
        "versions": {"headwise": particulars_of_ours(), **peers},
    }
