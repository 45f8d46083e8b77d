"""Why a model says A instead of B: the smallest graph of tokens, heads and MLPs that alone says so nearly as much.

A graph needs a contrast, the same prompt with the reason taken out. It is yours where you give one. Else A and B are
exchanged wherever the prompt names them; and where it names neither, the tokens on which the answer hangs most are
replaced by random ones, as few as take most of the difference away.
"""

import hashlib
import random
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.data.layout import encode, ordinary_ids, pad_id, shared_start, start_ids
from headwise.graph import Graph
from headwise.method import Method
from headwise.models import context_length, name_of
from headwise.paths import Paths, prepare
from headwise.score import provenance
from headwise.slopes import attributed, followed, mean_slopes
from headwise.task import Batch, Metric, answer_logits, logit_diff, sequence_logprob
from headwise.worth import Appraisal, Worth, gap, outcomes, share, smallest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reason:
    """The answer to one "why".

    Attributes:
        tokens: the prompt as the model reads it; contrast: what it was compared with, one text a comparison.
        how: how the contrast was made: "given", "exchanged" or "random".
        metric: what was measured: "logit difference", or "log-probability ratio" where an answer is several tokens.
        graph: the edges; tokens of the prompt are the places embed@0, embed@1 and so on.
        batch: the prompts that were run, as methods of the circuits room take them.
        worth: what the graph explains, on the prompt that it was found on: in-sample, so it flatters the graph.
        unseen: prompts that had no say in choosing the graph, in words, and the share that it carries alone on them;
            None where none could be made.
    """

    prompt: str
    answer: str
    instead: str
    tokens: list[str]
    contrast: list[str]
    how: str
    metric: str
    graph: Graph
    worth: Worth
    batch: Batch
    about: dict[str, Any] = field(default_factory=dict)
    unseen: tuple[str, float] | None = None

    def tested(self) -> str:
        """Where the figures come from, in one sentence."""
        if self.unseen is None:
            return "All of this was measured on the prompt that chose the graph, so it flatters it."
        prompts, kept = self.unseen
        return f"On {prompts}, which had no say in choosing it, the graph does {kept:.0%} alone."

    @property
    def name(self) -> str:
        """A name for its graph in an atlas: the two answers, and a few digits for the prompt and its contrast."""
        words = [re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:16] for text in (self.answer, self.instead)]
        asked = "\n".join([self.prompt, self.answer, self.instead, *self.contrast])
        return "-".join(["why", *filter(None, words), hashlib.sha256(asked.encode()).hexdigest()[:6]])

    def kept(self) -> Graph:
        """The graph with the question and all that was measured in its provenance, as it is saved."""
        said = {key: value for key, value in self.data().items() if key not in ("nodes", "edges", "about")}
        said |= {"low": self.worth.low, "high": self.worth.high, "reasons": self.worth.reasons}
        return replace(self.graph, about={**self.about, "why": said})

    def named(self, place: str) -> str:
        """A place in words that a reader of the prompt knows: embed@3 with its token."""
        if not place.startswith("embed@"):
            return place
        column = int(place.removeprefix("embed@"))
        token = self.tokens[column] if column < len(self.tokens) else "(answer)"
        return f"{token.strip() or repr(token)}@{column}"

    def data(self) -> dict[str, Any]:
        """The contract of `headwise why --json`."""
        return {
            **{k: getattr(self, k) for k in ("prompt", "answer", "instead", "tokens", "contrast", "how", "metric")},
            **told(self.worth, self.graph),
            "says": f"{self.worth.sentence()} {self.tested()}",
            "unseen": self.unseen and {"prompts": self.unseen[0], "faithfulness": self.unseen[1]},
            "about": self.about,
        }


