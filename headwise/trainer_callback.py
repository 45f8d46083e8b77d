"""The edits and resets of the lab in a Hugging Face `Trainer`, on the same schedules.

trainer = Trainer(model, args, train_dataset=..., callbacks=[EditCallback([Edit("L1.z", 0.0, when=steps(0, 900))])])
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from headwise.edits import Edit, Scene, holding
from headwise.lesson import generator
from headwise.resets import Reset
from headwise.tape import Tape


class EditCallback(TrainerCallback):
    """Holds edits and makes resets while a `Trainer` trains; evaluation runs without them.

    A Trainer tells its callbacks nothing when a step raises: what was held then stays held until it trains again.

    Attributes:
        tape: what the Trainer logged: "loss" on "train", "eval_loss" as "loss" on "eval"; `after` reads it.

    Args:
        changes: `Edit` and `Reset` objects, each on its schedule `when`, in steps of the optimiser.
        seed: of fresh values.

    Raises:
        ValueError: something else is among the changes, such as a `Switch`: the Trainer has its data by itself.
    """

    def __init__(self, changes: "Sequence[Edit | Reset]", seed: int = 0) -> None:
        for one in changes:
            if not isinstance(one, (Edit, Reset)):
                raise ValueError(f"A Trainer can be given Edit and Reset, not {type(one).__name__}.")
        self.edits = [one for one in changes if isinstance(one, Edit)]
        self.resets = [one for one in changes if isinstance(one, Reset)]
        self.seed, self.tape = seed, Tape()
        self._spreads: dict[str, tuple[float, float]] = {}
        self._stack = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module = None, **kwargs: Any) -> None:
        """Remember how the parameters are spread that will be drawn anew; let go of what a stopped training held."""
        self._stack.close()
        for reset in self.resets:
            self._spreads |= reset.spreads(model)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Draw anew what is due, and hold what is on."""
        step = state.global_step
        inner = getattr(optimizer, "optimizer", optimizer)
        draw = generator(self.seed, 3, step)
        for reset in self.resets:
            if reset.when.on(step, self.tape):
                reset.apply(model, inner, self._spreads, draw)
        active = [one for one in self.edits if one.when.on(step, self.tape)]
        if active:
            self._stack.enter_context(holding(model, active, Scene(step=step)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go."""
        self._stack.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Note what the Trainer measured."""
        for name, value in (logs or {}).items():
            if isinstance(value, (int, float, Tensor)):
                split = "eval" if name.startswith("eval_") else "train"
                self.tape.add(state.global_step, name.removeprefix("eval_"), split, "", float(value))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go."""
        self._stack.close()
