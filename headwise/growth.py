"""The last rung of the ladder: a head *grew* where its number rose in training more than random heads', with the skill.

run = train(config, lesson, training, seed=5, folder="runs/five")
for claim in grown_claims(run, "induction"):
    print(claim.sentence())        # L1.H3 induction: proved (needed, enough, grown)
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from headwise.claim import Claim, Role, Rung, role, settle
from headwise.measuring import look
from headwise.models import open_model
from headwise.score import Score
from headwise.site import Unit
from headwise.tape import Tape
from headwise.task import Batch
from headwise.training import Run
from headwise.verify import Proof

# The skill has begun when this share of its gain is made, and is there at the other.
BEGUN, THERE = 0.1, 0.9


@dataclass(frozen=True)
class Grown:
    """A head of one of several runs that grew, with the whole claim in words."""

    condition: str
    seed: int
    unit: str
    role: str
    verdict: str
    says: str


def grown_heads(runs: "Mapping[str, Mapping[int, Run]]", name: str = "induction") -> list[Grown]:
    """The heads that grew into a role, of runs by condition and seed, each run's claims kept in its atlas.

    Claims are on the weights as they are in the end, without the edits that were held in training. A run of which
    nothing can be claimed says why in its atlas.json, under `skipped`.
    """
    found = []
    for condition, by_seed in runs.items():
        for seed, run in by_seed.items():
            claims, reason = [], {}
            try:
                claims = grown_claims(run, name)
            except ValueError as problem:
                reason = {f"grown {name}": str(problem)}
            if run.folder is not None:
                others = {key: why for key, why in run.atlas.about.get("skipped", {}).items() if key != f"grown {name}"}
                run.atlas.note(skipped=others | reason or None)
            found += [
                Grown(condition, seed, claim.unit, claim.role, claim.verdict, claim.sentence())
                for claim in claims
                if any(rung.step == "grown" and rung.passed for rung in claim.rungs)
            ]
    return found


def grown_claims(run: Run, name: str = "induction", *, rows: int = 128, proof: Proof | None = None) -> list[Claim]:
    """Claims on a role for the heads of a trained run, with the rung "grown" beside seen, needed and enough.

    The strongest heads are candidates, see `nominated`. A head grew where its rise from
    the first checkpoint, prompt by prompt, beats that of the 95 % head among random heads of the same layers, and half
    of the rise was made while the skill was learned. The claims are settled together and kept in the run's atlas.

    Args:
        run: with a folder.
        name: a role whose score is one of the lesson's looks.
        rows: prompts, which had no say in choosing the candidates.

    Raises:
        ValueError: the run kept nothing, its lesson does not measure that role, or no head comes near it.
    """
    part, atlas = role(name), run.atlas
    if part.score not in run.lesson.looks:
        raise ValueError(f"{type(run.lesson).__name__} does not measure {part.score!r}; it measures {_list(run)}.")
    seen = atlas.score(part.score)
    candidates = nominated(seen, part)
    if not candidates:
        best = seen.top(1)[0]
        raise ValueError(f"No head comes near {name}: the best is {best} with {seen[best]:.2f} of {part.threshold}.")
    batch, proof = run.lesson.make(None, rows, seed=0x6E0), proof or Proof()
    claims = proof.run(run.model, batch, part.name, candidates, seen=seen)
    before, _ = open_model(str(run.atlas.path.parent / "checkpoints" / "step=0"))
    rises = _rises(before, run.model, batch, run, part)
    nulls = [unit for unit in proof.draw(run.model, candidates) if unit in rises]
    claims = [
        replace(claim, rungs=[*claim.rungs, _rung(part, claim.unit, rises, nulls, run.tape, proof)]) for claim in claims
    ]
    settled = settle(claims)
    atlas.add_claims(settled, only_of={part.name})
    return settled


def nominated(seen: Score, part: Role) -> list[str]:
    """Heads at or above the role's threshold, strongest first: at most half of each layer, and one in any case.

    Small models often make every head of a layer do the same. The weaker half is then what the stronger is compared
    with: heads of another layer have other parts in the same circuit, and are no random heads.
    """
    order = seen.table.sort("value", descending=True)["unit"].to_list()
    size = Counter(Unit.parse(unit).layer for unit in order)
    found: list[str] = []
    taken: Counter[int] = Counter()
    for unit in order:
        layer = Unit.parse(unit).layer
        if seen[unit] >= part.threshold and taken[layer] < max(1, size[layer] // 2):
            taken[layer] += 1
            found.append(unit)
    return found


def _list(run: Run) -> str:
    return ", ".join(run.lesson.looks) or "nothing of heads"


def _rises(
    before: PreTrainedModel, after: PreTrainedModel, batch: Batch, run: Run, part: Role
) -> dict[str, tuple[np.ndarray, float]]:
    """{unit: (rise of its number on each prompt, its number at the start)}."""
    with torch.no_grad():
        first, last = (look(model.eval(), batch, run.lesson)[part.score] for model in (before, after))
    return {unit: ((last[unit] - first[unit]).double().numpy(), float(first[unit].mean())) for unit in last}


def _rung(
    part: Role,
    unit: str,
    rises: dict[str, tuple[np.ndarray, float]],
    nulls: list[str],
    tape: Tape,
    proof: Proof,
) -> Rung:
    (mine, start), together = rises[unit], with_skill(tape, part.score, unit)
    share = float(mine.mean() / max(1e-6, 1 - start)) if together else 0.0
    return proof.rung("grown", f"rise of {part.score} in training", mine, [rises[one][0] for one in nulls], share)


def with_skill(tape: Tape, number: str, unit: str) -> bool:
    """Whether half of a head's rise was made while the loss fell: from a tenth of its fall on, up to nine tenths."""
    steps, losses = tape.curve("loss")
    _, values = tape.curve(number, unit=unit)
    fall, rise = np.array(losses[0]) - np.array(losses), np.array(values) - values[0]
    if fall[-1] <= 0 or rise[-1] <= 0:
        return False
    begun, there = (steps[int(np.argmax(fall >= mark * fall.max()))] for mark in (BEGUN, THERE))
    half = steps[int(np.argmax(rise >= rise[-1] / 2))]
    return begun <= half <= there