@dataclass(frozen=True)
class Why(Method):
    """How a reason is looked for.

    Fields:
        target: share of the difference that the graph must carry alone.
        steps: gradients by which edges are ranked (EAP-IG), and steps in which those that are kept are weighed
            (conductance), more where the metric turns.
        contrasts: random contrasts that are compared, where neither a contrast nor a name to exchange is at hand.
        draws: random circuits of each kind that the graph must beat, 0 for no test.
    """

    target: float = 0.8
    steps: int = 5
    contrasts: int = 3
    draws: int = 20
    seed: int = 0

    def ask(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        prompt: str,
        answer: str,
        instead: str,
        contrast: str | None = None,
    ) -> Reason:
        """Find the graph and measure it.

        Raises:
            ValueError: an empty prompt or answer, an answer equal to its foil, a prompt that is too long, a contrast of
                another length, a model that prefers the foil, or one whose edges are not known.
        """
        question = _Question.of(model, tokenizer, prompt, answer, instead)
        if contrast is not None:
            others, how = [question.given(contrast)], "given"
        else:
            others, how = question.exchanged(), "exchanged"
            if not others:
                others, how = self._replaced(model, question), "random"
        batch, measure = question.batch(others), question.metric
        metric_name = "logit difference" if question.single else "log-probability ratio"
        parts = prepare(model, batch, measure, len(batch), tokens=True)
        appraisal = Appraisal(target=self.target, draws=self.draws, halves=0, nodes=12, largest=True, seed=self.seed)
        own, rest = gap(parts)
        if own.mean() <= 0:
            raise ValueError(
                f"After this prompt the model prefers {instead!r} to {answer!r} ({metric_name} {own.mean():.3g}); ask "
                "the other way round."
            )
        if how == "random" and rest.mean() > 0.5 * own.mean():
            raise ValueError(
                f"With random tokens for all that matters in the prompt the {metric_name} is still {rest.mean():.3g} "
                f"of {own.mean():.3g}: the model prefers {answer!r} anyway. Give a contrast, or other answers."
            )
        graph = weighed(self, parts, batch, explaining(self, parts, batch, self.target, self.steps)[0], self.steps)
        about = {**provenance(self, model, batch), "model": name_of(model)}
        return Reason(
            prompt=prompt,
            answer=answer,
            instead=instead,
            tokens=[tokenizer.decode([i]) for i in question.ids],
            contrast=[question.said(ids) for ids in others],
            how=how,
            metric=metric_name,
            graph=replace(graph, name="why", about=about),
            worth=appraisal.of(parts, graph, about),
            batch=batch,
            about=about,
            unseen=self._unseen(model, question, others, how, graph),
        )

    def _unseen(
        self, model: "PreTrainedModel", question: "_Question", others: list[list[int]], how: str, graph: Graph
    ) -> tuple[str, float] | None:
        """What the graph carries on the exchanged prompt, asked the other way round, or with other random tokens."""
        if how == "exchanged":
            words = "the exchanged prompt, asked the other way round"
            batch = replace(question, ids=others[0], ways=question.ways[::-1]).batch([question.ids])
        elif how == "random":
            words, draw = "other random tokens in the same places", random.Random(f"why unseen {self.seed}")
            pool = ordinary_ids(question.tokenizer)
            where = {i for row in others for i, token in enumerate(row) if token != question.ids[i]}
            fresh = [[draw.choice(pool) if i in where else t for i, t in enumerate(question.ids)] for _ in others]
            batch = question.batch(fresh)
        else:
            return None
        parts = prepare(model, batch, question.metric, len(batch), tokens=True)
        try:
            clean, corrupt = gap(parts)
        except ValueError:
            # The model does not say so there, and a graph cannot carry what there is not.
            return None
        return words, float(share(outcomes(parts, [graph]), clean, corrupt)[0])

    def _replaced(self, model: "PreTrainedModel", question: "_Question") -> list[list[int]]:
        """Contrasts in which the columns that matter most are random tokens, as few as take most of it away."""
        draw = random.Random(f"why {self.seed}")
        pool = ordinary_ids(question.tokenizer)
        columns = list(range(len(start_ids(question.tokenizer)), len(question.ids)))

        def changed(where: list[int]) -> list[int]:
            return [draw.choice(pool) if i in where else token for i, token in enumerate(question.ids)]

        def measured(rows: list[list[int]]) -> Tensor:
            values = []
            for row in rows:
                batch = question.batch([row]).flipped().to(model.device)
                with torch.no_grad():
                    values.append(question.metric(answer_logits(model, batch), batch).mean())
            return torch.stack(values)

        own = float(measured([question.ids])[0])
        worth = {i: own - float(measured([changed([i]) for _ in range(2)]).mean()) for i in columns}
        chosen: list[int] = []
        rows: list[list[int]] = []
        for column in sorted(columns, key=worth.__getitem__, reverse=True):
            chosen.append(column)
            rows = [changed(chosen) for _ in range(self.contrasts)]
            if float(measured(rows).mean()) < 0.25 * own:
                break
        return rows


