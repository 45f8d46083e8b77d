"""How does representation impact in-context learning: A exploration on a synthetic task. Fu et al., 2023.
arXiv:2309.06054

Row s147 of the mission. Probes of two kinds on some twenty small networks: does the stream tell what an item is made of
(in weights), does it tell which factor the prompt is about (in context)? And weights by hand that match and copy.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import PreTrainedModel

from headwise.data import HiddenFactors
from headwise.data.factor_circuit import by_hand
from headwise.lab import FactorProbes
from headwise.lab.factor_probes import FIRST
from headwise.lesson import generator
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import answers, streams
from headwise.stats import foretold


def hits(stream: Tensor, labels: Tensor, classes: int) -> float:
    """Share of the second half of the prompts whose label [B] a linear probe of the stream [B, D] tells."""
    said, true = foretold(stream.numpy(), one_hot(labels, classes).numpy())
    return float((said.argmax(-1) == true.argmax(-1)).mean())


@dataclass(frozen=True)
class FactorProbesReplication(Replication):
    """Accuracy and both probes of every network, how soon learning by heart first helps, and weights by hand."""

    row: ClassVar[str] = "s147"
    claim: ClassVar[str] = (
        "How well networks read a hidden factor in their prompt goes with their in-context component, for which the "
        "in-weights component is the ground."
    )
    paper: ClassVar[str] = "in-context probe highly related to accuracy; match and copy by hand equals the best tuned"

    prompts: ClassVar[int] = 4000
    length: ClassVar[int] = 10
    least_correlation: ClassVar[float] = 0.8
    least_sooner: ClassVar[float] = 0.2
    least_by_hand: ClassVar[float] = 0.95

    def run(self, seed: int = 0) -> Outcome:
        """All conditions with two seeds each."""
        experiment = FactorProbes(full=self.full)
        found = experiment.run(seeds=[seed + one for one in experiment.seeds])
        probed = {
            f"{name}, seed {one}": self._probe(run.model, run.lesson, seed)
            for name, by in found.runs.items()
            if name not in FIRST
            for one, run in by.items()
        }
        metric, _, bound = experiment.goal
        scratch, first = (one.times for one in found.time_to(metric, above=bound, names=FIRST))
        spent = experiment.head_start
        sooner = [1 - (b - spent) / a for a, b in zip(scratch, first, strict=True)]
        lesson = next(iter(found.runs[FIRST[0]].values())).lesson
        assert isinstance(lesson, HiddenFactors)
        batch = lesson.make(n=self.prompts, seed=seed + 2147)
        tuned = [self._probe(run.model, lesson, seed)["accuracy"] for run in found.runs[FIRST[1]].values()]
        last = {
            "by hand": float((answers(by_hand(lesson), batch)[:, -1].argmax(-1) == batch.answer[:, -1]).float().mean()),
            "Bayes": float((lesson.bayes(batch)[:, -1].argmax(-1) == batch.answer[:, -1]).float().mean()),
            "best trained": max(*tuned, *(one["accuracy"] for one in probed.values())),
        }
        return self._judge(probed, {"scratch": scratch, "first": first, "sooner": sooner}, last)

    def _probe(self, model: PreTrainedModel, trained: object, seed: int) -> dict[str, float]:
        """Accuracy at the last item; the best layer's probe for the hidden factor there, and for an item's factors."""
        assert isinstance(trained, HiddenFactors)
        lesson = HiddenFactors(factors=trained.factors, values=trained.values, length=self.length)
        batch = lesson.make(n=self.prompts, seed=seed + 1147)
        items, _, hidden = lesson.examples(self.prompts, generator(seed + 1147))
        made = lesson.made_of(items[:, 0])
        layers = streams(model, batch)
        return {
            "accuracy": float((answers(model, batch)[:, -1].argmax(-1) == batch.answer[:, -1]).float().mean()),
            "in context": max(hits(stream[:, -1], hidden[:, -1], lesson.factors) for stream in layers),
            "in weights": max(
                float(np.mean([hits(stream[:, 0], value, lesson.values) for value in made.unbind(-1)]))
                for stream in layers
            ),
        }

    def _judge(self, probed: dict, times: dict, last: dict) -> Outcome:
        columns = {name: np.array([one[name] for one in probed.values()]) for name in next(iter(probed.values()))}
        context, weights = (
            float(np.corrcoef(columns["accuracy"], columns[name])[0, 1]) for name in ("in context", "in weights")
        )
        checks = {
            f"accuracy goes with the in-context probe, correlation above {self.least_correlation}": context
            > self.least_correlation,
            "more than with the in-weights probe": context > weights,
            f"with items learned by heart first, learning to read takes {self.least_sooner:.0%} fewer steps": bool(
                np.all(np.array(times["sooner"]) >= self.least_sooner)
            ),
            f"weights by hand are right in {self.least_by_hand:.0%} or more": last["by hand"] >= self.least_by_hand,
            "and no worse than the best network that was trained": last["by hand"] >= last["best trained"],
        }
        reach = columns["accuracy"]
        measured = (
            f"{len(probed)} networks, accuracy {reach.min():.2f} to {reach.max():.2f}: correlation with the in-context "
            f"probe {context:.2f}, with the in-weights probe {weights:.2f}; steps to the goal from scratch "
            f"{', '.join(f'{v:.0f}' for v in times['scratch'])}, with items learned first "
            f"{', '.join(f'{v:.0f}' for v in times['first'])} in all; by hand {last['by hand']:.3f}"
        )
        chance = 1 / HiddenFactors().values
        baseline = f"chance {chance:.2f}, Bayes {last['Bayes']:.3f}, best trained {last['best trained']:.3f}"
        return settle(measured, baseline, checks, {"networks": probed, "times": times, "last": last})
