"""You Need Multiple Exiting: Dynamic Early Exiting for Accelerating Unified Vision Language Model. Tang et al., 2022.
arXiv:2211.11152
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from headwise.anatomy import anatomy
from headwise.skipping import DepthMethod, Depths, decodes, exiting


@dataclass(frozen=True)
class MuE(DepthMethod):
    """A token leaves where a block hardly turned its state, a text leaves the encoder where it hardly turned any.

    A block's similarity is the cosine between what went in and what came out. In a decoder each token is judged by
    itself; in an encoder, where all tokens look at each other, the mean over the tokens of a text decides for all.

    Fields:
        threshold: a decoder's token leaves above this similarity, -1 to 1; above 1 none leaves.
        encoder: the same for texts in an encoder; None is `threshold`.
        least: blocks that always run.

    Raises:
        ValueError: least below 1.
    """

    row: ClassVar[str] = "s145"
    threshold: float = 0.98
    encoder: float | None = None
    least: int = 1

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ValueError(f"least is {self.least}; at least 1 block must run.")

    @contextmanager
    def stacks(self, model: PreTrainedModel) -> Iterator[dict[str, Depths]]:
        """Inside the block both stacks exit so; gives the depths of each ("" and, where there is one, "enc")."""
        with ExitStack() as entered:
            found = {}
            for stack in sorted(set(anatomy(model).blocks) & {"", "enc"}):
                seen: dict[str, Tensor | None] = {}
                if not decodes(model, stack):
                    hook = _encoder(model, stack).register_forward_pre_hook(partial(_note, seen), with_kwargs=True)
                    entered.callback(hook.remove)
                rule = partial(self._token if decodes(model, stack) else self._text, seen)
                found[stack] = entered.enter_context(exiting(model, rule, stack))
            yield found

    @contextmanager
    def use(self, model: PreTrainedModel) -> Iterator[Depths]:
        """Inside the block the model exits early; the depths are those of the decoder, or of the only stack."""
        with self.stacks(model) as depths:
            yield depths[""]

    def _token(self, _: dict, number: int, before: Tensor, after: Tensor) -> Tensor:
        likeness = cosine_similarity(before.float(), after.float(), dim=-1)
        return (likeness > self.threshold) & (number + 1 >= self.least)

    def _text(self, seen: dict, number: int, before: Tensor, after: Tensor) -> Tensor:
        likeness = cosine_similarity(before.float(), after.float(), dim=-1)
        real = torch.ones_like(likeness) if seen.get("mask") is None else seen["mask"].to(likeness.dtype)
        mean = (likeness * real).sum(-1) / real.sum(-1)
        limit = self.threshold if self.encoder is None else self.encoder
        return ((mean > limit) & (number + 1 >= self.least))[:, None].expand_as(likeness)


def layerwise_loss(
    model: PreTrainedModel, states: tuple[Tensor, ...], labels: Tensor, norm: nn.Module | None = None
) -> Tensor:
    """The mean over all decoder layers of the loss that each would have as the last: every layer learns to be read.

    Args:
        states: `hidden_states` (`decoder_hidden_states`) of a forward pass, the embedding first, each [B, T, D].
        labels: [B, T] ids to be said at each place, -100 where none is.
        norm: the model's final norm, which it applies to the last of `states` itself; None where it has none.
    """
    head: Any = model.get_output_embeddings()
    inner = [state if norm is None else norm(state) for state in states[1:-1]]
    said = [head(state).flatten(0, 1).float() for state in [*inner, states[-1]]]
    return torch.stack([cross_entropy(logits, labels.flatten()) for logits in said]).mean()


def _encoder(model: PreTrainedModel, stack: str) -> nn.Module:
    return model.get_encoder() if stack == "enc" else model


def _note(seen: dict[str, Tensor | None], _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    seen["mask"] = kwargs.get("attention_mask")
