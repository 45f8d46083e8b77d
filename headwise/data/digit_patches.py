"""Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More. Wang et al., 2025. arXiv:2502.03738

Row s097 of the mission.
"""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from headwise.data.digits_images import part_of_digits
from headwise.lesson import Lesson, Shape
from headwise.task import Batch


@dataclass(frozen=True)
class DigitPatches(Lesson):
    """Handwritten digits of 8 x 8 pixels, cut into patches: which digit is it?

    A patch is a position, row by row; one more position, which is empty, holds the answer. 1,297 images are taught, the
    split "test" has 500 others.

    Fields:
        patch: pixels in each direction: 1, 2, 4 or 8.
        moved: pixels by which an image that is taught is moved at most, in each direction; what is uncovered is empty.
    """

    row: ClassVar[str] = "s097"
    tests: ClassVar[tuple[str, ...]] = ("test",)

    patch: int = 2
    moved: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch not in (1, 2, 4, 8):
            raise ValueError(f"Patches of {self.patch} pixels do not tile an image of 8 x 8; allowed are 1, 2, 4, 8.")

        if not 0 <= self.moved < 8:
            raise ValueError(f"Images of 8 x 8 cannot be moved by {self.moved} pixels; allowed are 0 to 7.")

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (8 // self.patch) ** 2

    @property
    def shape(self) -> Shape:
        """Vectors of the pixels of a patch, ten classes."""
        return Shape(self.tokens + 1, 10, input_size=self.patch**2)

    def draw(self, n: int, draw: torch.Generator) -> Batch:
        """Different images as far as there are enough, then any.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        images, digits, _ = part_of_digits(self.split)
        size = len(images)
        rows = torch.randperm(size, generator=draw)[:n] if n <= size else torch.randint(size, (n,), generator=draw)
        at = torch.full((n, 1), self.tokens)
        shown = images[rows]
        if self.moved and self.split == "train":
            shown = _moved(shown, self.moved, draw)
        return Batch({"inputs_embeds": self.cut(shown)}, at=at, answer=digits[rows][:, None])

    def cut(self, images: Tensor) -> Tensor:
        """Images [n, 8, 8] -> patches and an empty position [n, tokens + 1, patch ** 2]."""
        side, p = 8 // self.patch, self.patch
        patches = images.view(-1, side, p, side, p).transpose(2, 3).reshape(-1, self.tokens, p * p)
        return torch.cat([patches, torch.zeros_like(patches[:, :1])], 1)

    def lines(self) -> dict[str, float]:
        """Cross-entropy in nats of guessing among ten digits."""
        return {"chance": log(10), "perfect": 0.0}

    def config(self, **options: object) -> dict[str, object]:
        """A small vision transformer: every position sees every other, positions are learned."""
        shape = {"causal": False, "pos": "learned", "heads": 4, "width": 32, "mlp": 64}
        return super().config(**(shape | options))


def _moved(images: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """Each image [n, 8, 8] moved by up to so many pixels; -1 is empty."""
    wide = pad(images, (most,) * 4, value=-1.0)
    down, right = torch.randint(2 * most + 1, (2, len(images), 1), generator=draw) + torch.arange(8)
    return wide[torch.arange(len(images))[:, None, None], down[:, :, None], right[:, None]]
