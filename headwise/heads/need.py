"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads.
Xiao et al., 2024. arXiv:2410.10819

The paper defines retrieval heads as those without whose full attention the output changes, and trains gates to find
them. Here it is measured, one KV head at a time.

On SmolLM2-135M-Instruct (6 needles, 6 passkeys of two and 6 keys of four, 500 tokens each, averaged) 16 of 90 KV heads
are worth more than 0.01 nats: L18.G2 1.10, L23.G0 0.16, L8.G0 0.13, L23.G2 0.09. Below them the order is noise, and the
task counts: rank correlations between tasks are 0.1 to 0.5, so several should be averaged. What two heads do alike is
not needed of either alone, but gates see it: with few full heads caches are better planned without (docs/LOG.md).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from headwise.direct import predicts
from headwise.method import HeadMethod
from headwise.narrow import Window, kv_heads
from headwise.scan import effects
from headwise.score import Score
from headwise.shares import answers
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Need(HeadMethod):
    """Log-probability of the answer that is lost when one KV head alone sees only the first and the latest tokens.

    Fields:
        sink, recent: how many first tokens, and how many latest ones (its own included), a streaming head sees.
        whole: True reads the context once with everything in sight, and narrows the head from the question on only:
            about ten times faster. False narrows it from the first token on.
        share_prefix: False runs the naive twin, a full forward pass a KV head; only without `whole`.
        variants: KV heads narrowed side by side, as rows of one batch.
        dtype: "bfloat16" rounds differences from the unchanged run: faster, for ranking heads; only without `whole`.
    """

    sink: int = 16
    recent: int = 64
    whole: bool = True
    share_prefix: bool = True
    variants: int = 6
    dtype: str = "float32"

    evidence: ClassVar[str] = "needed"
    needs: ClassVar[str] = "passkeys"

    def score(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """One loss in nats per KV head, mean over the answer's tokens; below 0 where the answer gains.

        Raises:
            ValueError: a window of nothing, or a model that predicts no next token.
        """
        predicts(model, "heads.need")
        window, units = Window(self.sink, self.recent), kv_heads(model)
        if self.whole:
            got = answers(
                model, batch, [(), *([u] for u in units)], window, whole=True, at_once=self.variants, label="need"
            )
            lost = dict(zip(units, got.logprob[0] - got.logprob[1:], strict=True))
        else:
            found = effects(
                model,
                batch,
                units,
                window,
                share_prefix=self.share_prefix,
                prompts=2,
                variants=self.variants,
                dtype=self.dtype,
                label="need",
            )
            lost = {unit: found.of(unit) for unit in units}
        return Score.of_units(self, model, batch, lost, kind="kv")
