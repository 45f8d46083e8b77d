"""What a draft is, who makes it, and what became of it. Verification is in headwise/verifying.py.

How to write a drafter: derive from `Drafter`; `begin` gets the texts, `accept` what was added to them after every
forward pass, `propose` hands back one `Draft` a row. The loop checks drafts with the model, keeps caches in order and
stops where generation must stop, so that a drafter only guesses. A guess that is wrong costs time and nothing else.

Texts are lists of token ids without padding. Rows keep their numbers for the whole run, also when others are done.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ALL, DIFFERS, STOPPED, WAITS, NO_ROOM = (
    "all accepted",
    "the model chose another token",
    "the text ended",
    "waits for other rows",
    "no room",
)
NOTHING = "nothing to propose"


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, in a chain or in a tree.

    Attributes:
        tokens: ids, n of them; none where the drafter has nothing to propose.
        parents: for a tree, the index of each token's parent among `tokens`, -1 where it follows the text directly.
            A parent stands before its children, and of the children of one parent the likeliest stands first, for where
            a cache cannot hold a tree only the first branch is checked. None is a chain.
        probs: [n, V] the distribution from which each token was drawn at random (given that its elder siblings were
            refused); None where the choice was made without chance. Used when the model samples.
        source: who made it, for the counts.
        why: where there are no tokens, the reason in a few words, for the counts.
    """

    tokens: list[int]
    parents: list[int] | None = None
    probs: Tensor | None = None
    source: str = ""
    why: str = NOTHING

    @property
    def depth(self) -> int:
        """Tokens of the longest branch."""
        return max(self._depths(), default=0)

    def _depths(self) -> list[int]:
        depths: list[int] = []
        for index in range(len(self.tokens)):
            parent = index - 1 if self.parents is None else self.parents[index]
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def chain(self) -> "Draft":
        """The first branch of a tree, as a chain."""
        if self.parents is None:
            return self
        path, last = [], -1
        for index, parent in enumerate(self.parents):
            if parent == last:
                path.append(index)
                last = index
        probs = None if self.probs is None else self.probs[path]
        return Draft([self.tokens[i] for i in path], None, probs, self.source, self.why)

    def cut(self, room: int) -> "Draft":
        """What is left of it when at most `room` tokens may be added to the text."""
        if self.parents is None:
            if len(self.tokens) <= room:
                return self
            probs = None if self.probs is None else self.probs[:room]
            return Draft(self.tokens[:room], None, probs, self.source, NO_ROOM)
        depths = self._depths()
        if max(depths, default=0) <= room:
            return self
        kept = [i for i, depth in enumerate(depths) if depth <= room]
        place = {-1: -1} | {old: new for new, old in enumerate(kept)}
        probs = None if self.probs is None else self.probs[kept]
        parents = [place[self.parents[i]] for i in kept]
        return Draft([self.tokens[i] for i in kept], parents, probs, self.source, NO_ROOM)

    def check(self, vocabulary: int) -> None:
        """Raises ValueError: an id that the model does not have, a tree that is none, probabilities of other shape."""
        name = self.source or "A drafter"
        for token in self.tokens:
            if not 0 <= token < vocabulary:
                raise ValueError(f"{name} proposed token {token}; allowed are 0 to {vocabulary - 1}.")
        if self.parents is not None:
            wrong = [i for i, parent in enumerate(self.parents) if not -1 <= parent < i]
            if wrong or len(self.parents) != len(self.tokens):
                raise ValueError(
                    f"{name} proposed a tree of {len(self.tokens)} tokens with the parents {self.parents}; allowed is "
                    "one parent a token, -1 or the index of an earlier token."
                )
        if self.probs is not None and self.probs.shape != (len(self.tokens), vocabulary):
            raise ValueError(
                f"{name} gave probabilities {list(self.probs.shape)} for {len(self.tokens)} tokens; allowed is "
                f"[{len(self.tokens)}, {vocabulary}], the vocabulary of the model."
            )


