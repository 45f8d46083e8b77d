"""What the attention mask of a forward pass says: which columns are padding, and whether causal order says the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.store import Turn, portions


@dataclass
class MaskReader:
    """What the mask of a forward pass says, found once for all layers."""

    mask: Tensor | None = None
    read: "tuple[Tensor | None, Tensor | None]" = (None, None)

    def of(self, mask: Tensor | None, past: int, length: int, rows: int) -> "tuple[Tensor | None, Tensor | None]":
        """(left padding of each row or None, the whole mask or None where causal order and padding say it all)."""
        if mask is None:
            return None, None
        if mask is not self.mask:
            self.mask, self.read = mask, _read_mask(mask, past, length, rows)
        return self.read

    def forget(self) -> None:
        """Hold nothing once the last layer has read it: a mask can be larger than the cache."""
        self.mask, self.read = None, (None, None)


def _read_mask(mask: Tensor, past: int, length: int, rows: int) -> "tuple[Tensor | None, Tensor | None]":
    if mask.ndim == 2:
        columns = torch.arange(past + length, device=mask.device)
        mask = mask.bool()[:, None, None, :] & (columns <= columns[past:, None])
    elif mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    mask = mask[..., : past + length]
    last = mask[:, 0, -1]
    # A row in which the last token sees nothing is padding as far as it goes.
    pads = torch.where(last.any(-1), last.int().argmax(-1), past + length)
    turn = Turn(past, pads)
    columns = torch.arange(past + length, device=mask.device)
    queries = columns[past:]

    def usual(here: slice) -> bool:
        # Rows of padding may see anything or nothing; nobody reads what comes of them.
        padding = (queries[here] < pads[:, None])[:, None, :, None]
        return bool(((mask[:, :, here] == turn.seen(queries[here], columns)) | padding).all())

    if mask.shape[1] == 1 and all(usual(here) for here in portions(length, mask.device)):
        return (pads.expand(rows) if bool(pads.any()) else None), None
    return None, mask
