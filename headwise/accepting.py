"""Which tokens of a draft stay: the model's own choice, or chance that leaves the model's distribution as it is.

One rule serves all drafts (Leviathan et al., 2022, arXiv:2211.17192; Miao et al., 2023, arXiv:2305.09781 for trees): a
token x drawn from q is kept with probability min(1, p(x) / q(x)), and where it is refused the next one is judged by,
or drawn from, what is left of p: (p - q)+. A token chosen without chance has q(x) = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from headwise.drafting import ALL, DIFFERS, NO_ROOM, STOPPED, Draft


class Line:
    """One row of token ids, its padding included, in a buffer with room to the final length; its number is `row`."""

    def __init__(self, start: Tensor, most: int, row: int = 0) -> None:
        self.row = row
        self.ids = start.new_zeros(max(most, len(start) + 1))
        self.ids[: len(start)] = start
        self.start = self.length = len(start)
        self.most, self.last = most, -1

    def add(self, token: int) -> None:
        """Write one more token."""
        self.ids[self.length] = self.last = token
        self.length += 1

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.most - self.length

    def text(self, rows: int) -> Tensor:
        """[rows, length], the same in each: processors and criteria may know something of every row of the batch."""
        return self.ids[None, : self.length].expand(rows, -1)


@dataclass(frozen=True)
class Walk:
    """How far one draft went.

    Attributes:
        path: indices of the accepted tokens in the draft. tokens: what was added to the text: these, and mostly one
            more that the model chose itself.
        stopped: whether the text has ended with the last of `tokens`.
        why: in words, why it went no further.
    """

    path: list[int]
    tokens: list[int]
    stopped: bool
    why: str


class Rules:
    """How the model chooses its next token in this run, and when a text ends."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        rows: int,
    ) -> None:
        self.processors, self.rows = processors, rows
        self.sampling = bool(config.do_sample)
        limits = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
        self.most = min([*limits, int(config.max_length)])
        ends = [one.eos_token_id.flatten().tolist() for one in criteria if isinstance(one, EosTokenCriteria)]
        self.ends = {token for one in ends for token in one}
        self._slow = [one for one in criteria if not isinstance(one, MaxLengthCriteria | EosTokenCriteria)]

    def stops(self, line: Line) -> bool:
        """Whether the text ends with its last token."""
        if line.length >= self.most or line.last in self.ends:
            return True
        said = [torch.as_tensor(one(line.text(self.rows), None)).expand(self.rows) for one in self._slow]
        return any(bool(one[line.row]) for one in said)

    def read(self, logits: Tensor) -> "Tensor | list[list[int]]":
        """Logits [B, W, V] in the form that `choose` wants: the best tokens, where nothing else is asked for."""
        if self.sampling or len(self.processors):
            return logits.float()
        return logits.float().argmax(-1).tolist()

    def choose(
        self, known: "Tensor | list[int]", at: int, line: Line, options: "Sequence[tuple[int, Tensor | None]]"
    ) -> tuple[int, int | None]:
        """The next token after column `at` of one row, and which of the options it is, if any.

        Args:
            known: one row of what `read` gave.
            options: (token, the distribution it was drawn from or None) of each child in the draft.
        """
        if not isinstance(known, Tensor):
            token = known[at]
        else:
            scores = self.processors(line.text(self.rows), known[at].repeat(self.rows, 1))[line.row]
            if self.sampling:
                return pick(scores.softmax(-1), options)
            token = int(scores.argmax())
        return token, next((i for i, (one, _) in enumerate(options) if one == token), None)

    def walk(self, known: "Tensor | list[int]", at: int, draft: Draft, line: Line) -> Walk:
        """Follow a draft as far as the model does, and write what is accepted into the line.

        Args:
            known: one row of what `read` gave. at: the column that predicts the first token of the draft; the draft's
                own columns follow it.
        """
        children: dict[int, list[int]] = {}
        for index in range(len(draft.tokens)):
            parent = index - 1 if draft.parents is None else draft.parents[index]
            children.setdefault(parent, []).append(index)
        path: list[int] = []
        tokens: list[int] = []
        node = -1
        while True:
            here = children.get(node, [])
            options = [(draft.tokens[i], None if draft.probs is None else draft.probs[i]) for i in here]
            token, which = self.choose(known, at + 1 + node, line, options)
            line.add(token)
            tokens.append(token)
            if which is not None:
                node = here[which]
                path.append(node)
            if self.stops(line):
                return Walk(path, tokens, True, STOPPED)
            if which is None:
                why = DIFFERS if here else ALL if draft.tokens and draft.why != NO_ROOM else draft.why
                return Walk(path, tokens, False, why)


def pick(p: Tensor, options: "Sequence[tuple[int, Tensor | None]]") -> tuple[int, int | None]:
    """Draw from p [V] so that options are taken as often as can be: (token, which option it is, if any).

    Whatever the options are, the token is distributed as p, as long as each was drawn from the distribution [V] that
    stands beside it, or without chance where that is None.
    """
    for which, (token, q) in enumerate(options):
        if q is not None:
            q = q.to(p)
        # What is said to come from a distribution that does not hold it cannot have been drawn from it.
        if q is None or float(q[token]) <= 0:
            q = torch.zeros_like(p)
            q[token] = 1
        if float(torch.rand(())) * float(q[token]) < float(p[token]):
            return token, which
        left = (p - q).clamp_min(0)
        total = left.sum()
        if not float(total) > 0:  # p and q are the same but for rounding
            return token, which
        p = left / total
    return int(torch.multinomial(p, 1)), None
