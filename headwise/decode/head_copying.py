"""In-context Learning and Induction Heads. Olsson et al., 2022. arXiv:2209.11895

What is ours here: the heads that the paper found are asked where to copy from. An induction head looks at the token
that followed the present one before, so its attention says where the model itself copies, before an n-gram can.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.buffer import Buffer
from headwise.drafting import Draft, Drafter, News, Reading
from headwise.listen import Handler, Place, listen
from headwise.score import Score
from headwise.site import Site, Unit
from headwise.verifying import DraftMethod


@dataclass(frozen=True)
class HeadCopying(DraftMethod):
    """Where induction heads looked when the model chose its newest token, the text behind that token is proposed.

    Of the places that hold the newest token, the one that the heads looked at most is taken, if it got at least `least`
    of their attention, on average over heads. Queries and keys of these heads are read as they pass; only the newest
    query of a row is multiplied with its keys, which are held a second time for these heads.

    Fields:
        heads: heads to ask, such as ("L5.H1", "L9.H6"); `HeadCopying().asking(score)` takes them from an atlas.
        tokens: proposed at most. least: share of attention from which a place is believed, 0 to 1.
    """

    heads: tuple[str, ...] = ()
    tokens: int = 10
    least: float = 0.2

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.least <= 1:
            raise ValueError(
                f"tokens is {self.tokens} and least {self.least}; allowed are 1 or more tokens, and 0 to 1."
            )

    def asking(self, score: Score, count: int = 6) -> "HeadCopying":
        """The same method with the heads that score highest, for example on `heads.induction`."""
        return replace(self, heads=tuple(score.top(count)))

    def drafter(self, model: PreTrainedModel) -> Drafter:
        """A drafter that watches these heads. Raises ValueError: no heads, or heads that the model does not have."""
        if not self.heads:
            raise ValueError(
                "HeadCopying has no heads to ask; give some, such as heads=('L5.H1',), or use asking(score)."
            )
        return _Asks(self, model)


class _Asks(Drafter):
    """What the watched heads hold of each row.

    Attributes:
        groups: {layer: (heads [h], the KV head of each [h], scale)}.
        keys: {(row, layer): keys [1, h, n, d] of the tokens read so far}.
        looks: {row: attention [n] when the newest token was chosen, mean over heads}.
    """

    def __init__(self, method: HeadCopying, model: PreTrainedModel) -> None:
        self.method = method
        self.groups: dict[int, tuple[list[int], list[int], float]] = {}
        body = anatomy(model)
        for unit in method.heads:
            head = Unit.parse(unit)
            if head.letter != "H":
                raise ValueError(f"{unit!r} is no head to ask; allowed are names such as L5.H1.")
            body.resolve(Site(head.layer, "q", head.index))
            layer = body.layer(head.layer)
            scale = float(getattr(layer.attention, "scaling", None) or layer.head_dim**-0.5)
            heads, kv, _ = self.groups.setdefault(layer.number, ([], [], scale))
            heads.append(head.index)
            kv.append(head.index // (layer.heads // layer.kv_heads))
        self.passed: dict[tuple[int, str], list[Tensor]] = {}
        self.texts: list[list[int]] = []
        self.where: list[dict[int, list[int]]] = []
        self.keys: dict[tuple[int, int], Buffer] = {}
        self.looks: dict[int, Tensor] = {}

    @contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        """Read queries and keys of the heads' layers in every pass."""
        self.passed = {(layer, kind): [] for layer in self.groups for kind in ("q", "k")}
        sites = [Site(layer, kind) for layer, kind in self.passed]
        with listen(model, [(site, self._see(site)) for site in sites]):
            yield
        self.passed, self.keys, self.looks = {}, {}, {}

    def _see(self, site: Site) -> Handler:
        heads, kv, _ = self.groups[site.layer]
        mine = heads if site.kind == "q" else kv

        def see(value: Tensor, place: Place) -> None:
            if site.kind == "k":  # a cache hands over all its keys, the new ones last
                value = value[:, :, value.shape[2] - self.passed[site.layer, "q"][-1].shape[2] :]
            self.passed[site.layer, site.kind].append(value.detach()[:, mine])

        return see

    def begin(self, model: PreTrainedModel, texts: list[list[int]], sampling: bool) -> None:
        """Note where each token stands."""
        self.texts, self.where, self.keys, self.looks = [[] for _ in texts], [{} for _ in texts], {}, {}
        for row, text in enumerate(texts):
            self._add(row, text)

    def _add(self, row: int, tokens: list[int]) -> None:
        for token in tokens:
            self.where[row].setdefault(token, []).append(len(self.texts[row]))
            self.texts[row].append(token)

    def accept(self, news: Mapping[int, News], read: Reading) -> None:
        """Keep the keys of what stays, and see where the newest token came from."""
        looked: dict[int, list[Tensor]] = {row: [] for row in news}
        for layer, (_, _, scale) in self.groups.items():
            # A drafter beside this one may have called the model too: the verifying pass came last.
            q, k = (torch.cat(self.passed[layer, kind][-self._passes(layer, read.width) :], 2) for kind in ("q", "k"))
            for row in news:
                columns, place = read.columns[row], read.places[row]
                buffer = self.keys.setdefault((row, layer), Buffer())
                new = k[place : place + 1, :, columns]
                buffer.append(new, new[..., :0])
                scores = (buffer.k[0] @ q[place, :, columns[-1], :, None])[..., 0].float() * scale
                looked[row].append(scores.softmax(-1))
        for row, one in news.items():
            self.looks[row] = torch.cat(looked[row]).mean(0)
            self._add(row, one.tokens)
        for values in self.passed.values():
            values.clear()

    def _passes(self, layer: int, width: int) -> int:
        """How many of the passes seen, from the last, make up the one that was verified."""
        count = 0
        for one in reversed(self.passed[layer, "q"]):
            count, width = count + 1, width - one.shape[2]
            if width <= 0:
                break
        return count

    def propose(self, rooms: Mapping[int, int]) -> dict[int, Draft]:
        """What stands behind the newest token where the heads looked."""
        return {row: self._one(row) for row in rooms}

    def _one(self, row: int) -> Draft:
        text, looks = self.texts[row], self.looks[row]
        before = len(text) - 1 - len(looks)  # tokens of a text that was begun in an earlier run
        places = [place for place in self.where[row][text[-1]] if before <= place < len(text) - 1]
        if not places:
            return Draft([], source="head_copying", why="the newest token is new")
        weights = looks[torch.tensor(places, device=looks.device) - before]
        best = int(weights.argmax())
        if float(weights[best]) < self.method.least:
            return Draft([], source="head_copying", why="the heads look elsewhere")
        start = places[best] + 1
        return Draft(text[start : start + self.method.tokens], source="head_copying")
