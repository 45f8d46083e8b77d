"""Making the Most of your Model: Methods for Finetuning and Applying Pretrained Transformers. Yoshida, 2024.
arXiv:2408.16241

Its hidden state optimisation, first in Yoshida and Gimpel, 2021, arXiv:2112.08653.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from headwise.drafting import Stats
from headwise.verifying import Decoded, DecodeMethod

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

Memory = list[tuple[Tensor, Tensor]]  # keys and values [B, H, T, d] of every layer


@dataclass(frozen=True)
class HiddenStates(DecodeMethod):
    """Remembered keys and values are moved so that the text read last would have been likelier; no weight changes.

    A text is read window by window. After each the gradient of its loss by all keys and values in the cache, its own
    among them, says where these should have been; they go a step of a fixed length there, and the next window is read
    with them. Only tokens that have been read are used, so what is predicted is never known before.

    Fields:
        rate: length of a step, as a share of the root mean square of a layer's keys (values) over the real tokens;
            the paper takes steps of Adam instead. 0 is the model alone.
        steps: for each window. window: tokens of it, and so how seldom steps are taken.

    Raises:
        ValueError: steps or a window below 1, or a rate below 0.
    """

    row: ClassVar[str] = "s067"
    rate: float = 0.0003
    steps: int = 1
    window: int = 32

    def __post_init__(self) -> None:
        if min(self.steps, self.window) < 1 or self.rate < 0:
            raise ValueError(
                f"rate is {self.rate}, steps {self.steps} and window {self.window}; allowed are a rate of 0 or more, "
                "and 1 or more of the others."
            )

    def read(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, DynamicCache]:
        """Read a text in windows.

        Args:
            ids: [B, T], padded on the left where `mask` [B, T] says so.

        Returns:
            [B, T - 1] the log-probability in nats of every token but the first when it came, 0 where a token or the one
            before is padding; and the cache of all T tokens, optimised.

        Raises:
            ValueError: a model whose cache does not hold all keys and values.
        """
        real = torch.ones_like(ids) if mask is None else mask
        known: Memory = []
        said, last = [], None
        for start in range(0, ids.shape[1], self.window):
            part = slice(start, min(start + self.window, ids.shape[1]))
            logits, known = self._window(model, ids, real, part, known)
            before = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], 1)
            said.append(before.log_softmax(-1).gather(-1, ids[:, max(1, start) : part.stop, None])[..., 0])
            last = logits[:, -1:]
        return torch.cat(said, 1) * (real[:, :-1] * real[:, 1:]), _cache(model, known)

    def _window(
        self, model: PreTrainedModel, ids: Tensor, real: Tensor, part: slice, known: Memory
    ) -> tuple[Tensor, Memory]:
        """Logits [B, W, V] of a window as it was first read, and keys and values up to its end after all steps."""
        first: Tensor | None = None
        whole: Memory = []
        places = (real.cumsum(-1) - 1).clamp_min(0)
        seen, new = real[:, : part.stop], ids[:, part]
        told = seen[:, part] * seen[:, : part.start].any(1)[:, None]  # the first window of a row has nothing to move
        wanted = torch.where((told[:, 1:] * told[:, :-1]).bool(), new[:, 1:], -100)
        learns = bool(known) and self.rate > 0 and bool((wanted >= 0).any())
        with torch.set_grad_enabled(learns):
            for _ in range(self.steps if learns else 1):
                held = [(k.requires_grad_(learns), v.requires_grad_(learns)) for k, v in known]
                cache = _cache(model, held)
                out = model(input_ids=new, attention_mask=seen, position_ids=places[:, part], past_key_values=cache)
                whole = _memory(model, cache)
                logits = out.logits.float()
                first = logits.detach() if first is None else first
                if learns:
                    loss = cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum")
                    slopes = torch.autograd.grad(loss, [one for pair in whole for one in pair])
                    moved = [self._step(one, slope, seen) for one, slope in zip(sum(whole, ()), slopes, strict=True)]
                    whole = list(zip(moved[::2], moved[1::2], strict=True))
                    known = [(k[:, :, : part.start], v[:, :, : part.start]) for k, v in whole]
        return cast(Tensor, first), whole

    def _step(self, value: Tensor, slope: Tensor, seen: Tensor) -> Tensor:
        """One layer's keys or values [B, H, T, d] a step down, row by row; padding stays where it is."""
        real = seen[:, None, :, None].to(value.dtype)
        count = real.sum((1, 2, 3), keepdim=True) * value.shape[1] * value.shape[3]
        size, steep = (((one * real).square().sum((1, 2, 3), keepdim=True) / count).sqrt() for one in (value, slope))
        return (value - self.rate * size / steep.clamp_min(1e-20) * slope * real).detach()

    def generate(
        self, model: PreTrainedModel, ids: Tensor, streamer: "BaseStreamer | None" = None, **options: Any
    ) -> Decoded:
        """Generate after ids [B, T], padded on the left, with the optimised memory of all of them but the last."""
        began, mask = time.perf_counter(), options.get("attention_mask")
        if ids.shape[1] > 1:
            known = None if mask is None else mask[:, :-1]
            options["past_key_values"] = self.read(model, ids[:, :-1], known)[1]
        out = model.generate(ids, streamer=streamer, **options)
        stats = Stats(rows=len(ids), tokens=len(ids) * (out.shape[1] - ids.shape[1]))
        stats.seconds = time.perf_counter() - began
        return Decoded(out, stats)


def _cache(model: PreTrainedModel, known: Memory) -> DynamicCache:
    """A cache of transformers' own that holds these keys and values."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for number, (k, v) in enumerate(known):
        cache.update(k, v, number)
    return cache


def _memory(model: PreTrainedModel, cache: DynamicCache) -> Memory:
    layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if any(k is None or k.ndim != 4 for k, _ in layers) or any(layer.is_sliding for layer in cache.layers):
        raise ValueError(
            f"The cache of this {model.config.model_type} does not hold the keys and values of every token in every "
            "layer, so they cannot be optimised; allowed are models with full attention throughout."
        )
    return cast("Memory", layers)
