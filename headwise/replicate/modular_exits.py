"""One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer Embeddings.
Gurioli et al., 2025. arXiv:2503.03008

Row s141 of the mission. A sentence encoder of six layers learns to find functions of Python's library by what is said
of them: once with exits after two, four and six layers at once, and once for each depth alone. The paper trains a model
of a billion weights on code.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from headwise.convert import encoder_path
from headwise.data.documented import documented
from headwise.data.reference import digest
from headwise.lab import ModularExits as Method
from headwise.models import open_model
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import shares_of_time

EXITS, LENGTH, TIMED = (2, 4, 6), 24, 192


@dataclass(frozen=True)
class ModularExits(Replication):
    """How often the right function is among the ten nearest, and what it costs, at every exit of joint training."""

    row: ClassVar[str] = "s141"
    claim: ClassVar[str] = "Training all exits together, the deepest guiding, makes every depth usable."
    paper: ClassVar[str] = "better retrieval by early layers at no extra training cost; no one figure in the abstract"

    changed: ClassVar[str] = (
        "the first run did not measure time; the share of processor time and its bound, which is the mission's, came "
        "with the second. Nothing else was changed."
    )

    least_gain: ClassVar[float] = 15.0
    most_lost: ClassVar[float] = 1.0
    most_time: ClassVar[float] = 0.45

    def run(self, seed: int = 0) -> Outcome:
        """The same pairs, steps and rate for every training; functions that are looked for are not among them."""
        opened, tokenizer = open_model(encoder_path())
        opened = getattr(opened, "base_model", opened)
        pairs, wanted = documented(seed), 800 if self.full else 400
        test, rest = pairs[:wanted], pairs[wanted:]
        steps, batch = (300, 24) if self.full else (30, 16)
        found: dict[str, dict[int, float]] = {"untuned": self._recalls(opened, tokenizer, test, EXITS)}
        codes, method = [code for _, code in test[:TIMED]], Method(length=LENGTH)
        leave = {number: partial(method.embed, opened, tokenizer, codes, number) for number in EXITS}
        found["time"] = {number: 100 * share for number, share in shares_of_time(leave, EXITS[-1]).items()}
        for name, exits in (("together", EXITS), *((f"{number} alone", (number,)) for number in EXITS)):
            model = self._short(opened, exits[-1])
            torch.manual_seed(seed)
            Method(exits, length=LENGTH).train(model, tokenizer, rest, steps=steps, batch=batch, rate=2e-4, seed=seed)
            found[name] = self._recalls(model, tokenizer, test, exits)
        return self._judge(found, len(test), len(rest), digest([sentence for sentence, _ in pairs]))

    def _short(self, opened, layers: int):
        """A copy with the first layers only, so that a shallow training costs what it must."""
        model = copy.deepcopy(opened)
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
        return model

    def _recalls(self, model, tokenizer, test, exits: tuple[int, ...]) -> dict[int, float]:
        """{exit: percent of sentences whose function is among the ten nearest}."""
        found = {}
        for number in exits:
            method = Method(length=LENGTH)
            said, code = (method.embed(model, tokenizer, [pair[side] for pair in test], number) for side in (0, 1))
            near = (said @ code.T).topk(10).indices
            found[number] = 100 * float((near == torch.arange(len(test))[:, None]).any(1).float().mean())
        return found

    def _judge(self, found: dict[str, dict[int, float]], n: int, learned: int, text: str) -> Outcome:
        joint, untuned = found["together"], found["untuned"]
        alone = {number: found[f"{number} alone"][number] for number in EXITS}
        early = EXITS[:-1]
        checks = {
            "early exits trained together find as much as encoders cut there and trained alone": all(
                joint[number] >= alone[number] for number in early
            ),
            f"and at least {self.least_gain:.0f} points more than before training": all(
                joint[number] >= untuned[number] + self.least_gain for number in early
            ),
            f"the last exit is within {self.most_lost:.0f} point of training it alone": joint[EXITS[-1]]
            >= alone[EXITS[-1]] - self.most_lost,
            f"{EXITS[0]} layers take at most {self.most_time:.0%} of the processor time of {EXITS[-1]}": found["time"][
                EXITS[0]
            ]
            <= 100 * self.most_time,
        }

        def words(one: dict[int, float]) -> str:
            return ", ".join(f"{one[number]:.1f} %" for number in EXITS)

        measured = (
            f"recall at 10 after {', '.join(map(str, EXITS))} layers: {words(joint)}; {words(found['time'])} of the "
            f"processor time; {n} functions"
        )
        baseline = f"each depth trained alone {words(alone)}; untuned {words(untuned)}; {learned} pairs to learn from"
        numbers = {name: {str(number): value for number, value in one.items()} for name, one in found.items()}
        return settle(measured, baseline, checks, {**numbers, "text": text})
