"""RazorAttention: Efficient KV Cache Compression Through Retrieval Heads. Tang et al., 2024. arXiv:2407.15891

Row s124 of the mission. The paper reads random tokens said four times; `data.repeated` makes them with repeats=4.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from headwise.pattern import PatternMethod, after_same, mean_over_queries, to_kv_heads
from headwise.score import Score
from headwise.task import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RazorInduction(PatternMethod):
    """Attention to the token one to the right of each earlier copy, averaged over all queries that have one."""

    row: ClassVar[str] = "s124"

    def read(self, pattern: Tensor, batch: Batch) -> Tensor:
        """Pattern [b, H, T, T] -> [b, H] in 0 to 1; NaN for a prompt in which no token is repeated."""
        cells = after_same(batch)
        return mean_over_queries((pattern * cells[:, None]).sum(-1), cells.any(-1))

    def kv(self, model: "PreTrainedModel", batch: Batch) -> Score:
        """The same for KV heads: the maximum over the query heads of each group."""
        return to_kv_heads(self.score(model, batch), model)
