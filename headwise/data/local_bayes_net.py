"""Why think step by step? Reasoning emerges from the locality of experience. Prystawski et al., 2023. arXiv:2304.03843

Row s026 of the mission.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from headwise.lesson import Lesson, Shape, generator
from headwise.task import Batch, correct

SEEN = ("local", "full", "wrong")


class Net(NamedTuple):
    """A Bayes net over binary variables, written out.

    Fields:
        joint: [2 ** nodes] probabilities; bit i of the index is the value of variable i.
        linked: [nodes, nodes] true between parents and children.
        near: [nodes, nodes] steps from one variable to another along links, `nodes` where there is no way.
        held: pairs of variables that are never observed together.
    """

    joint: np.ndarray
    linked: np.ndarray
    near: np.ndarray
    held: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LocalBayesNet(Lesson):
    """Some variables of a Bayes net with their values, the one that was announced last: what is each value?

    A prompt is "target", a variable, then variables with their values in any order, the announced one last. Which of
    them are observed depends on where one stands in the net. Some pairs that depend on each other but are not linked
    are never observed together. Everything after the announcement is learned.

    Fields:
        nodes: variables; as many links.
        seen: "local": those at most so many links from one of them (1 in half of the prompts, 2 in a quarter, ...);
            "full": all; "wrong": those that are near in another net. A fifth of them is left out.
        pairs: how many are held out: among those of the most information about each other, at random.
    """

    row: ClassVar[str] = "s026"

    nodes: int = 12
    seen: str = "local"
    pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seen not in SEEN or not 4 <= self.nodes <= 16 or self.pairs < 1:
            raise ValueError(
                f"seen={self.seen!r}, {self.nodes} variables and {self.pairs} pairs are no net here; allowed are "
                f"{', '.join(SEEN)}, 4 to 16 variables and 1 pair or more."
            )

    @property
    def shape(self) -> Shape:
        """Tokens: variables, then the values 0 and 1, "target", and what fills up."""
        return Shape(2 + 2 * self.nodes, self.nodes + 2, vocab_size=self.nodes + 4)

    @property
    def net(self) -> Net:
        """The net of this world."""
        return bayes_net(self.nodes, self.pairs, self.world)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Answers are everything after the announcement; weights are 0 behind the end of a prompt."""
        net, nodes = self.net, self.nodes
        states = torch.multinomial(torch.from_numpy(net.joint), n, replacement=True, generator=draw)
        values = (states[:, None] >> torch.arange(nodes)) & 1
        here = self._observed(n, draw)
        for pair in net.held:
            both = here[:, pair[0]] & here[:, pair[1]]
            drop = torch.tensor(pair)[torch.randint(2, (n,), generator=draw)]
            here[both, drop[both]] = False
        # Observed variables first, in random order; the last of them is announced.
        order = (torch.rand(n, nodes, generator=draw) + 2 * ~here).argsort(-1)
        count = here.sum(-1, keepdim=True)
        target = order.gather(1, count - 1)
        body = torch.stack([order, nodes + values.gather(1, order)], -1).flatten(1)
        there = torch.arange(2 * nodes) < 2 * count
        body = torch.where(there, body, nodes + 3)
        ids = torch.cat([torch.full((n, 1), nodes + 2), target, body], 1)
        return Batch(
            inputs={"input_ids": ids[:, :-1]},
            at=torch.arange(1, 1 + 2 * nodes).expand(n, -1),
            answer=torch.where(there, body, 0),
            weight=there.float(),
        )

    def _observed(self, n: int, draw: torch.Generator) -> Tensor:
        """[n, nodes] which variables are seen; never none."""
        if self.seen == "full":
            here = torch.ones(n, self.nodes, dtype=torch.bool)
        else:
            other = self.world + 10_000 if self.seen == "wrong" else self.world
            near = torch.from_numpy(bayes_net(self.nodes, self.pairs, other).near)
            centre = torch.randint(self.nodes, (n,), generator=draw)
            reach = 1 + (torch.rand(n, generator=draw).log() / np.log(0.5)).floor()
            here = near[centre] <= reach[:, None]
        kept = here & (torch.rand(n, self.nodes, generator=draw) >= 0.2)
        return torch.where((kept.sum(-1) >= 2)[:, None], kept, here)

    def cells(self, batch: Batch) -> dict[str, Tensor]:
        """The cell "previous": to the token before, as from a variable's value to its name."""
        at = torch.arange(batch.ids.shape[1], device=batch.at.device)
        return {"previous": (at[:, None] - at == 1)[None]}

    def metrics(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy of values and names, where there are any."""
        return {"accuracy": correct(logits, batch)}

    def lines(self) -> dict[str, float]:
        """Nats a token where names are guessed and values known by their marginals, on 2,000 prompts."""
        one = torch.tensor([self.conditional(node, {}) for node in range(self.nodes)])
        batch = self.make(None, 2000)
        names, values = batch.answer[:, 0::2], batch.answer[:, 1::2] - self.nodes
        said = torch.where(values == 1, one[names], 1 - one[names]).log()
        there = cast(Tensor, batch.weight)[:, 0::2]
        cost = ((np.log(self.nodes) - said) * there).sum(-1) / (2 * there.sum(-1))
        return {"marginals": float(cost.mean())}

    def conditional(self, of: int, given: dict[int, int]) -> float:
        """The true probability that a variable is 1, given values of others."""
        joint, states = self.net.joint, np.arange(2**self.nodes)
        fits = np.ones(len(joint), dtype=bool)
        for node, value in given.items():
            fits &= (states >> node) & 1 == value
        return float(joint[fits & ((states >> of) & 1 == 1)].sum() / joint[fits].sum())

    def scaffold(self, one: int, other: int) -> list[int]:
        """The fewest variables, up to 3, that make two independent, in the order of their distance from the first.

        Of several such sets the nearest to both is taken; where there is none, that which leaves least information.
        """
        net = self.net
        rest = [node for node in range(self.nodes) if node not in (one, other)]
        left: dict[tuple[int, ...], float] = {}
        for size in range(1, 4):
            left |= {kept: information(net.joint, one, other, kept) for kept in combinations(rest, size)}
            enough = [kept for kept, nats in left.items() if nats < 1e-9]
            if enough:
                found = min(enough, key=lambda kept: int((net.near[one] + net.near[other])[list(kept)].sum()))
                break
        else:
            found = min(left, key=lambda kept: left[kept])
        return sorted(found, key=lambda node: int(net.near[one, node]))


def information(joint: np.ndarray, one: int, other: int, kept: tuple[int, ...] = ()) -> float:
    """Nats that two variables tell of each other, given others. joint [2 ** nodes] as in `Net`."""
    nodes = len(joint).bit_length() - 1
    named = (one, other, *kept)
    # The first axis is the highest bit, that of the last variable.
    whole = joint.reshape((2,) * nodes).transpose(range(nodes - 1, -1, -1))
    table = whole.sum(tuple(node for node in range(nodes) if node not in named))
    table = table.transpose([sorted(named).index(node) for node in named])
    both = table.sum((0, 1)) * table / (table.sum(1, keepdims=True) * table.sum(0, keepdims=True))
    return float((table * np.log(both)).sum())


@cache
def bayes_net(nodes: int, pairs: int, world: int) -> Net:
    """A random net: `nodes` links, tables from Beta(0.2, 0.2); of 20 the one with the most mutual information."""
    draw = np.random.default_rng(generator(world, 26).initial_seed())
    found = [_random_net(nodes, draw) for _ in range(20)]
    means = [np.mean([information(joint, a, b) for a, b in combinations(range(nodes), 2)]) for joint, _ in found]
    joint, linked = found[int(np.argmax(means))]
    near = np.where(linked, 1, nodes)
    np.fill_diagonal(near, 0)
    for middle in range(nodes):
        near = np.minimum(near, near[:, middle, None] + near[None, middle])
    near = np.minimum(near, nodes)
    apart = [(a, b) for a, b in combinations(range(nodes), 2) if not linked[a, b] and near[a, b] < nodes]
    apart.sort(key=lambda pair: -information(joint, *pair))
    chosen = draw.permutation(min(len(apart), 2 * pairs))[:pairs]
    return Net(joint, linked, near, tuple(apart[i] for i in sorted(chosen)))


def _random_net(nodes: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Joint probabilities, and the links without direction."""
    every = list(combinations(range(nodes), 2))
    links = [every[i] for i in draw.permutation(len(every))[:nodes]]
    linked = np.zeros((nodes, nodes), dtype=bool)
    states, joint = np.arange(2**nodes), np.ones(2**nodes)
    for node in range(nodes):
        parents = [a for a, b in links if b == node]
        linked[parents, node] = linked[node, parents] = True
        table = draw.beta(0.2, 0.2, 2 ** len(parents)) if parents else draw.uniform(size=1)
        row = sum((((states >> a) & 1) << i for i, a in enumerate(parents)), np.zeros_like(states))
        one = table.clip(0.01, 0.99)[row]
        joint = joint * np.where((states >> node) & 1, one, 1 - one)
    return joint, linked
