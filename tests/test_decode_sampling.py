"""Under sampling, drafts keep the model's distribution; rules of acceptance that are wrong are found out."""

from collections.abc import Callable, Mapping

import pytest
import torch
from chances import draws_again, flatter, forgets_siblings, p_value, too_willing
from families import FAMILIES, VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from headwise import accepting
from headwise.drafting import Draft, Drafter, News, Reading


class _Chance(Drafter):
    """Proposes what may follow, in one of four ways: fixed chains, drawn ones with their distribution, and trees."""

    def __init__(self, kind: str, follows: dict[tuple[int, ...], list[int]]) -> None:
        self.kind, self.follows = kind, follows

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        assert sampling
        self.made: list[tuple[int, ...]] = [() for _ in texts]

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        for row, one in news.items():
            self.made[row] += tuple(one.tokens)

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        return {row: self._one(self.made[row]) for row in rooms}

    def _one(self, text: tuple[int, ...]) -> Draft:
        here = self.follows[text]
        after = {token: self.follows.get((*text, token), here) for token in here}
        # The least likely comes first: what is wrong then shows more.
        if self.kind == "fixed chain":
            return Draft([here[2], after[here[2]][1]])
        if self.kind == "fixed tree":
            return Draft([here[2], here[1], after[here[2]][1], after[here[2]][0]], [-1, -1, 0, 0])
        first, q = self._drawn(here)
        if self.kind == "drawn chain":
            second, r = self._drawn(after[first])
            return Draft([first, second], None, torch.stack([q, r]))
        sibling = self._drawn(here)[0]
        third, r = self._drawn(after[first])
        return Draft([first, sibling, third], [-1, -1, 0], torch.stack([q, q, r]))

    def _drawn(self, tokens: list[int]) -> tuple[int, Tensor]:
        q = torch.zeros(VOCAB)
        q[tokens] = torch.tensor([0.2, 0.3, 0.5])
        return int(torch.multinomial(q, 1)), q


def _p_value(kind: str, times: int = 8) -> float:
    return p_value(flatter(FAMILIES["llama"].build()), lambda follows: _Chance(kind, follows), times=times)


@pytest.mark.parametrize("kind", ["fixed chain", "fixed tree", "drawn chain", "drawn tree"])
def test_sampling_keeps_the_distribution_of_the_model(kind: str) -> None:
    assert _p_value(kind) > 1e-3


# The last rule is wrong only half the time, and needs more draws to be seen as clearly.
@pytest.mark.parametrize(
    ("wrong", "kind", "times"),
    [(too_willing, "fixed chain", 8), (draws_again, "drawn chain", 8), (forgets_siblings, "drawn tree", 32)],
)
def test_the_test_of_sampling_has_power(
    wrong: Callable[..., tuple[int, int | None]], kind: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "pick", wrong)
    assert _p_value(kind, times) < 1e-6


def test_a_drafter_as_good_as_the_model_is_always_believed() -> None:
    p = torch.tensor([0.2, 0.5, 0.3])
    for _ in range(50):
        token = int(torch.multinomial(p, 1))
        assert accepting.pick(p, [(token, p)]) == (token, 0)
