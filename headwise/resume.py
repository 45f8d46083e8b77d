"""The whole state of a training run in one file: weights, optimiser, random numbers, tape, losses, step.

Written aside and renamed, so that a run that is killed goes on from the last state as if nothing had been.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from headwise.tape import Tape
from headwise.writing import write_aside

FORMAT = "headwise training 1"


@dataclass
class State:
    """What a run knows between two steps.

    Attributes:
        step: updates made.
        losses: the loss of each update, before it was made.
        tape: what was measured.
        spreads: mean and standard deviation of parameters at the start, for resets.
    """

    step: int
    losses: list[float]
    tape: Tape
    spreads: dict[str, tuple[float, float]]


def save(path: Path, model: nn.Module, optimiser: Optimizer, state: State, asked: dict[str, Any]) -> None:
    """Write everything that the next step depends on."""
    arrays = {f"model.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in model.named_parameters():
        for key, moment in optimiser.state.get(value, {}).items():
            if isinstance(moment, Tensor):
                arrays[f"optimiser.{key}.{name}"] = moment.detach().clone()
    arrays["random"] = torch.get_rng_state()
    # Twice the digits of a float32 that became a Python float: kept exactly.
    arrays["losses"] = torch.tensor(state.losses, dtype=torch.float64)
    facts = {"step": state.step, "rows": state.tape.rows, "spreads": state.spreads}
    notes = {"format": FORMAT, "facts": json.dumps(facts), "asked": json.dumps(asked)}
    write_aside(path, lambda p: save_file({k: v.contiguous().cpu() for k, v in arrays.items()}, p, metadata=notes))


def load(path: Path, model: nn.Module, optimiser: Optimizer, asked: dict[str, Any]) -> State:
    """Put model, optimiser and random numbers back, and hand back the rest.

    Raises:
        ValueError: the file is no such state, or belongs to a run that was asked for something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"{path} cannot be read as the state of a training run: {problem}") from problem
    if notes.get("format") != FORMAT:
        raise ValueError(f"{path} cannot be read as the state of a training run: it was written by something else.")
    _same(path, json.loads(notes["asked"]), json.loads(json.dumps(asked)))
    model.load_state_dict({k.removeprefix("model."): v for k, v in arrays.items() if k.startswith("model.")})
    for name, value in model.named_parameters():
        found = {k.split(".")[1]: v for k, v in arrays.items() if _belongs(k, name)}
        if found:
            optimiser.state[value].update(
                {k: v.to(v.device if k == "step" else value.device) for k, v in found.items()}
            )
    torch.set_rng_state(arrays["random"])
    facts = json.loads(notes["facts"])
    # What was measured at this step will be measured again.
    rows = [tuple(row) for row in facts["rows"] if row[0] < facts["step"]]
    spreads = {name: tuple(pair) for name, pair in facts["spreads"].items()}
    return State(facts["step"], arrays["losses"].tolist(), Tape(rows), spreads)


def _belongs(key: str, name: str) -> bool:
    parts = key.split(".", 2)
    return parts[0] == "optimiser" and parts[2:] == [name]


def _same(path: Path, kept: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in sorted({*kept, *asked}) if kept.get(key) != asked.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path.parent} holds another run: its {key} is {kept.get(key)!r}, not {asked.get(key)!r}. Use another "
            "folder, or ask for the same."
        )
