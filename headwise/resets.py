"""What else may happen in training on a schedule: a parameter drawn anew, another lesson taught."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headwise.lesson import Lesson
from headwise.schedule import When, always


@dataclass(frozen=True)
class Reset:
    """A parameter drawn anew before an update, such as embeddings that are to be forgotten.

    Attributes:
        name: the start of the parameter's name: "embed" means embed.weight (and embed.bias).
        when: the steps at which it happens, such as `every(25) & steps(0, 3000)`.
        std: of the fresh values, around 0; None for mean and standard deviation that the parameter had at the start.
        moments: whether the optimiser forgets what it gathered on this parameter, and only on this.
        rows: only these of its first axis, such as the tokens (100, 200), the second not with them; None for all.
    """

    name: str
    when: When = always
    std: float | None = None
    moments: bool = True
    rows: tuple[int, int] | None = None

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are meant. Raises ValueError where there are none."""
        every = dict(model.named_parameters())
        found = {k: v for k, v in every.items() if k == self.name or k.startswith(self.name + ".")}
        if not found:
            raise ValueError(
                f"{self.name!r} starts no parameter of this model; it has {', '.join(list(every)[:6])} ..."
            )
        return found

    def spreads(self, model: nn.Module) -> dict[str, tuple[float, float]]:
        """{parameter: (mean, standard deviation)} of what is there now."""
        found = {name: value.detach() for name, value in self.chosen(model).items()}
        return {name: (float(v.mean()), float(v.std()) if v.numel() > 1 else 0.0) for name, v in found.items()}

    def apply(
        self, model: nn.Module, optimiser: Optimizer, spreads: dict[str, tuple[float, float]], draw: torch.Generator
    ) -> None:
        """Draw anew, and clear the moments."""
        for name, value in self.chosen(model).items():
            mean, std = spreads[name] if self.std is None else (0.0, self.std)
            part = slice(*(self.rows or (0, None)))
            with torch.no_grad():
                fresh = torch.randn(value[part].shape, generator=draw)
                value[part] = fresh.to(value.device) * std + mean
            if self.moments:
                for moment in optimiser.state.get(value, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == value.shape:
                        moment[part] = 0
                    elif isinstance(moment, Tensor) and self.rows is None:  # the count of updates
                        moment.zero_()


@dataclass(frozen=True)
class Switch:
    """Another lesson for as long as a schedule is on. Of several that are on, the last counts.

    Attributes:
        lesson: of the same shape as the first.
        when: the steps at which it is taught.
    """

    lesson: Lesson
    when: When = always
