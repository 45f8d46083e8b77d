"""Thinking Sparks!: Emergent Attention Heads in Reasoning Models During Post Training. Park et al., 2025.
arXiv:2509.25758

Row s125 of the mission. The default model before and after a short supervised fine-tune made here: asked who is given
something, it learns to name the person named twice, where before it named the other one. Only that part of the paper is
covered: no distillation, no GRPO, no thinking switched on and off, no counts over training steps.
"""

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.anatomy import anatomy
from headwise.data import IOI
from headwise.do import Patch, do
from headwise.heads import Attribution
from headwise.models import open_model
from headwise.progress import hidden
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import rates
from headwise.tap import Tap, tap
from headwise.task import Batch


def named_twice(tokenizer: PreTrainedTokenizerBase, n: int, seed: int) -> Batch:
    """The prompts of indirect objects with answer and foil exchanged."""
    batch = IOI().make(tokenizer, n, seed)
    return replace(batch, answer=batch.foil, foil=batch.answer)


def tuned(model: PreTrainedModel, batch: Batch, seed: int = 0, steps: int = 40, rows: int = 8) -> PreTrainedModel:
    """A copy of the model, its upper half fine-tuned to say the answers of this batch, one pass over its rows."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    blocks = anatomy(model).blocks[""]
    upper = [blocks[n] for n in sorted(blocks)[len(blocks) // 2 :]]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = [p.requires_grad_(True) for block in upper for p in block.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    order = torch.randperm(len(batch)).split(rows)
    model.train()
    for step in tqdm(range(steps), desc="s125 fine-tuning", disable=hidden(), leave=False):
        part = batch.take(order[step % len(order)])
        logits = model(**part.inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        loss = nn.functional.cross_entropy(logits.float(), part.answer[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class ThinkingSparks(Replication):
    """Compares the heads behind a skill before and after fine-tuning, and takes the new ones away."""

    row: ClassVar[str] = "s125"
    claim: ClassVar[str] = (
        "Fine-tuning adds a stable set of heads to the circuit of a skill, and the gain rests on them."
    )
    paper: ClassVar[str] = "SFT and distillation add stable heads (sets and curves; no single figure)"
    changed: ClassVar[str] = (
        "a first fine-tune on multiple-choice letters taught nothing (25 % to 33 %), so another skill was "
        "taken; a first ablation set heads to their mean at the last column only and cost nothing, now they "
        "take their values on corrupt prompts everywhere, as attribution estimates."
    )

    circuit: ClassVar[int] = 27
    least_jaccard: ClassVar[float] = 0.6
    least_share: ClassVar[float] = 0.5
    least_gain: ClassVar[float] = 30.0

    def run(self, seed: int = 0) -> Outcome:
        """Circuits come from two resamples of prompts, the figures from prompts of a third draw."""
        model, tokenizer = open_model("default")
        n = 64 if self.full else 32
        after = tuned(model, named_twice(tokenizer, 640 if self.full else 320, seed + 1), seed, 80 if self.full else 40)
        held = named_twice(tokenizer, 200 if self.full else 100, seed + 2)
        samples = [named_twice(tokenizer, n, seed + 3 + i) for i in range(2)]
        with tqdm(total=6, desc="s125 circuits", disable=hidden(), leave=False) as bar:
            circuits: dict[str, list[set[str]]] = {"before": [], "after": []}
            for name, one in (("before", model), ("after", after)):
                for sample in samples:
                    circuits[name].append(self._circuit(one, sample))
                    bar.update()
            emergent = [new - old for old, new in zip(circuits["before"], circuits["after"], strict=True)]
            null = circuits["before"][1] - circuits["before"][0]
            rate = {"before": self._right(model, held), "after": self._right(after, held)}
            bar.update()
            rate |= self._ablated(after, held, emergent[0] & emergent[1] or emergent[0], circuits, seed)
            bar.update()
        return self._judge(emergent, null, circuits, rate, len(held))

    def _circuit(self, model: PreTrainedModel, batch: Batch) -> set[str]:
        """The heads whose change to the corrupt prompts' values would move the answer most, by attribution."""
        table = Attribution(value="resample", metric="logit_diff").score(model, batch).table
        order = sorted(zip(table["unit"], table["value"], strict=True), key=lambda row: -abs(row[1]))
        return {unit for unit, _ in order[: self.circuit]}

    def _right(self, model: PreTrainedModel, batch: Batch, rows: int = 16) -> float:
        """Percent of prompts whose answer ranks first of all tokens."""
        return rates(model, batch, rows)["stated"]

    def _ablated(self, model: PreTrainedModel, held: Batch, units: set[str], circuits, seed: int) -> dict:
        """Accuracy without the emergent heads, without the circuit, and without as many heads outside it (3 draws)."""
        with torch.no_grad(), tap(model, "z") as t:
            model.base_model(**held.flipped().inputs)
        inside = {unit for both in circuits.values() for circuit in both for unit in circuit}
        outside = [unit for unit in anatomy(model).units() if unit not in inside]
        layers = {unit.split(".")[0] for unit in units}
        beside = [unit for unit in outside if unit.split(".")[0] in layers]
        draw = random.Random(f"sparks {seed}")
        others = [draw.sample(beside if len(beside) >= len(units) else outside, len(units)) for _ in range(3)]
        return {
            "without": self._without(model, held, units, t),
            "without_circuit": self._without(model, held, circuits["after"][0], t),
            "random": [self._without(model, held, other, t) for other in others],
            "units": sorted(units),
        }

    def _without(self, model: PreTrainedModel, held: Batch, units: Iterable[str], corrupt: Tap) -> float:
        """Each head says, at every column, what it says on the corrupt prompt: what attribution estimates."""
        with do(model, *[Patch(unit, corrupt) for unit in sorted(units)]):
            return self._right(model, held, len(held))

    def _judge(self, emergent, null: set[str], circuits, rate: dict, n: int) -> Outcome:
        both = emergent[0] | emergent[1]
        jaccard = len(emergent[0] & emergent[1]) / len(both) if both else 0.0
        gain = rate["after"] - rate["before"]
        at_random = sum(rate["random"]) / len(rate["random"])
        lost = (rate["after"] - rate["without"]) / gain if gain > 0 else 0.0
        lost_random = (rate["after"] - at_random) / gain if gain > 0 else 0.0
        size = sum(map(len, emergent)) / 2
        checks = {
            f"taking the emergent heads away costs at least {100 * self.least_share:.0f} % of the gain": lost
            >= self.least_share,
            f"fine-tuning adds at least {self.least_gain:.0f} points": gain >= self.least_gain,
            "random heads of the same layers cost less": lost_random < lost,
            f"emergent sets of two prompt samples agree, Jaccard above {self.least_jaccard}": jaccard
            > self.least_jaccard,
            "more heads are new than between two samples of the model before": size > len(null),
        }
        measured = (
            f"skill {rate['before']:.0f} % to {rate['after']:.0f} % after fine-tuning; "
            f"{len(rate['units'])} emergent "
            f"heads, without them {rate['without']:.0f} % ({100 * lost:.0f} % of the gain), without the "
            f"circuit of {self.circuit} {rate['without_circuit']:.0f} %; Jaccard {jaccard:.2f}; "
            f"{n} held-out prompts; GRPO and distillation not covered"
        )
        baseline = (
            f"without as many random heads of the same layers {at_random:.0f} % ({100 * lost_random:.0f} % of "
            f"the gain, 3 "
            f"draws); new heads {size:.1f} against {len(null)} between two samples before"
        )
        sets = {name: [sorted(c) for c in both] for name, both in circuits.items()}
        numbers = {"rate": rate, "jaccard": jaccard, "emergent": [sorted(e) for e in emergent], "null": sorted(null)}
        return settle(measured, baseline, checks, {**numbers, "circuits": sets, "held_out": n})
