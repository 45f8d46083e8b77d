"""Talking Heads: Understanding Inter-layer Communication in Transformer Language Models.
Merullo et al., 2024. arXiv:2406.09519

Row s127 of the mission. Channels between heads are read from weights. Lists of six items, which the default model
recalls badly, are the test of an edit: one channel of one head is scaled, chosen on prompts of its own. Channels from
previous-token heads into the keys of induction heads are the test of the reading.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from headwise.circuits import TalkingHeads as Method
from headwise.circuits.talking_heads import ScaleChannel, channels, composed, in_z
from headwise.data import LaundryList, RepeatedTokens
from headwise.do import Intervention, do
from headwise.graph import Graph
from headwise.heads import Attribution, Induction, PreviousToken
from headwise.models import open_model
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import logits_of
from headwise.site import Unit
from headwise.task import Batch, answer_logits, logprob
from headwise.weights import Weights


@dataclass(frozen=True)
class TalkingHeads(Replication):
    """Edits one channel for a list task, ranks known pairs among all, and takes a known pair's channels away."""

    row: ClassVar[str] = "s127"
    claim: ClassVar[str] = "Scaling one low-rank channel between heads changes how well a list is recalled."
    paper: ClassVar[str] = "accuracy on laundry lists rises by more than 20 points; channels are seen in the weights"
    changed: ClassVar[str] = (
        "after its first record the random channels were drawn from the eight strongest of the head, not from its weak "
        "ones, which made too easy a rival; no threshold was moved"
    )

    items: ClassVar[int] = 6
    heads: ClassVar[int] = 6
    strengths: ClassVar[tuple[float, ...]] = (-2.0, 0.0, 4.0)
    least_change: ClassVar[float] = 10.0
    top: ClassVar[float] = 0.01
    least_lost: ClassVar[float] = 0.5
    most_random: ClassVar[float] = 0.1

    def run(self, seed: int = 0) -> Outcome:
        """Accuracy with one channel scaled, held-out; ranks of known pairs; attention without three channels."""
        model, tokenizer = open_model("default")
        weights, n = Weights(model), 32 if self.full else 16
        graph = Method().find(model)
        pair, places = self._pair(model, tokenizer, graph, seed)
        repeated = RepeatedTokens(length=30).make(tokenizer, 4, seed + 5)
        lost = self._lost(model, weights, repeated, pair, seed)
        task = LaundryList(items=self.items)
        dev, held = task.make(tokenizer, n, seed + 1), task.make(tokenizer, 4 * n, seed + 2)
        unit, number, alpha = self._chosen(model, weights, dev)
        strong = np.setdiff1d(np.arange(8), number)
        others = [int(i) for i in np.random.default_rng(seed).choice(strong, 3, replace=False)]
        rates = [
            self._right(model, held, one)
            for one in ([], *([ScaleChannel(unit, alpha, in_z(weights, unit, [i]))] for i in (number, *others)))
        ]
        return self._judge((unit, number, alpha), rates, pair, places, lost, len(held))

    def _pair(self, model: PreTrainedModel, tokenizer, graph: Graph, seed: int) -> tuple[tuple[str, str], list[float]]:
        """The best fitting of nine known pairs, and the places of all of them among all edges into keys, 0 the best."""
        batch = RepeatedTokens(length=50).make(tokenizer, 4, seed)
        before, after = (method.score(model, batch).top(3) for method in (PreviousToken(), Induction()))
        keys = graph.only(lambda edge: edge[1].endswith(".k"))
        values = np.sort([keys[edge] for edge in keys.edges])
        found = {}
        for writer in before:
            for reader in after:
                place = Unit.parse(reader)
                if Unit.parse(writer).layer < place.layer:
                    total, groups = graph.heads[place.layer]
                    edge = (writer, f"L{place.layer}.G{place.index // (total // groups)}.k")
                    found[writer, reader] = 1 - float(np.searchsorted(values, keys[edge], "right")) / len(values)
        pair = min(found, key=lambda one: found[one])
        return pair, sorted(found.values())

    def _lost(self, model, weights: Weights, batch: Batch, pair: tuple[str, str], seed: int) -> list[float]:
        """Share of the reader's induction attention that goes with the writer's best channels, and with random ones."""
        writer, reader = pair
        ranked = self._ranked(weights, writer, reader)
        draws = np.random.default_rng(seed)
        sets = [ranked[:3], *([int(i) for i in draws.choice(ranked[3:], 3, replace=False)] for _ in range(3))]
        found = []
        for numbers in ([], *sets):
            one = [ScaleChannel(writer, 0.0, in_z(weights, writer, numbers))] if numbers else []
            with do(model, *one):
                found.append(Induction().score(model, batch)[reader])
        return [1 - value / found[0] for value in found[1:]]

    def _ranked(self, weights: Weights, writer: str, reader: str) -> list[int]:
        """The writer's channels, those that fit the reader's keys best first."""
        source, place = Unit.parse(writer), Unit.parse(reader)
        directions = channels(weights, source.layer, source.index)[None]
        return composed(weights, directions, "k", place.layer, place.index)[0].argsort(descending=True).tolist()

    def _chosen(self, model: PreTrainedModel, weights: Weights, dev: Batch) -> tuple[str, int, float]:
        """Head, channel and strength with the best log-probability of the answer on the development prompts."""
        heads = Attribution(metric="logit_diff", prompts=4).score(model, dev).top(self.heads)
        found = {}
        for unit in heads:
            for number in (0, 1):
                source = in_z(weights, unit, [number])
                for alpha in self.strengths:
                    with torch.no_grad(), do(model, ScaleChannel(unit, alpha, source)):
                        parts = [logprob(answer_logits(model, part), part) for part in dev.chunks(8)]
                    found[unit, number, alpha] = float(torch.cat(parts).mean())
        return max(found, key=lambda one: found[one])

    def _right(self, model: PreTrainedModel, batch: Batch, changes: list[Intervention]) -> float:
        """Percent of prompts whose answer is the top token."""
        with do(model, *changes):
            said = logits_of(model, batch, 8).argmax(-1)
        return 100 * float((said == batch.answer[:, 0]).float().mean())

    def _judge(self, edit, rates: list[float], pair, places: list[float], lost: list[float], n: int) -> Outcome:
        unit, number, alpha = edit
        change, others = rates[1] - rates[0], [rate - rates[0] for rate in rates[2:]]
        checks = {
            f"one channel adds at least {self.least_change:.0f} points": change >= self.least_change,
            "random channels of the same head, scaled alike, add less": change > max(others),
            f"the best of the known pairs is among the top {self.top:.0%} of edges into keys": places[0] <= self.top,
            f"without three channels the reader loses {self.least_lost:.0%} of its attention": lost[0]
            >= self.least_lost,
            f"without three random ones less than {self.most_random:.0%}": max(lost[1:]) < self.most_random,
        }
        measured = (
            f"channel {number} of {unit} x{alpha:g}: {rates[0]:.0f} % to {rates[1]:.0f} % of {n} held-out lists of "
            f"{self.items}; {pair[0]} into {pair[1]} at the top {places[0]:.1%}, its three best channels carry "
            f"{lost[0]:.0%} of the attention"
        )
        baseline = (
            f"random channels {np.mean(others):+.0f} points; known pairs, median place {np.median(places):.0%}; three "
            f"random channels carry {np.mean(lost[1:]):.0%}"
        )
        numbers = {"right": rates, "edit": list(edit), "pair": list(pair), "places": places, "lost": lost}
        return settle(measured, baseline, checks, numbers)