def explaining(method: Method, parts: list[Paths], batch: Batch, target: float, steps: int) -> tuple[Graph, float]:
    """The smallest graph of edges ranked by EAP-IG that does `target` of the behaviour alone, and the share it does."""
    first = parts[0].edges.parts[0].number
    ranks = [mean_slopes(one, ("embed", 0), one.own.resid[first], one.other.resid[first], steps) for one in parts]
    return smallest(parts, attributed(method, parts, batch, ranks), target, spare=8)


def weighed(method: Method, parts: list[Paths], batch: Batch, graph: Graph, steps: int) -> Graph:
    """The graph with the weights that its edges have on these prompts: what each passes on (conductance).

    EAP-IG ranks well, but a weight of it can be many times the whole difference where attention turns sharply.
    """
    return attributed(method, parts, batch, [followed(one, steps) for one in parts]) & graph


def told(worth: Worth, graph: Graph) -> dict[str, Any]:
    """What `headwise why --json` says of any graph: its worth, its nodes, and its edges, the largest first."""
    rows = graph.table.sort(graph.table["weight"].abs(), descending=True).iter_rows(named=True)
    kept = ("clean", "corrupt", "faithfulness", "left", "explains", "p", "losses", "of")
    return {
        **{key: getattr(worth, key) for key in kept},
        "nodes": graph.nodes,
        "edges": [{key: row[key] for key in ("source", "target", "weight")} for row in rows],
    }