@dataclass(frozen=True)
class News:
    """What was added to one row since the drafter last heard of it.

    Attributes:
        tokens: ids that are now part of the text, the newest last. The newest has not been read by the model yet.
        hidden: [n, d] last hidden states of the model, after its final norm, at the positions that it has read since
            then and that stay, oldest first; only where the drafter says `wants_hidden`. After the first pass these are
            all positions of the prompt that the pass read; afterwards the position of the previous newest token and
            those of the accepted tokens but the newest. So the last row of `hidden` is the state that predicted the
            newest token, and over a run a row gets one state for each token but the newest.
    """

    tokens: list[int]
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """Which columns of the model's last pass the `hidden` of the news are of; for drafters that watch the model.

    Attributes:
        columns: {row: columns of the pass, oldest first}, as many as there are new hidden states.
        places: {row: which row of the model's batch it was}.
        width: columns of the pass; a prompt read in chunks counts as one pass.
    """

    columns: dict[int, list[int]]
    places: dict[int, int]
    width: int


class Drafter(ABC):
    """Guesses the next tokens of some texts. One object serves one run at a time; `begin` starts the next."""

    wants_hidden: bool = False

    def watch(self, model: PreTrainedModel) -> AbstractContextManager:
        """Entered around the whole run, before `begin`: for drafters that look into the model with taps or hooks."""
        return nullcontext()

    @abstractmethod
    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Start on new texts.

        Args:
            model: the model that verifies; a drafter may call it, with a cache of its own.
            texts: the prompt of every row, without padding.
            sampling: whether the model samples; then a drafter that draws its tokens should hand back `probs`.
        """

    @abstractmethod
    def accept(self, news: "Mapping[int, News]", read: "Reading") -> None:
        """Take in what was added: {row: news}, after the first pass and after each verification.

        Args:
            read: which columns of the last forward pass these are; for drafters that watch the model.
        """

    @abstractmethod
    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """One draft for each row that is asked: {row: how many tokens may still be added, 1 or more}.

        Longer drafts are cut. A row for which there is nothing to say may be left out.
        """


@dataclass
class Stats:
    """What became of the drafts of one run; counts only, so that it does not grow with the text.

    Attributes:
        rows: texts; passes: forward passes, the reading of the prompt included.
        turns: rows that took part in a pass of verification, summed over passes.
        tokens: tokens generated, all rows together.
        drafted, accepted: tokens proposed, and those that the model agreed to.
        lengths: {accepted tokens of a draft: how often}, drafts without tokens left out.
        why: {why a draft was not longer or not accepted further: how often}, one for each turn.
        sources: {drafter: [drafts, tokens proposed, tokens accepted]}.
        seconds: of the whole run; prefill: until the first token was known.
    """

    rows: int = 0
    passes: int = 0
    turns: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    sources: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    prefill: float = 0.0

    @property
    def per_pass(self) -> float:
        """Tokens that one row gained in a pass of verification, on average; 1 is decoding without drafts."""
        first = self.tokens - self.rows
        return first / self.turns if self.turns else 1.0

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated after the first, a second, since the first was known."""
        spent = self.seconds - self.prefill
        return (self.tokens - self.rows) / spent if spent > 0 else 0.0

    def note(self, draft: Draft, accepted: int, why: str) -> None:
        """Count one row's turn."""
        self.turns += 1
        self.why[why] += 1
        if draft.tokens:
            self.drafted += len(draft.tokens)
            self.accepted += accepted
            self.lengths[accepted] += 1
            one = self.sources.setdefault(draft.source or "draft", [0, 0, 0])
            for place, number in enumerate((1, len(draft.tokens), accepted)):
                one[place] += number

    def data(self) -> dict:
        """Everything as plain values, for JSON."""
        return {
            **{name: getattr(self, name) for name in ("rows", "passes", "turns", "tokens", "drafted", "accepted")},
            "per_pass": self.per_pass,
            "acceptance": self.acceptance,
            "tokens_per_second": self.tokens_per_second,
            "lengths": {str(length): count for length, count in sorted(self.lengths.items())},
            "why": dict(self.why.most_common()),
            "sources": {name: list(counts) for name, counts in self.sources.items()},
            "seconds": self.seconds,
            "prefill": self.prefill,
        }


@contextmanager
def last_states(model: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects the last hidden states [B, T, D] that the model's body gives inside the block."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    if not wanted:
        yield seen
        return
    hook = model.get_decoder().register_forward_hook(see)  # OPT passes its base model by
    try:
        yield seen
    finally:
        hook.remove()


def states_of(seen: list[Tensor], place: int, columns: list[int]) -> Tensor | None:
    """The hidden states [n, D] of some columns of one place."""
    if not seen:
        return None
    whole = seen[0][place] if len(seen) == 1 else torch.cat([one[place] for one in seen])
    return whole[columns]
