"""On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion. Fan et al., 2024. arXiv:2406.15480"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from headwise.drafting import Stats
from headwise.verifying import Decoded, DecodeMethod

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class LogitFusion(DecodeMethod):
    """A large model speaks as if tuned: small tuned models say in which direction, and at each token how far.

    The direction is the difference of logits between a tuned small model and the same one untuned. Its weight is solved
    for: the fused distribution stands as far from the large model's own (Kullback-Leibler) as the tuned small model's
    stands from the untuned one's. That distance grows with the weight, so there is one solution, found by bisection.
    Of several experts each counts as much as its own distance at this token; the paper solves for them together.

    Fields:
        most: largest weight; 0 is the large model alone.
        fixed: a constant weight instead (proxy tuning is 1); None solves.

    Raises:
        ValueError: a weight below 0.
    """

    row: ClassVar[str] = "s073"
    most: float = 4.0
    fixed: float | None = None

    def __post_init__(self) -> None:
        if self.most < 0 or (self.fixed is not None and self.fixed < 0):
            raise ValueError(f"most is {self.most} and fixed {self.fixed}; allowed are weights of 0 or more.")

    def weight(self, large: Tensor, direction: Tensor, distance: Tensor) -> Tensor:
        """[B] the weight at which softmax(large + weight * direction) is `distance` [B] nats from softmax(large).

        `large` and `direction` are [B, V]. At most `most`, where the distance is not reached.
        """
        large, direction = large.double(), direction.double()
        low, high = torch.zeros_like(distance, dtype=torch.double), torch.full_like(distance, self.most).double()
        for _ in range(50):
            middle = (low + high) / 2
            near = divergence(large + middle[:, None] * direction, large) < distance
            low, high = torch.where(near, middle, low), torch.where(near, high, middle)
        return (low + high) / 2

    def fuse(self, large: Tensor, tuned: list[Tensor], small: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, V] of the large model, each tuned small one and the untuned one -> fused logits, weight [B]."""
        distances = torch.stack([divergence(one, small) for one in tuned])
        shares = distances / distances.sum(0).clamp_min(1e-12)
        direction = sum(share[:, None] * (one - small) for share, one in zip(shares, tuned, strict=True))
        if self.fixed is not None:
            weight = torch.full_like(distances[0], self.fixed)
        else:
            weight = self.weight(large, direction, (shares * distances).sum(0))
        return (large + weight[:, None] * direction).to(large.dtype), weight

    def processor(
        self, small: PreTrainedModel, *tuned: PreTrainedModel, attention_mask: Tensor | None = None
    ) -> "Fusing":
        """The rule for `model.generate(logits_processor=...)` of a large model with the same vocabulary.

        Args:
            small: the small model untuned; tuned: it again, tuned, once for each task.
            attention_mask: [B, T] of the prompt where it is padded.

        Raises:
            ValueError: no tuned model, or vocabularies of other sizes.
        """
        return Fusing(self, small, list(tuned), attention_mask)

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Generate after ids [B, T] with the large model; the option `experts` holds (small, tuned, ...)."""
        experts = options.pop("experts", ())
        if len(experts) < 2:
            raise ValueError(f"{len(experts)} small models were given; an untuned one and a tuned one are needed.")
        rule = self.processor(*experts, attention_mask=options.get("attention_mask"))
        rules = LogitsProcessorList([rule, *options.pop("logits_processor", [])])
        out = model.generate(ids, streamer=streamer, logits_processor=rules, **options)
        return Decoded(out, Stats(rows=len(ids), tokens=len(ids) * (out.shape[1] - ids.shape[1])))


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats between the distributions of two rows of logits: [B, V], [B, V] -> [B]."""
    one, other = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return (one.exp() * (one - other)).sum(-1)


@dataclass
class Fusing(LogitsProcessor):
    """Runs the small models beside the large one, each with a KV cache of its own; `weights` keeps what was solved."""

    method: LogitFusion
    small: PreTrainedModel
    tuned: list[PreTrainedModel]
    mask: Tensor | None = None
    weights: list[Tensor] = field(default_factory=list)
    read: Tensor | None = None
    caches: list[Cache | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        sizes = [model.config.get_text_config().vocab_size for model in (self.small, *self.tuned)]
        if not self.tuned or len(set(sizes)) > 1:
            raise ValueError(f"Small models with vocabularies of {sizes} cannot be fused; they must be the same.")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the large model -> fused scores [B, V]."""
        models = [self.small, *self.tuned]
        size = self.small.config.get_text_config().vocab_size
        if scores.shape[-1] != size:
            raise ValueError(f"The large model says {scores.shape[-1]} logits, the small ones {size}; they must agree.")
        known = 0 if self.read is None else self.read.shape[1]
        # Beams and new texts change the past; then it is read again.
        if not known or known >= input_ids.shape[1] or not torch.equal(input_ids[:, :known], self.read):
            known, self.caches = 0, [None] * len(models)
        mask = torch.ones_like(input_ids)
        if self.mask is not None:
            mask[:, : self.mask.shape[1]] = self.mask.repeat_interleave(len(input_ids) // len(self.mask), 0)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, known:]
        said = []
        with torch.no_grad():
            for place, model in enumerate(models):
                out = model(
                    input_ids=input_ids[:, known:],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=self.caches[place],
                    use_cache=True,
                )
                self.caches[place] = out.past_key_values
                said.append(out.logits[:, -1].float())
        self.read = input_ids
        fused, weight = self.method.fuse(scores.float(), said[1:], said[0])
        self.weights.append(weight)
        return fused.to(scores.dtype)
