"""Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven Priors. Amos et al., 2023.
arXiv:2310.02980

Row s027 of the mission. Causal denoising, which is foretelling the next token; in place of state space models stands
the gated recurrence of HGRN2 (arXiv:2404.07904). A model from scratch has as many updates as the other has in all.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from headwise.comparison import Condition
from headwise.data import ListOps, PixelSequences
from headwise.experiment import Experiment
from headwise.resets import Switch
from headwise.schedule import steps
from headwise.tiny import TinyConfig
from headwise.training import Training

MIXERS = {"attention": None, "recurrence": {"name": "attention.hgrn2"}}


@dataclass(frozen=True)
class SelfPretraining(Experiment):
    """Teaches two tasks to two kinds of models, at once, or after foretelling the tasks' own inputs.

    Fields:
        before: updates on the inputs; `after`: updates on the answers that follow them.
    """

    row: ClassVar[str] = "s027"
    goal: ClassVar[tuple[str, str, float]] = ("loss", "below", 1.0)

    before: int = 350
    after: int = 250

    def conditions(self) -> dict[str, Condition]:
        """Names: "pixels, attention, scratch", "pixels, attention, pretrained" and so on."""
        before, later = (20_000, 10_000) if self.full else (self.before, self.after)
        training = Training(steps=before + later, batch=32, lr=3e-3, warmup=20, clip=1.0, measure_every=100, rows=500)
        found = {}
        for task, lesson in (("pixels", PixelSequences()), ("list operations", ListOps())):
            switch = Switch(replace(lesson, due="inputs"), steps(0, before))
            for mixer, named in MIXERS.items():
                shape = {"heads": 2, "width": 32, "mlp": 64, "pos": "learned"}
                config = TinyConfig(**lesson.config(**shape), mixer=named)
                found[f"{task}, {mixer}, scratch"] = Condition(config, lesson, training)
                found[f"{task}, {mixer}, pretrained"] = Condition(config, lesson, training, [switch])
        return found
