"""Making the Most of your Model: Methods for Finetuning and Applying Pretrained Transformers. Yoshida, 2024.
arXiv:2408.16241

Its conditional beam search, first in Yoshida, Goyal and Gimpel, 2023, arXiv:2311.08817.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from headwise.drafting import Stats
from headwise.grams import repeated
from headwise.verifying import Decoded, DecodeMethod

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

NEVER = -1e6  # in place of the logarithm of 0, which sums cannot bear


@dataclass(frozen=True)
class ConditionalBeams(DecodeMethod):
    """Beam search for the likeliest text among those that are not degenerate, that is, neither empty nor repetitive.

    A beam scores log p(text so far) + log p(it will not be degenerate | text so far). The second is a classifier's,
    learned from texts of the model; it is known where a text has ended, or repeats more already than a whole one may.

    Fields:
        beams: of the search. candidates: tokens of each beam that the classifier is asked about.
        most: tokens of a text at most. least: fewer, its end not counted, are as good as none.
        repeats: share of runs of 4 tokens that may have stood in the text before.

    Raises:
        ValueError: sizes below 1, or a share that is none.
    """

    row: ClassVar[str] = "s067"
    beams: int = 4
    candidates: int = 16
    most: int = 48
    least: int = 1
    repeats: float = 0.2

    def __post_init__(self) -> None:
        if min(self.beams, self.candidates, self.most, self.least) < 1 or not 0 <= self.repeats < 1:
            raise ValueError(
                f"beams is {self.beams}, candidates {self.candidates}, most {self.most}, least {self.least} and "
                f"repeats {self.repeats}; allowed are 1 or more, and for repeats a share below 1."
            )

    def degenerate(self, text: list[int]) -> bool:
        """Whether a text, its end left out, is too short or repeats itself."""
        return len(text) < self.least or repeated(text) > self.repeats

    def doomed(self, text: list[int]) -> bool:
        """Whether a beginning will be degenerate however it goes on: it has repeats for a text as long as can be."""
        return repeated(text) * (len(text) - 3) > self.repeats * (self.most - 3)

    def learn(self, texts: Sequence[list[int]], steps: int = 200) -> "Classifier":
        """A classifier from whole texts of the model, their ends left out: each of their beginnings is an example.

        Raises:
            ValueError: no text, or all of one kind.
        """
        kinds = {self.degenerate(text) for text in texts}
        if len(kinds) < 2:
            raise ValueError(
                f"{len(texts)} texts, all of one kind, teach no classifier; both degenerate and other texts are needed."
            )
        one = Classifier(self)
        good = [0.0 if self.degenerate(text) else 1.0 for text in texts for _ in range(len(text) + 1)]
        x = torch.tensor([one.features(text[:end]) for text in texts for end in range(len(text) + 1)])
        y = torch.tensor(good)
        weights = torch.zeros(x.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = binary_cross_entropy_with_logits(x @ weights, y) + 1e-3 * weights.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        one.weights = weights.detach().tolist()
        return one

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Generate after ids [B, T]; the option `judge` holds what `learn` gave."""
        judge = options.pop("judge", None)
        if not isinstance(judge, Classifier):
            raise ValueError(f"The option judge is {judge!r}; allowed is the classifier that learn(texts) gives.")
        began = time.perf_counter()
        ends = options.get("eos_token_id", model.generation_config.eos_token_id)
        ends = set(ends) if isinstance(ends, list | tuple) else {ends}
        rules = [Conditioned(self, judge, ids.shape[1], ends), *options.pop("logits_processor", [])]
        how = {"num_beams": self.beams, "max_new_tokens": self.most, "do_sample": False, **options}
        out = model.generate(ids, streamer=streamer, logits_processor=LogitsProcessorList(rules), **how)
        out = out if isinstance(out, Tensor) else out.sequences
        stats = Stats(rows=len(ids), tokens=len(ids) * (out.shape[1] - ids.shape[1]))
        stats.seconds = time.perf_counter() - began
        return Decoded(out, stats)


class Classifier:
    """Logistic regression on how much of a beginning repeats itself, in runs of 1 to 4 tokens, and how long it is."""

    def __init__(self, method: ConditionalBeams) -> None:
        self.method = method
        self.weights: list[float] = []

    def features(self, text: list[int]) -> list[float]:
        """Eight numbers of the beginning of a text."""
        long, shares = len(text) / self.method.most, [repeated(text, size) for size in (1, 2, 3, 4)]
        over = max(0.0, shares[3] - self.method.repeats)
        return [1.0, long, *shares, long * shares[3], long * over]

    def __call__(self, text: list[int], over: bool) -> float:
        """Log-probability that a text will not be degenerate; where it is `over` that is known, 0 or `NEVER`."""
        if over or self.method.doomed(text):
            return 0.0 if over and not self.method.degenerate(text) else NEVER
        score = sum(a * b for a, b in zip(self.weights, self.features(text), strict=True))
        return -math.log1p(math.exp(-score)) if score > -30 else score


class Conditioned(LogitsProcessor):
    """Adds what the classifier says of each candidate; summed over a beam it is what it says of the whole."""

    def __init__(self, method: ConditionalBeams, judge: Classifier, prompt: int, ends: "set[int | None]") -> None:
        self.method, self.judge, self.prompt, self.ends = method, judge, prompt, ends

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities [R, V] of the next token -> those of the candidates, conditioned; others never."""
        best = scores.topk(min(self.method.candidates, scores.shape[1]))
        texts = input_ids[:, self.prompt :].tolist()
        added = [
            [self._after(text, token) - self.judge(text, False) for token in tokens]
            for text, tokens in zip(texts, best.indices.tolist(), strict=True)
        ]
        told = best.values + torch.tensor(added, device=scores.device, dtype=scores.dtype)
        return torch.full_like(scores, -torch.inf).scatter(1, best.indices, told)

    def _after(self, text: list[int], token: int) -> float:
        if token in self.ends:
            return self.judge(text, True)
        return self.judge([*text, token], len(text) + 1 >= self.method.most)
