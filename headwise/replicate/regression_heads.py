"""In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head Softmax
Attention. He et al., 2025. arXiv:2503.12734

Row s094 of the mission. One layer with 1, 2 and 4 heads on the same prompts. The paper's errors were read off a figure
of its authors; the exact errors of both kinds of gradient descent stand beside them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from headwise.data import LinearRegression
from headwise.lab import RegressionHeads
from headwise.lab.regression_heads import circuits
from headwise.replicate import Outcome, Replication, settle
from headwise.replicate.runs import answers
from headwise.training import Run

# Squared errors of the paper: length: {predictor: error}.
PAPER = {
    10: {"1 head": 0.875, "2 heads": 0.604, "debiased": 0.614, "Bayes": 0.194},
    40: {"1 head": 0.405, "2 heads": 0.243, "4 heads": 0.243, "debiased": 0.243, "Bayes": 0.115},
    100: {"1 head": 0.284, "2 heads": 0.164, "debiased": 0.163, "Bayes": 0.104},
}


@dataclass(frozen=True)
class RegressionHeadsReplication(Replication):
    """Reads the trained weights, and compares errors and predictions with gradient descent at three lengths."""

    row: ClassVar[str] = "s094"
    claim: ClassVar[str] = (
        "Heads of attention trained on linear regression pair up, with diagonal KQ and OV that add up to zero, to "
        "debiased gradient descent."
    )
    paper: ClassVar[str] = "squared error at 40 examples 0.405, 0.243, 0.243 for 1, 2, 4 heads; 0.164 at 100 for 2"
    changed: ClassVar[str] = (
        "with 5,000 steps what is not an even diagonal of four heads held 0.14 of the energy of KQ, all others "
        "were met; then 20,000 steps for four heads. Thresholds are as they were."
    )

    prompts: ClassVar[int] = 40_000
    near: ClassVar[float] = 0.03
    most_uneven: ClassVar[float] = 0.05
    most_sum: ClassVar[float] = 0.05
    least_cosine: ClassVar[float] = 0.98

    def run(self, seed: int = 0) -> Outcome:
        """One run for each number of heads."""
        found = RegressionHeads(full=self.full).run(seeds=(seed + 5,))
        runs = {name: next(iter(by.values())) for name, by in found.runs.items()}
        errors, alike, linear = {}, {}, {}
        for length in PAPER:
            lesson = LinearRegression(length=length)
            batch = lesson.make(n=self.prompts, seed=seed + 1000 + length)
            known, answer = lesson.predict(batch), batch.answer[:, 0]
            rows = {name: answers(run.model, batch)[:, 0, 0] for name, run in runs.items()}
            alike[length] = {
                name: float(torch.cosine_similarity(row, known["debiased gradient descent"], 0))
                for name, row in rows.items()
            }
            errors[length] = {name: float((row - answer).square().mean()) for name, row in {**rows, **known}.items()}
            # Linear attention has no softmax to divide by: its step stays that of the length it was trained at.
            step = length / RegressionHeads().length * LinearRegression().steps[0] / lesson.steps[0]
            linear[length] = float((step * known["gradient descent"] - answer).square().mean())
        return self._judge(runs, errors, alike, linear)

    def _judge(self, runs: dict[str, Run], errors: dict, alike: dict, linear: dict) -> Outcome:
        weights = {name: circuits(run.model) for name, run in runs.items()}
        many = ("2 heads", "4 heads")

        def close(length: int, name: str) -> bool:
            return abs(errors[length][name] / PAPER[length][name] - 1) <= self.near

        debiased = {length: LinearRegression(length=length).lines()["debiased gradient descent"] for length in PAPER}
        checks = {
            f"with 2 and 4 heads the error at 40 examples is within {self.near:.0%} of the paper's": all(
                close(40, name) for name in many
            ),
            f"and of exact debiased gradient descent ({debiased[40]:.4f})": all(
                abs(errors[40][name] / debiased[40] - 1) <= self.near for name in many
            ),
            f"with 1 head it is within {self.near:.0%} of the paper's": close(40, "1 head"),
            f"ridge is within {self.near:.0%} of the paper's": abs(errors[40]["Bayes"] / PAPER[40]["Bayes"] - 1)
            <= self.near,
            f"what is not an even diagonal holds at most {self.most_uneven} of the energy of KQ": all(
                weights[name].uneven <= self.most_uneven for name in many
            ),
            f"OV of y adds up to at most {self.most_sum} of its largest, and OV of x stays below that": all(
                max(weights[name].sum, weights[name].leak) <= self.most_sum for name in many
            ),
            f"predictions have a cosine of at least {self.least_cosine} with debiased gradient descent": all(
                alike[40][name] >= self.least_cosine for name in many
            ),
            f"at 100 examples the error of 2 heads is within {self.near:.0%} of the paper's": close(100, "2 heads"),
            "at 100 examples softmax attention has become better, linear attention worse": errors[100]["2 heads"]
            < errors[40]["2 heads"]
            and linear[100] > linear[40],
        }
        at, chance = errors[40], LinearRegression().lines()["chance"]
        pair, four = (weights[name] for name in many)
        measured = (
            f"squared error at 40 examples {at['1 head']:.3f}, {at['2 heads']:.4f}, {at['4 heads']:.4f} for 1, 2, 4 "
            f"heads; {errors[100]['2 heads']:.4f} at 100 for 2. KQ of 2 heads "
            f"{', '.join(f'{v:+.3f}' for v in pair.omega.tolist())}, OV "
            f"{', '.join(f'{v:+.2f}' for v in pair.mu.tolist())}; with 2 and 4 heads what is not "
            f"an even diagonal holds {pair.uneven:.1e} and {four.uneven:.1e} of the energy of KQ, and OV adds up to "
            f"{pair.sum:.1e} and {four.sum:.1e} of its largest"
        )
        baseline = (
            f"debiased gradient descent {debiased[40]:.4f} and {debiased[100]:.4f}, ridge {at['Bayes']:.4f}; linear "
            f"attention {linear[40]:.3f} at 40 and {linear[100]:.3f} at 100; always 0: {chance:.1f}"
        )
        numbers = {
            "errors": errors,
            "cosine": alike,
            "linear attention": linear,
            "weights": {
                name: {
                    "omega": one.omega.tolist(),
                    "mu": one.mu.tolist(),
                    "uneven": one.uneven,
                    "sum": one.sum,
                    "leak": one.leak,
                }
                for name, one in weights.items()
            },
            "steps": {name: run.step for name, run in runs.items()},
        }
        return settle(measured, baseline, checks, numbers)
