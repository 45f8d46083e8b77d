"""Why think step by step? Reasoning emerges from the locality of experience. Prystawski et al., 2023. arXiv:2304.03843

Row s026 of the mission. Scaled down to 12 variables and 2 layers.
"""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.comparison import Condition
from headwise.data import LocalBayesNet
from headwise.experiment import Experiment
from headwise.lesson import generator
from headwise.tiny import TinyConfig
from headwise.training import Training


@dataclass(frozen=True)
class LocalExperience(Experiment):
    """Shows models parts of Bayes nets and asks for two variables that were never seen together.

    Fields:
        nets: worlds, each a net of its own.
        nodes: variables of a net.
    """

    row: ClassVar[str] = "s026"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 1.0)
    seeds: ClassVar[tuple[int, ...]] = (5,)

    nets: tuple[int, ...] = (0, 1, 2)
    nodes: int = 12

    def conditions(self) -> dict[str, Condition]:
        """Names: "local, net 0" and so on, for what is seen and each net."""
        found = {}
        for seen, net in product(("local", "full", "wrong"), self.nets):
            lesson = LocalBayesNet(nodes=14 if self.full else self.nodes, seen=seen, world=net)
            training = Training(
                steps=20_000 if self.full else 5000,
                batch=64,
                lr=2e-3,
                optimiser="adamw",
                weight_decay=0.01,
                warmup=50,
                decay="cosine",
                measure_every=500,
            )
            config = TinyConfig(**lesson.config(layers=4 if self.full else 2, heads=4, width=64, mlp=128, act="gelu"))
            found[f"{seen}, net {net}"] = Condition(config, lesson, training)
        return found


def asked(lesson: LocalBayesNet) -> list[tuple[int, int, int]]:
    """(variable, given variable, its value) of everything that is asked: held-out pairs both ways."""
    return [(y, x, value) for a, b in lesson.net.held for y, x in ((a, b), (b, a)) for value in (0, 1)]


def estimate(
    model: PreTrainedModel, lesson: LocalBayesNet, of: int, given: int, value: int, between: list[int]
) -> float:
    """The probability of 1 that a model gives a variable, after the value of another and then of those in between.

    What is in between is summed over by the model's own probabilities of its values, and not sampled.
    """
    nodes = lesson.nodes
    choices = torch.tensor(list(product((0, 1), repeat=len(between))), dtype=torch.long)
    rows = len(choices)
    first = torch.tensor([nodes + 2, of, given, nodes + value]).expand(rows, -1)
    middle = torch.stack([torch.tensor(between, dtype=torch.long).expand(rows, -1), nodes + choices], -1).flatten(1)
    ids = torch.cat([first, middle, torch.full((rows, 1), of)], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[..., nodes : nodes + 2].log_softmax(-1)
    said = logits[:, 4:-1:2].gather(-1, choices[..., None])[..., 0]
    return float((said.sum(-1).exp() * logits[:, -1, 1].exp()).sum())


def wandering(
    model: PreTrainedModel, lesson: LocalBayesNet, questions: list[tuple[int, int, int]], draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The same for all questions, where the model itself says what comes in between, `draws` times each.

    Returns:
        The mean probability of 1 [questions], and how many variables came in between [questions].
    """
    nodes, draw = lesson.nodes, generator(seed, 26)
    rows = torch.tensor(questions).repeat_interleave(draws, 0)
    of, given, value = rows.unbind(1)
    ids = torch.stack([torch.full_like(of, nodes + 2), of, given, nodes + value], 1)
    used = torch.nn.functional.one_hot(given, nodes).bool()
    said, steps = torch.full((len(rows),), torch.nan), torch.zeros(len(rows))
    with torch.no_grad():
        while said.isnan().any():
            names = model(input_ids=ids, use_cache=False).logits[:, -1, :nodes].masked_fill(used, -torch.inf)
            name = torch.multinomial(names.softmax(-1), 1, generator=draw)
            ids = torch.cat([ids, name], 1)
            odds = model(input_ids=ids, use_cache=False).logits[:, -1, nodes : nodes + 2].softmax(-1)
            said = torch.where(said.isnan() & (name[:, 0] == of), odds[:, 1], said)
            steps += said.isnan()
            ids = torch.cat([ids, nodes + torch.multinomial(odds, 1, generator=draw)], 1)
            # Those that have arrived go on without meaning, until all have.
            used = used.scatter(1, name, True)
            used[used.all(-1), 0] = False
    return said.view(-1, draws).mean(-1), steps.view(-1, draws).mean(-1)
