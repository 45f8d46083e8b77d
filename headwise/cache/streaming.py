"""Efficient Streaming Language Models with Attention Sinks. Xiao et al., 2023. arXiv:2309.17453"""

from dataclasses import dataclass

from headwise.kv_cache import CacheMethod
from headwise.narrow import Window
from headwise.ring import Ring
from headwise.store import Store


@dataclass(frozen=True)
class Streaming(CacheMethod):
    """The first tokens of each row and the most recent ones, in prefill and in decoding alike; all others are dropped.

    A query sees the first `sink` tokens of its row and the last `recent` ones, itself among them. Keys keep the
    positions that they had in the text. The paper renumbers them, which matters beyond the trained length.

    Fields:
        sink: tokens kept at the start, 0 or more.
        recent: most recent tokens kept, 1 or more.
    """

    sink: int = 16
    recent: int = 256

    def __post_init__(self) -> None:
        Window(self.sink, self.recent)

    def store(self, reserve: int = 0) -> Store:
        """A ring of `recent` tokens beside the sinks."""
        return Ring(self.sink, self.recent)
