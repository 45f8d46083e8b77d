"""Environments of their own for the peers, outside the repository.

python bench/env.py [--envs FOLDER]    makes what is missing and prints what each holds.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
PEERS = {
    "transformer_lens": "transformer-lens==4.3.0",
    "nnsight": "nnsight==0.8.1",
    "kvpress": "kvpress==0.5.5",
    "circuitkit": "circuitkit==0.2.0",
    # It asks for TransformerLens 1.13 or later, and the HookedTransformer that it imports is gone since 4.0; it imports
    # `attr` without asking for it.
    "auto_circuit": "auto-circuit==1.0.1 transformer-lens==3.8.0 attrs",
    "economize": "economize==0.3.2",
    "dejavuu": "transformers huggingface_hub numpy pydantic rich tqdm typer loguru onnxruntime",
    "dejavuu_older": "transformers==5.2.0 huggingface_hub numpy pydantic rich tqdm typer loguru onnxruntime",
}
# It asks for Python 3.13, though nothing in it needs that: installed by itself, behind what it needs. With the newest
# transformers it cannot take tokens back.
BY_ITSELF = {name: "dejavuu==0.2.0" for name in ("dejavuu", "dejavuu_older")}
# These get the versions that headwise has.
PINNED = {name: str(Path(__file__).parent.parent / "constraints.txt") for name in ("economize", "dejavuu")}
SHOWN = (
    "torch", "transformers", "transformer-lens", "nnsight", "kvpress", "circuitkit", "auto-circuit", "economize",
    "dejavuu", "numpy",
)  # fmt: skip


def folder_of(given: str | None) -> Path:
    """Where the environments are: --envs, else a folder beside the models that headwise keeps."""
    home = Path(os.environ.get("HEADWISE_HOME") or "~/.cache/headwise").expanduser()
    return Path(given).expanduser() if given else home / "bench-envs"


def python_of(peer: str, envs: Path) -> str:
    """The interpreter that runs a contestant; our own where it is no peer. Makes the environment on first use, and adds
    to it what `PEERS` asks for since.
    """
    if peer not in PEERS:
        return sys.executable
    place = envs / peer
    python, made = place / "bin" / "python", place / ".made"
    wanted = " ".join([PEERS[peer], *([BY_ITSELF[peer]] if peer in BY_ITSELF else [])])
    if not made.exists() or made.read_text() != wanted:
        if not made.exists():
            envs.mkdir(parents=True, exist_ok=True)
            venv.create(place, with_pip=True, clear=True)
        pinned = ["-c", PINNED[peer]] if peer in PINNED else []
        _install(python, [*pinned, TORCH, *PEERS[peer].split()])
        if peer in BY_ITSELF:
            _install(python, ["--no-deps", "--ignore-requires-python", BY_ITSELF[peer]])
        made.write_text(wanted)
    return str(python)


def _install(python: Path, words: list[str]) -> None:
    """Let pip install what the words say; ends with what pip said where it could not."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} could not be installed:\n{done.stderr[-2000:]}")


def versions(python: str) -> dict[str, str]:
    """Versions of the packages that matter, as that interpreter has them."""
    code = (
        "import importlib.metadata as m, json\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{n: have[n] for n in {SHOWN!r} if n in have}}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", help="folder for the environments")
    envs = folder_of(parser.parse_args().envs)
    for peer in PEERS:
        print(peer, versions(python_of(peer, envs)))
