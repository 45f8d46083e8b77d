"""How a small model is trained: how many steps, at which rate, by which optimiser, and when it is measured."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from headwise.schedule import When

OPTIMISERS = ("adam", "adamw", "sgd")
DECAYS = ("none", "cosine", "linear")


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Fields:
        steps: updates; `batch` prompts in each, always fresh ones.
        lr: learning rate after `warmup` steps; it then decays to 0 by "cosine" or "linear", or not ("none").
        optimiser: "adam", "adamw" or "sgd"; `weight_decay`, `momentum` (of sgd), `betas` (of adam) as torch has them.
        clip: largest norm of the gradient, 0 for none.
        measure_every: steps from one measurement to the next, on `rows` prompts of every split.
        checkpoint_every: steps from one state in the folder to the next.
        until: training ends at the first measurement at which this is on.
        threads: of torch; small models are fastest with one, and sums then have one order.

    Raises:
        ValueError: an unknown optimiser or decay, or a number that is too small.
    """

    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    optimiser: str = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    decay: str = "none"
    clip: float = 0.0
    measure_every: int = 50
    rows: int = 256
    checkpoint_every: int = 500
    until: When | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("optimiser", OPTIMISERS), ("decay", DECAYS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown to training: {', '.join(allowed)}.")
        for name in ("steps", "batch", "measure_every", "rows", "checkpoint_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a training is {getattr(self, name)}; it must be 1 or more.")

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.decay == "cosine":
            return self.lr * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
        return self.lr * (1 - done) if self.decay == "linear" else self.lr

    def make(self, model: PreTrainedModel) -> Optimizer:
        """The optimiser over everything that is to be trained."""
        chosen = [value for value in model.parameters() if value.requires_grad]
        more = {"lr": self.rate(0), "weight_decay": self.weight_decay, "fused": True}
        if self.optimiser == "sgd":
            return torch.optim.SGD(chosen, momentum=self.momentum, **more)
        made = torch.optim.AdamW if self.optimiser == "adamw" else torch.optim.Adam
        return made(chosen, betas=self.betas, **more)
