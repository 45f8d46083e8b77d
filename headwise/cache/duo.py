"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads. Xiao et al., 2024.
arXiv:2410.10819
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.kv_cache import CacheMethod, KVCache, kv_units
from headwise.narrow import Window
from headwise.ring import Ring
from headwise.store import Store


@dataclass(frozen=True)
class Duo(CacheMethod):
    """Retrieval heads keep everything, streaming heads only sinks and recent tokens, each kind in buffers of its own.

    Which heads are which comes from the caller: `heads.duo_gate` finds them as the paper does, and
    a plan may take them from any score. As a treatment in a plan it is what a streaming head gets.

    Fields:
        sink: tokens a streaming head keeps at the start; the paper deploys 64.
        recent: most recent tokens that it keeps; the paper deploys 256.
        whole: a prompt that is read in one pass sees itself whole, as in the paper's one-shot prefill; False streams in
            prompts too, as in its chunked prefill, which costs less time and asks more of the heads.
    """

    row: ClassVar[str] = "s104"
    sink: int = 64
    recent: int = 256
    whole: bool = False

    def __post_init__(self) -> None:
        Window(self.sink, self.recent)

    def store(self, reserve: int = 0) -> Store:
        """What a streaming head keeps."""
        return Ring(self.sink, self.recent, whole=self.whole)

    def split(self, model: PreTrainedModel, full: list[str], reserve: int = 0) -> KVCache:
        """A cache in which the KV heads `full` ("L5.G0") keep everything and all others stream."""
        return self.build(model, [unit for unit in kv_units(model) if unit not in set(full)], reserve)
