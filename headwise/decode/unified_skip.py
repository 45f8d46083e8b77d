"""Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy. Liu et al., 2024.
arXiv:2404.06954
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from headwise.skipping import DepthMethod, Depths, must_run, skipping, stack_blocks


@dataclass(frozen=True)
class UnifiedSkip(DepthMethod):
    """A wanted speed-up says how many blocks run; they stand evenly, first and last among them, the same for all texts.

    The choice hangs on nothing but the number of blocks, so batches stay batches, and a block that is left out keeps
    nothing in the KV cache, which shrinks as well.

    Fields:
        speedup: blocks of the model over blocks that run; at least 1.

    Raises:
        ValueError: a speed-up below 1.
    """

    row: ClassVar[str] = "s130"
    speedup: float = 1.25

    def __post_init__(self) -> None:
        if not self.speedup >= 1:
            raise ValueError(f"speedup is {self.speedup}; allowed is 1 or more.")

    def kept(self, blocks: int) -> list[int]:
        """Numbers of the blocks that run, of so many."""
        keep = min(blocks, max(2, round(blocks / self.speedup)))
        return sorted({round(i * (blocks - 1) / max(1, keep - 1)) for i in range(keep)})

    def skipped(self, model: PreTrainedModel) -> list[int]:
        """Numbers of the blocks of this model that are passed by; never one that its cache counts on."""
        blocks = list(stack_blocks(model))
        kept = {blocks[place] for place in self.kept(len(blocks))} | set(must_run(model))
        return [number for number in blocks if number not in kept]

    @contextmanager
    def use(self, model: PreTrainedModel) -> Iterator[Depths]:
        """Inside the block the model runs so: plain calls, batches, `generate` with its cache."""
        with skipping(model, self.skipped(model)) as depths:
            yield depths
