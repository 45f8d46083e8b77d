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
}
SHOWN = (
    "torch", "transformers", "transformer-lens", "nnsight", "kvpress", "circuitkit", "auto-circuit", "numpy",
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
    if not made.exists() or made.read_text() != PEERS[peer]:
        if not made.exists():
            envs.mkdir(parents=True, exist_ok=True)
            venv.create(place, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        done = subprocess.run([*pip, TORCH, *PEERS[peer].split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{PEERS[peer]} could not be installed:\n{done.stderr[-2000:]}")
        made.write_text(PEERS[peer])
    return str(python)


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