@dataclass(frozen=True)
class _Question:
    """A prompt with two ways to go on, as token ids."""

    tokenizer: Any
    prompt: str
    answer: str
    instead: str
    ids: list[int]
    ways: tuple[list[int], list[int]]

    @classmethod
    def of(cls, model: "PreTrainedModel", tokenizer: Any, prompt: str, answer: str, instead: str) -> "_Question":
        if not hasattr(tokenizer, "encode"):
            raise ValueError(f"{name_of(model)} has no tokenizer, so a prompt cannot be read for it.")
        for text, what in ((prompt, "prompt"), (answer, "answer"), (instead, "answer that it is compared with")):
            if not text.strip():
                raise ValueError(
                    f"The {what} is empty; a question has a prompt, an answer and what to compare it with."
                )
        prompt, answer, instead = prompt.rstrip(), answer.strip(), instead.strip()
        if answer == instead:
            raise ValueError(f"The answer and what it is compared with are both {answer!r}; they must differ.")
        ids = start_ids(tokenizer) + encode(tokenizer, prompt)
        ways = [_continued(tokenizer, prompt, text) for text in (answer, instead)]
        shared = min(shared_start(ways), len(ways[0]) - 1, len(ways[1]) - 1)
        ids, ways = ids + ways[0][:shared], [way[shared:] for way in ways]
        room, length = context_length(model), len(ids) + max(map(len, ways)) - 1
        if room is not None and length > room:
            raise ValueError(f"The prompt and its answer are {length} tokens; this model reads at most {room}.")
        return cls(tokenizer, prompt, answer, instead, ids, (ways[0], ways[1]))

    @property
    def single(self) -> bool:
        """Whether both answers are one token, so that their logits can be compared."""
        return all(len(way) == 1 for way in self.ways)

    @property
    def metric(self) -> Metric:
        """Answer against foil: their logits, or, of several tokens, twice the signed log-probability of each row."""
        return logit_diff if self.single else lambda logits, batch: 2 * sequence_logprob(logits, batch)

    def given(self, text: str) -> list[int]:
        """Ids of the user's own contrast. Raises ValueError when it has another number of tokens."""
        stem = start_ids(self.tokenizer) + encode(self.tokenizer, text.rstrip())
        shared = len(self.ids) - len(start_ids(self.tokenizer) + encode(self.tokenizer, self.prompt))
        ids = stem + self.ids[len(self.ids) - shared :]
        if len(ids) != len(self.ids):
            raise ValueError(
                f"The contrast is {len(ids)} tokens and the prompt {len(self.ids)}; they must be "
                "equally long, token by token."
            )
        if ids == self.ids:
            raise ValueError("The contrast is the prompt itself; change what the answer should depend on.")
        return ids

    def said(self, ids: list[int]) -> str:
        """A contrast in words, as `given` takes it: without the start token and what both answers begin with."""
        start = len(start_ids(self.tokenizer))
        return self.tokenizer.decode(ids[start : start + len(encode(self.tokenizer, self.prompt))])

    def exchanged(self) -> list[list[int]]:
        """The prompt with answer and foil exchanged, where it names them; nothing where that changes its length."""
        names = {self.answer: self.instead, self.instead: self.answer}
        pattern = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(names, key=len, reverse=True))
        text = re.sub(pattern, lambda match: names[match[0]], self.prompt)
        if text == self.prompt:
            return []
        try:
            return [self.given(text)]
        except ValueError:
            return []

    def batch(self, others: list[list[int]]) -> Batch:
        """The prompt against each contrast. Answers of several tokens have a row each, the foil's counted against."""
        if self.single:
            rows, corrupt = [self.ids] * len(others), others
            at = torch.full((len(rows), 1), len(self.ids) - 1)
            answer, foil = (torch.tensor([way] * len(rows)) for way in self.ways)
            weight = None
        else:
            width = max(map(len, self.ways))
            # A short way is filled behind its end, where nothing that is read can see it.
            filled = [way + [pad_id(self.tokenizer)] * (width - len(way)) for way in self.ways]
            rows = [self.ids + way[:-1] for _ in others for way in filled]
            corrupt = [ids + way[:-1] for ids in others for way in filled]
            at = (torch.arange(width) + len(self.ids) - 1).expand(len(rows), -1).clone()
            answer, foil = torch.tensor([way for _ in others for way in filled]), None
            signed = zip(self.ways, (1, -1), strict=True)
            signs = [[sign * (i < len(way)) for i in range(width)] for way, sign in signed]
            weight = torch.tensor([row for _ in others for row in signs], dtype=torch.float32)
        text = f"{self.prompt} [{self.answer}, not {self.instead}]"
        return Batch(
            inputs={"input_ids": torch.tensor(rows)},
            corrupt={"input_ids": torch.tensor(corrupt)},
            at=at,
            answer=answer,
            foil=foil,
            weight=weight,
            texts=[text] * len(rows),
            about={"task": "why", "prompt": self.prompt, "answer": self.answer, "instead": self.instead},
        )


def _continued(tokenizer: Any, prompt: str, text: str) -> list[int]:
    """Ids by which a text goes on after the prompt, a blank between them unless it begins with a sign.

    Raises:
        ValueError: the tokenizer melts the two into other tokens, or does not know the text.
    """
    blank = " " if re.match(r"[\w\"'(]", text) else ""
    before, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + blank + text)
    way = whole[len(before) :]
    if whole[: len(before)] != before or not way or tokenizer.unk_token_id in way:
        raise ValueError(f"This tokenizer cannot go on with {text!r} after {prompt[-20:]!r}; try it with other words.")
    return way
